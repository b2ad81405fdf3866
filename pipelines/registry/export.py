"""Export of a version as ONNX, as its own .pt2 program or as weights, after a check against the version's program."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from models.base import Model
from pipelines.errors import error_text
from pipelines.registry.client import (
    CHECKPOINT_FOLDER,
    RegistryError,
    download_artifact,
    find_version,
    registry_client,
)
from pipelines.registry.load import load_program, safe_loading
from pipelines.registry.onnx_export import (
    CHECKED_SHAPES,
    check_equal,
    export_onnx,
    load_onnx,
    synthetic_batch,
)
from pipelines.registry.program_check import PROGRAM_FILE
from pipelines.weights import INFO_FILE, WEIGHTS_FILE, CheckpointInfo, load_weights

ONNX_METADATA_FIELDS = ("sigma", "size", "hole_range")  # of CheckpointInfo, copied to the ONNX file


@dataclass(frozen=True)
class ExportResult:
    """The file that a version was exported to."""

    name: str
    version: str
    path: str
    bytes: int
    difference: float
    """The largest absolute difference from the version's program, over inputs of several shapes. For pt2, which is that
    program: from the model rebuilt from the version's checkpoint."""


def export_version(
    uri: str, export_format: str, out: Path, *, size: int | None = None, tracking_uri: str | None = None
) -> ExportResult:
    """Write a version (NAME@ALIAS, NAME/VERSION, or NAME) to the file `out`, after checking the output.

    onnx: see export_onnx; `size` restricts the file to one size. pt2: the version's program, for torch.export.load.
    safetensors: the weights of all networks, discriminators included, and their description in out.json; named
    model.safetensors in a folder of its own, the two files are a checkpoint folder.
    The difference is at most 1e-5, or ten times the float32 rounding error where that is larger.
    ValueError: no such version; registered without its networks by an earlier release; a larger difference; an operator
    that ONNX does not have. RuntimeError: the packages of the extra `onnx` are not installed.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file, for example {out / f'model.{export_format}'}")
    with (
        registry_client(tracking_uri) as client,
        safe_loading(),
        tempfile.TemporaryDirectory(prefix="inpaint-export-") as folder,
    ):
        version = find_version(client, uri)
        label = f"{version.name} version {version.version}"
        _, program = load_program(version, folder)
        try:
            model, info = load_checkpoint_model(version, folder)
        except RegistryError:
            if export_format != "pt2":
                raise
            completion = program
        else:
            completion = model.frozen_completion().cpu().eval()
        if export_format == "onnx":
            path = Path(folder, "model.onnx")
            metadata = {
                key: value for key in ONNX_METADATA_FIELDS if (value := getattr(info, key)) is not None
            }
            export_onnx(model, path, size, {**metadata, "version": label})
            files, exported = {out: path}, load_onnx(path)
        elif export_format == "safetensors":
            checkpoint = Path(folder, CHECKPOINT_FOLDER)
            files = {out: checkpoint / WEIGHTS_FILE, out.with_suffix(".json"): checkpoint / INFO_FILE}
            exported = completion
        else:
            files, exported = {out: Path(folder, "data", PROGRAM_FILE)}, completion
        shapes = CHECKED_SHAPES if size is None else [(b, size, size) for b in (1, 2)]
        checks = [
            check_equal(exported, completion, synthetic_batch(*shape), f"{export_format} of {label}", program)
            for shape in shapes
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        for target, source in files.items():
            temporary = target.with_name(f".{target.name}.part")
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
    difference = max(check["difference"] for check in checks)
    return ExportResult(version.name, str(version.version), str(out), out.stat().st_size, difference)


def load_checkpoint_model(version: ModelVersion, folder: str) -> tuple[Model, CheckpointInfo]:
    """The whole model of a version, discriminators included, and its info; the checkpoint is downloaded to `folder`.

    RegistryError: the checkpoint is missing (earlier releases stored none) or damaged.
    """
    label = f"{version.name} version {version.version}"
    try:
        return load_weights(download_artifact(version, CHECKPOINT_FOLDER, folder))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RegistryError(f"the checkpoint of {label} cannot be loaded: {error_text(error)}") from error
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"{label} was registered by an earlier release, without its networks: only "
            "its program is stored; register the model again to export it"
        ) from error
