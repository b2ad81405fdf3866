"""Context Encoders: Feature Learning by Inpainting. Pathak, Krahenbuhl, Donahue, Darrell, Efros. CVPR 2016: the
networks for holes of any shape and position, random blocks and random regions.

`architecture` paper is that of section 3: AlexNet's convolutions, a channel-wise fully connected layer and five
up-convolutions; released is that of the published code, the centre network with one more up-convolution. Images are in
[-1,1] inside, and the output covers the full window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

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
    SmallConfig,
    global_mask_mean,
)
from models.context_encoder import FILL_COLORS, Discriminator
from models.context_encoder import Generator as CenterGenerator
from models.hole_crop import resampling_matrix
from models.layers import ChannelwiseLinear, scale_channels
from models.losses import gan_fake, gan_generator, gan_real, masked_l2

MIN_MAP_SIZE = 6  # pixels: side of the channel-wise layer's map at the paper's 227 px, and its minimum


@dataclass(frozen=True)
class ContextEncoderRegionOptions:
    architecture: str = "paper"
    """paper: AlexNet's encoder and the channel-wise fully connected layer; released: the code's, with a bottleneck."""
    size: int = 227
    """Side of the training window in pixels, at least 32; a power of two with released (the code's is 128)."""
    width: float = 1.0
    """Scales all channel counts, also the bottleneck; 1 is the paper's."""
    groups: int = 2
    """Groups of AlexNet's second, fourth and fifth convolution: 2 (Caffe's network, as in the paper) or 1."""
    bottleneck: int = 4000
    """Of the released architecture."""
    fill_color: str = "paper"
    """Colour of the hole: the ImageNet mean, or "released": the mean in the released code's channel order."""
    lambda_rec: float = 0.999
    """Weight of the l2 reconstruction loss."""
    lambda_adv: float | None = None
    """None: 0.001 with released, 0 with paper, whose adversarial loss diverged with AlexNet. 0: reconstruction loss only,
    without a discriminator."""
    lr_generator: float = 2e-3
    """Learning rate of the encoder and decoder."""
    lr_discriminator: float = 2e-4
    """Learning rate of the discriminator."""

    def __post_init__(self) -> None:
        name = "context_encoder_region"
        if self.architecture not in ("paper", "released"):
            raise ValueError(f"{name} architecture {self.architecture!r} is neither paper nor released")
        if self.size < 32 or (self.architecture == "released" and self.size & (self.size - 1)):
            raise ValueError(f"{name} size {self.size}: at least 32, and a power of two with released")
        if self.fill_color not in FILL_COLORS:
            raise ValueError(f"{name} fill_color {self.fill_color!r} is none of {', '.join(FILL_COLORS)}")
        if self.width <= 0 or self.bottleneck < 1:
            raise ValueError(f"{name} width and bottleneck must be positive")
        if self.groups not in (1, 2):
            raise ValueError(f"{name} groups {self.groups} is neither 1 nor 2")
        if self.lambda_rec < 0 or self.adversarial_weight < 0:
            raise ValueError(f"{name} lambda_rec and lambda_adv must not be negative")

    @property
    def adversarial_weight(self) -> float:
        """lambda_adv, or the architecture's default."""
        if self.lambda_adv is None:
            return 0.001 if self.architecture == "released" else 0.0
        return self.lambda_adv


# -- the paper's network -----------------------------------------------------------------------------------------


class AlexNet(nn.Sequential):
    """conv1 to pool5 (Krizhevsky et al. 2012): [B,3,227,227] -> [B,256,6,6]; convolutions with ReLU, no normalisation.

    The three max-pools halve the map. With smaller windows the last ones are omitted, so that the map keeps at least
    the paper's 6 x 6 pixels: `pool_count` is their number, `map_size` the side of the map.
    """

    def __init__(self, size: int, width: float, groups: int) -> None:
        # even, for two groups
        c1, c2, c3, c4, c5 = (2 * scale_channels(c // 2, width) for c in (96, 256, 384, 384, 256))
        g = groups
        map_size, pool_count = (size - 11) // 4 + 1, 0  # 55
        while pool_count < 3 and (map_size - 3) // 2 + 1 >= MIN_MAP_SIZE:
            map_size, pool_count = (map_size - 3) // 2 + 1, pool_count + 1  # 27, 13, 6

        def pool(number: int) -> list[nn.Module]:
            return [nn.MaxPool2d(3, 2)] if number <= pool_count else []

        def conv(c_in: int, c_out: int, kernel: int, groups: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, kernel, 1, kernel // 2, groups=groups), nn.ReLU(inplace=True)]

        super().__init__(
            *[nn.Conv2d(3, c1, 11, 4), nn.ReLU(inplace=True), *pool(1)],
            *[*conv(c1, c2, 5, g), *pool(2)],
            *[*conv(c2, c3, 3), *conv(c3, c4, 3, g), *conv(c4, c5, 3, g), *pool(3)],
        )
        self.map_size, self.pool_count, self.channels = map_size, pool_count, c5


class UpConvolutions(nn.Sequential):
    """Five up-convolutions, n -> 2n - 1 pixels each: [B,256,6,6] -> [B,3,161,161] in [-1,1].

    `layer_count`: the last ones only, two more than the encoder has pools. ReLU between them; the paper does not say what
    follows the last, here tanh as in the released code.
    """

    def __init__(self, c_in: int, width: float, layer_count: int) -> None:
        channels = [c_in, *(scale_channels(c, width) for c in (128, 64, 64, 32)[5 - layer_count :]), 3]
        layers: list[nn.Module] = []
        for a, b in pairwise(channels):
            layers += [nn.ConvTranspose2d(a, b, 5, 2, 2), nn.ReLU(inplace=True)]
        super().__init__(*layers[:-1], nn.Tanh())


class RegionGenerator(nn.Module):
    """[B,3,S,S] -> [B,3,S,S], both in [-1,1]: AlexNet, channel-wise fully connected layer, 1x1 convolution over the
    channels, up-convolutions, and a resize to the window."""

    def __init__(self, size: int, width: float, groups: int) -> None:
        super().__init__()
        self.size = size
        self.encoder = AlexNet(size, width, groups)
        c = self.encoder.channels
        self.channelwise = ChannelwiseLinear(c, self.encoder.map_size)
        self.mix = nn.Conv2d(c, c, 1)
        self.decoder = UpConvolutions(c, width, self.encoder.pool_count + 2)
        self._init_weights()

    def _init_weights(self) -> None:
        """The paper does not state its initialisation: He et al. 2015, which keeps the variance through ReLU layers."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.channelwise.weight, 0.0, 1 / self.encoder.map_size)

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.channelwise(self.encoder(x)))
        image = self.decoder(F.relu(self.mix(code)))
        return F.interpolate(image, (self.size, self.size), mode="bilinear", align_corners=False)


class RegionDiscriminator(nn.Module):
    """[B,3,S,S] in [-1,1] -> logits [B,1,1,1]: the centre network's discriminator with one more layer, for the full
    window.

    Windows that are not a power of two (227) are resized to the next smaller one (128).
    """

    def __init__(self, size: int, width: float) -> None:
        super().__init__()
        self.size = 1 << (size.bit_length() - 1)
        self.judge = Discriminator(2 * self.size, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return self.judge(x)


# -- the model ---------------------------------------------------------------------------------------------------


class ContextEncoderRegion(Model):
    """Trains on the batch's masks, `size` x `size` px. The released architecture has batch norm, on CPUs with each rank's
    own statistics; the paper's has none."""

    name: ClassVar[str] = "context_encoder_region"
    Options: ClassVar[type] = ContextEncoderRegionOptions
    precisions: ClassVar[Mapping[HardwareKind, Precision]] = {"amx": Precision(bfloat16=True)}
    small_config: ClassVar[SmallConfig] = SmallConfig(
        {"size": 32, "width": 0.125, "lambda_adv": 0.001},
        image_size=32,
        overfit_steps={"train": 150},
        overfit_lr=1e-3,
    )
    options: ContextEncoderRegionOptions
    fill_color: Tensor

    def __init__(self, options: ContextEncoderRegionOptions) -> None:
        super().__init__(options)
        o = options
        paper = o.architecture == "paper"
        generator = (
            RegionGenerator(o.size, o.width, o.groups)
            if paper
            else CenterGenerator(o.size, o.width, o.bottleneck, full_window=True)
        )
        self.networks = nn.ModuleDict(
            {"generator": generator, "discriminator": RegionDiscriminator(o.size, o.width)}
        )
        rates = {"generator": o.lr_generator, "discriminator": o.lr_discriminator}
        trained = ("generator", "discriminator") if o.adversarial_weight > 0 else ("generator",)
        self.phases = (
            Phase(
                "train",
                steps=116_000,  # as for the centre network: the paper does not state it
                generators=("generator",),
                discriminators=trained[1:],
                lr={name: rates[name] for name in trained},
                betas=(0.5, 0.999),
            ),
        )
        fill_color = torch.tensor(FILL_COLORS[o.fill_color]).view(1, 3, 1, 1) / 127.5 - 1
        self.register_buffer("fill_color", fill_color, persistent=False)

    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """`output` of the network and `image`, the completed window: both [B,3,S,S] in [-1,1]."""
        image, hole, s = batch["image"] * 2 - 1, batch["mask"] > 0.5, self.options.size
        if image.shape[2:] != (s, s):
            raise ValueError(
                f"context_encoder_region of size {s} trains on {s}x{s} px, not {tuple(image.shape[2:])}"
            )
        if self.options.architecture == "released" and len(image) < 2 and self.networks["generator"].training:
            raise ValueError(
                "context_encoder_region needs a batch of at least 2 on each rank (batch norm of a 1x1 map)"
            )
        output = self.networks["generator"](torch.where(hole, self.fill_color.to(image), image))
        return {"output": output, "image": torch.where(hole, output, image)}

    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        if not phase.discriminators:
            return {}
        d = self.networks["discriminator"]
        return {"discriminator": gan_real(d(batch["image"] * 2 - 1)) + gan_fake(d(out["image"].detach()))}

    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        """rec: the squared error in the hole, divided by the hole's area (equation 1)."""
        truth, mask = batch["image"] * 2 - 1, batch["mask"]
        losses = {"rec": masked_l2(out["output"], truth, mask, global_mask_mean(batch))}
        if phase.discriminators:
            losses["adv"] = gan_generator(self.networks["discriminator"](out["image"]))
        return losses

    def weights(self, phase: Phase) -> dict[str, float]:
        rec = {"rec": self.options.lambda_rec}
        return (
            {**rec, "adv": self.options.adversarial_weight, "discriminator": 1.0}
            if phase.discriminators
            else rec
        )

    def _build_completion(self) -> Completion:
        return RegionCompletion(self.networks["generator"], self.options.size, self.fill_color)


class RegionCompletion(Completion):
    """Resizes the photograph, whatever its aspect ratio, to the window and the output back. A photograph of the window's
    size is not resampled."""

    fill_color: Tensor

    def __init__(self, generator: nn.Module, size: int, fill_color: Tensor) -> None:
        super().__init__()
        self.generator, self.size = generator, size
        self.register_buffer("fill_color", fill_color.clone(), persistent=False)

    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        s = self.size
        known = 1 - hole.to(image.dtype)
        rows, columns = (self._resize_matrix(image, dim, s) for dim in (2, 3))
        known_fraction = rows @ known @ columns.transpose(2, 3)  # of each pixel of the window
        window = (rows @ image @ columns.transpose(2, 3)) / known_fraction.clamp_min(1e-6)
        window = torch.where(known_fraction < 0.5, self.fill_color.to(image), window * 2 - 1)
        output = self.generator(window)
        rows, columns = (self._resize_matrix(image, dim, s, back=True) for dim in (2, 3))
        return (rows @ output @ columns.transpose(2, 3) + 1) / 2

    def _resize_matrix(self, image: Tensor, dim: int, size: int, back: bool = False) -> Tensor:
        """The matrix [1,1,to,from] that resizes a dimension of the photograph to the window, or back."""
        side = image.shape[dim]
        one = torch.ones(1, dtype=image.dtype, device=image.device)
        step = one * size / side if back else one * side / size
        return (
            resampling_matrix(one * 0, step, side, size)[:, None]
            if back
            else resampling_matrix(one * 0, step, size, side)[:, None]
        )
