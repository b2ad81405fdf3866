"""bfloat16 on CPUs: which convolutions oneDNN computes right, and float32 for the others.

torch 2.13's oneDNN has wrong gradients in bfloat16 for some shapes: parts of them are unwritten memory, and some calls
write outside their buffers. `is_proven` is a set of shapes in which the scan of tests/bfloat16 found no fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.private.torch import convolutions_replaced

_torch_conv2d, _torch_conv_transpose2d = F.conv2d, F.conv_transpose2d


def is_proven(
    map_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    contiguous: bool,
) -> bool:
    """Whether oneDNN computes a convolution's output and gradients right in bfloat16; all arguments (height, width).

    contiguous: whether the input and the weight are, unlike in channels_last. Outside the set, torch 2.13 is wrong for
    maps of 1 or 2 pixels a side, mostly at strides above 1, and for dilated convolutions in channels_last.
    """
    if groups > 1 or any(side <= k for side, k in zip(map_size, kernel, strict=True)):
        return False
    return contiguous or max(dilation) == 1


@contextmanager
def proven_bfloat16() -> Iterator[None]:
    """Inside this context, convolutions outside the proven set run in float32 though autocast is on."""
    with convolutions_replaced(_conv2d, _conv_transpose2d):
        yield


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if _needs_float32(input, weight, stride, dilation, groups):
        with torch.autocast("cpu", enabled=False):
            input, weight, bias = input.float(), weight.float(), None if bias is None else bias.float()
            return _torch_conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _torch_conv2d(input, weight, bias, stride, padding, dilation, groups)


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    if _needs_float32(input, weight, stride, dilation, groups):
        with torch.autocast("cpu", enabled=False):
            input, weight, bias = input.float(), weight.float(), None if bias is None else bias.float()
            return _torch_conv_transpose2d(
                input, weight, bias, stride, padding, output_padding, groups, dilation
            )
    return _torch_conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _needs_float32(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> bool:
    return torch.is_autocast_enabled("cpu") and not is_proven(
        input.shape[2:],
        weight.shape[2:],
        _pair(stride),
        _pair(dilation),
        groups,
        input.is_contiguous() and weight.is_contiguous(),
    )


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value
