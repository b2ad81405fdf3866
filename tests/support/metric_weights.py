"""Weights files of the networks of published scores, with random values: the true ones are in no package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from models.metric_networks import FidInception

VGG16_CONVS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def alexnet_like() -> nn.Sequential:
    """`torchvision.models.alexnet().features`, written out."""
    return nn.Sequential(
        *[nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)],
        *[nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)],
        *[nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)],
    )


def vgg16_like() -> nn.Sequential:
    """`torchvision.models.vgg16().features`, written out."""
    layers: list[nn.Module] = []
    c_in = 3
    for level in VGG16_CONVS:
        for c in level:
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
            c_in = c
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def random_inception() -> dict[str, Tensor]:
    """A state dict of the Inception of FID whose activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = FidInception().state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            state[key] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            state[key] = torch.rand(value.shape, generator=generator) + 0.5
        elif value.is_floating_point():
            state[key] = torch.randn(value.shape, generator=generator) * 0.1
    return state


def write_alexnet(path: Path) -> nn.Sequential:
    """Write the file; returns the network."""
    torch.manual_seed(0)
    return _write(alexnet_like(), path)


def write_vgg16(path: Path) -> nn.Sequential:
    """Write the file; returns the network."""
    torch.manual_seed(0)
    return _write(vgg16_like(), path)


def write_inception(path: Path) -> dict[str, Tensor]:
    """Write the file; returns the state dict."""
    state = random_inception()
    torch.save(state, path)
    return state


def _write(network: nn.Sequential, path: Path) -> nn.Sequential:
    torch.save({f"features.{key}": value for key, value in network.state_dict().items()}, path)
    return network.eval()
