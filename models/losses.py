"""Loss terms, each a mean and unweighted; a model's options hold the weights, under the papers' symbols:

gan_real, gan_fake, gan_generator   L_adv: lambda_adv (context encoder, DeepFill), alpha (GLCIC), lambda_adv1 and
                                    lambda_adv2 (EdgeConnect)
wgan_critic, gradient_penalty       DeepFill v1's critics: 1 and lambda_gp
masked_l2                           L_rec: lambda_rec (context encoder), GLCIC's L
l1_over_hole, masked_l1             L_l1: lambda_l1 (EdgeConnect), L_valid and L_hole: lambda_valid, lambda_hole
discount_map                        DeepFill v1's gamma^l, under lambda_l1
feature_matching                    L_FM: lambda_FM
perceptual, style                   L_perc: lambda_p, lambda_perceptual; L_style: lambda_s, lambda_style
total_variation                     L_tv: lambda_tv
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


def grams(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Gram matrices of every layer: `perceptual` of two of these is `style` of the features."""
    return {name: gram(f) for name, f in features.items()}


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


def masked_l2(output: Tensor, truth: Tensor, weight: Tensor, mask_mean: Tensor | None = None) -> Tensor:
    """mean of weight * (output - truth)^2 over all pixels (Pathak et al. 2016, equation 1; Iizuka et al. 2017, equation 2).

    weight [...,H,W]: the mask, or a map. `mask_mean`, a scalar: measured in hole areas, as in `l1_over_hole`.
    """
    loss = (weight * (output - truth) ** 2).mean()
    return loss if mask_mean is None else loss / mask_mean.clamp_min(1 / (truth.shape[2] * truth.shape[3]))


def masked_l1(output: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """mean of mask * |output - truth| over all pixels, not only the mask's (Liu et al. 2018, section 3.3)."""
    return ((output - truth).abs() * mask).mean()


def dilate(mask: Tensor) -> Tensor:
    """A mask [B,1,H,W] in {0,1} grown by one pixel, diagonals too."""
    return F.max_pool2d(mask, 3, 1, 1)


def total_variation(image: Tensor, region: Tensor | None = None) -> Tensor:
    """Sum of |difference| of horizontal and of vertical neighbours, over the number of elements of image [B,C,H,W].

    region [B,1,H,W] in {0,1}: only pairs with both pixels in it count (Liu et al. 2018, section 3.3: the hole grown
    by a pixel).
    """
    across, down = (image.diff(dim=dim).abs() for dim in (3, 2))
    if region is not None:
        across = across * (region[..., 1:] * region[..., :-1])
        down = down * (region[..., 1:, :] * region[..., :-1, :])
    return (across.sum() + down.sum()) / image.numel()


def wgan_critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
    """mean(D(fake)) - mean(D(real)): what a Wasserstein critic minimises. Its generator's loss is the hinge's."""
    return on_fake.mean() - on_real.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, at: Tensor, mask: Tensor
) -> Tensor:
    """mean of (||mask * gradient of D|| - 1)^2 (Gulrajani et al. 2017; masked: DeepFill v1, section 3.3).

    real, fake [B,C,H,W], mask [B,1,H,W]; the gradient is taken, and its norm over all of a photograph, at
    real + at (fake - real), with `at` [B] in [0,1]. Needs grad mode; the inputs get no gradient.
    """
    between = torch.lerp(real, fake, at.to(real).view(-1, 1, 1, 1)).detach().requires_grad_()
    with torch.compiler.set_stance("force_eager"):  # what is compiled cannot be differentiated twice
        on_between = critic(between)
    (slope,) = torch.autograd.grad(on_between.sum(), between, create_graph=True)
    return ((torch.linalg.vector_norm((slope * mask).flatten(1), dim=1) - 1) ** 2).mean()


def discount_map(side: int, gamma: float, released: bool = True) -> Tensor:
    """Weights gamma^l [side,side] of spatially discounted l1 (DeepFill v1, section 3.2): l is a pixel's distance in
    pixels to the nearest side of the box.

    The known pixels beside the box are 1 away from its outermost ones; in the released code only so at the bottom and
    at the right: the first row and column are 0 away.
    """
    i = torch.arange(side)
    line = torch.minimum(i if released else i + 1, side - i)
    return gamma ** torch.minimum(line[:, None], line).float()
