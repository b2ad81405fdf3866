"""Layers that several papers share, and the tensor tricks that let any size through an exported program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm


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


def init_glorot_(module: nn.Module) -> nn.Module:
    """TensorFlow's initialisation, in place: convolutions and dense layers Glorot-uniform, biases 0.

    Call it before spectral norm is put on a layer.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def spectral_(module: nn.Module) -> nn.Module:
    """Spectral norm on every convolution of an initialised module, in place (Miyato et al. 2018)."""
    for layer in list(module.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            spectral_norm(layer)
    return module


@contextmanager
def still_spectral(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a forward pass takes no power iteration: the layers are the same functions however often they are used."""
    found = [m for module in modules for m in module.modules() if isinstance(m, _SpectralNorm) and m.training]
    for norm in found:
        norm.training = False
    try:
        yield
    finally:
        for norm in found:
            norm.training = True


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


class GatedConv2d(nn.Module):
    """Gated convolution (DeepFill v2, Yu et al. 2019): activation(features) * sigmoid(gates).

    One convolution gives both, features in its first half of channels and gates in its second. Zero padding keeps
    the size: [B,c_in,H,W] -> [B,c_out,H/stride,W/stride], rounded up. `kernel` is odd.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        activation: Callable[[Tensor], Tensor] = F.elu,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(c_in, 2 * c_out, kernel, stride, padding, dilation)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        features, gates = y.chunk(2, dim=1)
        if not torch.compiler.is_exporting() and y.stride(1) == 1:
            # channels_last: halves of every pixel's numbers, through which the activations would crawl
            features, gates = features.clone(), gates.clone()
        return self.activation(features) * torch.sigmoid(gates)


class PartialConv2d(nn.Conv2d):
    """Partial convolution (Liu et al. 2018, section 3.1): W^T (X . M) sum(1)/sum(M) + b where the window has a valid
    pixel, else 0.

    Masks are 1 = valid, 0 = hole, as in the paper: the one place of this project where they are. A mask is
    [B,1,H,W], shared by all channels, or [B,C,H,W]. Zero padding counts as hole. The new mask [B,1,H',W'] is 1 where
    the window had a valid pixel. What X holds where M is 0 is never used, be it NaN. No parameter belongs to masks.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = False
    ) -> None:
        super().__init__(c_in, c_out, kernel, stride, padding, bias=bias)
        self.window = (kernel, stride, padding)
        self.ones = c_in * kernel * kernel  # sum(1)

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor, skip: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B,C,H,W] and its mask -> y [B,c_out,H',W'] and its mask [B,1,H',W']; C is c_in.

        skip: features [B,S,H,W] and their mask, as if concatenated to x and its mask; then C + S is c_in.
        """
        seen = torch.where(mask > 0, x, 0)
        valid = _valid_channels(x, mask)
        if skip is not None:
            features, its_mask = skip
            seen = torch.cat([seen, torch.where(its_mask > 0, features, 0)], dim=1)
            valid = valid + _valid_channels(features, its_mask)
        # sum(M), one channel however many M has. By pooling: convolutions may be computed in ways that round.
        # Not by its divisor_override: torch's ONNX exporter ignores that
        total = (F.avg_pool2d(valid, *self.window) * self.window[0] ** 2).round()
        covered = total > 0
        y = self._conv_forward(seen, self.weight, None) * torch.where(covered, self.ones / total, 0)
        new_mask = covered.to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.view(1, -1, 1, 1) * new_mask
        return y, new_mask


def _valid_channels(x: Tensor, mask: Tensor) -> Tensor:
    """How many channels of x are valid at each pixel [B,1,H,W]."""
    return mask * x.shape[1] if mask.shape[1] == 1 else mask.sum(1, keepdim=True)


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
