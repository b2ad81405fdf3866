"""Checkpoint folders: `model.safetensors` with the weights, and `model.json` with everything needed to rebuild the model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.records import RecordError, from_json
from data_prep.storage import Storage, check_key
from models import build_model
from models.base import Model
from pipelines.renamed import model_options

WEIGHTS_FILE, INFO_FILE = "model.safetensors", "model.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """The contents of model.json; the file of a registered version has the same fields and more.

    Missing fields are None. Numbers stay as they were written, 2 or 2.0, so that a copy has the same bytes.
    """

    name: str
    """Of the model class; `build_model(name, **options)` rebuilds it."""
    options: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    """Side of the training crops in pixels."""
    seed: int | None = None
    masks: dict[str, Any] | None = None
    """Used in training: kind -> weight or settings."""
    edge_source: str | None = None
    sigma: int | float | None = None
    """For Canny edges at inference; the median of `sigmas`."""
    sigmas: tuple[int | float, ...] | None = None
    """Used in training."""
    hole_range: tuple[int | float, int | float] | None = None
    """Smallest and largest hole in training, as fractions of the image in [0, 1]."""
    steps: int | None = None
    precision: str | None = None
    """Of the training: float32 or bfloat16."""
    channels_last: bool | None = None
    """Its memory layout."""
    hardware: str | None = None
    """On which it began: gpu, amx, avx512_bf16 or cpu (models.base.HardwareKind)."""
    model: str | None = None
    """`name` again. Only in records of imported versions."""
    needs_edges: bool | None = None
    takes_edges: bool | None = None
    true_edges: bool | None = None
    imported: str | None = None
    """Origin of imported weights."""
    extra: dict[str, Any] = field(default_factory=dict)
    """All other keys of the record: a version's provenance, keys of other programs, and nulls."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any], source: str) -> CheckpointInfo:
        """From parsed JSON; errors name it as `source`. RecordError: no name, or a field of another type."""
        if not isinstance(record, Mapping):
            raise RecordError(source, "is not an object with named fields")
        known = {key: record[key] for key in RECORD_FIELDS if record.get(key) is not None}
        extra = {key: value for key, value in record.items() if key not in known}
        return replace(from_json(cls, known, source), extra=extra)

    @classmethod
    def read(cls, path: Path) -> CheckpointInfo:
        """From a model.json. OSError: there is none. RecordError: not JSON, or as for `from_record`."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(str(path), f"is not JSON: {error}") from None
        return cls.from_record(record, str(path))

    def as_json(self) -> dict[str, Any]:
        """The record, with keys sorted."""
        known = {key: value for key in RECORD_FIELDS if (value := getattr(self, key)) is not None}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
        return dict(sorted((self.extra | plain).items()))


RECORD_FIELDS = tuple(item.name for item in fields(CheckpointInfo) if item.name != "extra")


def save_weights(
    folder: Path, model: Model, ema_weights: Mapping[str, Tensor], info: CheckpointInfo
) -> list[str]:
    """Write a checkpoint folder; returns the names of its files.

    `ema_weights` (network.key -> tensor) replace the corresponding weights of the model.
    """
    state = model.state_dict() | {f"networks.{key}": value for key, value in ema_weights.items()}
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in state.items()},
        folder / WEIGHTS_FILE,
    )
    (folder / INFO_FILE).write_text(
        json.dumps(info.as_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    return [WEIGHTS_FILE, INFO_FILE]


def load_weights(folder: Path) -> tuple[Model, CheckpointInfo]:
    """The model of a checkpoint folder, in eval mode, and its model.json.

    Raises the errors of reading, building and strict loading (ValueError: not a safetensors file). Never unpickles.
    """
    info = CheckpointInfo.read(folder / INFO_FILE)
    model = build_model(info.name, **model_options(info.name, info.options))
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:  # derived from Exception only
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged or not a safetensors file: {error}") from error
    model.load_state_dict(state, strict=True)
    return model.eval(), info


@contextmanager
def as_local_folder(storage: Storage, folder: str) -> Iterator[Path]:
    """A local path of a storage's folder: the folder itself, or a temporary download from a bucket."""
    source = storage.subfolder(folder)
    path = source.local_path()
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        for key, _ in source.list():
            target = Path(temporary) / check_key(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.download(key, target)
        yield Path(temporary)
