"""Loss terms that several papers share. Every one is a mean, unweighted; the lambdas are applied outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GAN_KINDS = ("nsgan", "lsgan", "hinge")


def _to(logits: Tensor, target: float, kind: str) -> Tensor:
    """How far a discriminator's raw output is from `target` (0 fake, 1 real)."""
    goal = torch.full_like(logits, target)
    if kind == "lsgan":
        return F.mse_loss(torch.sigmoid(logits), goal)
    return F.binary_cross_entropy_with_logits(logits, goal)


def gan_real(logits: Tensor, kind: str = "nsgan") -> Tensor:
    """The discriminator's loss on real samples; `logits` are its output before any sigmoid."""
    return F.relu(1 - logits).mean() if kind == "hinge" else _to(logits, 1.0, kind)


def gan_fake(logits: Tensor, kind: str = "nsgan") -> Tensor:
    """The discriminator's loss on generated samples."""
    return F.relu(1 + logits).mean() if kind == "hinge" else _to(logits, 0.0, kind)


def gan_generator(logits: Tensor, kind: str = "nsgan") -> Tensor:
    """The generator's (non-saturating) loss on the discriminator's output for its samples."""
    return -logits.mean() if kind == "hinge" else _to(logits, 1.0, kind)


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over layers of mean |D_i(fake) - D_i(real)| (pix2pixHD; EdgeConnect equation 3)."""
    return torch.stack([F.l1_loss(f, r.detach()) for f, r in zip(fake, real, strict=True)]).sum()


def gram(features: Tensor) -> Tensor:
    """Gram matrices [B,C,C] of [B,C,H,W]: F F^T / (C H W)."""
    b, c, h, w = features.shape
    f = features.view(b, c, h * w)
    return torch.bmm(f, f.transpose(1, 2)) / (c * h * w)


def perceptual(fake: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of mean |phi_i(fake) - phi_i(real)| (Johnson et al. 2016)."""
    return torch.stack([F.l1_loss(fake[name], real[name]) for name in real]).sum()


def style(fake: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of the mean absolute difference of Gram matrices (Gatys et al. 2016)."""
    return torch.stack([F.l1_loss(gram(fake[name]), gram(real[name])) for name in real]).sum()


def l1_over_hole(output: Tensor, truth: Tensor, mask_mean: Tensor) -> Tensor:
    """mean |output - truth| / mean(mask): the l1 loss measured in hole areas (EdgeConnect section 3.2).

    `mask_mean` is a scalar; a batch without a hole counts as one with a single hole pixel.
    """
    return F.l1_loss(output, truth) / mask_mean.clamp_min(1 / (truth.shape[2] * truth.shape[3]))
