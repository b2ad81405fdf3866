"""Image Inpainting for Irregular Holes Using Partial Convolutions. Liu, Reda, Shih, Wang, Tao, Catanzaro. ECCV 2018.

A U-Net of partial convolutions, which see valid pixels only and pass on an updated mask. No discriminator. The authors
released the layer only; choices that the paper leaves open are explained where they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
)
from models.checkpoint_layout import (
    CheckpointLayout,
    NetworkLayout,
    OptionValues,
    StateDict,
    count_keys,
    width_ratio,
)
from models.features import IMAGENET_MEAN_STD, FeatureStack, load_feature_stack
from models.layers import PartialConv2d, crop_to, pad_to_multiple, scale_channels
from models.losses import dilate, gram_matrices, masked_l1, perceptual_loss, total_variation

# Psi_1 ... Psi_3 of the perceptual and style losses; for EfficientNet-Lite0 the layers of the same resolutions.
FEATURE_LAYERS = {
    "vgg16": ("pool1", "pool2", "pool3"),
    "efficientnet_lite0": ("stage1", "stage2", "stage3"),
}
# option -> mean and standard deviation per channel
NORMALIZATIONS = {"imagenet": IMAGENET_MEAN_STD, "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
TV_REGIONS = ("dilated", "whole")


@dataclass(frozen=True)
class PartialConvOptions:
    levels: int = 8
    """Stride-2 layers of the encoder, and as many of the decoder: 8 for 512 px (paper), 7 for 256 px, at least 3.
    Training sizes are multiples of 2**levels."""
    width: float = 1.0
    """Scales all channel counts; 1 is the paper's."""
    normalization: str = "imagenet"
    """Normalisation of the network's input and output, and of the losses valid, hole and tv: "imagenet" (mean 0 and
    standard deviation 1 per channel), or "symmetric", [-1,1]. The paper does not state it; ports use either."""
    lambda_valid: float = 1.0
    """Weight of the l1 on known pixels."""
    lambda_hole: float = 6.0
    """Weight of the l1 in the hole."""
    lambda_perceptual: float = 0.05
    """Weight of the perceptual loss."""
    lambda_style: float = 120.0
    """Weight of each of the two style losses."""
    lambda_tv: float = 0.1
    """Weight of the total variation loss."""
    tv_region: str = "dilated"
    """Region of the total variation loss: the hole dilated by a pixel, the sum divided by the number of elements of the
    image (paper), or "whole": the mean over all horizontal pairs of the composite plus that over all vertical ones, as
    in naoto0804/pytorch-inpainting-with-partial-conv."""
    features: str | Mapping[str, Any] = "vgg16"
    """vgg16, efficientnet_lite0, or a mapping: name, weights, sha256 and layers (a list). The defaults of
    lambda_perceptual and lambda_style are for vgg16; efficientnet_lite0 has larger features: use 0.02 and 0.5."""
    lr: float = 2e-4
    """Learning rate of the phase `train`."""
    lr_finetune: float = 5e-5
    """Learning rate of the phase `finetune`."""

    def __post_init__(self) -> None:
        if not 3 <= self.levels <= 12:
            raise ValueError(f"partial_conv levels {self.levels} is not in 3..12")
        if self.width <= 0:
            raise ValueError(f"partial_conv width {self.width} is not positive")
        for option, known in (("normalization", NORMALIZATIONS), ("tv_region", TV_REGIONS)):
            if (value := getattr(self, option)) not in known:
                raise ValueError(f"partial_conv {option} {value!r} is none of {', '.join(known)}")
        config = self.feature_config
        if unknown := set(config) - {"name", "weights", "sha256", "layers"}:
            raise ValueError(f"partial_conv features has no key {sorted(unknown)[0]!r}")
        if config.get("name") not in FEATURE_LAYERS:
            raise ValueError(
                f"partial_conv features {config.get('name')!r} is none of {', '.join(FEATURE_LAYERS)}"
            )

    @property
    def feature_config(self) -> dict[str, Any]:
        """`features` as a mapping."""
        return {"name": self.features} if isinstance(self.features, str) else dict(self.features)


