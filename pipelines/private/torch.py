"""Private APIs of torch 2.13 for the pipeline; those for the networks are in models/private.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = [
    "TorchDispatchMode",
    "compiler_error_type",
    "convolutions_replaced",
    "flop_formula",
    "lerp_all",
    "replace_tcp_store",
]

PRIVATE_APIS: dict[str, tuple[str, str]] = {
    "torch._dynamo.exc.BackendCompilerFailed": (
        "the error that holds the compiler's own message",
        "`train.compile` without g++ prints pages of torch's source instead of one line",
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": (
        "sees every operator of a step; the public FlopCounterMode does not work with a gradient penalty "
        "(RuntimeError: A leaf node was passed to _will_engine_execute_node, torch 2.13)",
        "`inpaint plan --photos` cannot count a step's operations",
    ),
    "torch.utils.flop_counter.flop_registry": (
        "the formula of each operator",
        "as without TorchDispatchMode",
    ),
    "torch.ops.aten.add.Tensor._overloadpacket": (
        "the key of an operator in the registry",
        "as without TorchDispatchMode",
    ),
    "torch.nn.functional.conv2d": (
        "replaced while a step runs: layers look the function up at each call. The public TorchFunctionMode sees every "
        "function, and takes 8 ms of a step of 60 ms",
        "convolutions that oneDNN computes wrong in bfloat16 are not kept in float32",
    ),
    "torch.nn.functional.conv_transpose2d": ("as conv2d", "as without conv2d"),
    "torch._foreach_lerp_": (
        "updates all moving averages in one call",
        "the averages are updated one tensor after the other, which takes a millisecond more",
    ),
    "torch.distributed.rendezvous.TCPStore": (
        "the class of the store that rank 0 opens, replaced by a function whose store listens on loopback",
        "the store listens on all networks, and whoever reaches it may write to it",
    ),
}


def compiler_error_type() -> type[Exception]:
    """The class of a failed compiler's error, whose `inner_exception` is the compiler's own.

    Imported only by those who compile: torch._dynamo takes a second to import, as long as all the rest of torch.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    return BackendCompilerFailed


def flop_formula(operator: Any) -> Callable[..., int] | None:
    """torch's FLOP formula for an operator that a TorchDispatchMode sees; None if there is none."""
    return flop_registry.get(operator._overloadpacket)


def replace_tcp_store(store: Callable[..., Any]) -> None:
    """For the rest of this process, process groups create their store with store(host, port, **options)."""
    module: Any = importlib.import_module(
        "torch.distributed.rendezvous"
    )  # the package has a function of this name
    module.TCPStore = store


@contextmanager
def convolutions_replaced(
    conv2d: Callable[..., Tensor], conv_transpose2d: Callable[..., Tensor]
) -> Iterator[None]:
    """Inside this context all layers call these functions in place of torch.nn.functional's."""
    functional: Any = torch.nn.functional
    originals = functional.conv2d, functional.conv_transpose2d
    functional.conv2d, functional.conv_transpose2d = conv2d, conv_transpose2d
    try:
        yield
    finally:
        functional.conv2d, functional.conv_transpose2d = originals


def lerp_all(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """average += weight (value - average) in place, for each pair: the same bits as Tensor.lerp_."""
    torch._foreach_lerp_(averages, values, weight)
