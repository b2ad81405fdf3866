"""Context Encoders: Feature Learning by Inpainting. Pathak, Krahenbuhl, Donahue, Darrell, Efros. CVPR 2016.

The centre-region network of the released code: it sees a window whose middle is blanked, and gives the window's
centre half. Images are in [-1,1] inside. `overlap`, `fill` and the learning rates name what paper and code differ in.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Batch, Completion, Losses, Model, Phase
from models.layers import init_normal_, scaled
from models.losses import gan_fake, gan_generator, gan_real, masked_l2
from models.window import Window, box, resampler

FILLS = {"paper": (123.0, 117.0, 104.0), "released": (117.0, 104.0, 123.0)}


@dataclass(frozen=True)
class ContextEncoderOptions:
    size: int = 128
    """The training window in pixels: a power of two, at least 32. The output is its centre half."""
    width: float = 1.0
    """Scales every channel count, the bottleneck too; 1 is the paper's."""
    bottleneck: int = 4000
    overlap: int = 7
    """Pixels of known context that the output repeats on each side, at 128 px (paper 7, released 4)."""
    overlap_weight: float = 10.0
    fill: str = "paper"
    """Colour of the blanked square: the ImageNet mean, or "released": the same in the code's channel order."""
    lambda_rec: float = 0.999
    lambda_adv: float = 0.001
    """0: reconstruction only, no discriminator is trained."""
    lr_generator: float = 2e-3
    lr_discriminator: float = 2e-4

    def __post_init__(self) -> None:
        if self.size < 32 or self.size & (self.size - 1):
            raise ValueError(f"context_encoder size {self.size} is not a power of two of at least 32")
        if self.fill not in FILLS:
            raise ValueError(f"context_encoder fill {self.fill!r} is neither of {', '.join(FILLS)}")
        if self.width <= 0 or self.bottleneck < 1:
            raise ValueError("context_encoder width and bottleneck must be positive")
        if not 0 <= self.overlap <= 24:
            raise ValueError(f"context_encoder overlap {self.overlap} is not in 0..24 (pixels at 128 px)")


def _widths(levels: int, width: float) -> list[int]:
    """Channels after each stride-2 level: 64 ... 64, 128, 256, 512; small windows drop the first ones."""
    return [scaled(c, width) for c in ([64] * levels + [128, 256, 512])[-levels:]]


class ToPoint(nn.Conv2d):
    """Convolution over a whole 4x4 map, [B,c_in,4,4] -> [B,c_out,1,1], as the matrix product that it is: on CPUs
    several times faster, and these are nearly all of the network's weights."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1))[:, :, None, None]


class FromPoint(nn.ConvTranspose2d):
    """The way back, [B,c_in,1,1] -> [B,c_out,4,4]."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 4, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return (x.flatten(1) @ self.weight.flatten(1)).view(-1, self.out_channels, 4, 4)


def _down(c_in: int, c_out: int, norm: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)
    return [conv, *([nn.BatchNorm2d(c_out)] if norm else []), nn.LeakyReLU(0.2, inplace=True)]


def _up(c_in: int, c_out: int) -> list[nn.Module]:
    conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class Generator(nn.Sequential):
    """[B,3,S,S] -> [B,3,S/2,S/2], both in [-1,1]; S = 128 has the paper's layers. `whole`: with one up-convolution
    more, [B,3,S,S]."""

    def __init__(self, size: int, width: float, bottleneck: int, whole: bool = False) -> None:
        levels = size.bit_length() - 3  # stride-2 convolutions from S to 4
        down = _widths(levels, width)
        up = _widths(levels if whole else levels - 1, width)[::-1]
        n = scaled(bottleneck, width)
        layers = _down(3, down[0], norm=False)  # S/2
        for c_in, c_out in pairwise(down):
            layers += _down(c_in, c_out)  # S/4 ... 4
        layers += [ToPoint(down[-1], n), nn.BatchNorm2d(n), nn.LeakyReLU(0.2, inplace=True)]  # 1
        layers += [FromPoint(n, up[0]), nn.BatchNorm2d(up[0]), nn.ReLU(inplace=True)]  # 4
        for c_in, c_out in pairwise(up):
            layers += _up(c_in, c_out)  # 8 ... S/4
        layers += [nn.ConvTranspose2d(up[-1], 3, 4, 2, 1, bias=False), nn.Tanh()]  # S/2
        super().__init__(*layers)
        init_normal_(self)


class Discriminator(nn.Sequential):
    """[B,3,S/2,S/2] in [-1,1] -> logits [B,1,1,1]; it sees the centre only, not its context."""

    def __init__(self, size: int, width: float) -> None:
        down = _widths(size.bit_length() - 4, width)
        layers = _down(3, down[0], norm=False)  # S/4
        for c_in, c_out in pairwise(down):
            layers += _down(c_in, c_out)  # S/8 ... 4
        super().__init__(*layers, ToPoint(down[-1], 1))  # 1
        init_normal_(self)