class ImageNormalizer(nn.Module):
    """Normalises images in [0,1] for the network, and its output back; not part of the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalization: str) -> None:
        super().__init__()
        for name, value in zip(("mean", "std"), NORMALIZATIONS[normalization], strict=True):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


class PartialConvBlock(nn.Module):
    """Partial convolution, batch norm, activation. slope: that of the leaky ReLU (0: ReLU); None: no norm and no
    activation, but a bias."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int, slope: float | None, norm: bool = True
    ) -> None:
        super().__init__()
        self.conv = PartialConv2d(c_in, c_out, kernel, stride, kernel // 2, bias=slope is None)
        # He et al.'s initialisation; a slope of 1 means no ReLU
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
    """The U-Net: normalised image [B,3,H,W], valid [B,1,H,W] (1 = valid, 0 = hole) -> normalised image [B,3,H,W].

    H and W are multiples of 2**levels. The image is never read in the hole; the output is 0 where not even the
    bottleneck has seen a valid pixel. In training each rank's batch norm uses the statistics of its own part of the
    batch, as on the paper's single GPU; only rank 0's running statistics are kept.
    """

    def __init__(self, levels: int, width: float) -> None:
        super().__init__()
        down = [scale_channels(c, width) for c in ([64, 128, 256] + [512] * levels)[:levels]]
        kernels = ([7, 5, 5] + [3] * levels)[:levels]
        self.encoder = nn.ModuleList(
            PartialConvBlock(c_in, c_out, kernel, stride=2, slope=0.0, norm=i > 0)
            for i, ((c_in, c_out), kernel) in enumerate(zip(pairwise([3, *down]), kernels, strict=True))
        )
        up = [*down[-2::-1], 3]  # channels of each level's skip; the last level outputs an image
        self.decoder = nn.ModuleList(
            PartialConvBlock(c_in + c_skip, c_out, kernel=3, stride=1, slope=0.2 if i < levels - 1 else None)
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


# -- public checkpoints ---------------------------------------------------------------------------------------


def _public_module_names(options: OptionValues) -> list[str]:
    levels = options["levels"]
    modules = ["enc_1.conv.input_conv"]
    for block in (*(f"enc_{i}" for i in range(2, levels + 1)), *(f"dec_{i}" for i in range(levels, 1, -1))):
        modules += [f"{block}.conv.input_conv", f"{block}.bn"]
    return [*modules, "dec_1.conv.input_conv"]


def _read_public_options(states: dict[str, StateDict], config: Mapping[str, Any]) -> OptionValues:
    state = states["generator"]
    return {
        "levels": count_keys(state, r"enc_\d+\.conv\.input_conv\.weight(_orig)?") or 7,
        "width": width_ratio(state, "enc_1.conv.input_conv.weight", 64),
        "normalization": "imagenet",
    }


def _scale_weights(state: StateDict, options: OptionValues) -> tuple[StateDict, OptionValues]:
    """The port divides by sum(M), the paper multiplies by sum(1)/sum(M). With weights divided by sum(1), the number of
    weights per output channel, the two are equal. Both add the bias afterwards."""
    scaled = {key: w / w[0].numel() if key.endswith("conv.weight") else w for key, w in state.items()}
    return scaled, options


LAYOUT = CheckpointLayout(
    source="naoto0804/pytorch-inpainting-with-partial-conv",
    license_name="MIT",
    network_layouts=(
        NetworkLayout(
            "generator",
            "*.pth of its train.py",
            r"enc_1\.conv\.input_conv\.weight",
            _public_module_names,
            ignored_pattern=r".*\.mask_conv\.weight",  # ones
        ),
    ),
    read_options=_read_public_options,
    read_image_size=lambda options, config: 2 ** (options["levels"] + 1),
    notes=lambda options: (
        "the port's partial convolution omits the factor sum(1): the weights are divided by it, which gives the same "
        "function",
    ),
    convert=_scale_weights,
)


class PartialConv(Model):
    """Trains on the batch's masks, of any shape; training sizes are multiples of 2**levels pixels."""

    name: ClassVar[str] = "partial_conv"
    Options: ClassVar[type] = PartialConvOptions
    feature_loss_options: ClassVar[tuple[str, ...]] = ("lambda_perceptual", "lambda_style")
    published_training: ClassVar[PublishedTraining] = PublishedTraining(
        device_hours=10 * 24,
        device="a V100",
        source="ten days, Liu et al. 2018",
        batch_size=6,
        image_size=512,
    )
    precisions: ClassVar[Mapping[HardwareKind, Precision]] = {
        "amx": Precision(bfloat16=True, channels_last=True),
        "avx512_bf16": Precision(channels_last=True),  # bfloat16 was not measured there
        "cpu": Precision(channels_last=True),
    }
    small_config: ClassVar[SmallConfig] = SmallConfig(
        {
            "levels": 3,
            "width": 0.125,
            "features": "efficientnet_lite0",
            "lambda_perceptual": 0.02,
            "lambda_style": 0.5,
        },
        image_size=32,
        overfit_steps={"train": 100, "finetune": 20},
    )
    checkpoint_layout: ClassVar[CheckpointLayout] = LAYOUT
    options: PartialConvOptions

    def __init__(self, options: PartialConvOptions) -> None:
        super().__init__(options)
        self.size_multiple = 2**options.levels  # type: ignore[misc]  # of this instance, not of the class
        self.networks = nn.ModuleDict({"generator": Generator(options.levels, options.width)})
        self.normalizer = ImageNormalizer(options.normalization)

        def phase(name: str, steps: int, lr: float) -> Phase:
            return Phase(name, steps, ("generator",), (), {"generator": lr})

        # Steps are MMagic's for Places2: the paper states days only. Adam's betas are the default.
        self.phases = (
            phase("train", 800_000, options.lr),
            phase("finetune", 500_000, options.lr_finetune),
        )
        # in a tuple, so that it is not part of the state dict
        self._feature_stack: tuple[FeatureStack] | None = None

    def frozen_modules(self, phase: Phase) -> list[nn.Module]:
        """The encoder's batch norm during fine-tuning, so that holes do not shift its statistics (section 4.2)."""
        if phase.name != "finetune":
            return []
        encoder: nn.Module = self.networks["generator"].get_submodule("encoder")
        return [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        image: Tensor = batch["image"]
        b, _, h, w = image.shape
        m, generator = self.size_multiple, self.networks["generator"]
        if h % m or w % m:
            raise ValueError(
                f"partial_conv with {self.options.levels} levels trains on multiples of {m} px, not {h}x{w}"
            )
        if generator.training and b * h * w < 2 * m * m:
            raise ValueError(
                f"partial_conv with {self.options.levels} levels needs at least 2 photographs of {m}x{m} px on each "
                "rank, or larger ones (batch norm of a 1x1 map)"
            )
        return {"output": generator(self.normalizer.normalize(image), 1 - batch["mask"])}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        return {}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        image, mask, output = batch["image"], batch["mask"], out["output"]
        truth = self.normalizer.normalize(image)
        region = dilate(mask) if self.options.tv_region == "dilated" else None
        losses = {
            "valid": masked_l1(output, truth, 1 - mask),
            "hole": masked_l1(output, truth, mask),
            "tv": total_variation(torch.where(mask > 0, output, truth), region),
        }
        if self._feature_weights():
            output = self.normalizer.denormalize(output)
            losses |= self._feature_losses(output, torch.where(mask > 0, output, image), image)
        return losses

    def _feature_losses(self, output: Tensor, composite: Tensor, truth: Tensor) -> Losses:
        """Perceptual and style losses of images in [0,1]; each image passes through the feature stack once."""
        o, phi = self.options, self.feature_stack().to(truth)
        layers = o.feature_config.get("layers") or FEATURE_LAYERS[o.feature_config["name"]]
        with torch.no_grad():
            truth_features = phi(truth, layers)
        output_features, composite_features = phi(output, layers), phi(composite, layers)
        losses: Losses = {}
        if o.lambda_perceptual:
            losses["perceptual"] = perceptual_loss(output_features, truth_features) + perceptual_loss(
                composite_features, truth_features
            )
        if o.lambda_style:
            truth_grams = gram_matrices(truth_features)
            losses["style_out"] = perceptual_loss(gram_matrices(output_features), truth_grams)
            losses["style_comp"] = perceptual_loss(gram_matrices(composite_features), truth_grams)
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

    def feature_stack(self) -> FeatureStack:
        """The frozen stack for the perceptual and style losses, loaded on first use."""
        if self._feature_stack is None:
            config = self.options.feature_config
            stack = load_feature_stack(config["name"], config.get("weights"), config.get("sha256"))
            self._feature_stack = (stack,)
        return self._feature_stack[0]

    def load_loss_networks(self, phase: Phase) -> None:
        if self._feature_weights():
            self.feature_stack()

    def _build_completion(self) -> Completion:
        return PartialCompletion(self.networks["generator"], self.normalizer, self.size_multiple)


class PartialCompletion(Completion):
    """Pads sides to multiples of 2**levels, at least twice that. Padding counts as hole, as everything beyond the border
    does in the network's own zero padding."""

    def __init__(self, generator: nn.Module, normalizer: ImageNormalizer, size_multiple: int) -> None:
        super().__init__()
        self.generator, self.normalizer, self.size_multiple = generator, normalizer, size_multiple

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        m = self.size_multiple
        # twice: torch.export would specialise an exported program to a bottleneck that is one pixel wide
        image, valid = (pad_to_multiple(x, m, min_size=2 * m) for x in (image, (~hole).to(image.dtype)))
        rows, columns = (
            torch.arange(side, device=image.device) < end
            for side, end in zip(image.shape[2:], (height, width))
        )
        valid = valid * (rows[:, None] & columns)
        output = self.normalizer.denormalize(self.generator(self.normalizer.normalize(image), valid))
        return crop_to(output, height, width)
