"""Context Encoders: Feature Learning by Inpainting. Pathak, Krahenbuhl, Donahue, Darrell, Efros. CVPR 2016.

The centre-region network of the released code: its input is a window with a blanked centre, its output the window's
centre half. Images are in [-1,1] inside. Where paper and code differ, the options `overlap`, `fill_color` and the learning
rates choose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Batch, Completion, Losses, Model, Phase, SmallConfig
from models.checkpoint_layout import CheckpointLayout, NetworkLayout, OptionValues, StateDict
from models.hole_crop import ContextWindow, bounding_box, resampling_matrix
from models.layers import init_normal_, scale_channels
from models.losses import gan_fake, gan_generator, gan_real, masked_l2

FILL_COLORS = {"paper": (123.0, 117.0, 104.0), "released": (117.0, 104.0, 123.0)}


@dataclass(frozen=True)
class ContextEncoderOptions:
    size: int = 128
    """Side of the training window in pixels: a power of two, at least 32. The output is its centre half."""
    width: float = 1.0
    """Scales all channel counts, also the bottleneck; 1 is the paper's."""
    bottleneck: int = 4000
    """Channels of the bottleneck at width 1."""
    overlap: int = 7
    """Overlap of the output with the known context on each side, in pixels at 128 px (paper 7, released 4)."""
    overlap_weight: float = 10.0
    """Factor on the reconstruction loss in the overlap."""
    fill_color: str = "paper"
    """Colour of the blanked square: the ImageNet mean, or "released": the mean in the released code's channel order."""
    lambda_rec: float = 0.999
    """Weight of the l2 reconstruction loss."""
    lambda_adv: float = 0.001
    """0: reconstruction loss only, without a discriminator."""
    lr_generator: float = 2e-3
    """Learning rate of the encoder and decoder."""
    lr_discriminator: float = 2e-4
    """Learning rate of the discriminator."""

    def __post_init__(self) -> None:
        if self.size < 32 or self.size & (self.size - 1):
            raise ValueError(f"context_encoder size {self.size} is not a power of two of at least 32")
        if self.fill_color not in FILL_COLORS:
            raise ValueError(
                f"context_encoder fill_color {self.fill_color!r} is none of {', '.join(FILL_COLORS)}"
            )
        if self.width <= 0 or self.bottleneck < 1:
            raise ValueError("context_encoder width and bottleneck must be positive")
        if not 0 <= self.overlap <= 24:
            raise ValueError(f"context_encoder overlap {self.overlap} is not in 0..24 (pixels at 128 px)")


def _channel_counts(levels: int, width: float) -> list[int]:
    """Channels after each stride-2 level: 64 ... 64, 128, 256, 512; small windows omit the first ones."""
    return [scale_channels(c, width) for c in ([64] * levels + [128, 256, 512])[-levels:]]


class FullMapConv2d(nn.Conv2d):
    """Convolution over a full 4x4 map, [B,c_in,4,4] -> [B,c_out,1,1], computed as a matrix product: several times faster
    on CPUs. Nearly all of the network's weights are in these layers."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1))[:, :, None, None]


class FullMapConvTranspose2d(nn.ConvTranspose2d):
    """Its transpose, [B,c_in,1,1] -> [B,c_out,4,4]."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 4, bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return (x.flatten(1) @ self.weight.flatten(1)).view(-1, self.out_channels, 4, 4)


def _down_block(c_in: int, c_out: int, norm: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)
    return [conv, *([nn.BatchNorm2d(c_out)] if norm else []), nn.LeakyReLU(0.2, inplace=True)]


def _up_block(c_in: int, c_out: int) -> list[nn.Module]:
    conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class Generator(nn.Sequential):
    """[B,3,S,S] -> [B,3,S/2,S/2], both in [-1,1]; S = 128 has the paper's layers.

    full_window: with one more up-convolution, [B,3,S,S] -> [B,3,S,S].
    """

    def __init__(self, size: int, width: float, bottleneck: int, full_window: bool = False) -> None:
        levels = size.bit_length() - 3  # stride-2 convolutions from S to 4
        down = _channel_counts(levels, width)
        up = _channel_counts(levels if full_window else levels - 1, width)[::-1]
        n = scale_channels(bottleneck, width)
        layers = _down_block(3, down[0], norm=False)  # S/2
        for c_in, c_out in pairwise(down):
            layers += _down_block(c_in, c_out)  # S/4 ... 4
        layers += [FullMapConv2d(down[-1], n), nn.BatchNorm2d(n), nn.LeakyReLU(0.2, inplace=True)]  # 1
        layers += [FullMapConvTranspose2d(n, up[0]), nn.BatchNorm2d(up[0]), nn.ReLU(inplace=True)]  # 4
        for c_in, c_out in pairwise(up):
            layers += _up_block(c_in, c_out)  # 8 ... S/4
        layers += [nn.ConvTranspose2d(up[-1], 3, 4, 2, 1, bias=False), nn.Tanh()]  # S/2
        super().__init__(*layers)
        init_normal_(self)


