"""bfloat16 on CPUs: which convolutions oneDNN computes right, and float32 for the others.

torch 2.13's oneDNN has wrong gradients in bfloat16 for some shapes: parts of them are unwritten memory, and some calls
write outside their buffers. `is_proven` is the set of shapes without a fault in tests/benchmarks/scan_bfloat16.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (F.conv2d, F.conv_transpose2d)


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
    a stride above 1 on a map of 1 or 2 pixels a side, and for dilated convolutions in channels_last.
    """
    if groups > 1 or any(side <= k for side, k in zip(map_size, kernel, strict=True)):
        return False
    return contiguous or max(dilation) == 1


class ProvenBfloat16(TorchFunctionMode):
    """Inside this context, convolutions outside the proven set run in float32 though autocast is on."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (
            func in _CONVOLUTIONS
            and torch.is_autocast_enabled("cpu")
            and not _is_proven_call(func, *args, **kwargs)
        ):
            with torch.autocast("cpu", enabled=False):
                args = tuple(_to_float32(value) for value in args)
                return func(*args, **{name: _to_float32(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _is_proven_call(func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
    """The set's answer for a call of F.conv2d or F.conv_transpose2d."""
    names = ("bias", "stride", "padding", "dilation", "groups")
    if func is F.conv_transpose2d:
        names = ("bias", "stride", "padding", "output_padding", "groups", "dilation")
    options = dict(zip(names, args)) | kwargs
    return is_proven(
        input.shape[2:],
        weight.shape[2:],
        _pair(options.get("stride", 1)),
        _pair(options.get("dilation", 1)),
        options.get("groups", 1),
        input.is_contiguous() and weight.is_contiguous(),
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]
