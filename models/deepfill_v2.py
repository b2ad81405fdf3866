"""DeepFill v2: Free-Form Image Inpainting with Gated Convolution. Yu, Lin, Yang, Shen, Lu, Huang. ICCV 2019.

A coarse network fills the hole, a second one refines it with contextual attention, both of gated convolutions; the
critic is a spectral-normalised PatchGAN. Images are in [-1,1] inside. Widths and weights are the released code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.attention import ContextualAttention
from models.base import Batch, Completion, Losses, Model, Phase
from models.layers import GatedConv2d, crop_to, init_glorot_, pad_to_multiple, scaled, spectral_
from models.losses import gan_fake, gan_generator, gan_real

# What papers.md 2.2 and the released code differ in: how patches that touch the hole are left out, and by what the
# overlap of pasted patches is divided.
ATTENTION: dict[str, dict[str, Any]] = {
    "exact": {"masking": "exact", "overlap": "exact", "fuse": 3},
    "released": {"masking": "released", "overlap": "released", "fuse": 3},
}


@dataclass(frozen=True)
class DeepFillV2Options:
    width: float = 1.0
    """Scales every channel count; 1 is the paper's."""
    guided: bool = False
    """Whether a person's sketch is one more input: the batch's edges inside the hole, the only ones it sees."""
    attention: str = "exact"
    """exact: weights sum to 1 and patches are averaged by their true overlap; released: as the code does both."""
    lambda_adv: float = 1.0
    """0: reconstruction only, no discriminator is trained."""
    lambda_l1: float = 1.0
    """Of the coarse and of the refined output alike."""
    lr: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.999

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError("deepfill_v2 width must be positive")
        if self.attention not in ATTENTION:
            raise ValueError(f"deepfill_v2 attention {self.attention!r} is none of {', '.join(ATTENTION)}")
        for name in ("lambda_adv", "lambda_l1"):
            if getattr(self, name) < 0:
                raise ValueError(f"deepfill_v2 {name} must not be negative")
        if self.lr <= 0:
            raise ValueError("deepfill_v2 lr must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"deepfill_v2 {name} must be in [0,1)")


# -- generator: channel counts are those behind the gate, half of what the convolutions compute --------------------


def _widths(width: float) -> tuple[int, int, int]:
    """Channels at H, H/2 and H/4: the code's cnum 48, of which the gate leaves half."""
    return scaled(24, width), scaled(48, width), scaled(96, width)


def _dilated(c: int) -> list[nn.Module]:
    return [GatedConv2d(c, c, dilation=d) for d in (2, 4, 8, 16)]


def _out(width: float) -> list[nn.Module]:
    """From H/4 to the image: two gated convolutions at each doubled size, and a plain one with tanh."""
    c1, c2, c4 = _widths(width)
    half = scaled(12, width)
    return [
        *[nn.Upsample(scale_factor=2), GatedConv2d(c4, c2), GatedConv2d(c2, c2)],  # H/2
        *[nn.Upsample(scale_factor=2), GatedConv2d(c2, c1), GatedConv2d(c1, half)],  # H
        *[nn.Conv2d(half, 3, 3, padding=1), nn.Tanh()],
    ]


class Coarse(nn.Sequential):
    """Stage 1: [B,c_in,H,W] -> [B,3,H,W] in [-1,1]; H, W multiples of 4."""

    def __init__(self, c_in: int, width: float) -> None:
        c1, c2, c4 = _widths(width)
        super().__init__(
            GatedConv2d(c_in, c1, 5),
            *[GatedConv2d(c1, c2, stride=2), GatedConv2d(c2, c2)],  # H/2
            *[GatedConv2d(c2, c4, stride=2), GatedConv2d(c4, c4), GatedConv2d(c4, c4)],  # H/4
            *_dilated(c4),
            *[GatedConv2d(c4, c4), GatedConv2d(c4, c4)],
            *_out(width),
        )


class Refinement(nn.Module):
    """Stage 2: the composite of stage 1 [B,3,H,W] and the mask [B,1,H,W] -> [B,3,H,W] in [-1,1]; H, W multiples of 8.

    The mask goes to the attention alone.
    """

    def __init__(self, width: float, attention: str) -> None:
        super().__init__()
        c1, c2, c4 = _widths(width)
        self.hallucination = nn.Sequential(
            GatedConv2d(3, c1, 5),
            *[GatedConv2d(c1, c1, stride=2), GatedConv2d(c1, c2)],  # H/2
            *[GatedConv2d(c2, c2, stride=2), GatedConv2d(c2, c4), GatedConv2d(c4, c4)],  # H/4
            *_dilated(c4),
        )
        self.before_attention = nn.Sequential(
            GatedConv2d(3, c1, 5),
            *[GatedConv2d(c1, c1, stride=2), GatedConv2d(c1, c2)],  # H/2
            *[GatedConv2d(c2, c4, stride=2), GatedConv2d(c4, c4)],  # H/4
            GatedConv2d(c4, c4, activation=F.relu),
        )
        self.attention = ContextualAttention(**ATTENTION[attention])
        self.after_attention = nn.Sequential(GatedConv2d(c4, c4), GatedConv2d(c4, c4))
        self.merge = nn.Sequential(GatedConv2d(2 * c4, c4), GatedConv2d(c4, c4), *_out(width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = self.before_attention(x)
        attended = self.attention(features, features, F.interpolate(mask, scale_factor=0.25))  # nearest
        return self.merge(torch.cat([self.hallucination(x), self.after_attention(attended)], dim=1))


class Generator(nn.Module):
    """Both stages: image [B,3,H,W] in [-1,1] (its hole is not read), hole [B,1,H,W] bool and, when guided, sketch
    [B,1,H,W] (only its part in the hole is seen) -> their outputs [B,3,H,W] in [-1,1]; H, W multiples of 8."""

    def __init__(self, width: float = 1.0, guided: bool = False, attention: str = "exact") -> None:
        super().__init__()
        self.guided = guided
        self.coarse = Coarse(6 if guided else 5, width)
        self.refinement = Refinement(width, attention)
        init_glorot_(self)

    def forward(self, image: Tensor, hole: Tensor, sketch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mask = hole.to(image.dtype)
        x = [image.masked_fill(hole, 0.0)]
        if self.guided:
            assert sketch is not None
            x.append(sketch * mask)
        x1 = self.coarse(torch.cat([*x, torch.ones_like(mask), mask], dim=1))
        x2 = self.refinement(torch.where(hole, x1, image), mask)
        return x1, x2


# -- discriminator -------------------------------------------------------------------------------------------------


class Discriminator(nn.Sequential):
    """SN-PatchGAN: image in [-1,1], mask and, when guided, sketch [B,c_in,H,W] -> [B,256,H/64,W/64], rounded up: the
    hinge loss is taken over each element. Receptive field 253 px."""

    def __init__(self, c_in: int = 4, width: float = 1.0) -> None:
        c = [c_in, *(scaled(n, width) for n in (64, 128, 256, 256, 256, 256))]
        layers: list[nn.Module] = []
        for a, b in pairwise(c):
            layers += [nn.Conv2d(a, b, 5, 2, 2), nn.LeakyReLU(0.2, inplace=True)]  # behind the last one too
        super().__init__(*layers)
        init_glorot_(self)
        spectral_(self)


class DeepFillV2(Model):
    name: ClassVar[str] = "deepfill_v2"
    Options: ClassVar[type] = DeepFillV2Options
    multiple: ClassVar[int] = 8
    options: DeepFillV2Options

    def __init__(self, options: DeepFillV2Options) -> None:
        super().__init__(options)
        self.takes_edges = options.guided
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(options.width, options.guided, options.attention),
                "discriminator": Discriminator(5 if options.guided else 4, options.width),
            }
        )
        discriminators = ("discriminator",) if options.lambda_adv else ()
        self.phases = (
            Phase(
                "train",
                steps=1_000_000,  # the released v1's; v2's configuration has no end (max_iters 1e8)
                generators=("generator",),
                discriminators=discriminators,
                lr=dict.fromkeys(("generator", *discriminators), options.lr),
                betas=(options.beta1, options.beta2),
                uses_edges=options.guided,
            ),
        )

    # -- losses -----------------------------------------------------------------------------------------------

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """`coarse` and `refined` are the stages' outputs, `composite` has the photograph's own pixels outside the
        hole: all [B,3,H,W] in [-1,1]."""
        if self.options.guided and batch.get("edge") is None:
            raise ValueError("deepfill_v2 guided needs edges in the batch: the recipe's data has none")
        truth, hole = batch["image"] * 2 - 1, batch["mask"] > 0.5
        x1, x2 = self.networks["generator"](truth, hole, batch.get("edge"))
        return {"coarse": x1, "refined": x2, "composite": torch.where(hole, x2, truth)}

    def _judged(self, batch: Batch, image: Tensor) -> Tensor:
        """What the discriminator sees of a photograph or a composite: no channel of ones here."""
        sketch = [batch["edge"] * batch["mask"]] if self.options.guided else []
        return torch.cat([image, batch["mask"], *sketch], dim=1)

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        d, truth = self.networks["discriminator"], batch["image"] * 2 - 1
        with parametrize.cached():  # one power iteration for both
            on_real = d(self._judged(batch, truth))
            on_fake = d(self._judged(batch, out["composite"].detach()))
        return {"discriminator": (gan_real(on_real, "hinge") + gan_fake(on_fake, "hinge")) / 2}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        truth = batch["image"] * 2 - 1
        losses = {
            "l1_coarse": F.l1_loss(out["coarse"], truth),  # over the whole image, known pixels too
            "l1": F.l1_loss(out["refined"], truth),
        }
        if phase.discriminators:
            on_fake = self.networks["discriminator"](self._judged(batch, out["composite"]))
            losses["adv"] = gan_generator(on_fake, "hinge")
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        o = self.options
        weights = {"l1_coarse": o.lambda_l1, "l1": o.lambda_l1}
        return {**weights, "adv": o.lambda_adv, "discriminator": 1.0} if phase.discriminators else weights

    # -- completion -------------------------------------------------------------------------------------------

    def _completion(self) -> Completion:
        return GatedCompletion(self.networks["generator"])


class GatedCompletion(Completion):
    """Stage 2's output; edges inside the hole are the sketch of a guided model, without any there is none."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        # 8: the attention halves the features, which are at a quarter of the size
        image, hole, edge = (pad_to_multiple(x, 8) for x in (image, hole, edge))
        _, x2 = self.generator(image * 2 - 1, hole, edge)
        return crop_to((x2 + 1) / 2, height, width)
