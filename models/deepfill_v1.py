"""DeepFill v1: Generative Image Inpainting with Contextual Attention. Yu, Lin, Yang, Shen, Lu, Huang. CVPR 2018.

A coarse network fills the hole, a second one refines it with contextual attention; a local and a global Wasserstein
critic. Images are in [-1,1] inside, and outputs are clipped to it. Widths and weights are the released code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import ContextualAttention
from models.base import Batch, Completion, Losses, Model, Phase, hole_mean, uniform
from models.layers import crop_to, init_glorot_, pad_to_multiple, scaled
from models.losses import discount_map, gan_generator, gradient_penalty, wgan_critic
from models.window import around, crop

GAMMAS = {"released": 0.9, "paper": 0.99}


@dataclass(frozen=True)
class DeepFillV1Options:
    size: int = 256
    """The training window in pixels, a multiple of 32: the critics' dense layers depend on it, and the local critic
    sees a box of half of it."""
    width: float = 1.0
    """Scales every channel count; 1 is the paper's."""
    attention: bool = True
    """False: the paper's baseline, here the same two-branch network with the attention layer alone left out; the
    convolutions before and after it stay."""
    attention_masking: str = "exact"
    """exact: attention weights sum to 1; released: patches that touch the hole take a share of the softmax."""
    attention_overlap: str = "exact"
    """exact: pasted patches are averaged by their true overlap; released: divided by 4, too dark at the border."""
    attention_similarity: str = "released"
    """released: scores with normalised background patches; cosine: with both normalised, as the paper writes."""
    attention_fuse: int = 3
    """0: no attention propagation."""
    lambda_adv: float = 0.001
    """0: reconstruction only, no critic is trained."""
    lambda_l1: float = 1.2
    """Of the spatially discounted l1 on the local box."""
    lambda_ae: float = 1.2
    """Of the l1 on known pixels."""
    lambda_gp: float = 10.0
    coarse_alpha: float = 1.2
    """Of the coarse output in both l1 terms, beside 1 of the refined one."""
    discount: str = "released"
    """released: gamma 0.9, and distances that are 0 at the box's top and left and 1 at its bottom and right; paper:
    gamma 0.99, and the distance to the nearest pixel outside the box."""
    gamma: float | None = None
    """Base of the discount, a pixel of the window whatever its size; none: that of `discount`."""
    critic_steps: int = 5
    """Steps of the critics to one of the generator."""
    lr: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.9

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 32:
            raise ValueError(f"deepfill_v1 size {self.size} is not a multiple of 32")
        if self.width <= 0:
            raise ValueError("deepfill_v1 width must be positive")
        if self.discount not in GAMMAS:
            raise ValueError(f"deepfill_v1 discount {self.discount!r} is none of {', '.join(GAMMAS)}")
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
        self.attend()

    def attend(self) -> nn.Module:
        """The attention layer of these options. ValueError, naming the option, when one is out of range."""
        try:
            return ContextualAttention(
                fuse=self.attention_fuse,
                masking=self.attention_masking,
                overlap=self.attention_overlap,
                similarity=self.attention_similarity,
            )
        except ValueError as error:
            raise ValueError("deepfill_v1 " + str(error).replace("attention ", "attention_", 1)) from None


# -- generator -------------------------------------------------------------------------------------------------


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation), nn.ELU(inplace=True)]


def _widths(width: float) -> tuple[int, int, int]:
    """Channels at H, H/2 and H/4: the code's cnum 32, doubled twice."""
    return scaled(32, width), scaled(64, width), scaled(128, width)


def _dilated(c: int) -> list[nn.Module]:
    return [layer for d in (2, 4, 8, 16) for layer in _conv(c, c, dilation=d)]


def _out(width: float) -> list[nn.Module]:
    """Two convolutions from H/4 and the way up to the image, before it is clipped."""
    c1, c2, c4 = _widths(width)
    half = scaled(16, width)
    return [
        *[nn.Upsample(scale_factor=2), *_conv(c4, c2), *_conv(c2, c2)],  # H/2
        *[nn.Upsample(scale_factor=2), *_conv(c2, c1), *_conv(c1, half)],  # H
        nn.Conv2d(half, 3, 3, padding=1),
    ]


class Coarse(nn.Sequential):
    """The first network, 17 convolutions: [B,5,H,W] -> [B,3,H,W], to be clipped; H, W multiples of 4."""

    def __init__(self, width: float) -> None:
        c1, c2, c4 = _widths(width)
        super().__init__(
            *_conv(5, c1, 5),
            *[*_conv(c1, c2, stride=2), *_conv(c2, c2)],  # H/2
            *[*_conv(c2, c4, stride=2), *_conv(c4, c4), *_conv(c4, c4)],  # H/4
            *_dilated(c4),
            *[*_conv(c4, c4), *_conv(c4, c4)],
            *_out(width),
        )


