"""Layers that several papers share, and the tensor tricks that let any size through an exported program."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


def scaled(channels: int, width: float) -> int:
    """A paper's channel count at a width (1 = the paper's): rounded, at least 1."""
    return max(1, round(channels * width))


def init_normal_(module: nn.Module) -> nn.Module:
    """DCGAN's initialisation, in place: convolutions N(0, 0.02), batch norm scales N(1, 0.02), biases 0.

    Call it before spectral norm is put on a layer: afterwards `weight` is no longer a parameter.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def spectral_(module: nn.Module) -> nn.Module:
    """Spectral norm on every convolution of an initialised module, in place (Miyato et al. 2018)."""
    for layer in list(module.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            spectral_norm(layer)
    return module


def fold_spectral_(module: nn.Module) -> nn.Module:
    """Make every normalised weight a plain parameter, in place.

    Not by parametrize.remove_parametrizations, which takes `weight` off the class that a deep copy shares with
    its original.
    """
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            weight = layer.weight.detach().clone()  # type: ignore[operator, union-attr]
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            layer.weight = nn.Parameter(weight)
    return module


class ChannelwiseLinear(nn.Module):
    """Channel-wise fully connected layer (Pathak et al. 2016, section 3.1): each of `channels` maps of
    `size` x `size` has its own full matrix, and nothing passes from one map to another.

    [B, channels, size, size] -> the same shape; channels * size^4 weights (and channels * size^2 biases).
    """

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        n = size * size
        self.weight = nn.Parameter(torch.empty(channels, n, n).normal_(0.0, 0.02))
        self.bias = nn.Parameter(torch.zeros(channels, n)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bci,cij->bcj", x.flatten(2), self.weight)
        if self.bias is not None:
            y = y + self.bias
        return y.view_as(x)


def pad_to_multiple(x: Tensor, multiple: int, least: int = 1) -> Tensor:
    """Repeat the last row and column of [B,C,H,W] until both sides are multiples, and at least `least` (one too).

    Written as index_select because F.pad bakes the example's size into an exported program.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        target = torch.sym_max((size + multiple - 1) // multiple, least // multiple) * multiple
        x = x.index_select(dim, torch.arange(target, device=x.device).clamp(max=size - 1))
    return x


def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """The top left height x width of [B,C,H,W]: the way back from `pad_to_multiple`."""
    x = x.index_select(2, torch.arange(height, device=x.device))
    return x.index_select(3, torch.arange(width, device=x.device))
