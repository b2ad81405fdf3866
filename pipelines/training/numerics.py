"""Torch helpers of the learner: float inputs, flat gradients, memory formats, torch.compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipelines.private.torch import lerp_all

RECOMPILE_LIMIT = 64  # compiled graphs per function


class CompilationError(ValueError):
    """torch.compile does not work on this machine."""


def compile_networks(networks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile in place, at the first call. State dicts keep their keys; copies of a network are not compiled.

    A network needs one graph for each way it is used: trained, frozen, without gradients, in evaluation, per shape
    and data type. torch counts the graphs of all networks together, and above its limit of 8 it silently runs
    uncompiled: the limit is raised here.
    """
    import torch.compiler.config as settings  # its first import takes a second

    settings.recompile_limit = max(RECOMPILE_LIMIT, settings.recompile_limit)
    # without it, a network whose forward is that of nn.Sequential is not compiled (pytorch issue 150915)
    with settings.patch(wrap_top_frame=True):  # type: ignore[attr-defined]
        for network in networks:
            network.compile(backend=backend, dynamic=False)


@contextmanager
def shorten_compiler_errors() -> Iterator[None]:
    """Raise CompilationError, one line, in place of the compiler's error of several pages."""
    from pipelines.private.torch import compiler_error_type

    try:
        yield
    except compiler_error_type() as error:
        inner = error.inner_exception  # type: ignore[attr-defined]
        lines = str(inner).strip().splitlines() or [type(inner).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0]).strip()
        raise CompilationError(
            f"train.compile does not work here: {reason}. It needs a C++ compiler (g++) and Python's headers; "
            "without them, leave train.compile out"
        ) from error


def to_float_tensor(value: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Convert the stream's arrays to the model's inputs; float tensors pass unchanged.

    Images uint8 [B,H,W,3] -> float32 [B,3,H,W] in [0,1]; masks and edges [B,H,W] -> float32 [B,1,H,W].
    """
    if value.is_floating_point():
        return value
    if value.ndim == 3:
        return value.unsqueeze(1).float()
    return value.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format).mul_(1 / 255)


def flatten_gradients(network: nn.Module) -> Tensor:
    """Allocate one flat tensor for all gradients of a network; each parameter's `grad` becomes a view of it."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    first = parameters[0]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=first.device, dtype=first.dtype)
    for parameter, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        # strided like the parameter, which may be channels_last
        parameter.grad = view.as_strided(parameter.shape, parameter.stride())
    return flat


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's moments the memory format of their parameters.

    Fused Adam iterates over both in the order of memory, and the state may come from a learner with another format.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter).copy_(value)


@torch.no_grad()
def update_averages(averages: Mapping[str, Tensor], values: Mapping[str, Tensor], weight: float) -> None:
    """Move averages towards the values by `weight` of the difference, in place; integers are copied."""
    floats = [key for key, value in values.items() if value.is_floating_point()]
    lerp_all([averages[key] for key in floats], [values[key] for key in floats], weight)
    for key in values.keys() - set(floats):
        averages[key].copy_(values[key])


@contextmanager
def requires_grad_off(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Switch off requires_grad of the trainable parameters inside this context."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