class Refinement(nn.Module):
    """The second network: [B,5,H,W] and the mask [B,1,H,W] -> [B,3,H,W], to be clipped; H, W multiples of 8."""

    def __init__(self, width: float, attention: nn.Module | None) -> None:
        super().__init__()
        c1, c2, c4 = _widths(width)
        self.hallucination = nn.Sequential(
            *_conv(5, c1, 5),
            *[*_conv(c1, c1, stride=2), *_conv(c1, c2)],  # H/2
            *[*_conv(c2, c2, stride=2), *_conv(c2, c4), *_conv(c4, c4)],  # H/4
            *_dilated(c4),
        )
        self.before_attention = nn.Sequential(
            *_conv(5, c1, 5),
            *[*_conv(c1, c1, stride=2), *_conv(c1, c2)],  # H/2
            *[*_conv(c2, c4, stride=2), *_conv(c4, c4)],  # H/4
            *[nn.Conv2d(c4, c4, 3, padding=1), nn.ReLU(inplace=True)],
        )
        self.attention = attention
        self.after_attention = nn.Sequential(*_conv(c4, c4), *_conv(c4, c4))
        self.merge = nn.Sequential(*_conv(2 * c4, c4), *_conv(c4, c4), *_out(width))

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
        where = [torch.ones_like(mask), mask]
        x1 = self.coarse(torch.cat([image.masked_fill(hole, 0.0), *where], dim=1)).clamp(-1, 1)
        x2 = self.refinement(torch.cat([torch.where(hole, x1, image), *where], dim=1), mask).clamp(-1, 1)
        return x1, x2


# -- critics ---------------------------------------------------------------------------------------------------


class Critic(nn.Sequential):
    """[B,3,S,S] in [-1,1] -> scores [B,1]: convolutions 5x5 of stride 2, and a dense layer. It is not told the mask."""

    def __init__(self, size: int, channels: tuple[int, ...], width: float = 1.0) -> None:
        c = [3, *(scaled(n, width) for n in channels)]
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(c):  # S/2, S/4, S/8, S/16
            layers += [nn.Conv2d(c_in, c_out, 5, 2, 2), nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(c[-1] * (size // 16) ** 2, 1))
        init_glorot_(self)


# -- the model -------------------------------------------------------------------------------------------------


class DeepFillV1(Model):
    """Trains on `size` x `size` crops; completes any size."""

    name: ClassVar[str] = "deepfill_v1"
    Options: ClassVar[type] = DeepFillV1Options
    multiple: ClassVar[int] = 8
    options: DeepFillV1Options

    def __init__(self, options: DeepFillV1Options) -> None:
        super().__init__(options)
        s, w = options.size, options.width
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(w, options.attend() if options.attention else None),
                "local_critic": Critic(s // 2, (64, 128, 256, 512), w),
                "global_critic": Critic(s, (64, 128, 256, 256), w),
            }
        )
        critics = ("local_critic", "global_critic") if options.lambda_adv > 0 else ()
        self.phases = (
            Phase(
                "train",
                # 1e6 steps of the generator; each of the critics' has a batch of its own
                steps=1_000_000 * (options.critic_steps if critics else 1),
                generators=("generator",),
                discriminators=critics,
                lr=dict.fromkeys(("generator", *critics), options.lr),
                betas=(options.beta1, options.beta2),
                critic_steps=options.critic_steps if critics else 1,
            ),
        )

    def local(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B,C,S,S] -> [B,C,S/2,S/2]: each photograph's own square around the middle of its hole's box, shifted into
        the photograph."""
        side = self.options.size // 2
        return crop(x, *around(mask, side), side)

    def discount(self) -> Tensor:
        """Weight of each pixel of the local box in the discounted l1 [S/2,S/2]."""
        o = self.options
        gamma = GAMMAS[o.discount] if o.gamma is None else o.gamma
        return discount_map(o.size // 2, gamma, o.discount == "released")

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """The coarse and the refined output, and the completed photographs: in [-1,1]."""
        image, hole, s = batch["image"], batch["mask"] > 0.5, self.options.size
        if image.shape[2:] != (s, s):
            raise ValueError(
                f"deepfill_v1 of size {s} trains on {s}x{s} px, not {tuple(image.shape[2:])}: "
                "make its size option data.size"
            )
        image = image * 2 - 1
        coarse, fine = self.networks["generator"](image, hole)
        return {"coarse": coarse, "fine": fine, "image": torch.where(hole, fine, image)}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        images = batch["image"] * 2 - 1, out["image"].detach(), batch["mask"]
        seen = {"local": [self.local(x, batch["mask"]) for x in images], "global": images}
        losses: Losses = {}
        for column, (name, (real, fake, mask)) in enumerate(seen.items()):
            critic = self.networks[f"{name}_critic"]
            losses[name] = wgan_critic(critic(real), critic(fake))
            losses[f"gp_{name}"] = gradient_penalty(critic, real, fake, uniform(batch, column), mask)
        return losses

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        truth, mask, alpha = batch["image"] * 2 - 1, batch["mask"], self.options.coarse_alpha
        coarse, fine = ((truth - out[name]).abs() for name in ("coarse", "fine"))
        error = alpha * coarse + fine  # [B,3,S,S]
        known = (1 - hole_mean(batch)).clamp_min(1 / (truth.shape[2] * truth.shape[3]))
        losses = {
            "l1": (self.discount().to(error) * self.local(error, mask)).mean(),
            "ae": (error * (1 - mask)).mean() / known,
        }
        if phase.discriminators:
            on_fake = [
                self.networks["local_critic"](self.local(out["image"], mask)),
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

    def _completion(self) -> Completion:
        return DeepFillCompletion(self.networks["generator"])


class DeepFillCompletion(Completion):
    """The refined output."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image, mask = (pad_to_multiple(x, 8) for x in (image * 2 - 1, hole.to(image.dtype)))
        _, fine = self.generator(image, mask > 0.5)
        return (crop_to(fine, height, width) + 1) / 2
