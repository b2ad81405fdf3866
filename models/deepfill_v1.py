"""DeepFill v1: Generative Image Inpainting with Contextual Attention. Yu, Lin, Yang, Shen, Lu, Huang. CVPR 2018.

A coarse network fills the hole, a second one refines it with contextual attention; a local and a global Wasserstein
critic. Images are in [-1,1] inside, and outputs are clipped to it. Channel counts and loss weights are the released
code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import ContextualAttention, visualize_attention
from models.base import (
    Batch,
    Completion,
    HardwareKind,
    Losses,
    Model,
    Phase,
    Precision,
    PublishedTraining,
    SmallConfig,
    global_mask_mean,
    sample_uniform,
)
from models.checkpoint_layout import CheckpointLayout, NetworkLayout, OptionValues, StateDict, width_ratio
from models.hole_crop import crop, crop_corner
from models.layers import crop_to, init_glorot_, pad_to_multiple, scale_channels
from models.losses import discount_map, gan_generator, gradient_penalty, wgan_critic

DISCOUNT_GAMMAS = {"released": 0.9, "paper": 0.99}


@dataclass(frozen=True)
class DeepFillV1Options:
    size: int = 256
    """Side of the training window in pixels, a multiple of 32. The critics' dense layers depend on it; the local critic
    sees a box with half of it as side."""
    width: float = 1.0
    """Scales all channel counts; 1 is the paper's."""
    attention: bool = True
    """False: the paper's baseline, here the same two-branch network without the attention layer; the convolutions before
    and after it stay."""
    attention_masking: str = "exact"
    """exact: attention weights sum to 1; released: patches that touch the hole take part in the softmax."""
    attention_overlap: str = "exact"
    """exact: pasted patches are averaged over their true overlap; released: divided by 4, too dark at the border."""
    attention_similarity: str = "released"
    """released: scores with normalised background patches; cosine: with both normalised, as in the paper."""
    attention_norm: str = "released"
    """released: patches are divided by max(|p|, 1e-4); smooth: by sqrt(|p|^2 + 1e-4 n), for patches of n numbers, as in
    daa233/generative-inpainting-pytorch."""
    attention_fuse: int = 3
    """3, or 0: no attention propagation."""
    lambda_adv: float = 0.001
    """0: reconstruction losses only, without critics."""
    lambda_l1: float = 1.2
    """Weight of the spatially discounted l1 on the local box."""
    lambda_ae: float = 1.2
    """Weight of the l1 on known pixels."""
    lambda_gp: float = 10.0
    """Weight of the gradient penalty in the critics' losses."""
    coarse_alpha: float = 1.2
    """Weight of the coarse output in both l1 losses; that of the refined output is 1."""
    discount: str = "released"
    """released: gamma 0.9, with distance 0 in the box's first row and column and 1 in the last; paper: gamma 0.99, with
    the distance to the nearest pixel outside the box."""
    gamma: float | None = None
    """Discount per pixel of the window, whatever its size; None: that of `discount`."""
    critic_steps: int = 5
    """Critic steps per generator step."""
    lr: float = 1e-4
    """Learning rate of all networks."""
    beta1: float = 0.5
    """First beta of Adam."""
    beta2: float = 0.9
    """Second beta of Adam."""

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 32:
            raise ValueError(f"deepfill_v1 size {self.size} is not a multiple of 32")
        if self.width <= 0:
            raise ValueError("deepfill_v1 width must be positive")
        if self.discount not in DISCOUNT_GAMMAS:
            raise ValueError(
                f"deepfill_v1 discount {self.discount!r} is none of {', '.join(DISCOUNT_GAMMAS)}"
            )
        if self.gamma is not None and not 0 < self.gamma <= 1:
            raise ValueError("deepfill_v1 gamma must be in (0,1]")
        for name in ("lambda_adv", "lambda_l1", "lambda_ae", "lambda_gp", "coarse_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"deepfill_v1 {name} must not be negative")
        if self.critic_steps < 1:
            raise ValueError("deepfill_v1 critic_steps must be at least 1")
        if self.lr <= 0:
            raise ValueError("deepfill_v1 lr must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"deepfill_v1 {name} must be in [0,1)")
        self.build_attention()

    def build_attention(self) -> nn.Module:
        """The attention layer of these options. ValueError, naming the option, if one is out of range."""
        try:
            return ContextualAttention(
                fuse=self.attention_fuse,
                masking=self.attention_masking,
                overlap=self.attention_overlap,
                similarity=self.attention_similarity,
                norm=self.attention_norm,
            )
        except ValueError as error:
            raise ValueError("deepfill_v1 " + str(error).replace("attention ", "attention_", 1)) from None


# -- generator -------------------------------------------------------------------------------------------------


def _conv_elu(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation), nn.ELU(inplace=True)]


def _channel_counts(width: float) -> tuple[int, int, int]:
    """Channels at H, H/2 and H/4: the code's cnum 32, doubled twice."""
    return scale_channels(32, width), scale_channels(64, width), scale_channels(128, width)


def _dilated_convs(c: int) -> list[nn.Module]:
    return [layer for d in (2, 4, 8, 16) for layer in _conv_elu(c, c, dilation=d)]


def _decoder_layers(width: float) -> list[nn.Module]:
    """From H/4 up to the image, before clipping."""
    c1, c2, c4 = _channel_counts(width)
    half = scale_channels(16, width)
    return [
        *[nn.Upsample(scale_factor=2), *_conv_elu(c4, c2), *_conv_elu(c2, c2)],  # H/2
        *[nn.Upsample(scale_factor=2), *_conv_elu(c2, c1), *_conv_elu(c1, half)],  # H
        nn.Conv2d(half, 3, 3, padding=1),
    ]


class Coarse(nn.Sequential):
    """The coarse network, 17 convolutions: [B,5,H,W] -> [B,3,H,W], before clipping; H, W multiples of 4."""

    def __init__(self, width: float) -> None:
        c1, c2, c4 = _channel_counts(width)
        super().__init__(
            *_conv_elu(5, c1, 5),
            *[*_conv_elu(c1, c2, stride=2), *_conv_elu(c2, c2)],  # H/2
            *[*_conv_elu(c2, c4, stride=2), *_conv_elu(c4, c4), *_conv_elu(c4, c4)],  # H/4
            *_dilated_convs(c4),
            *[*_conv_elu(c4, c4), *_conv_elu(c4, c4)],
            *_decoder_layers(width),
        )


class Refinement(nn.Module):
    """The refinement network: [B,5,H,W] and the mask [B,1,H,W] -> [B,3,H,W], before clipping; H, W multiples of 8."""

    def __init__(self, width: float, attention: nn.Module | None) -> None:
        super().__init__()
        c1, c2, c4 = _channel_counts(width)
        self.hallucination = nn.Sequential(
            *_conv_elu(5, c1, 5),
            *[*_conv_elu(c1, c1, stride=2), *_conv_elu(c1, c2)],  # H/2
            *[*_conv_elu(c2, c2, stride=2), *_conv_elu(c2, c4), *_conv_elu(c4, c4)],  # H/4
            *_dilated_convs(c4),
        )
        self.before_attention = nn.Sequential(
            *_conv_elu(5, c1, 5),
            *[*_conv_elu(c1, c1, stride=2), *_conv_elu(c1, c2)],  # H/2
            *[*_conv_elu(c2, c4, stride=2), *_conv_elu(c4, c4)],  # H/4
            *[nn.Conv2d(c4, c4, 3, padding=1), nn.ReLU(inplace=True)],
        )
        self.attention = attention
        self.after_attention = nn.Sequential(*_conv_elu(c4, c4), *_conv_elu(c4, c4))
        self.merge = nn.Sequential(*_conv_elu(2 * c4, c4), *_conv_elu(c4, c4), *_decoder_layers(width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = self.before_attention(x)
        if self.attention is not None:
            features = self.attention(features, features, F.interpolate(mask, scale_factor=0.25))  # nearest
        return self.merge(torch.cat([self.hallucination(x), self.after_attention(features)], dim=1))


class Generator(nn.Module):
    """Both networks: image [B,3,H,W] in [-1,1] (its hole is not read) and hole [B,1,H,W] bool -> their outputs
    [B,3,H,W] in [-1,1]; H, W multiples of 8."""

    def __init__(self, width: float = 1.0, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.coarse = Coarse(width)
        self.refinement = Refinement(width, attention)
        init_glorot_(self)

    def forward(self, image: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        mask = hole.to(image.dtype)
        extra = [torch.ones_like(mask), mask]
        x1 = self.coarse(torch.cat([image.masked_fill(hole, 0.0), *extra], dim=1)).clamp(-1, 1)
        x2 = self.refinement(torch.cat([torch.where(hole, x1, image), *extra], dim=1), mask).clamp(-1, 1)
        return x1, x2


# -- critics ---------------------------------------------------------------------------------------------------


class Critic(nn.Sequential):
    """[B,3,S,S] in [-1,1], without the mask -> scores [B,1]: 5x5 convolutions of stride 2, and a dense layer."""

    def __init__(self, size: int, channels: tuple[int, ...], width: float = 1.0) -> None:
        c = [3, *(scale_channels(n, width) for n in channels)]
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(c):  # S/2, S/4, S/8, S/16
            layers += [nn.Conv2d(c_in, c_out, 5, 2, 2), nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(c[-1] * (size // 16) ** 2, 1))
        init_glorot_(self)


# -- public checkpoints ---------------------------------------------------------------------------------------


_DOWN_LAYERS = ["1", "2_downsample", "3", "4_downsample", "5", "6"]
_ATROUS_LAYERS = [f"{i}_atrous" for i in (7, 8, 9, 10)]
_UP_LAYERS = [str(i) for i in range(11, 18)]


def _public_module_names(options: OptionValues) -> list[str]:
    return [
        *(f"coarse_generator.conv{n}.conv" for n in (*_DOWN_LAYERS, *_ATROUS_LAYERS, *_UP_LAYERS)),
        *(f"fine_generator.conv{n}.conv" for n in (*_DOWN_LAYERS, *_ATROUS_LAYERS)),
        *(f"fine_generator.pmconv{n}.conv" for n in (*_DOWN_LAYERS, "9", "10")),
        *(f"fine_generator.allconv{n}.conv" for n in _UP_LAYERS),
    ]


def _read_public_options(states: dict[str, StateDict], config: Mapping[str, Any]) -> OptionValues:
    return {
        "width": width_ratio(states["generator"], "coarse_generator.conv1.conv.weight", 32),
        "attention_masking": "released",
        "attention_overlap": "released",
        "attention_norm": "smooth",
    }


# An early commit of the port scaled scores by 2550 instead of 10 and had the authors' norm (--set
# attention_norm=released); its tensors look the same.
LAYOUT = CheckpointLayout(
    source="daa233/generative-inpainting-pytorch",
    license_name="MIT",
    network_layouts=(
        NetworkLayout(
            "generator",
            "gen_*.pt",
            r"coarse_generator\.conv1\.conv\.weight",
            _public_module_names,
        ),
    ),
    read_options=_read_public_options,
    read_image_size=lambda options, config: 256,
    notes=lambda options: (
        "attention as in the port, which divides patches of n numbers by sqrt(|p|^2 + 1e-4 n); the authors' code, and "
        "the port's first commits, divide by max(|p|, 1e-4) (--set attention_norm=released)",
    ),
    discriminator_pattern=r"dis_conv_module\..*",
)


# -- the model -------------------------------------------------------------------------------------------------


class DeepFillV1(Model):
    """Trains on `size` x `size` crops; completes any size."""

    name: ClassVar[str] = "deepfill_v1"
    Options: ClassVar[type] = DeepFillV1Options
    size_multiple: ClassVar[int] = 8
    published_training: ClassVar[PublishedTraining] = PublishedTraining(
        device_hours=5 * 24,
        device="a GTX 1080 Ti",
        source="five days, github.com/JiahuiYu/generative_inpainting/issues 53 and 237",
        batch_size=16,
        image_size=256,
        # 0.3 to 0.4 batches per second, with five critic steps each
        steps_range=(0.3 * (5 * 5 * 24 * 3600), 0.4 * (5 * 5 * 24 * 3600)),
    )
    precisions: ClassVar[Mapping[HardwareKind, Precision]] = {
        "amx": Precision(bfloat16=True, channels_last=True),
        "avx512_bf16": Precision(channels_last=True),  # bfloat16 was not measured there
        "cpu": Precision(channels_last=True),
    }
    small_config: ClassVar[SmallConfig] = SmallConfig(
        {"size": 32, "width": 0.125}, image_size=32, overfit_steps={"train": 600}
    )
    checkpoint_layout: ClassVar[CheckpointLayout] = LAYOUT
    options: DeepFillV1Options

    def __init__(self, options: DeepFillV1Options) -> None:
        super().__init__(options)
        s, w = options.size, options.width
        self.visualizations = ("attention",) if options.attention else ()
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(w, options.build_attention() if options.attention else None),
                "local_critic": Critic(s // 2, (64, 128, 256, 512), w),
                "global_critic": Critic(s, (64, 128, 256, 256), w),
            }
        )
        critics = ("local_critic", "global_critic") if options.lambda_adv > 0 else ()
        self.phases = (
            Phase(
                "train",
                # 1e6 generator steps; each critic step has its own batch
                steps=1_000_000 * (options.critic_steps if critics else 1),
                generators=("generator",),
                discriminators=critics,
                lr=dict.fromkeys(("generator", *critics), options.lr),
                betas=(options.beta1, options.beta2),
                critic_steps=options.critic_steps if critics else 1,
            ),
        )

    def crop_local(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B,C,S,S] -> the local boxes [B,C,S/2,S/2]: the square centred on each photograph's hole, shifted into the
        photograph."""
        side = self.options.size // 2
        return crop(x, *crop_corner(mask, side), side)

    def discount_weights(self) -> Tensor:
        """Weight of each pixel of the local box in the discounted l1 [S/2,S/2]."""
        o = self.options
        gamma = DISCOUNT_GAMMAS[o.discount] if o.gamma is None else o.gamma
        return discount_map(o.size // 2, gamma, o.discount == "released")

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """`coarse` and `fine` output, and `image`, the completed photographs: in [-1,1]."""
        image, hole, s = batch["image"], batch["mask"] > 0.5, self.options.size
        if image.shape[2:] != (s, s):
            raise ValueError(
                f"deepfill_v1 of size {s} trains on {s}x{s} px, not {tuple(image.shape[2:])}: "
                "set its size option to data.size"
            )
        image = image * 2 - 1
        coarse, fine = self.networks["generator"](image, hole)
        return {"coarse": coarse, "fine": fine, "image": torch.where(hole, fine, image)}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        images = batch["image"] * 2 - 1, out["image"].detach(), batch["mask"]
        inputs = {"local": [self.crop_local(x, batch["mask"]) for x in images], "global": images}
        losses: Losses = {}
        for index, (name, (real, fake, mask)) in enumerate(inputs.items()):
            critic = self.networks[f"{name}_critic"]
            losses[name] = wgan_critic(critic(real), critic(fake))
            alpha = sample_uniform(batch, index)
            losses[f"gp_{name}"] = gradient_penalty(critic, real, fake, alpha, mask)
        return losses

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        truth, mask, alpha = batch["image"] * 2 - 1, batch["mask"], self.options.coarse_alpha
        coarse, fine = ((truth - out[name]).abs() for name in ("coarse", "fine"))
        error = alpha * coarse + fine  # [B,3,S,S]
        known_fraction = (1 - global_mask_mean(batch)).clamp_min(1 / (truth.shape[2] * truth.shape[3]))
        losses = {
            "l1": (self.discount_weights().to(error) * self.crop_local(error, mask)).mean(),
            "ae": (error * (1 - mask)).mean() / known_fraction,
        }
        if phase.discriminators:
            on_fake = [
                self.networks["local_critic"](self.crop_local(out["image"], mask)),
                self.networks["global_critic"](out["image"]),
            ]
            losses["adv"] = torch.stack([gan_generator(scores, "hinge") for scores in on_fake]).sum()
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        o = self.options
        weights = {"l1": o.lambda_l1, "ae": o.lambda_ae}
        if phase.discriminators:
            weights |= {"adv": o.lambda_adv, "local": 1.0, "gp_local": o.lambda_gp}
            weights |= {"global": 1.0, "gp_global": o.lambda_gp}
        return weights

    def visualize_attention(self, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
        return visualize_attention(self, image, mask, edge)

    def _build_completion(self) -> Completion:
        return DeepFillCompletion(self.networks["generator"])


class DeepFillCompletion(Completion):
    """The generator's refined output, at any size."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image, mask = (pad_to_multiple(x, 8) for x in (image * 2 - 1, hole.to(image.dtype)))
        _, fine = self.generator(image, mask > 0.5)
        return (crop_to(fine, height, width) + 1) / 2
