"""The ledger of a sweep: one small JSON file a trial in the storage, which outlives any process."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field

from data_prep.storage import Storage
from pipelines.recipe import Recipe
from pipelines.sweeps.result import Trial
from pipelines.sweeps.space import Link, Values, sweep_of

RUNNING = "running"


@dataclass
class Entry:
    """A trial as far as it got."""

    trial: Trial
    first: Values = field(default_factory=dict)
    """The values that it began with; the trial has those that population-based training left it."""
    chain: list[Link] = field(default_factory=list)
    """The parts of its training, which it goes on from."""
    looks: list[tuple[int, float]] = field(default_factory=list)
    """(step, score) that the scheduler has seen."""


class Ledger:
    """The trials of a sweep, as far as they got; written by the sweep's own process only."""

    def __init__(self, storage: Storage, folder: str, steps: int) -> None:
        self.storage, self.folder, self.steps = storage, folder, steps
        self.entries: dict[int, Entry] = {}
        for key, _ in storage.list(folder):
            if key.endswith(".json") and key.rpartition("/")[2][:4].isdigit():
                entry = json.loads(storage.read(key))
                trial = Trial(**entry.pop("trial"))
                self.entries[trial.number] = Entry(trial, **entry)
        self.before = self._clock()
        self.began = time.monotonic()

    def write(self, entry: Entry) -> None:
        self.entries[entry.trial.number] = entry
        text = json.dumps(asdict(entry), indent=1)
        self.storage.write(f"{self.folder}/{entry.trial.number:04d}.json", text.encode())
        self.storage.write(f"{self.folder}/clock.json", json.dumps({"seconds": self.seconds}).encode())

    @property
    def trials(self) -> list[Trial]:
        return [entry.trial for _, entry in sorted(self.entries.items())]

    @property
    def seconds(self) -> float:
        """Of this sweep in all its lives."""
        return self.before + time.monotonic() - self.began

    @property
    def over(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state != RUNNING]

    def allows(self, recipe: Recipe, number: int) -> bool:
        """Whether the budget has room for one more trial."""
        budget = sweep_of(recipe).budget
        done = sum(self.steps if trial.state == RUNNING else trial.steps for trial in self.trials)
        return not (
            (budget.trials is not None and number >= budget.trials)
            or (budget.minutes is not None and self.seconds >= 60 * budget.minutes)
            or (budget.steps is not None and done + self.steps > budget.steps)
        )

    def _clock(self) -> float:
        try:
            return float(json.loads(self.storage.read(f"{self.folder}/clock.json"))["seconds"])
        except (FileNotFoundError, ValueError):
            return 0.0
