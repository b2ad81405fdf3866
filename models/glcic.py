"""Globally and Locally Consistent Image Completion. Iizuka, Simo-Serra, Ishikawa. SIGGRAPH 2017.

A fully convolutional completion network C, and a discriminator D of the whole image and a patch around the hole. Images
are in [0,1] throughout. Defaults are the paper's; options name the differences of the released port ("port" below is
GLCIC-PyTorch: the authors released no training code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
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
    global_mask_mean,
    sample_uniform,
)
from models.checkpoint_layout import CheckpointLayout, NetworkLayout, OptionValues, StateDict, width_ratio
from models.hole_crop import crop, crop_corner
from models.layers import crop_to, pad_to_multiple, scale_channels
from models.losses import gan_fake, gan_generator, gan_real, masked_l2

PLACES365_MEAN = (0.4578, 0.4414, 0.4078)  # mean of Places365's training photographs at 256 px
OPTION_CHOICES = {
    "reduction": ("hole", "image"),
    "gan": ("minimax", "nsgan"),
    "discriminator_input": ("completed", "output"),
    "optimizer": ("adadelta", "adam"),
}


@dataclass(frozen=True)
class GLCICOptions:
    size: int = 256
    """Side of the training window in pixels: a power of two, at least 32. The side of D's local patch is half of it."""
    width: float = 1.0
    """Scales all channel counts, also of the fully connected layers; 1 is the paper's."""
    mean_color: Sequence[float] = PLACES365_MEAN
    """C's input in the hole: the mean colour of the training set, RGB in [0,1]. The default is that of Places365."""
    alpha: float = 0.0004
    """Weight of the adversarial loss in the joint phase; 0: none."""
    reduction: str = "hole"
    """Mean of the squared error: over the hole, or, "image" (port), over the whole image: at 256 px about 1/5 of it."""
    gan: str = "minimax"
    """C minimises log(1 - D) (paper), or, "nsgan", -log D (port): non-saturating, its gradient does not vanish while D is
    confident."""
    discriminator_input: str = "completed"
    """D sees C's output in the hole and the known pixels outside, or, "output" (port), C's raw output everywhere."""
    scale_discriminator: bool = False
    """Multiply D's loss in the joint phase by alpha / 2, as in the port."""
    optimizer: Literal["adadelta", "adam"] = "adadelta"
    """adadelta (paper) or adam."""
    lr: float = 1.0
    """Adadelta's learning rate."""
    lr_adam: float = 4e-4
    """Adam's learning rate (mmagic's)."""

    def __post_init__(self) -> None:
        if self.size < 32 or self.size & (self.size - 1):
            raise ValueError(f"glcic size {self.size} is not a power of two of at least 32")
        if self.width <= 0 or self.alpha < 0:
            raise ValueError("glcic width must be positive and alpha not negative")
        for option, known in OPTION_CHOICES.items():
            if (value := getattr(self, option)) not in known:
                raise ValueError(f"glcic {option} {value!r} is none of {', '.join(known)}")
        if len(self.mean_color) != 3 or not all(0 <= c <= 1 for c in self.mean_color):
            raise ValueError(f"glcic mean_color {self.mean_color} is not three numbers in [0,1]")
        object.__setattr__(self, "mean_color", tuple(self.mean_color))  # recipes give a list