class Discriminator(nn.Sequential):
    """The centre [B,3,S/2,S/2] in [-1,1], without its context -> logits [B,1,1,1]."""

    def __init__(self, size: int, width: float) -> None:
        down = _channel_counts(size.bit_length() - 4, width)
        layers = _down_block(3, down[0], norm=False)  # S/4
        for c_in, c_out in pairwise(down):
            layers += _down_block(c_in, c_out)  # S/8 ... 4
        super().__init__(*layers, FullMapConv2d(down[-1], 1))  # 1
        init_normal_(self)


# -- public checkpoints ---------------------------------------------------------------------------------------


def _public_module_names(
    options: OptionValues, encoder_prefix: str, decoder_prefix: str, is_single_sequential: bool = False
) -> list[str]:
    """Prefixes of the public nn.Sequential of encoder and decoder, or of the single one that holds both."""
    levels = options["size"].bit_length() - 3  # stride-2 layers, the first without norm
    encoder = [0, *(i for n in range(levels) for i in (3 * n + 2, 3 * n + 3))]
    decoder = [*(i for n in range(levels - 1) for i in (3 * n, 3 * n + 1)), 3 * (levels - 1)]
    start = 3 * levels + 2 if is_single_sequential else 0
    return [*(f"{encoder_prefix}.{i}" for i in encoder), *(f"{decoder_prefix}.{start + i}" for i in decoder)]


def _public_conv_weights(state: StateDict) -> list[Tensor]:
    """The weights of all convolutions, in order."""
    matches = (re.fullmatch(r"main(_encode|_decode)?\.(\d+)\.weight(_orig)?", key) for key in state)
    convs = [match for match in matches if match and state[match[0]].ndim == 4]
    return [state[match[0]] for match in sorted(convs, key=lambda m: (m[1] == "_decode", int(m[2])))]


def _read_public_options(states: dict[str, StateDict], config: Mapping[str, Any]) -> OptionValues:
    convs = _public_conv_weights(states["generator"])
    levels = (len(convs) - 1) // 2  # the encoder has one more convolution, the decoder as many as levels
    if levels < 3:  # missing tensors are reported later, when keys are compared
        return {"overlap": 4, "fill_color": "released"}
    width = convs[0].shape[0] / 64
    return {
        "size": 2 ** min(levels + 2, 16),
        "width": width,
        "bottleneck": max(1, round(convs[levels].shape[0] / width)),
        "overlap": 4,
        "fill_color": "released",
    }


def _is_generator(state: StateDict) -> bool:
    """Whether a single nn.Sequential is the generator's: the discriminator's first layers are the same, but it ends in
    one channel."""
    convs = _public_conv_weights(state)
    return convs[-1].shape[1] == convs[0].shape[1]  # a transposed convolution's is [c_in,c_out,k,k]


LAYOUT = CheckpointLayout(
    source="BoyuanJiang/context_encoder_pytorch",
    license_name="MIT",
    network_layouts=(
        NetworkLayout(
            "generator",
            "netG_*.pth",
            r"main\.0\.weight",
            lambda options: _public_module_names(options, "main", "main", is_single_sequential=True),
            accepts=_is_generator,
        ),
        NetworkLayout(  # of a pull request that was never merged
            "generator",
            "netG_*.pth",
            r"main_encode\.0\.weight",
            lambda options: _public_module_names(options, "main_encode", "main_decode"),
        ),
    ),
    read_options=_read_public_options,
    read_image_size=lambda options, config: options["size"],
    notes=lambda options: (
        "as in the port, an overlap of 4 pixels and the released code's fill colour (--set overlap=7, "
        "--set fill_color=paper for the paper's)",
    ),
    discriminator_pattern=r"main\.0\.weight",
)


