"""DeepFill v2: Free-Form Image Inpainting with Gated Convolution. Yu, Lin, Yang, Shen, Lu, Huang. ICCV 2019.

A coarse network fills the hole, a second one refines it with contextual attention, both with gated convolutions; the
discriminator is a PatchGAN with spectral norm. Images are in [-1,1] inside. Channel counts and loss weights are the
released code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.attention import ContextualAttention, visualize_attention
from models.base import Batch, Completion, HardwareKind, Losses, Model, Phase, Precision, SmallConfig
from models.checkpoint_layout import (
    CheckpointLayout,
    NetworkLayout,
    OptionValues,
    StateDict,
    count_keys,
    dim_size,
    width_ratio,
)
from models.layers import (
    GatedConv2d,
    add_spectral_norm_,
    crop_to,
    init_glorot_,
    pad_to_multiple,
    scale_channels,
)
from models.losses import gan_fake, gan_generator, gan_real

# Differences between docs/papers.md 2.2 and the released code: how patches that touch the hole are excluded, the divisor
# of overlapping pasted patches, and the norm of patches.
ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"masking": "exact", "overlap": "exact", "fuse": 3},
    "released": {"masking": "released", "overlap": "released", "fuse": 3},
    "smooth": {"masking": "released", "overlap": "released", "fuse": 3, "norm": "smooth"},
}


@dataclass(frozen=True)
class DeepFillV2Options:
    width: float = 1.0
    """Scales all channel counts; 1 is the paper's."""
    guided: bool = False
    """Whether a user's sketch is a further input: the edges inside the hole; edges outside are not used."""
    attention: str = "exact"
    """exact: weights sum to 1 and patches are averaged over their true overlap; released: both as in the released code;
    smooth: as released, but patches of n numbers are divided by sqrt(|p|^2 + 1e-4 n), as in the first release of
    nipponjo/deepfillv2-pytorch."""
    lambda_adv: float = 1.0
    """0: reconstruction losses only, without a discriminator."""
    lambda_l1: float = 1.0
    """Weight of the l1 of the coarse and of the refined output."""
    lr: float = 1e-4
    """Learning rate of both networks."""
    beta1: float = 0.5
    """First beta of Adam."""
    beta2: float = 0.999
    """Second beta of Adam."""

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError("deepfill_v2 width must be positive")
        if self.attention not in ATTENTION_OPTIONS:
            raise ValueError(
                f"deepfill_v2 attention {self.attention!r} is none of {', '.join(ATTENTION_OPTIONS)}"
            )
        for name in ("lambda_adv", "lambda_l1"):
            if getattr(self, name) < 0:
                raise ValueError(f"deepfill_v2 {name} must not be negative")
        if self.lr <= 0:
            raise ValueError("deepfill_v2 lr must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"deepfill_v2 {name} must be in [0,1)")


# -- generator: channel counts are those after the gate, half of the convolution's output channels ------------------


def _channel_counts(width: float) -> tuple[int, int, int]:
    """Channels at H, H/2 and H/4: half of the code's cnum 48, doubled twice."""
    return scale_channels(24, width), scale_channels(48, width), scale_channels(96, width)


def _dilated_convs(c: int) -> list[nn.Module]:
    return [GatedConv2d(c, c, dilation=d) for d in (2, 4, 8, 16)]


def _decoder_layers(width: float) -> list[nn.Module]:
    """From H/4 up to the image: two gated convolutions per resolution, and a plain one with tanh."""
    c1, c2, c4 = _channel_counts(width)
    half = scale_channels(12, width)
    return [
        *[nn.Upsample(scale_factor=2), GatedConv2d(c4, c2), GatedConv2d(c2, c2)],  # H/2
        *[nn.Upsample(scale_factor=2), GatedConv2d(c2, c1), GatedConv2d(c1, half)],  # H
        *[nn.Conv2d(half, 3, 3, padding=1), nn.Tanh()],
    ]


class Coarse(nn.Sequential):
    """Stage 1, the coarse network: [B,c_in,H,W] -> [B,3,H,W] in [-1,1]; H, W multiples of 4."""

    def __init__(self, c_in: int, width: float) -> None:
        c1, c2, c4 = _channel_counts(width)
        super().__init__(
            GatedConv2d(c_in, c1, 5),
            *[GatedConv2d(c1, c2, stride=2), GatedConv2d(c2, c2)],  # H/2
            *[GatedConv2d(c2, c4, stride=2), GatedConv2d(c4, c4), GatedConv2d(c4, c4)],  # H/4
            *_dilated_convs(c4),
            *[GatedConv2d(c4, c4), GatedConv2d(c4, c4)],
            *_decoder_layers(width),
        )


class Refinement(nn.Module):
    """Stage 2: the composite of stage 1 [B,3,H,W] and the mask [B,1,H,W] -> [B,3,H,W] in [-1,1]; H, W multiples of 8.

    Only the attention sees the mask.
    """

    def __init__(self, width: float, attention: str) -> None:
        super().__init__()
        c1, c2, c4 = _channel_counts(width)
        self.hallucination = nn.Sequential(
            GatedConv2d(3, c1, 5),
            *[GatedConv2d(c1, c1, stride=2), GatedConv2d(c1, c2)],  # H/2
            *[GatedConv2d(c2, c2, stride=2), GatedConv2d(c2, c4), GatedConv2d(c4, c4)],  # H/4
            *_dilated_convs(c4),
        )
        self.before_attention = nn.Sequential(
            GatedConv2d(3, c1, 5),
            *[GatedConv2d(c1, c1, stride=2), GatedConv2d(c1, c2)],  # H/2
            *[GatedConv2d(c2, c4, stride=2), GatedConv2d(c4, c4)],  # H/4
            GatedConv2d(c4, c4, activation=F.relu),
        )
        self.attention = ContextualAttention(**ATTENTION_OPTIONS[attention])
        self.after_attention = nn.Sequential(GatedConv2d(c4, c4), GatedConv2d(c4, c4))
        self.merge = nn.Sequential(GatedConv2d(2 * c4, c4), GatedConv2d(c4, c4), *_decoder_layers(width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = self.before_attention(x)
        attended = self.attention(features, features, F.interpolate(mask, scale_factor=0.25))  # nearest
        return self.merge(torch.cat([self.hallucination(x), self.after_attention(attended)], dim=1))


class Generator(nn.Module):
    """Both stages: image [B,3,H,W] in [-1,1] (its hole is not read), hole [B,1,H,W] bool and, when guided, sketch
    [B,1,H,W] (only its pixels in the hole are seen) -> their outputs [B,3,H,W] in [-1,1]; H, W multiples of 8."""

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
    """SN-PatchGAN: image in [-1,1], mask and, when guided, sketch [B,c_in,H,W] -> logits [B,256,H/64,W/64], rounded up.
    The hinge loss is the mean over all elements. Receptive field 253 px."""

    def __init__(self, c_in: int = 4, width: float = 1.0) -> None:
        c = [c_in, *(scale_channels(n, width) for n in (64, 128, 256, 256, 256, 256))]
        layers: list[nn.Module] = []
        for a, b in pairwise(c):
            layers += [nn.Conv2d(a, b, 5, 2, 2), nn.LeakyReLU(0.2, inplace=True)]  # after the last one too
        super().__init__(*layers)
        init_glorot_(self)
        add_spectral_norm_(self)


# -- public checkpoints ---------------------------------------------------------------------------------------


def _public_module_names(first: str, second: str) -> list[str]:
    """first, second: name prefixes of the two branches of stage 2 (hallucination, attention)."""

    def block(name: str, up: bool = False) -> list[str]:
        return [f"{name}.conv1_upsample.conv" if up else f"{name}.conv1_downsample", f"{name}.conv2"]

    def bottleneck(name: str, *numbers: int) -> list[str]:
        return [f"{name}{n}" for n in numbers]

    def out(stage: str) -> list[str]:
        ups = [*block(f"{stage}.up_block1", up=True), *block(f"{stage}.up_block2", up=True)]
        return [*ups, f"{stage}.conv_to_rgb"]

    def down(name: str) -> list[str]:
        return [f"{name}conv1", *block(f"{name}down_block1"), *block(f"{name}down_block2")]

    first, second = f"stage2.{first}", f"stage2.{second}"
    modules = [
        *[*down("stage1."), *bottleneck("stage1.conv_bn", 1, 2, 3, 4, 5, 6, 7), *out("stage1")],
        *[*down(first), *bottleneck(f"{first}conv_bn", 1, 2, 3, 4, 5)],
        *[*down(second), *bottleneck(f"{second}conv_bn", 1, 4, 5)],
        *[*bottleneck("stage2.conv_bn", 6, 7), *out("stage2")],
    ]
    return [f"{module}.conv" for module in modules]


_FIRST_RELEASE = r"stage2\.b1_conv1\.conv\.weight(_orig)?"


def _read_public_options(states: dict[str, StateDict], config: Mapping[str, Any]) -> OptionValues:
    state = states["generator"]
    guided = dim_size(state, "stage1.conv1.conv.weight", 1) == 6
    return {
        "width": width_ratio(state, "stage1.conv1.conv.weight", 48),
        "attention": "smooth" if count_keys(state, _FIRST_RELEASE) else "released",
        **({"guided": True} if guided else {}),
    }


def _public_notes(options: OptionValues) -> tuple[str, ...]:
    first_release = (
        "the tensor names are those of the port's first release: as there, attention divides patches of n numbers by "
        "sqrt(|p|^2 + 1e-4 n) (--set attention=released for the later release's max(|p|, 1e-4))",
    )
    guided = (
        "its first layer's 6 channels are read as RGB, sketch, ones and mask, in the order of the authors' code",
    )
    return (first_release if options["attention"] == "smooth" else ()) + (
        guided if options.get("guided") else ()
    )


LAYOUT = CheckpointLayout(
    source="nipponjo/deepfillv2-pytorch",
    license_name="none given",
    network_layouts=(
        NetworkLayout(
            "generator",
            "states_pt_*.pth",
            r"stage1\.conv1\.conv\.weight",
            lambda options: _public_module_names("conv_", "ca_"),
            accepts=lambda state: not count_keys(state, _FIRST_RELEASE),
            ignored_pattern=r".*\.fuse_weight",
        ),
        NetworkLayout(  # the first release had other names for the branches
            "generator",
            "states_pt_*.pth",
            r"stage1\.conv1\.conv\.weight",
            lambda options: _public_module_names("b1_", "b2_"),
            accepts=lambda state: bool(count_keys(state, _FIRST_RELEASE)),
        ),
    ),
    read_options=_read_public_options,
    read_image_size=lambda options, config: 256,
    notes=_public_notes,
    discriminator_pattern=r"conv1\.conv_sn\..*",
)


class DeepFillV2(Model):
    name: ClassVar[str] = "deepfill_v2"
    Options: ClassVar[type] = DeepFillV2Options
    size_multiple: ClassVar[int] = 8
    precisions: ClassVar[Mapping[HardwareKind, Precision]] = {
        "amx": Precision(bfloat16=True),
        "avx512_bf16": Precision(bfloat16=True),
        "cpu": Precision(channels_last=True),
    }
    small_config: ClassVar[SmallConfig] = SmallConfig(
        # with the paper's lambda_adv of 1 small networks need many more steps
        {"width": 0.125, "lambda_adv": 0.001},
        image_size=32,
        overfit_steps={"train": 200},
    )
    checkpoint_layout: ClassVar[CheckpointLayout] = LAYOUT
    options: DeepFillV2Options

    def __init__(self, options: DeepFillV2Options) -> None:
        super().__init__(options)
        self.takes_edges = options.guided
        self.visualizations = ("attention",)
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
                steps=1_000_000,  # as the released v1; v2's configuration has no practical limit (max_iters 1e8)
                generators=("generator",),
                discriminators=discriminators,
                lr=dict.fromkeys(("generator", *discriminators), options.lr),
                betas=(options.beta1, options.beta2),
                uses_edges=options.guided,
            ),
        )

    # -- losses -----------------------------------------------------------------------------------------------

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """`coarse` and `refined`, the outputs of the stages, and `composite`, the refined output in the hole and the
        photograph outside: all [B,3,H,W] in [-1,1]."""
        if self.options.guided and batch.get("edge") is None:
            raise ValueError("deepfill_v2 guided needs edges in the batch: the recipe's data has none")
        truth, hole = batch["image"] * 2 - 1, batch["mask"] > 0.5
        x1, x2 = self.networks["generator"](truth, hole, batch.get("edge"))
        return {"coarse": x1, "refined": x2, "composite": torch.where(hole, x2, truth)}

    def _with_mask_and_sketch(self, batch: Batch, image: Tensor) -> Tensor:
        """The discriminator's input for a photograph or a composite: unlike the generator's, without a channel of ones."""
        sketch = [batch["edge"] * batch["mask"]] if self.options.guided else []
        return torch.cat([image, batch["mask"], *sketch], dim=1)

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        d, truth = self.networks["discriminator"], batch["image"] * 2 - 1
        with parametrize.cached():  # one power iteration for both passes
            on_real = d(self._with_mask_and_sketch(batch, truth))
            on_fake = d(self._with_mask_and_sketch(batch, out["composite"].detach()))
        return {"discriminator": (gan_real(on_real, "hinge") + gan_fake(on_fake, "hinge")) / 2}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        truth = batch["image"] * 2 - 1
        losses = {
            "l1_coarse": F.l1_loss(out["coarse"], truth),  # over the whole image, also known pixels
            "l1": F.l1_loss(out["refined"], truth),
        }
        if phase.discriminators:
            on_fake = self.networks["discriminator"](self._with_mask_and_sketch(batch, out["composite"]))
            losses["adv"] = gan_generator(on_fake, "hinge")
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        o = self.options
        weights = {"l1_coarse": o.lambda_l1, "l1": o.lambda_l1}
        return {**weights, "adv": o.lambda_adv, "discriminator": 1.0} if phase.discriminators else weights

    # -- completion -------------------------------------------------------------------------------------------

    def visualize_attention(self, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
        return visualize_attention(self, image, mask, edge)

    def _build_completion(self) -> Completion:
        return GatedCompletion(self.networks["generator"])


class GatedCompletion(Completion):
    """Stage 2's output. For a guided model the edges inside the hole are the sketch, possibly empty."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        # 8: the attention downsamples the features, at a quarter of the size, by 2
        image, hole, edge = (pad_to_multiple(x, 8) for x in (image, hole, edge))
        _, x2 = self.generator(image * 2 - 1, hole, edge)
        return crop_to((x2 + 1) / 2, height, width)
