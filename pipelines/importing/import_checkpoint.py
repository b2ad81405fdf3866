"""Imports a public implementation's checkpoint and registers it as a version: reads it safely (checkpoint_files.py),
maps its tensors to our networks (layouts.py, matching.py), registers the model.

Only the networks that complete images are imported: no discriminators, no optimizer states.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from models import build_model
from models.base import Model
from models.checkpoint_layout import CheckpointLayout, OptionValues, StateDict
from pipelines.downloads import file_sha256
from pipelines.importing.collect import collect_files, missing_networks_message
from pipelines.importing.layouts import find_layout
from pipelines.importing.matching import (
    BATCH_NORM_COUNTER,
    describe_network,
    format_keys,
    match_tensors,
)
from pipelines.provenance import source_tags
from pipelines.recipe.load import read_yaml
from pipelines.registry.registration import register
from pipelines.tracking import runs
from pipelines.tracking.runs import Tracking


@dataclass(frozen=True)
class ImportedModel:
    """A model with a checkpoint's weights, in evaluation mode, and the origin of the weights."""

    model: Model
    size: int
    """Side of its training photographs in pixels."""
    files: tuple[tuple[str, str], ...]
    """Name and sha256 of each file used."""
    options: OptionValues
    """Read from the checkpoint, or passed to import_checkpoint."""
    layout: CheckpointLayout
    notes: tuple[str, ...]
    """Sentences for the user."""


def import_checkpoint(
    name: str, files: Sequence[str | Path], settings: Mapping[str, Any] | None = None, size: int | None = None
) -> ImportedModel:
    """The model `name` with the weights of `files`: checkpoints of its public implementation, or folders of them.

    A checkpoint is a state dict with any key prefix, nested in any dictionaries. If it also holds averaged weights
    (EMA), those are used. settings: options that cannot be read from the tensors' shapes, or that override those read.
    size: training size in pixels, if it is not the implementation's default.
    ValueError: an unknown model or option; a file that is missing, damaged, of another format or network, or holds more
    than tensors; tensors that are missing, unused or of another shape (the message lists the first ones).
    """
    layout = find_layout(name)
    collected = collect_files(name, layout, files)
    networks = collected.networks
    if not networks:
        raise ValueError(
            missing_networks_message(
                name,
                layout,
                collected,
                [network_layout.network for network_layout in layout.network_layouts],
                files,
            )
        )
    options = {
        **layout.read_options(
            {network: c.tensors.state for network, c in networks.items()}, collected.config
        ),
        **(settings or {}),
    }
    with torch.device("meta"):
        meta_model = build_model(name, **options)
    required = [
        network
        for network in dict.fromkeys(p.network for p in layout.network_layouts)
        if network in meta_model.networks
    ]
    if missing := [network for network in required if network not in networks]:
        raise ValueError(missing_networks_message(name, layout, collected, missing, files))
    state_dicts: dict[str, StateDict] = {}
    for network in required:
        source = networks[network]
        network_layout, our_network = source.layout, meta_model.networks[network]
        state_dicts[network], problems, skipped = match_tensors(
            source.tensors,
            our_network,
            network_layout.module_names(options),
            network_layout.ignored_pattern,
            network_layout.zero_pattern,
        )
        if problems:
            raise ValueError(
                f"{source.file} cannot become {name} in the layout of {layout.source}: tensors are "
                f"{'; '.join(problems)}; the file has {describe_network(source.tensors.state)}, "
                f"our {name} has {describe_network(our_network.state_dict(), with_name=False)}"
            )
        if skipped:
            collected.notes.append(
                f"left out of {source.file.name}, beside the network: {format_keys(skipped)}"
            )
        for key, value in state_dicts[network].items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{source.file} is damaged: {key} holds numbers that are not finite")
    if "generator" in state_dicts:
        state_dicts["generator"], options = layout.convert(state_dicts["generator"], options)
    model = build_model(name, **options).eval()
    for network, state in state_dicts.items():
        counters = {
            k: v for k, v in model.networks[network].state_dict().items() if k.endswith(BATCH_NORM_COUNTER)
        }
        model.networks[network].load_state_dict(counters | state)
    image_size = layout.read_image_size(options, collected.config) if size is None else size
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"{image_size!r} is not a training size in pixels: pass --size")
    digests = tuple((file.name, file_sha256(file)) for file in sorted({networks[n].file for n in required}))
    return ImportedModel(
        model, image_size, digests, options, layout, (*layout.notes(options), *collected.notes)
    )


def register_import(
    imported: ImportedModel, tracking: Tracking, name: str | None = None, sigma: float = 2.0
) -> str:
    """Register the import under `name` (None: the model's name); returns the version.

    Registering the same weights again returns the same version. sigma: Canny's, in pixels, for models that take edges.
    ValueError: an invalid name or sigma, or the registry (RegistryError).
    """
    model = imported.model
    metadata: dict[str, Any] = {"size": imported.size, "imported": imported.layout.source}
    if model.takes_edges:
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma {sigma:g} is not positive")
        metadata["sigma"] = sigma
    key = _content_key(imported, metadata)
    names, digests = (", ".join(column) for column in zip(*imported.files, strict=True))
    params = {"layout": model.name, "source": imported.layout.source, "files": names, "sha256": digests}
    # the same weights from other files get a run of their own: the parameters of a run cannot change
    run_key = hashlib.sha256(f"{key} {names} {digests}".encode()).hexdigest()
    tags = source_tags(f"inpaint import {model.name}")
    run = runs.open_run(tracking, run_key, f"import-{model.name}", tags=tags)
    with runs.finish_run_on_exit(tracking, run) as client:
        runs.log_params(client, run, params | imported.options | metadata)
        return register(
            model,
            name=name or model.name,
            run_id=run,
            step_key=key,
            tags={"inpaint.imported": imported.layout.source, "inpaint.files": names},
            metadata=metadata,
            tracking_uri=tracking.uri,
        )


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Model options from `OPTION=VALUE` texts with YAML values. ValueError: another format."""
    settings = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {text!r}: expected OPTION=VALUE, for example --set edge_input=canny")
        try:
            settings[key] = read_yaml(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {key}: {value!r} is not a YAML value") from None
    return settings


# -- files -----------------------------------------------------------------------------------------------------


def _content_key(imported: ImportedModel, metadata: Mapping[str, Any]) -> str:
    """The step key: a digest of the imported networks' tensors, options and metadata, not of the files."""
    settings = {"model": imported.model.name, "options": imported.options, **metadata}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in dict.fromkeys(part.network for part in imported.layout.network_layouts):
        if name in imported.model.networks:
            for key, value in imported.model.networks[name].state_dict().items():
                digest.update(f"{name}.{key} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