class ContextEncoder(Model):
    """Trains on the centres of `size` x `size` crops (the batch's masks are not used); completes holes whose bounding
    box is at most half the photograph's shorter side. On CPUs each rank's batch norm uses the statistics of its own
    part of the batch."""

    name: ClassVar[str] = "context_encoder"
    Options: ClassVar[type] = ContextEncoderOptions
    small_config: ClassVar[SmallConfig] = SmallConfig(
        {"size": 32, "width": 0.125},
        image_size=32,
        overfit_steps={"train": 100},
        overfit_options={"overlap": 0},
    )
    checkpoint_layout: ClassVar[CheckpointLayout] = LAYOUT
    resamples_hole: ClassVar[bool] = True
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
        self.overlap_px = round(options.overlap * s / 128)
        self.window = ContextWindow(s, self.overlap_px, FILL_COLORS[options.fill_color])

    def crop_center(self, x: Tensor) -> Tensor:
        """The generator's output block: [B,C,S,S] -> [B,C,S/2,S/2]."""
        start, end = self.options.size // 4, 3 * self.options.size // 4
        return x[:, :, start:end, start:end]

    def overlap_weights(self) -> Tensor:
        """Weight of each output pixel in L_rec [S/2,S/2]: 10 in the overlap with the context, 1 in the blanked square."""
        half, o = self.options.size // 2, self.overlap_px
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
        return {"centre": self.networks["generator"](self.window.blank_center(image * 2 - 1))}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        d, truth = self.networks["discriminator"], self.crop_center(batch["image"]) * 2 - 1
        return {"discriminator": gan_real(d(truth)) + gan_fake(d(out["centre"].detach()))}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        truth = self.crop_center(batch["image"]) * 2 - 1
        losses = {"rec": masked_l2(out["centre"], truth, self.overlap_weights().to(truth))}
        if phase.discriminators:
            losses["adv"] = gan_generator(self.networks["discriminator"](out["centre"]))
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        rec = {"rec": self.options.lambda_rec}
        return {**rec, "adv": self.options.lambda_adv, "discriminator": 1.0} if phase.discriminators else rec

    def check_hole(self, mask: Tensor) -> None:
        """The window has twice the side of the hole's bounding box, and must not be larger than the photograph."""
        top, bottom, left, right = bounding_box(mask > 0.5)
        height, width = mask.shape[2:]
        max_side = min(height, width) // 2
        for h, w in torch.stack([bottom - top, right - left], dim=1).tolist():
            if max(h, w) > max_side:
                raise ValueError(
                    f"context_encoder cannot fill a hole of {w}x{h} px in a photograph of {width}x{height} px: it "
                    f"needs a window of twice its size around it, so a hole may be at most {max_side} px"
                )

    def _build_completion(self) -> Completion:
        return ContextCompletion(self.networks["generator"], self.window)


class ContextCompletion(Completion):
    """Treats all holes of a photograph as one, their common bounding box. Near the border the window extends beyond the
    photograph, whose last pixels are repeated there. Known pixels beside the hole in the blanked square are not seen,
    as in training."""

    def __init__(self, generator: nn.Module, window: ContextWindow) -> None:
        super().__init__()
        self.generator = generator
        self.window = window

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width, s = image.shape[2], image.shape[3], self.window.size
        top, left, side = (t.to(image.dtype) for t in self.window.locate(hole))
        scale = side / s
        rows = resampling_matrix(top, scale, s, height)[:, None]  # [B,1,S,H]
        columns = resampling_matrix(left, scale, s, width)[:, None].transpose(2, 3)  # [B,1,W,S]
        context = rows @ image @ columns  # [B,3,S,S]
        touches_hole = (rows @ hole.to(image.dtype) @ columns) > 0
        centre = self.generator(self.window.blank_center(context * 2 - 1, touches_hole))  # [B,3,S/2,S/2]
        # back to the photograph's pixels; the output block begins a quarter of the window from its border
        rows = resampling_matrix(-top / scale - s / 4, 1 / scale, height, s // 2)[:, None]  # [B,1,H,S/2]
        columns = resampling_matrix(-left / scale - s / 4, 1 / scale, width, s // 2)[:, None].transpose(2, 3)
        return (rows @ centre @ columns + 1) / 2
