"""Private names of torch 2.13 that the networks use. tests/test_private.py checks that they exist, as for
pipelines/private."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm

PRIVATE_APIS: dict[str, tuple[str, str]] = {
    "torch.nn.utils.parametrizations._SpectralNorm": (
        "finds the spectral norms of a network, to pause their power iteration",
        "each further forward pass of a discriminator changes its weights: micro-batches change a step's result",
    ),
}
"""name -> (use, consequence if torch drops it)"""


def find_spectral_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The spectral norms (torch.nn.utils.parametrizations.spectral_norm) in the modules and their children."""
    return [norm for module in modules for norm in module.modules() if isinstance(norm, _SpectralNorm)]
