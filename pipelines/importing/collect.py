"""Finds the networks of a layout in the files that a user names, and words the error if one is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import build_model
from models.checkpoint_layout import CheckpointLayout, NetworkLayout
from pipelines.importing.checkpoint_files import SUFFIXES, OptimizerStateOnly, UnsafeCheckpoint, read_tensors
from pipelines.importing.layouts import all_layouts
from pipelines.importing.matching import (
    NetworkTensors,
    averaged_networks,
    contains_key,
    describe_network,
    find_networks,
    fold_weight_norm,
    format_keys,
    normalize_key,
)
from pipelines.importing.unsupported_checkpoints import UnsupportedCheckpoint, find_unsupported


@dataclass(frozen=True)
class NetworkSource:
    """The tensors of one network, and the file that they are from."""

    file: Path
    layout: NetworkLayout
    tensors: NetworkTensors


@dataclass
class CollectedFiles:
    """The contents of the files to import."""

    networks: dict[str, NetworkSource] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unmatched: list[tuple[Path, dict[str, Tensor], bool]] = field(default_factory=list)
    """(file, its tensors, whether the user named the file), for files without a network of the layout."""
    unreadable: list[ValueError] = field(default_factory=list)
    """Errors of files that were found in a folder and cannot be read."""
    optimizer_only: list[ValueError] = field(default_factory=list)
    """Errors of files with only an optimizer's state; ignored if other files hold the networks."""


def collect_files(name: str, layout: CheckpointLayout, files: Sequence[str | Path]) -> CollectedFiles:
    """Read all files; find the layout's networks in them. ValueError: a file that the user named is of no use."""
    collected = CollectedFiles()
    for path, named in _paths(files):
        if path.suffix == ".json":
            collected.config |= _read_json(path)
            continue
        try:
            tensors = fold_weight_norm(read_tensors(path))
        except OptimizerStateOnly as error:
            collected.optimizer_only.append(error)
            continue
        except ValueError as error:
            foreign = None
            if isinstance(error, UnsafeCheckpoint):
                foreign = find_unsupported([normalize_key(key) for key in error.strings])
            if foreign is not None:
                error = ValueError(_unsupported_message(name, path, foreign))
            if named:
                raise error from None
            collected.unreadable.append(error)
            continue
        networks = _networks_in_file(layout, tensors, path, collected.notes)
        for source in networks:
            network = source.layout.network
            if network in collected.networks:
                first_file = collected.networks[network].file
                raise ValueError(f"{first_file} and {path} both hold the {network}: name one of them")
            collected.networks[network] = source
        if not networks:
            collected.unmatched.append((path, tensors, named))
    for path, tensors, named in collected.unmatched:
        if named and not (
            collected.networks and contains_key([*map(normalize_key, tensors)], layout.discriminator_pattern)
        ):
            raise ValueError(_mismatch_message(name, layout, path, tensors))
    return collected


def _networks_in_file(
    layout: CheckpointLayout, tensors: dict[str, Tensor], path: Path, notes: list[str]
) -> list[NetworkSource]:
    """The layout's networks in one file.

    ValueError: the file holds a network several times, and not exactly one of them is a moving average.
    """
    networks: dict[str, NetworkSource] = {}
    for network_layout in layout.network_layouts:
        matches = [
            match
            for match in find_networks(tensors, network_layout.signature_pattern)
            if network_layout.accepts(match.state)
        ]
        if len(matches) > 1 and len(averaged_networks(matches)) == 1:
            matches = averaged_networks(matches)
            notes.append(f"of the weights in {path.name}, those of {matches[0].prefix}, which are averages")
        if len(matches) > 1:
            prefixes = ", ".join(match.prefix or "no prefix" for match in matches)
            raise ValueError(
                f"{path} holds the {network_layout.network} {len(matches)} times ({prefixes}): "
                "save the one you want in a file of its own"
            )
        if matches:
            networks[network_layout.network] = NetworkSource(path, network_layout, matches[0])
    return list(networks.values())


def missing_networks_message(
    name: str,
    layout: CheckpointLayout,
    collected: CollectedFiles,
    networks: Sequence[str],
    files: Sequence[str | Path],
) -> str:
    """The error if `networks` of the layout are in none of the files, and the likely reason."""
    file_names = _file_names(layout, networks)
    reasons = [str(error) for error in collected.unreadable]
    if collected.networks:
        found_in = ", ".join(dict.fromkeys(c.file.name for c in collected.networks.values()))
        problem = f"{name} needs {' and '.join(file_names)} too: name it beside {found_in}, or their folder"
    else:
        paths = ", ".join(str(file) for file in files)
        problem = f"{paths}: no generator of {layout.source} there (one is called {' or '.join(file_names)})"
        are_discriminators = [
            contains_key([*map(normalize_key, tensors)], layout.discriminator_pattern)
            for _, tensors, _ in collected.unmatched
        ]
        if not all(are_discriminators):
            path, tensors, _ = collected.unmatched[are_discriminators.index(False)]
            reasons.insert(0, _mismatch_message(name, layout, path, tensors))
        reasons += [str(error) for error in collected.optimizer_only]
    return "; ".join([problem, *reasons[:1]])


def _file_names(layout: CheckpointLayout, networks: Sequence[str]) -> list[str]:
    """The usual file names of networks of the layout."""
    return list(
        dict.fromkeys(
            network_layout.file_pattern
            for network_layout in layout.network_layouts
            if network_layout.network in networks
        )
    )


def _mismatch_message(name: str, layout: CheckpointLayout, path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The error for a file with none of the layout's networks: what the file holds instead."""
    state = {normalize_key(key): tensor for key, tensor in tensors.items()}
    known = " or ".join(_file_names(layout, [part.network for part in layout.network_layouts]))
    if contains_key(state, layout.discriminator_pattern):
        return (
            f"{path} cannot become {name}: it holds a discriminator, which cannot complete images; name the "
            f"generator's file (one is called {known})"
        )
    for other, other_layout in all_layouts().items():
        if other != name and any(
            part.accepts(match.state)
            for part in other_layout.network_layouts
            for match in find_networks(tensors, part.signature_pattern)
        ):
            return f"{path} cannot become {name}: it looks like {other}'s ({other_layout.source}): inpaint import {other}"
    if foreign := find_unsupported(state):
        return _unsupported_message(name, path, foreign)
    with torch.device("meta"):
        networks = build_model(name).networks
    ours = " and ".join(
        dict.fromkeys(
            describe_network(networks[p.network].state_dict(), with_name=False)
            for p in layout.network_layouts
            if p.network in networks
        )
    )
    return (
        f"{path} cannot become {name}: its tensors ({format_keys(list(state))}) are not those of {known} of "
        f"{layout.source}; it has {describe_network(state)}; {name} has {ours}"
    )


def _unsupported_message(name: str, path: Path, foreign: UnsupportedCheckpoint) -> str:
    return f"{path} cannot become {name}: it is {foreign.description}, and {foreign.reason}"


def _paths(files: Sequence[str | Path]) -> Iterator[tuple[Path, bool]]:
    """(file, whether the user named it) for the files and those in folders, each file once."""
    visited: set[Path] = set()
    for item in map(Path, files):
        if item.is_dir():
            inside = sorted(
                path for path in item.iterdir() if path.is_file() and not path.name.startswith(".")
            )
            paths = [p for p in inside if p.suffix.lower() in SUFFIXES or p.name == "config.json"]
        elif item.is_file():
            paths = [item]
        else:
            raise ValueError(f"there is no file {item}")
        for path in paths:
            if path.resolve() not in visited:
                visited.add(path.resolve())
                yield path, path is item


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
