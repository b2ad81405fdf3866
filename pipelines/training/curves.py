"""Training curves, stored as one JSON file beside the weights. Cheap to import."""

from __future__ import annotations

import json
from dataclasses import dataclass

from data_prep.records import decode, to_json
from data_prep.storage import Storage
from pipelines.contracts import FolderKey

CURVES_FILE = "curves.json"


@dataclass(frozen=True)
class TrainingCurves:
    """Points (step, {metric: value}) by increasing step, and the phases (name, first step, end)."""

    points: tuple[tuple[int, dict[str, float]], ...]
    phases: tuple[tuple[str, int, int], ...] = ()

    def to_json(self) -> str:
        return json.dumps(to_json(self))


def read_curves(storage: Storage, weights_folder: FolderKey) -> TrainingCurves:
    """Read the curves in a folder of weights. Raises ValueError in one line if the file is damaged."""
    name = f"{weights_folder}/{CURVES_FILE}"
    return decode(TrainingCurves, storage.read(name), name)