class ContextEncoder(Model):
    """Trains on the centre of `size` x `size` crops (the batch's masks are not used); completes any hole whose
    box is at most half as long as the photograph's shorter side. On CPUs batch norm has each rank's own statistics of
    its part of the batch."""

    name: ClassVar[str] = "context_encoder"
    Options: ClassVar[type] = ContextEncoderOptions
    options: ContextEncoderOptions

    def __init__(self, options: ContextEncoderOptions) -> None:
        super().__init__(options)
        s = options.size
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(s, options.width, options.bottleneck),
                "discriminator": Discriminator(s, options.width),
            }
        )
        adversarial = options.lambda_adv > 0
        lr = {"generator": options.lr_generator, "discriminator": options.lr_discriminator}
        self.phases = (
            Phase(
                "train",
                steps=116_000,  # 500 epochs of Paris StreetView's 14,900 photographs in batches of 64
                generators=("generator",),
                discriminators=("discriminator",) if adversarial else (),
                lr=lr if adversarial else {"generator": options.lr_generator},
                betas=(0.5, 0.999),
            ),
        )
        self.overlap = round(options.overlap * s / 128)
        self.window = Window(s, self.overlap, FILLS[options.fill])

    def centre(self, x: Tensor) -> Tensor:
        """The block that the generator gives: [B,C,S,S] -> [B,C,S/2,S/2]."""
        a, b = self.options.size // 4, 3 * self.options.size // 4
        return x[:, :, a:b, a:b]

    def overlap_map(self) -> Tensor:
        """Weight of each output pixel in L_rec [S/2,S/2]: 10 where the context is known, 1 in the blanked square."""
        half, o = self.options.size // 2, self.overlap
        weight = torch.full((half, half), self.options.overlap_weight)
        weight[o : half - o, o : half - o] = 1.0
        return weight

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        image: Tensor = batch["image"]
        s = self.options.size
        if image.shape[2:] != (s, s):
            raise ValueError(
                f"context_encoder of size {s} trains on {s}x{s} px, not {tuple(image.shape[2:])}"
            )
        if len(image) < 2 and self.networks["generator"].training:
            raise ValueError(
                "context_encoder needs a batch of at least 2 on each rank (batch norm of a 1x1 map)"
            )
        return {"centre": self.networks["generator"](self.window.blank(image * 2 - 1))}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        d, truth = self.networks["discriminator"], self.centre(batch["image"]) * 2 - 1
        return {"discriminator": gan_real(d(truth)) + gan_fake(d(out["centre"].detach()))}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        truth = self.centre(batch["image"]) * 2 - 1
        losses = {"rec": masked_l2(out["centre"], truth, self.overlap_map().to(truth))}
        if phase.discriminators:
            losses["adv"] = gan_generator(self.networks["discriminator"](out["centre"]))
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        rec = {"rec": self.options.lambda_rec}
        return {**rec, "adv": self.options.lambda_adv, "discriminator": 1.0} if phase.discriminators else rec

    def check_hole(self, mask: Tensor) -> None:
        """A window twice the hole's box must be no larger than the photograph."""
        top, bottom, left, right = box(mask > 0.5)
        height, width = mask.shape[2:]
        most = min(height, width) // 2
        for h, w in torch.stack([bottom - top, right - left], dim=1).tolist():
            if max(h, w) > most:
                raise ValueError(
                    f"context_encoder cannot fill a hole of {w}x{h} px in a photograph of {width}x{height} px: it "
                    f"needs a window of twice its size around it, so a hole may be at most {most} px"
                )

    def _completion(self) -> Completion:
        return ContextCompletion(self.networks["generator"], self.window)


class ContextCompletion(Completion):
    """All of a photograph's holes are one hole, their common box. Near a border the window leaves the photograph,
    whose last pixels are repeated there. Known pixels beside the hole in the blanked square are not seen, as in
    training."""

    def __init__(self, generator: nn.Module, window: Window) -> None:
        super().__init__()
        self.generator = generator
        self.window = window

    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width, s = image.shape[2], image.shape[3], self.window.size
        top, left, side = (t.to(image.dtype) for t in self.window.place(hole))
        scale = side / s
        rows = resampler(top, scale, s, height)[:, None]  # [B,1,S,H]
        columns = resampler(left, scale, s, width)[:, None].transpose(2, 3)  # [B,1,W,S]
        seen = rows @ image @ columns  # [B,3,S,S]
        touched = (rows @ hole.to(image.dtype) @ columns) > 0
        centre = self.generator(self.window.blank(seen * 2 - 1, touched))  # [B,3,S/2,S/2]
        # the photograph's pixels in the output block, whose first pixel is a quarter of the window in
        rows = resampler(-top / scale - s / 4, 1 / scale, height, s // 2)[:, None]  # [B,1,H,S/2]
        columns = resampler(-left / scale - s / 4, 1 / scale, width, s // 2)[:, None].transpose(2, 3)
        return (rows @ centre @ columns + 1) / 2
