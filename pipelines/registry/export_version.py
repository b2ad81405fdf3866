"""A version in another format: ONNX, its own program, or weights; checked against the version's program first."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from models.base import Model
from pipelines.errors import in_a_line
from pipelines.filling.loading import load_program, safely
from pipelines.registry.onnx_export import CHECKED, compared, export_onnx, request, runner
from pipelines.registry.program import PROGRAM
from pipelines.registry.versions import CHECKPOINT, RegistryError, connected, fetch, find_version
from pipelines.training.weights import DESCRIPTION, WEIGHTS, load_weights

FORMATS = ("onnx", "pt2", "safetensors")
KEPT = ("sigma", "size", "hole_range")  # of what is on record, in an ONNX file


def export_version(
    uri: str, form: str, out: Path, *, size: int | None = None, tracking_uri: str | None = None
) -> dict[str, Any]:
    """Write a version (models:/NAME@ALIAS, models:/NAME/VERSION) to the file `out`; nothing is written before the check.

    onnx: as export_onnx (`size`: for one size only). pt2: the version's program, for torch.export.load. safetensors: all
    networks, critics too, with a description beside it (out.json): in a folder of its own, as model.safetensors, a
    checkpoint folder. Keys of what is returned: name, version, path, bytes, difference (the largest between the version's
    program and what is written; of the program itself, the model that is built again; over inputs of several shapes: at
    most 1e-5, or where float32 alone errs by more, ten times that). ValueError in one line: no such version; one that an
    earlier release registered, without its networks; what differs, or ONNX cannot express. RuntimeError: the packages of
    the extra `onnx` are not installed.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file, for example {out / f'model.{form}'}")
    with (
        connected(tracking_uri) as client,
        safely(),
        tempfile.TemporaryDirectory(prefix="inpaint-export-") as folder,
    ):
        version = find_version(client, uri)
        label = f"{version.name} version {version.version}"
        _, program = load_program(version, folder)
        try:
            model, about = rebuilt(version, folder)
        except RegistryError:
            if form != "pt2":
                raise
            completion = program
        else:
            completion = model.completion().cpu().eval()
        if form == "onnx":
            path = Path(folder, "model.onnx")
            kept = {key: about[key] for key in KEPT if about.get(key) is not None}
            export_onnx(model, path, size, {**kept, "version": label})
            files, compute = {out: path}, runner(path)
        elif form == "safetensors":
            weights = Path(folder, CHECKPOINT)
            files = {out: weights / WEIGHTS, out.with_suffix(".json"): weights / DESCRIPTION}
            compute = completion
        else:
            files, compute = {out: Path(folder, "data", PROGRAM)}, completion
        shapes = CHECKED if size is None else [(b, size, size) for b in (1, 2)]
        checked = [
            compared(compute, completion, request(*shape), f"{form} of {label}", program) for shape in shapes
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        for target, source in files.items():
            part = target.with_name(f".{target.name}.part")
            shutil.copyfile(source, part)
            os.replace(part, target)
    return {
        "name": version.name,
        "version": str(version.version),
        "path": str(out),
        "bytes": out.stat().st_size,
        "difference": max(found["difference"] for found in checked),
    }


def rebuilt(version: ModelVersion, folder: str) -> tuple[Model, dict[str, Any]]:
    """The model that a version was exported from, with all its networks, and what is on record about it."""
    label = f"{version.name} version {version.version}"
    try:
        return load_weights(fetch(version, CHECKPOINT, folder))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RegistryError(f"the checkpoint of {label} cannot be loaded: {in_a_line(error)}") from error
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"{label} was registered by an earlier release, without its networks: only "
            "its program is there; register it anew to export it"
        ) from error
