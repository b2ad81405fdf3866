"""Unweighted loss terms, all means; the weights are options of the models, under the papers' symbols:

gan_real, gan_fake, gan_generator   L_adv: lambda_adv (context encoder, DeepFill), alpha (GLCIC), lambda_adv1 and
                                    lambda_adv2 (EdgeConnect)
wgan_critic, gradient_penalty       DeepFill v1's critics: 1 and lambda_gp
masked_l2                           L_rec: lambda_rec (context encoder), GLCIC's L
l1_over_hole, masked_l1             L_l1: lambda_l1 (EdgeConnect), L_valid and L_hole: lambda_valid, lambda_hole
discount_map                        DeepFill v1's gamma^l, under lambda_l1
feature_matching                    L_FM: lambda_FM
perceptual_loss, style_loss         L_perc: lambda_p, lambda_perceptual; L_style: lambda_s, lambda_style
total_variation                     L_tv: lambda_tv
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GAN_KINDS = ("nsgan", "lsgan", "hinge")


def _bce_or_lsgan(logits: Tensor, target: float, kind: str) -> Tensor:
    """Loss of a discriminator's logits against the label `target` (0 fake, 1 real): squared error, or cross entropy."""
    labels = torch.full_like(logits, target)
    if kind == "lsgan":
        return F.mse_loss(torch.sigmoid(logits), labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def gan_real(logits: Tensor, kind: str = "nsgan") -> Tensor:
    """The discriminator's loss on real samples; `logits` are its output before the sigmoid, if any."""
    return F.relu(1 - logits).mean() if kind == "hinge" else _bce_or_lsgan(logits, 1.0, kind)


def gan_fake(logits: Tensor, kind: str = "nsgan") -> Tensor:
    """The discriminator's loss on generated samples."""
    return F.relu(1 + logits).mean() if kind == "hinge" else _bce_or_lsgan(logits, 0.0, kind)


def gan_generator(logits: Tensor, kind: str = "nsgan") -> Tensor:
    """The generator's (non-saturating) loss on the discriminator's output for its samples."""
    return -logits.mean() if kind == "hinge" else _bce_or_lsgan(logits, 1.0, kind)


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over layers of mean |D_i(fake) - D_i(real)| (pix2pixHD; EdgeConnect equation 3)."""
    return torch.stack([F.l1_loss(f, r.detach()) for f, r in zip(fake, real, strict=True)]).sum()


def gram_matrix(features: Tensor) -> Tensor:
    """Gram matrices [B,C,C] of [B,C,H,W]: F F^T / (C H W)."""
    b, c, h, w = features.shape
    f = features.view(b, c, h * w)
    return torch.bmm(f, f.transpose(1, 2)) / (c * h * w)


def gram_matrices(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Gram matrices of each layer: `perceptual_loss` of two of these is `style_loss` of the features."""
    return {name: gram_matrix(f) for name, f in features.items()}


def perceptual_loss(fake: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of mean |phi_i(fake) - phi_i(real)| (Johnson et al. 2016)."""
    return torch.stack([F.l1_loss(fake[name], real[name]) for name in real]).sum()


def style_loss(fake: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of the mean absolute difference of Gram matrices (Gatys et al. 2016)."""
    return torch.stack([F.l1_loss(gram_matrix(fake[name]), gram_matrix(real[name])) for name in real]).sum()


def l1_over_hole(output: Tensor, truth: Tensor, mask_mean: Tensor) -> Tensor:
    """mean |output - truth| / mean(mask): the l1 loss normalised by the hole area (EdgeConnect section 3.2).

    `mask_mean` is a scalar; it is clamped to one hole pixel per photograph, for batches without a hole.
    """
    return F.l1_loss(output, truth) / mask_mean.clamp_min(1 / (truth.shape[2] * truth.shape[3]))


def masked_l2(output: Tensor, truth: Tensor, weight: Tensor, mask_mean: Tensor | None = None) -> Tensor:
    """mean of weight * (output - truth)^2 over all pixels (Pathak et al. 2016, equation 1; Iizuka et al. 2017, equation 2).

    weight [...,H,W]: the mask, or a weight map. `mask_mean`, a scalar: normalised by the hole area, as `l1_over_hole`.
    """
    loss = (weight * (output - truth) ** 2).mean()
    return loss if mask_mean is None else loss / mask_mean.clamp_min(1 / (truth.shape[2] * truth.shape[3]))


def masked_l1(output: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """mean of mask * |output - truth| over all pixels, not only those of the mask (Liu et al. 2018, section 3.3)."""
    return ((output - truth).abs() * mask).mean()


def dilate(mask: Tensor) -> Tensor:
    """Dilate a mask [B,1,H,W] in {0,1} by one pixel, diagonally too."""
    return F.max_pool2d(mask, 3, 1, 1)


def total_variation(image: Tensor, region: Tensor | None = None) -> Tensor:
    """Absolute differences of horizontal and vertical neighbours of image [B,C,H,W], H and W at least 2.

    region [B,1,H,W] in {0,1}: the sum over pairs with both pixels in it, divided by the number of elements of image
    (Liu et al. 2018, section 3.3: the hole dilated by a pixel). None: the mean over all horizontal pairs plus the mean
    over all vertical ones, as in naoto0804/pytorch-inpainting-with-partial-conv; S x S px have S (S - 1) of each.
    """
    across, down = (image.diff(dim=dim).abs() for dim in (3, 2))
    if region is None:
        return across.mean() + down.mean()
    across = across * (region[..., 1:] * region[..., :-1])
    down = down * (region[..., 1:, :] * region[..., :-1, :])
    return (across.sum() + down.sum()) / image.numel()


def wgan_critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
    """mean(D(fake)) - mean(D(real)), the loss of a Wasserstein critic. The generator's is `gan_generator(..., "hinge")`."""
    return on_fake.mean() - on_real.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor, mask: Tensor
) -> Tensor:
    """mean of (||mask * gradient of D|| - 1)^2 (Gulrajani et al. 2017; masked: DeepFill v1, section 3.3).

    real, fake [B,C,H,W], mask [B,1,H,W]; the gradient is taken at real + alpha (fake - real), alpha [B] in [0,1], and
    its norm over each photograph. Needs grad mode; the inputs get no gradient.
    """
    interpolated = torch.lerp(real, fake, alpha.to(real).view(-1, 1, 1, 1)).detach().requires_grad_()
    with torch.compiler.set_stance("force_eager"):  # compiled code cannot be differentiated twice
        scores = critic(interpolated)
    (gradient,) = torch.autograd.grad(scores.sum(), interpolated, create_graph=True)
    return ((torch.linalg.vector_norm((gradient * mask).flatten(1), dim=1) - 1) ** 2).mean()


def discount_map(side: int, gamma: float, released: bool = True) -> Tensor:
    """Weights gamma^l [side,side] of the spatially discounted l1 (DeepFill v1, section 3.2): l is a pixel's distance in
    pixels to the nearest known pixel beside the box.

    released: as in the released code, where l is 0 in the first row and column and 1 in the last; else 1 at all sides.
    """
    i = torch.arange(side)
    distance = torch.minimum(i if released else i + 1, side - i)
    return gamma ** torch.minimum(distance[:, None], distance).float()
