"""Image Inpainting for Irregular Holes Using Partial Convolutions. Liu, Reda, Shih, Wang, Tao, Catanzaro. ECCV 2018.

A U-Net whose every convolution sees valid pixels only and hands on the mask of what it could see. No discriminator.
The authors released the layer alone; what the paper leaves open is named where it is decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Batch, Completion, Losses, Model, Phase
from models.features import IMAGENET, FeatureStack, load_features
from models.layers import PartialConv2d, crop_to, pad_to_multiple, scaled
from models.losses import dilate, grams, masked_l1, perceptual, total_variation

# Psi_1 ... Psi_3 of the perceptual and style terms; the second line is our analogue, at the same resolutions.
LAYERS = {
    "vgg16": ("pool1", "pool2", "pool3"),
    "efficientnet_lite0": ("stage1", "stage2", "stage3"),
}
RANGES = {"imagenet": IMAGENET, "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}  # mean, deviation
TV_REGIONS = ("dilated", "whole")


@dataclass(frozen=True)
class PartialConvOptions:
    levels: int = 8
    """Stride-2 layers of the encoder, as many of the decoder: 8 for 512 px (the paper's), 7 for 256, at least 3.
    Training sizes are multiples of 2**levels."""
    width: float = 1.0
    """Scales every channel count; 1 is the paper's."""
    image_range: str = "imagenet"
    """What the network sees and gives, and what valid, hole and tv are measured in: ImageNet-normalised images (its
    mean 0 and deviation 1 each channel), or "symmetric": [-1,1]. The paper does not say; ports do one or the other."""
    lambda_valid: float = 1.0
    lambda_hole: float = 6.0
    lambda_perceptual: float = 0.05
    lambda_style: float = 120.0
    """Of each of the two style terms."""
    lambda_tv: float = 0.1
    tv: str = "dilated"
    """Where total variation counts: the hole grown by a pixel (paper), or "whole": everywhere, as a port does."""
    features: str | Mapping[str, Any] = "vgg16"
    """vgg16, efficientnet_lite0, or a mapping: name, weights, sha256 and layers (a list). lambda_perceptual and
    lambda_style above are meant for vgg16; efficientnet_lite0's features are larger: 0.02 and 0.5 suit it."""
    lr: float = 2e-4
    lr_finetune: float = 5e-5

    def __post_init__(self) -> None:
        if not 3 <= self.levels <= 12:
            raise ValueError(f"partial_conv levels {self.levels} is not in 3..12")
        if self.width <= 0:
            raise ValueError(f"partial_conv width {self.width} is not positive")
        for option, known in (("image_range", RANGES), ("tv", TV_REGIONS)):
            if (value := getattr(self, option)) not in known:
                raise ValueError(f"partial_conv {option} {value!r} is none of {', '.join(known)}")
        stack = self.stack
        if unknown := set(stack) - {"name", "weights", "sha256", "layers"}:
            raise ValueError(f"partial_conv features has no key {sorted(unknown)[0]!r}")
        if stack.get("name") not in LAYERS:
            raise ValueError(f"partial_conv features {stack.get('name')!r} is none of {', '.join(LAYERS)}")

    @property
    def stack(self) -> dict[str, Any]:
        """`features` as a mapping."""
        return {"name": self.features} if isinstance(self.features, str) else dict(self.features)


class Range(nn.Module):
    """Images in [0,1] to the network's range and back; no part of the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_range: str) -> None:
        super().__init__()
        for name, value in zip(("mean", "std"), RANGES[image_range], strict=True):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def inner(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def outer(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


class Block(nn.Module):
    """Partial convolution, batch norm, activation. slope: the activation's below 0 (0: ReLU); None: neither norm nor
    activation, but a bias."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int, slope: float | None, norm: bool = True
    ) -> None:
        super().__init__()
        self.conv = PartialConv2d(c_in, c_out, kernel, stride, kernel // 2, bias=slope is None)
        # He et al.'s initialisation; a slope of 1 is no ReLU
        nn.init.kaiming_normal_(self.conv.weight, a=1.0 if slope is None else slope)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm = nn.BatchNorm2d(c_out) if norm and slope is not None else nn.Identity()
        self.activation = nn.Identity() if slope is None else nn.LeakyReLU(slope, inplace=True)

    def forward(
        self, x: Tensor, mask: Tensor, skip: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        x, mask = self.conv(x, mask, skip)
        return self.activation(self.norm(x)), mask


class Generator(nn.Module):
    """The U-Net: image [B,3,H,W] in the network's range, valid [B,1,H,W] (1 = valid, 0 = hole) -> image [B,3,H,W].

    H and W are multiples of 2**levels. The image's contents in the hole are never used; where not even the
    bottleneck has seen a valid pixel the output is 0. Batch norm is each rank's own in training, over its part
    of the batch, as the paper's single GPU has it; only rank 0's running statistics are kept.
    """

    def __init__(self, levels: int, width: float) -> None:
        super().__init__()
        down = [scaled(c, width) for c in ([64, 128, 256] + [512] * levels)[:levels]]
        kernels = ([7, 5, 5] + [3] * levels)[:levels]
        self.encoder = nn.ModuleList(
            Block(c_in, c_out, kernel, stride=2, slope=0.0, norm=i > 0)
            for i, ((c_in, c_out), kernel) in enumerate(zip(pairwise([3, *down]), kernels, strict=True))
        )
        up = [*down[-2::-1], 3]  # each level gives as many channels as its skip has, the last an image
        self.decoder = nn.ModuleList(
            Block(c_in + c_skip, c_out, kernel=3, stride=1, slope=0.2 if i < levels - 1 else None)
            for i, (c_in, c_skip, c_out) in enumerate(zip([down[-1], *up], up, up))
        )

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        x, mask = image, valid
        skips = []
        for block in self.encoder:
            skips.append((x, mask))
            x, mask = block(x, mask)  # H/2 ... H/2**levels
        for block in self.decoder:
            x, mask = (F.interpolate(t, scale_factor=2, mode="nearest") for t in (x, mask))
            x, mask = block(x, mask, skips.pop())  # ... H/2, H: the last skip is the image and its mask
        return x


class PartialConv(Model):
    """Learns to fill the batch's masks, whatever their shape; a training size is a multiple of 2**levels pixels."""

    name: ClassVar[str] = "partial_conv"
    Options: ClassVar[type] = PartialConvOptions
    options: PartialConvOptions

    def __init__(self, options: PartialConvOptions) -> None:
        super().__init__(options)
        self.multiple = 2**options.levels  # type: ignore[misc]  # of this instance, not of the class
        self.networks = nn.ModuleDict({"generator": Generator(options.levels, options.width)})
        self.range = Range(options.image_range)

        def phase(name: str, steps: int, lr: float) -> Phase:
            return Phase(name, steps, ("generator",), (), {"generator": lr})

        # Steps are MMagic's for Places2: the paper gives days. Adam's betas are the usual ones.
        self.phases = (
            phase("train", 800_000, options.lr),
            phase("finetune", 500_000, options.lr_finetune),
        )
        # in a tuple, so that it is no part of the state dict
        self._features: tuple[FeatureStack] | None = None

    def frozen(self, phase: Phase) -> list[nn.Module]:
        """The encoder's batch norm while fine-tuning: holes no longer shift its statistics (section 4.2)."""
        if phase.name != "finetune":
            return []
        encoder: nn.Module = self.networks["generator"].get_submodule("encoder")
        return [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        image: Tensor = batch["image"]
        b, _, h, w = image.shape
        m, generator = self.multiple, self.networks["generator"]
        if h % m or w % m:
            raise ValueError(
                f"partial_conv with {self.options.levels} levels trains on multiples of {m} px, not {h}x{w}"
            )
        if generator.training and b * h * w < 2 * m * m:
            raise ValueError(
                f"partial_conv with {self.options.levels} levels needs at least 2 photographs of {m}x{m} px on each "
                "rank, or larger ones (batch norm of a 1x1 map)"
            )
        return {"output": generator(self.range.inner(image), 1 - batch["mask"])}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        return {}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        image, mask, output = batch["image"], batch["mask"], out["output"]
        truth = self.range.inner(image)
        region = dilate(mask) if self.options.tv == "dilated" else None
        losses = {
            "valid": masked_l1(output, truth, 1 - mask),
            "hole": masked_l1(output, truth, mask),
            "tv": total_variation(torch.where(mask > 0, output, truth), region),
        }
        if self._feature_weights():
            output = self.range.outer(output)
            losses |= self._feature_losses(output, torch.where(mask > 0, output, image), image)
        return losses

    def _feature_losses(self, output: Tensor, composite: Tensor, truth: Tensor) -> Losses:
        """Images in [0,1], each of which goes through the stack once, for the perceptual and both style terms."""
        o, phi = self.options, self.features().to(truth)
        layers = o.stack.get("layers") or LAYERS[o.stack["name"]]
        with torch.no_grad():
            of_truth = phi(truth, layers)
        of_output, of_composite = phi(output, layers), phi(composite, layers)
        losses: Losses = {}
        if o.lambda_perceptual:
            losses["perceptual"] = perceptual(of_output, of_truth) + perceptual(of_composite, of_truth)
        if o.lambda_style:
            style = grams(of_truth)
            losses["style_out"] = perceptual(grams(of_output), style)
            losses["style_comp"] = perceptual(grams(of_composite), style)
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        o = self.options
        pixels = {"valid": o.lambda_valid, "hole": o.lambda_hole, "tv": o.lambda_tv}
        return pixels | self._feature_weights()

    def _feature_weights(self) -> dict[str, float]:
        o = self.options
        perceptual = {"perceptual": o.lambda_perceptual} if o.lambda_perceptual else {}
        style = {"style_out": o.lambda_style, "style_comp": o.lambda_style} if o.lambda_style else {}
        return perceptual | style

    def features(self) -> FeatureStack:
        """The frozen stack of the perceptual and style terms, loaded at its first use."""
        if self._features is None:
            stack = self.options.stack
            self._features = (load_features(stack["name"], stack.get("weights"), stack.get("sha256")),)
        return self._features[0]

    def prepare(self, phase: Phase) -> None:
        if self._feature_weights():
            self.features()

    def _completion(self) -> Completion:
        return PartialCompletion(self.networks["generator"], self.range, self.multiple)


class PartialCompletion(Completion):
    """Sides are padded to multiples of 2**levels, at least twice that. What is padded counts as hole, as everything
    beyond the border does in the network's own zero padding."""

    def __init__(self, generator: nn.Module, image_range: Range, multiple: int) -> None:
        super().__init__()
        self.generator, self.range, self.multiple = generator, image_range, multiple

    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        m = self.multiple
        # twice: an exported program takes a bottleneck one pixel wide for one that is always so
        image, valid = (pad_to_multiple(x, m, least=2 * m) for x in (image, (~hole).to(image.dtype)))
        rows, columns = (
            torch.arange(side, device=image.device) < end
            for side, end in zip(image.shape[2:], (height, width))
        )
        valid = valid * (rows[:, None] & columns)
        output = self.range.outer(self.generator(self.range.inner(image), valid))
        return crop_to(output, height, width)
