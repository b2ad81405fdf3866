"""Layers that several papers share, and padding and cropping that export with dynamic sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from models.private import find_spectral_norms


def scale_channels(channels: int, width: float) -> int:
    """A paper's channel count times the width option (1 = the paper's): rounded, at least 1."""
    return max(1, round(channels * width))


def init_normal_(module: nn.Module) -> nn.Module:
    """DCGAN's initialisation, in place: convolutions N(0, 0.02), batch norm scales N(1, 0.02), biases 0.

    Call it before spectral norm is added: afterwards `weight` is no longer a parameter.
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

    Call it before spectral norm is added.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def add_spectral_norm_(module: nn.Module) -> nn.Module:
    """Add spectral norm to every convolution of an initialised module, in place (Miyato et al. 2018)."""
    for layer in list(module.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            spectral_norm(layer)
    return module


@contextmanager
def freeze_power_iteration(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No power iteration inside the block: forward passes leave the normalised weights unchanged."""
    norms = [norm for norm in find_spectral_norms(modules) if norm.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def fold_spectral_norm_(module: nn.Module) -> nn.Module:
    """Replace every spectrally normalised weight by a plain parameter, in place.

    parametrize.remove_parametrizations cannot be used: it removes `weight` from the class, which deep copies share.
    """
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            weight = layer.weight.detach().clone()  # type: ignore[operator, union-attr]
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            layer.weight = nn.Parameter(weight)
    return module


class ChannelwiseLinear(nn.Module):
    """Channel-wise fully connected layer (Pathak et al. 2016, section 3.1): each of the `channels` maps of
    `size` x `size` has its own full matrix; no information passes between maps.

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

    One convolution computes both: features in the first half of its channels, gates in the second. Zero padding keeps
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
            # channels_last: the halves are strided, and the activations slow on them
            features, gates = features.clone(), gates.clone()
        return self.activation(features) * torch.sigmoid(gates)


class PartialConv2d(nn.Conv2d):
    """Partial convolution (Liu et al. 2018, section 3.1): W^T (X . M) sum(1)/sum(M) + b where the window contains a valid
    pixel, else 0.

    Masks are 1 = valid, 0 = hole, as in the paper and unlike everywhere else in this project. A mask is
    [B,1,H,W], shared by all channels, or [B,C,H,W]. Zero padding counts as hole. The new mask [B,1,H',W'] is 1 where
    the window contained a valid pixel. X is never used where M is 0, even if it is NaN. Masks have no parameters.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = False
    ) -> None:
        super().__init__(c_in, c_out, kernel, stride, padding, bias=bias)
        self.pool_args = (kernel, stride, padding)
        self.window_size = c_in * kernel * kernel  # sum(1)

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor, skip: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B,C,H,W] and its mask -> y [B,c_out,H',W'] and its mask [B,1,H',W']; C is c_in.

        skip: features [B,S,H,W] and their mask, as if concatenated to x and its mask; then C + S is c_in.
        """
        masked = torch.where(mask > 0, x, 0)
        valid = _count_valid_channels(x, mask)
        if skip is not None:
            skip_x, skip_mask = skip
            masked = torch.cat([masked, torch.where(skip_mask > 0, skip_x, 0)], dim=1)
            valid = valid + _count_valid_channels(skip_x, skip_mask)
        # sum(M), one channel whatever the number of channels of M. By pooling: convolutions may use algorithms that
        # round. Without divisor_override: torch's ONNX exporter ignores it
        total = (F.avg_pool2d(valid, *self.pool_args) * self.pool_args[0] ** 2).round()
        covered = total > 0
        y = F.conv2d(masked, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        # under autocast y is bfloat16; masks stay float32, as their counts need more than its 8 bits
        y = y * torch.where(covered, self.window_size / total, 0).to(y.dtype)
        new_mask = covered.to(mask.dtype)
        if self.bias is not None:
            y = y + self.bias.view(1, -1, 1, 1).to(y.dtype) * new_mask.to(y.dtype)
        return y, new_mask


def _count_valid_channels(x: Tensor, mask: Tensor) -> Tensor:
    """Number of valid channels of x at each pixel [B,1,H,W]."""
    return mask * x.shape[1] if mask.shape[1] == 1 else mask.sum(1, keepdim=True)


def pad_to_multiple(x: Tensor, multiple: int, min_size: int = 1) -> Tensor:
    """Repeat the last row and column of [B,C,H,W] until both sides are multiples of `multiple`, and at least `min_size`
    (a multiple too).

    By index_select: F.pad would fix the example's size in an exported program.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        target = torch.sym_max((size + multiple - 1) // multiple, min_size // multiple) * multiple
        x = x.index_select(dim, torch.arange(target, device=x.device).clamp(max=size - 1))
    return x


def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """The top left height x width of [B,C,H,W]: the inverse of `pad_to_multiple`."""
    x = x.index_select(2, torch.arange(height, device=x.device))
    return x.index_select(3, torch.arange(width, device=x.device))
