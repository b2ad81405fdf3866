"""torch.compile of the networks that a learner trains, where torch by itself would stay uncompiled without a word.

torch._dynamo takes a second to import, as long as all the rest of torch: only who compiles pays for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

VARIANTS = 64  # graphs that one function may have


class CannotCompile(ValueError):
    """torch.compile does not work on this machine."""


def compile_networks(networks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile in place, at the first use. State dicts keep their keys, and copies of a network are not compiled.

    A network has a graph for each way it is used: trained, frozen, without gradients, in evaluation, with every shape
    and data type. torch counts those of all networks together, and leaves uncompiled what is over its limit of 8.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    # else a network whose forward is nn.Sequential's own is not compiled (pytorch issue 150915)
    with torch._dynamo.config.patch(wrap_top_frame=True):
        for network in networks:
            network.compile(backend=backend, dynamic=False)


@contextmanager
def compilation() -> Iterator[None]:
    """Says in one line what a compiler says in pages. Raises CannotCompile."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        lines = str(error.inner_exception).strip().splitlines() or [type(error.inner_exception).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0]).strip()
        raise CannotCompile(
            f"train.compile does not work here: {reason}. It needs a C++ compiler (g++) and Python's headers; "
            "without them leave it out"
        ) from error
