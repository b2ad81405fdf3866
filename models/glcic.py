"""Globally and Locally Consistent Image Completion. Iizuka, Simo-Serra, Ishikawa. SIGGRAPH 2017.

A fully convolutional completion network C, and a discriminator D that sees the whole image and a patch around the
hole. Images are in [0,1] throughout. Defaults are the paper's; options name where the released port differs
("port" below is GLCIC-PyTorch: the authors have released no training code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.base import Batch, Completion, Losses, Model, Phase, hole_mean, uniform
from models.layers import crop_to, pad_to_multiple, scaled
from models.losses import gan_fake, gan_generator, gan_real, masked_l2
from models.window import around, crop

PLACES = (0.4578, 0.4414, 0.4078)  # mean of Places365's training photographs at 256 px
CHOICES = {
    "reduction": ("hole", "image"),
    "gan": ("minimax", "nsgan"),
    "judged": ("completed", "output"),
    "optimiser": ("adadelta", "adam"),
}


@dataclass(frozen=True)
class GLCICOptions:
    size: int = 256
    """The training window in pixels: a power of two, at least 32. D's local patch is half as long."""
    width: float = 1.0
    """Scales every channel count, the fully connected layers' too; 1 is the paper's."""
    mean_colour: Sequence[float] = PLACES
    """What C sees in the hole: the training set's mean, RGB in [0,1]. The default is that of Places365."""
    alpha: float = 0.0004
    """Weight of the adversarial term in the joint phase; 0 leaves it out."""
    reduction: str = "hole"
    """The MSE is a mean over the hole, or over the whole "image" (port): at 256 px about a fifth of it."""
    gan: str = "minimax"
    """C minimises log(1 - D) as in the paper, or, "nsgan", -log D (port): the same aim, but a gradient that does not
    vanish while D is sure."""
    judged: str = "completed"
    """D sees C's output with the known pixels restored, or, "output" (port), all of C's output."""
    scale_discriminator: bool = False
    """Multiply D's loss in the joint phase by alpha / 2, as the port does."""
    optimiser: Literal["adadelta", "adam"] = "adadelta"
    lr: float = 1.0
    """Adadelta's factor."""
    lr_adam: float = 4e-4
    """Adam's learning rate (mmagic's)."""

    def __post_init__(self) -> None:
        if self.size < 32 or self.size & (self.size - 1):
            raise ValueError(f"glcic size {self.size} is not a power of two of at least 32")
        if self.width <= 0 or self.alpha < 0:
            raise ValueError("glcic width must be positive and alpha not negative")
        for option, known in CHOICES.items():
            if (value := getattr(self, option)) not in known:
                raise ValueError(f"glcic {option} {value!r} is neither of {', '.join(known)}")
        if len(self.mean_colour) != 3 or not all(0 <= c <= 1 for c in self.mean_colour):
            raise ValueError(f"glcic mean_colour {self.mean_colour} is not three numbers in [0,1]")
        object.__setattr__(self, "mean_colour", tuple(self.mean_colour))  # a recipe has a list


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def _deconv(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class Generator(nn.Module):
    """C: image [B,3,H,W], mask [B,1,H,W] (1 = hole) -> [B,3,H,W] in (0,1); H, W multiples of 4.

    Its innermost units see 287x287 px. What the image holds under the mask is not seen. The paper names no
    initialisation: torch's.
    """

    mean: Tensor

    def __init__(self, width: float = 1.0, mean_colour: Sequence[float] = PLACES) -> None:
        super().__init__()
        c32, c64, c128, c256 = (scaled(c, width) for c in (32, 64, 128, 256))
        self.body = nn.Sequential(
            *_conv(4, c64, kernel=5),
            *_conv(c64, c128, stride=2),  # H/2
            *_conv(c128, c128),
            *_conv(c128, c256, stride=2),  # H/4
            *_conv(c256, c256),
            *_conv(c256, c256),
            *_conv(c256, c256, dilation=2),
            *_conv(c256, c256, dilation=4),
            *_conv(c256, c256, dilation=8),
            *_conv(c256, c256, dilation=16),
            *_conv(c256, c256),
            *_conv(c256, c256),
            *_deconv(c256, c128),  # H/2
            *_conv(c128, c128),
            *_deconv(c128, c64),  # H
            *_conv(c64, c32),
            nn.Conv2d(c32, 3, 3, padding=1),
            nn.Sigmoid(),
        )
        self.register_buffer("mean", torch.tensor(mean_colour).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.body(torch.cat([torch.where(mask > 0.5, self.mean, image), mask], dim=1))


class Branch(nn.Sequential):
    """[B,3,S,S] -> [B,1024]: stride-2 convolutions down to 4x4, and a fully connected layer. Small S drops the last
    convolutions: 256 px has the global branch's six, 128 px the local one's five."""

    def __init__(self, size: int, width: float) -> None:
        levels = size.bit_length() - 3
        channels = [3, *(scaled(c, width) for c in [64, 128, 256, *[512] * levels][:levels])]
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(channels):
            layers += _conv(c_in, c_out, kernel=5, stride=2)  # S/2 ... 4
        fc = nn.Linear(channels[-1] * 4 * 4, scaled(1024, width))
        super().__init__(*layers, nn.Flatten(), fc, nn.ReLU(inplace=True))


class Discriminator(nn.Module):
    """D: image [B,3,S,S] and patch [B,3,S/2,S/2] -> logits [B,1]."""

    def __init__(self, size: int, width: float = 1.0) -> None:
        super().__init__()
        self.whole = Branch(size, width)
        self.local = Branch(size // 2, width)
        self.fc = nn.Linear(2 * scaled(1024, width), 1)

    def forward(self, image: Tensor, patch: Tensor) -> Tensor:
        return self.fc(torch.cat([self.whole(image), self.local(patch)], dim=1))


class GLCIC(Model):
    """Trains on `size` x `size` crops; completes any size.

    On CPUs batch norm has each rank's own statistics of its part of the batch: several ranks are not what one would
    be, and no part should be small (a port's author sees batches below 16 degrade). Synchronising them on GPUs
    (SyncBatchNorm) is the affair of who sets the ranks up.
    """

    name: ClassVar[str] = "glcic"
    Options: ClassVar[type] = GLCICOptions
    multiple: ClassVar[int] = 4
    options: GLCICOptions

    def __init__(self, options: GLCICOptions) -> None:
        super().__init__(options)
        self.networks = nn.ModuleDict(
            {
                "generator": Generator(options.width, options.mean_colour),
                "discriminator": Discriminator(options.size, options.width),
            }
        )
        lr = options.lr if options.optimiser == "adadelta" else options.lr_adam
        c, d = ("generator",), ("discriminator",)

        def phase(
            name: str, steps: int, generators: tuple[str, ...], discriminators: tuple[str, ...]
        ) -> Phase:
            rates = dict.fromkeys((*generators, *discriminators), lr)
            return Phase(name, steps, generators, discriminators, rates, optimiser=options.optimiser)

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

    # -- what D compares ----------------------------------------------------------------------------------------

    def anywhere(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Top, left [B] of a random patch of each photograph."""
        most = self.options.size - self.options.size // 2
        # clamped, as float32 may round a number up to 1
        corners = [(uniform(batch, i) * (most + 1)).long().clamp(max=most) for i in (0, 1)]
        return corners[0], corners[1]

    def _judge(self, image: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
        return self.networks["discriminator"](image, crop(image, *place, self.options.size // 2))

    def _fake(self, batch: Batch, output: Tensor) -> Tensor:
        """D's logits of C's output."""
        image, mask = batch["image"], batch["mask"]
        fake = output if self.options.judged == "output" else torch.where(mask > 0.5, output, image)
        return self._judge(fake, around(mask, self.options.size // 2))

    # -- losses -------------------------------------------------------------------------------------------------

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        on_real = self._judge(batch["image"], self.anywhere(batch))
        on_fake = self._fake(batch, out["image"].detach())
        return {"discriminator": gan_real(on_real) + gan_fake(on_fake)}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        image, mask = batch["image"], batch["mask"]
        area = hole_mean(batch) if self.options.reduction == "hole" else None
        losses = {"rec": masked_l2(out["image"], image, mask, area)}
        if "adv" in self.weights(phase):
            on_fake = self._fake(batch, out["image"])
            # -gan_fake is the mean of log(1 - D)
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
            scaled_down = joint and self.options.scale_discriminator
            weights["discriminator"] = self.options.alpha / 2 if scaled_down else 1.0
        return weights

    # -- completion ---------------------------------------------------------------------------------------------

    def _completion(self) -> Completion:
        return GLCICCompletion(self.networks["generator"])


class GLCICCompletion(Completion):
    """C, at any size."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image, mask = (pad_to_multiple(x, 4) for x in (image, hole.to(image.dtype)))
        return crop_to(self.generator(image, mask), height, width)
