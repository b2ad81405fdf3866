"""How a public PyTorch implementation of a model lays out its state dicts, as data for the importer.

Facts of those repositories (names, shapes, order of layers), none of their code. A model has a layout only if our
network computes the same function from the same tensors; differences around the network are stated in `notes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

StateDict = dict[str, Tensor]
OptionValues = dict[str, Any]


@dataclass(frozen=True)
class NetworkLayout:
    """A state dict of the public implementation, and the network of ours that it fills. Patterns are regular
    expressions of tensor names."""

    network: str
    file_pattern: str
    """Usual file name, for error messages."""
    signature_pattern: str
    """Matches a tensor that no state dict of another layout has; without prefixes and norms."""
    module_names: Callable[[OptionValues], list[str]]
    """Public modules with tensors, in the order of ours."""
    accepts: Callable[[StateDict], bool] = lambda state: True
    """Whether a state dict with the signature is this network."""
    ignored_pattern: str = r"(?!)"
    """Public tensors that are not weights."""
    zero_pattern: str = r"(?!)"
    """Our tensors to set to 0 if the file does not have them."""


@dataclass(frozen=True)
class CheckpointLayout:
    """A public implementation of a model."""

    source: str
    license_name: str
    network_layouts: tuple[NetworkLayout, ...]
    """Several layouts of the same network are alternatives: a file has one of them."""
    read_options: Callable[[dict[str, StateDict], Mapping[str, Any]], OptionValues]
    """Our options, from the shapes (per network) and the implementation's own configuration file, if any.
    Never raises: missing tensors are reported later, when keys are compared."""
    read_image_size: Callable[[OptionValues, Mapping[str, Any]], Any]
    """Side of its training photographs in pixels."""
    notes: Callable[[OptionValues], tuple[str, ...]] = lambda options: ()
    """Notes for the user on a model with these options."""
    discriminator_pattern: str = r"(?!)"
    """Matches a tensor of its discriminators, which completion does not need."""
    convert: Callable[[StateDict, OptionValues], tuple[StateDict, OptionValues]] = lambda state, options: (
        state,
        options,
    )
    """Changes the generator's tensors, already under our names, so that our network computes the same function."""


def dim_size(state: Mapping[str, Tensor], key: str, dim: int = 0) -> int | None:
    """Size of a tensor's dimension, under spectral norm too; None if there is no such tensor or dimension."""
    tensor = state.get(key, state.get(f"{key}_orig"))
    return tensor.shape[dim] if tensor is not None and tensor.ndim > dim else None


def width_ratio(state: Mapping[str, Tensor], key: str, base: int) -> float:
    """The width option: a layer's channels over the paper's `base`; 1 if there is no such layer."""
    return (dim_size(state, key) or base) / base


def count_keys(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of keys that match a regular expression completely."""
    return sum(1 for key in state if re.fullmatch(pattern, key))
