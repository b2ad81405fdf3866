"""A user-defined model: this file, and `register`. An encoder-decoder completes the hole from its surroundings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.base import Batch, Completion, Losses, Model, Phase, SmallConfig
from models.layers import crop_to, pad_to_multiple, scale_channels
from models.losses import masked_l1

NAME, CLASS_PATH = "tiny", f"{__name__}:TinyModel"


@dataclass(frozen=True)
class TinyOptions:
    width: float = 1.0
    """Scales every channel count."""
    lambda_l1: float = 1.0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError("tiny width must be positive")


class Generator(nn.Sequential):
    """[B,4,H,W] -> [B,3,H,W] in (0,1); H, W multiples of 8."""

    def __init__(self, width: float) -> None:
        c = [4, *(scale_channels(n, width) for n in (16, 32, 64))]
        layers: list[nn.Module] = []
        for a, b in pairwise(c):  # H/2, H/4, H/8
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(c[-1], c[-1], 3, 1, 1), nn.LeakyReLU(0.2)]
        for a, b in pairwise([*c[:0:-1], 3]):  # H/4, H/2, H
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2)]
        super().__init__(*layers[:-1], nn.Sigmoid())


class TinyModel(Model):
    name: ClassVar[str] = NAME
    Options: ClassVar[type] = TinyOptions
    size_multiple: ClassVar[int] = 8
    small_config: ClassVar[SmallConfig] = SmallConfig(
        {"width": 0.5}, image_size=32, overfit_steps={"train": 120}
    )
    options: TinyOptions

    def __init__(self, options: TinyOptions) -> None:
        super().__init__(options)
        self.networks = nn.ModuleDict({"generator": Generator(options.width)})
        self.phases = (Phase("train", 1000, ("generator",), (), {"generator": options.lr}),)

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"output": _complete(self.networks["generator"], batch["image"], batch["mask"])}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        return {}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        return {"l1": masked_l1(out["output"], batch["image"], batch["mask"])}

    def weights(self, phase: Phase) -> dict[str, float]:
        return {"l1": self.options.lambda_l1}

    def _build_completion(self) -> Completion:
        return TinyCompletion(self.networks["generator"])


class TinyCompletion(Completion):
    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image, mask = (pad_to_multiple(x, 8, min_size=16) for x in (image, hole.to(image.dtype)))
        return crop_to(_complete(self.generator, image, mask), height, width)


def _complete(generator: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    return generator(torch.cat([image * (1 - mask), mask], dim=1))