def _conv_bn_relu(
    c_in: int, c_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def _deconv_bn_relu(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class Generator(nn.Module):
    """C: image [B,3,H,W], mask [B,1,H,W] (1 = hole) -> [B,3,H,W] in (0,1); H, W multiples of 4.

    The receptive field of its innermost units is 287x287 px. The image is not seen under the mask. Initialisation is
    torch's: the paper does not state one.
    """

    mean: Tensor

    def __init__(self, width: float = 1.0, mean_color: Sequence[float] = PLACES365_MEAN) -> None:
        super().__init__()
        c32, c64, c128, c256 = (scale_channels(c, width) for c in (32, 64, 128, 256))
        self.body = nn.Sequential(
            *_conv_bn_relu(4, c64, kernel=5),
            *_conv_bn_relu(c64, c128, stride=2),  # H/2
            *_conv_bn_relu(c128, c128),
            *_conv_bn_relu(c128, c256, stride=2),  # H/4
            *_conv_bn_relu(c256, c256),
            *_conv_bn_relu(c256, c256),
            *_conv_bn_relu(c256, c256, dilation=2),
            *_conv_bn_relu(c256, c256, dilation=4),
            *_conv_bn_relu(c256, c256, dilation=8),
            *_conv_bn_relu(c256, c256, dilation=16),
            *_conv_bn_relu(c256, c256),
            *_conv_bn_relu(c256, c256),
            *_deconv_bn_relu(c256, c128),  # H/2
            *_conv_bn_relu(c128, c128),
            *_deconv_bn_relu(c128, c64),  # H
            *_conv_bn_relu(c64, c32),
            nn.Conv2d(c32, 3, 3, padding=1),
            nn.Sigmoid(),
        )
        self.register_buffer("mean", torch.tensor(mean_color).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.body(torch.cat([torch.where(mask > 0.5, self.mean, image), mask], dim=1))


class Branch(nn.Sequential):
    """[B,3,S,S] -> [B,1024]: stride-2 convolutions down to 4x4, and a fully connected layer. Small S omit the last
    convolutions: the global branch at 256 px has six, the local one at 128 px five."""

    def __init__(self, size: int, width: float) -> None:
        levels = size.bit_length() - 3
        channels = [3, *(scale_channels(c, width) for c in [64, 128, 256, *[512] * levels][:levels])]
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(channels):
            layers += _conv_bn_relu(c_in, c_out, kernel=5, stride=2)  # S/2 ... 4
        fc = nn.Linear(channels[-1] * 4 * 4, scale_channels(1024, width))
        super().__init__(*layers, nn.Flatten(), fc, nn.ReLU(inplace=True))


class Discriminator(nn.Module):
    """D: image [B,3,S,S] and patch [B,3,S/2,S/2] -> logits [B,1]."""

    def __init__(self, size: int, width: float = 1.0) -> None:
        super().__init__()
        self.whole = Branch(size, width)
        self.local = Branch(size // 2, width)
        self.fc = nn.Linear(2 * scale_channels(1024, width), 1)

    def forward(self, image: Tensor, patch: Tensor) -> Tensor:
        return self.fc(torch.cat([self.whole(image), self.local(patch)], dim=1))


# -- public checkpoints ---------------------------------------------------------------------------------------


_DECONV_LAYERS = (13, 15)
_LAYER_COUNT = 17


def _public_module_names(options: OptionValues) -> list[str]:
    modules = []
    for i in range(1, _LAYER_COUNT + 1):
        modules += [f"deconv{i}" if i in _DECONV_LAYERS else f"conv{i}", f"bn{i}"]
    return modules[:-1]  # no norm after the last


def _read_public_options(states: dict[str, StateDict], config: Mapping[str, Any]) -> OptionValues:
    width = width_ratio(states["generator"], "conv1.weight", 64)
    return {"width": width, **({"mean_color": config["mpv"]} if "mpv" in config else {})}


def _fold_batch_norms(state: StateDict, options: OptionValues) -> tuple[StateDict, OptionValues]:
    """Convert conv-ReLU-BN (port) to conv-BN-ReLU, exactly, for fixed statistics.

    BN scales each channel by a and shifts it by b, and the next layer is linear. Its weights are multiplied by a; the
    shift becomes a further input channel of ones, with weights times b. A bias cannot replace that channel: the
    next layer pads BN's output with zeros, so at the border there is no b. So each layer gets one more channel, which
    is always 1, and, as channel counts are rounded, some that are 0. Our own batch norms become the identity.
    """
    width = (options["width"] * 32 + 0.6) / 32  # at least one channel more at each of the widths
    new_options = {**options, "width": width}
    with torch.device("meta"):
        shapes = Generator(width).state_dict()
    folded = {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in shapes.items()}
    scale, shift = torch.ones(4, dtype=torch.float64), None
    for i in range(_LAYER_COUNT):
        conv, norm = f"body.{3 * i}", f"body.{3 * i + 1}"
        # [c_out,c_in,k,k]; a transposed convolution's is [c_in,c_out,k,k]
        axes = (1, 0) if i + 1 in _DECONV_LAYERS else (0, 1)
        weight = state[f"{conv}.weight"].double().movedim(axes, (0, 1))
        target = folded[f"{conv}.weight"].movedim(axes, (0, 1))
        c_out, c_in = weight.shape[:2]
        target[:c_out, :c_in] = weight * scale.view(-1, 1, 1)
        if shift is not None:
            target[:c_out, c_in] = (weight * shift.view(-1, 1, 1)).sum(1)
        folded[f"{conv}.bias"][:c_out] = state[f"{conv}.bias"]
        if i < _LAYER_COUNT - 1:
            folded[f"{conv}.bias"][c_out] = 1
            gamma, beta, mean, var = (
                state[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + 1e-5)
            shift = beta - mean * scale
            folded[f"{norm}.running_var"].fill_(1)
            folded[f"{norm}.weight"].fill_((1 + 1e-5) ** 0.5)
    return {key: value.to(shapes[key].dtype) for key, value in folded.items()}, new_options


LAYOUT = CheckpointLayout(
    source="otenim/GLCIC-PyTorch",
    license_name="MIT",
    network_layouts=(
        NetworkLayout("generator", "model_cn_step*", r"deconv13\.weight", _public_module_names),
    ),
    read_options=_read_public_options,
    read_image_size=lambda options, config: config.get("cn_input_size", 160),
    notes=lambda options: (
        "the port has batch norm after the activation, the paper before it: each is folded into the next layer, which "
        "is the same function, with one more channel per layer",
        "the colour of the hole in the network's input is mpv of the port's config.json, if that is among the files, "
        "else Places365's mean colour (--set mean_color=[R,G,B])",
    ),
    discriminator_pattern=r"(model_ld|model_gd)\..*",
    convert=_fold_batch_norms,
)


class GLCIC(Model):
    """Trains on `size` x `size` crops; completes any size.

    On CPUs each rank's batch norm uses the statistics of its own part of the batch: the result depends on the number of
    ranks, and the parts should not be small (the port's author saw worse results below 16 photographs). On GPUs the
    caller that sets up the ranks can synchronise them (SyncBatchNorm).
    """

    name: ClassVar[str] = "glcic"
    Options: ClassVar[type] = GLCICOptions
    size_multiple: ClassVar[int] = 4
    published_training: ClassVar[PublishedTraining] = PublishedTraining(
        device_hours=2 * 30 * 24 * 4,
        device="a K80",
        source="two months on four, Iizuka et al. 2017",
        batch_size=96,
        image_size=256,
        steps_range=(5e5, 5e5),
    )
    precisions: ClassVar[Mapping[HardwareKind, Precision]] = {
        "amx": Precision(bfloat16=True, channels_last=True),
        "avx512_bf16": Precision(channels_last=True),  # bfloat16 was not measured there
        "cpu": Precision(channels_last=True),
    }
    small_config: ClassVar[SmallConfig] = SmallConfig(
        {"size": 32, "width": 0.125},
        image_size=32,
        overfit_steps={"completion": 150, "discriminator": 5, "joint": 60},
    )
    checkpoint_layout: ClassVar[CheckpointLayout] = LAYOUT
    options: GLCICOptions

    def __init__(self, options: GLCICOptions) -> None:
        super().__init__(options)
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(options.width, options.mean_color),
                "discriminator": Discriminator(options.size, options.width),
            }
        )
        lr = options.lr if options.optimizer == "adadelta" else options.lr_adam
        c, d = ("generator",), ("discriminator",)

        def phase(
            name: str, steps: int, generators: tuple[str, ...], discriminators: tuple[str, ...]
        ) -> Phase:
            rates = dict.fromkeys((*generators, *discriminators), lr)
            return Phase(name, steps, generators, discriminators, rates, optimizer=options.optimizer)

        self.phases = (
            phase("completion", 90_000, c, ()),  # T_C
            phase("discriminator", 10_000, (), d),  # T_D
            phase("joint", 400_000, c, d),  # to T_train = 500,000
        )

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        image, s = batch["image"], self.options.size
        if image.shape[2:] != (s, s):
            raise ValueError(f"glcic of size {s} trains on {s}x{s} px, not {tuple(image.shape[2:])}")
        return {"image": self.networks["generator"](image, batch["mask"])}

    # -- the discriminator's inputs ------------------------------------------------------------------------------

    def random_corner(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Top, left [B] of a random patch in each photograph."""
        max_offset = self.options.size - self.options.size // 2
        # clamped, as float32 may round a number up to 1
        top, left = (
            (sample_uniform(batch, i) * (max_offset + 1)).long().clamp(max=max_offset) for i in (0, 1)
        )
        return top, left

    def _discriminate(self, image: Tensor, corner: tuple[Tensor, Tensor]) -> Tensor:
        """D's logits [B,1] for the image and its patch at `corner`."""
        return self.networks["discriminator"](image, crop(image, *corner, self.options.size // 2))

    def _fake_logits(self, batch: Batch, output: Tensor) -> Tensor:
        """D's logits for C's output."""
        image, mask = batch["image"], batch["mask"]
        raw = self.options.discriminator_input == "output"
        fake = output if raw else torch.where(mask > 0.5, output, image)
        return self._discriminate(fake, crop_corner(mask, self.options.size // 2))

    # -- losses -------------------------------------------------------------------------------------------------

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        on_real = self._discriminate(batch["image"], self.random_corner(batch))
        on_fake = self._fake_logits(batch, out["image"].detach())
        return {"discriminator": gan_real(on_real) + gan_fake(on_fake)}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        image, mask = batch["image"], batch["mask"]
        area = global_mask_mean(batch) if self.options.reduction == "hole" else None
        losses = {"rec": masked_l2(out["image"], image, mask, area)}
        if "adv" in self.weights(phase):
            on_fake = self._fake_logits(batch, out["image"])
            # -gan_fake is mean(log(1 - D))
            losses["adv"] = gan_generator(on_fake) if self.options.gan == "nsgan" else -gan_fake(on_fake)
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        weights: dict[str, float] = {}
        joint = bool(phase.generators and phase.discriminators)
        if phase.generators:
            weights["rec"] = 1.0
        if joint and self.options.alpha:
            weights["adv"] = self.options.alpha
        if phase.discriminators:
            scaled = joint and self.options.scale_discriminator
            weights["discriminator"] = self.options.alpha / 2 if scaled else 1.0
        return weights

    # -- completion ---------------------------------------------------------------------------------------------

    def _build_completion(self) -> Completion:
        return GLCICCompletion(self.networks["generator"])


class GLCICCompletion(Completion):
    """C, at any size."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image, mask = (pad_to_multiple(x, 4) for x in (image, hole.to(image.dtype)))
        return crop_to(self.generator(image, mask), height, width)
