"""What a run was asked for and how far it is, kept in its storage, for who has nothing but that storage:

    status/<workflow>.json            its steps, from which their keys follow
    status/<workflow>.progress.json   what the steps reported last, every ten seconds

Neither decides anything: what is finished is said by manifests alone.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipelines.durable.steps import Step, StepContext, Workflow, canonical

if TYPE_CHECKING:
    from data_prep.storage import Storage

FOLDER, ENDING, PROGRESS = "status", ".json", ".progress.json"
EVERY = 10.0  # seconds between two writings of what the steps reported


@dataclass(frozen=True)
class Reported:
    """The last that a step said: how far it is, and since when this run counts (`first` were done before it)."""

    done: float
    total: float
    note: str
    first: float
    seconds: float
    at: str  # UTC, ISO 8601

    @property
    def ago(self) -> float:
        """Seconds since then, by this machine's clock."""
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(self.at)).total_seconds())


def keep(workflow: Workflow) -> None:
    """Write down what this run is asked for, unless that is there, maybe as the beginning of a longer chain."""
    steps = [
        {"name": s.name, "config": s.config, "needs": s.needs, "version": s.version} for s in workflow.steps
    ]
    told = canonical({"given": workflow.given, "steps": steps})
    key = f"{FOLDER}/{workflow.name}{ENDING}"
    with suppress(FileNotFoundError, ValueError, LookupError):
        there, asked = json.loads(workflow.storage.read(key)), json.loads(told)
        if there["given"] == asked["given"] and all(step in there["steps"] for step in asked["steps"]):
            return
    workflow.storage.write(key, told.encode())


def names(storage: Storage) -> list[str]:
    """The runs that were ever begun in this storage."""
    keys = [key.removeprefix(f"{FOLDER}/") for key, _ in storage.list(FOLDER)]
    return sorted(key.removesuffix(ENDING) for key in keys if not key.endswith(PROGRESS))


def kept(storage: Storage, name: str) -> Workflow:
    """The run as it was begun last, to be looked at and not to be run. FileNotFoundError when it never was."""
    told = json.loads(storage.read(f"{FOLDER}/{name}{ENDING}"))
    steps = [Step(s["name"], _not_here, s["config"], tuple(s["needs"]), s["version"]) for s in told["steps"]]
    return Workflow(name, steps, storage, told["given"])


def reported(storage: Storage, name: str) -> dict[str, Reported]:
    """What each step said last; nothing when nobody wrote that down."""
    with suppress(FileNotFoundError, ValueError):
        told = json.loads(storage.read(f"{FOLDER}/{name}{PROGRESS}"))
        return {step: Reported(**values) for step, values in told.items()}
    return {}


def _not_here(context: StepContext) -> dict[str, Any]:
    raise RuntimeError(f"step {context.name!r} was read from its record, which is for looking only")


class Diary:
    """A context in which `diary(name, state, done, total, note)` is written down, and never waited for."""

    def __init__(self, workflow: Workflow, every: float = EVERY) -> None:
        self.storage, self.key, self.every = workflow.storage, f"{FOLDER}/{workflow.name}{PROGRESS}", every
        self.reports: dict[str, Reported] = {}
        self.began: dict[str, tuple[float, float]] = {}  # where a step was when it first said so, and when
        self.lock, self.over, self.news = (
            threading.Lock(),
            threading.Event(),
            True,
        )  # what is there is of an earlier run
        self.writer = threading.Thread(target=self._write_on, name="diary", daemon=True)

    def __enter__(self) -> Diary:
        self.writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()

    def __call__(self, name: str, state: str, done: float, total: float, note: str) -> None:
        if "/" in name:  # a trial of a sweep: its ledger says more
            return
        with self.lock:
            if state != "running":
                self.began.pop(name, None)
                self.news |= self.reports.pop(name, None) is not None
            elif total:
                first, clock = self.began.setdefault(name, (done, time.monotonic()))
                now = datetime.now(UTC).isoformat(timespec="seconds")
                self.reports[name] = Reported(done, total, note, first, time.monotonic() - clock, now)
                self.news = True

    def _write_on(self) -> None:
        from data_prep.storage import StorageError

        while not self.over.wait(self.every):
            with self.lock:
                told = {name: asdict(report) for name, report in self.reports.items()}
                news, self.news = self.news, False
            if news:
                with suppress(StorageError):
                    self.storage.write(self.key, json.dumps(told).encode())
