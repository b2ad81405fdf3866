"""Training checkpoints on disk and in a storage: the learner's state and the curve points so far."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from ray.train import Checkpoint

from data_prep.storage import Storage
from pipelines.contracts import FolderKey
from pipelines.tracking.runs import CurvePoint
from pipelines.training.monitoring import best_step

CHECKPOINT_FILES = ("state.pt", "journal.json")  # the learner's state; the curve points


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[CurvePoint]]:
    """The learner's state and the curve points in a checkpoint of Ray Train."""
    with checkpoint.as_directory() as folder:
        return _read_checkpoint_files(Path(folder), checkpoint.path)


def copy_checkpoint(storage: Storage, checkpoint: FolderKey, destination: FolderKey) -> None:
    """Copy a checkpoint to a folder in which Ray Train deletes nothing.

    Does nothing if the checkpoint does not exist: that of an earlier part of the schedule is in another folder.
    """
    if storage.exists(f"{checkpoint}/{CHECKPOINT_FILES[0]}"):
        for file in CHECKPOINT_FILES:
            storage.copy(f"{checkpoint}/{file}", f"{destination}/{file}")


def read_best_state(
    storage: Storage, best_folder: FolderKey, points: list[CurvePoint]
) -> dict[str, Any] | None:
    """The state with the best validation score; None if that is the last state, or if it was not kept."""
    step = best_step(points)
    if step == points[-1][0] or not storage.exists(f"{best_folder}/{CHECKPOINT_FILES[0]}"):
        return None
    state, _ = read_resume_state(storage.subfolder(best_folder))
    return state if state["step"] == step else None


def write_resume_state(storage: Storage, state: dict[str, Any], points: list[CurvePoint]) -> list[str]:
    """Store a state from which another training run resumes the schedule; returns the names of the files."""
    with tempfile.TemporaryDirectory() as temporary:
        write_checkpoint_files(Path(temporary), state, points)
        for name in CHECKPOINT_FILES:
            storage.upload(Path(temporary) / name, name)
    return list(CHECKPOINT_FILES)


def read_resume_state(storage: Storage) -> tuple[dict[str, Any], list[CurvePoint]]:
    """Read what `write_resume_state` stored: the learner's state and the curve points."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in CHECKPOINT_FILES:
            storage.download(name, Path(temporary) / name)
        return _read_checkpoint_files(Path(temporary), storage.uri)


def write_checkpoint_files(folder: Path, state: dict[str, Any], points: list[CurvePoint]) -> None:
    """Write the files of a checkpoint, CHECKPOINT_FILES."""
    torch.save(state, folder / "state.pt")
    (folder / "journal.json").write_text(json.dumps(points))


def _read_checkpoint_files(folder: Path, location: str) -> tuple[dict[str, Any], list[CurvePoint]]:
    """Load without unpickling (weights_only). Raises ValueError if the state is damaged or holds more than tensors."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{location}/state.pt is damaged, or holds more than tensors, and is not read: delete "
            f"{Path(location).parent} to train from the start"
        ) from error
    journal = json.loads((folder / "journal.json").read_text())
    return state, [(int(step), values) for step, values in journal]
