"""The trials of a sweep as JSON files in the storage, one per trial: what an interrupted sweep resumes from."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from data_prep.records import decode, from_json, to_json
from data_prep.storage import Storage
from pipelines.contracts import FolderKey
from pipelines.durable.steps import persistent_folder
from pipelines.recipe import Budget
from pipelines.sweeps.results import FieldValues, Segment, TrialRecord

RUNNING = "running"

_STORED = {
    "record": "trial",
    "initial_values": "first",
    "segments": "chain",
    "reported_scores": "looks",
    "copied_segments": "copied",
}
"""field of StoredTrial -> its key in the stored JSON"""


@dataclass
class StoredTrial:
    """A trial's record, and what its next process needs to resume it."""

    record: TrialRecord
    initial_values: FieldValues = field(default_factory=dict)
    """The values at its start; population-based training may have changed those of the record since."""
    segments: list[Segment] = field(default_factory=list)
    """The finished segments of its training."""
    reported_scores: list[tuple[int, float]] = field(default_factory=list)
    """(step, score) as reported to the scheduler."""
    copied_segments: int = 0
    """How many of the segments were trained by another trial."""


@dataclass(frozen=True)
class TrialReport:
    """A trial's report to Ray Tune: at each report step, at its end, and when it failed."""

    steps: int
    seconds: float
    """Since this process started the trial."""
    run_id: str = ""
    """The trial's MLflow run."""
    trained_steps: int | None = None
    """Steps since the trial's start step: the scheduler's time axis."""
    validation_psnr: float | None = None
    """PSNR in the holes of the validation photographs, in dB, which the scheduler compares; None if the trial failed."""
    segments: Sequence[Segment] = ()
    """The segments of its training so far."""
    copied_segments: int = 0
    """How many of them were trained by another trial."""
    curve: Sequence[tuple[int, float]] = ()
    """(step, validation PSNR in the holes) at its checkpoints."""
    weights: FolderKey = ""
    scores: dict[str, float] | None = None
    """metric -> score of its evaluation; None before its end."""
    evaluation: FolderKey = ""
    failure_reason: str = ""
    """Why it failed, in one line; empty if it did not."""

    def to_result(self) -> dict[str, Any]:
        """As Ray Tune's result, without empty fields: Ray Tune takes every field for a metric."""
        return {name: value for name, value in vars(self).items() if value not in (None, "", ())}

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> TrialReport:
        """From Ray Tune's result, which has further fields."""
        return cls(**{f.name: result[f.name] for f in fields(cls) if f.name in result})


def trial_store_folder(step_key: str) -> FolderKey:
    """The folder of the trials of the sweep step with this key."""
    return f"{persistent_folder(step_key)}/trials"


def read_trial(storage: Storage, folder: FolderKey, number: int) -> StoredTrial:
    """The stored state of a trial. ValueError in one line if the file is damaged."""
    return _read_key(storage, _trial_key(folder, number))


def _read_key(storage: Storage, key: str) -> StoredTrial:
    return parse_trial(storage.read(key), key)


def is_trial_file(name: str) -> bool:
    """Whether a file in the folder of trials is that of a trial."""
    return name.endswith(".json") and name[:4].isdigit()


def parse_trial(text: bytes, key: str) -> StoredTrial:
    """The text of a trial's file. ValueError in one line if it is damaged."""
    stored = decode(dict[str, Any], text, key)
    fields = {field: stored.pop(name) for field, name in _STORED.items() if name in stored}
    return from_json(StoredTrial, fields | stored, key)


def _trial_key(folder: FolderKey, number: int) -> str:
    return f"{folder}/{number:04d}.json"


class TrialStore:
    """The trials of a sweep. Only the sweep's own process writes them."""

    def __init__(self, storage: Storage, folder: FolderKey, steps_per_trial: int) -> None:
        self.storage, self.folder, self.steps_per_trial = storage, folder, steps_per_trial
        self.by_number: dict[int, StoredTrial] = {}
        """trial number -> trial"""
        for key, _ in storage.list(folder):
            if is_trial_file(key.rpartition("/")[2]):
                trial = _read_key(storage, key)
                self.by_number[trial.record.number] = trial
        self.earlier_seconds = self._read_seconds()
        self.started_at = time.monotonic()

    def write(self, trial: StoredTrial) -> None:
        self.by_number[trial.record.number] = trial
        stored = {_STORED[field]: value for field, value in to_json(trial).items()}
        text = json.dumps(stored, indent=1)
        self.storage.write(_trial_key(self.folder, trial.record.number), text.encode())
        self.storage.write(f"{self.folder}/clock.json", json.dumps({"seconds": self.total_seconds}).encode())

    @property
    def records(self) -> list[TrialRecord]:
        return [trial.record for _, trial in sorted(self.by_number.items())]

    @property
    def total_seconds(self) -> float:
        """Run time of the sweep, over all its processes."""
        return self.earlier_seconds + time.monotonic() - self.started_at

    @property
    def ended_records(self) -> list[TrialRecord]:
        return [record for record in self.records if record.state != RUNNING]

    def within_budget(self, budget: Budget, number: int) -> bool:
        """Whether the budget allows one more trial, with this number."""
        steps = sum(
            self.steps_per_trial if record.state == RUNNING else record.steps for record in self.records
        )
        return not (
            (budget.trials is not None and number >= budget.trials)
            or (budget.minutes is not None and self.total_seconds >= 60 * budget.minutes)
            or (budget.steps is not None and steps + self.steps_per_trial > budget.steps)
        )

    def _read_seconds(self) -> float:
        try:
            return float(json.loads(self.storage.read(f"{self.folder}/clock.json"))["seconds"])
        except (FileNotFoundError, ValueError):
            return 0.0
