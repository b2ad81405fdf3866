"""The steps of a run and their progress, stored so that `inpaint status` needs access to the storage only:

    status/<workflow>.json            the steps of the run that was started last: all that their keys depend on
    status/<workflow>/<digest>.json   the same for every run of that name, with the time of its first start
    status/<workflow>.progress.json   the last report of each step, written every ten seconds

For information only: manifests alone decide which steps are finished.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from data_prep.records import decode, from_json, to_json
from data_prep.storage import StorageError
from pipelines.durable.steps import Step, StepEvent, StepId, canonical_json
from pipelines.durable.workflow import Workflow
from pipelines.durations import format_eta

if TYPE_CHECKING:
    from data_prep.storage import Storage

STATUS_FOLDER, SUFFIX, PROGRESS_SUFFIX = "status", ".json", ".progress.json"
WRITE_SECONDS = 10.0  # between writes of the steps' progress
MAX_NOTES = 6  # of a step: a lost worker, its node and the resumption, twice


@dataclass(frozen=True)
class RecordedStep:
    """Everything that determines a step's key."""

    id: StepId
    version: int
    config: dict[str, Any]
    inputs: dict[str, StepId | tuple[StepId, ...] | dict[str, StepId]]

    @staticmethod
    def from_step(step: Step) -> RecordedStep:
        return from_json(
            RecordedStep,
            {
                "id": to_json(step.id),
                "version": step.version,
                "config": step.config_json,
                "inputs": step.map_inputs(to_json),
            },
            f"step {step.name}",
        )

    def as_step(self) -> Step:
        """The step, to read its state; its config, inputs and outputs are plain data, and it cannot be run."""
        return Step(self.id, "", self.config, self.inputs, dict, dict, version=self.version)


@dataclass(frozen=True)
class RecordedRun:
    """The steps of a run."""

    steps: tuple[RecordedStep, ...]
    begun: str = ""
    """When the run was first started: UTC, ISO 8601; ''."""
    command: str = ""
    """The command line that repeats the run; '' if unknown, as in records of earlier releases."""
    recipe: str = ""
    """The recipe with its overrides, as YAML; '' if unknown."""

    def as_workflow(self, storage: Storage, name: str) -> Workflow:
        return Workflow(name, [step.as_step() for step in self.steps], storage)


@dataclass(frozen=True)
class StepNote:
    """A note of a running step."""

    at: str
    """UTC, ISO 8601."""
    text: str


@dataclass(frozen=True)
class StepProgress:
    """The last report of a step."""

    done: float
    total: float
    note: str
    first: float
    """`done` in this run's first report: what earlier runs did."""
    seconds: float
    """Since the first report."""
    at: str
    """UTC, ISO 8601."""
    notes: tuple[StepNote, ...] = ()
    """The last notes of the running step, such as lost workers; oldest first."""

    @property
    def eta(self) -> str:
        """Remaining time at this run's mean rate, as m:ss or h:mm:ss; '' if unknown."""
        return format_eta(self.done - self.first, self.total - self.first, self.seconds)

    @property
    def age_seconds(self) -> float:
        """Seconds since the report, by this machine's clock."""
        return seconds_since(self.at)


def seconds_since(at: str) -> float:
    """Seconds since a time in UTC, ISO 8601, by this machine's clock."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds())


def save_workflow(workflow: Workflow, command: str = "", recipe: str = "") -> None:
    """Record the steps of a run that starts. Keeps the record of the last run if it has all of these steps.

    `command` and `recipe`: as in RecordedRun, without credentials, which the recipe's loading refuses.
    """
    run, storage = RecordedRun(tuple(map(RecordedStep.from_step, workflow.steps))), workflow.storage
    key, history_key = record_key(workflow.name), history_record_key(workflow.name, run)
    described = replace(run, command=command, recipe=recipe)
    if not storage.exists(history_key):
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with suppress(PermissionError):  # a finished run in a read-only storage
            storage.write(history_key, _record_text(replace(described, begun=now)))
    with suppress(FileNotFoundError, ValueError):
        last_run = _read(storage, key)
        if all(step in last_run.steps for step in run.steps):
            if command and not last_run.command and last_run.steps == run.steps:  # of an earlier release
                with suppress(PermissionError):
                    storage.write(key, _record_text(described))
            return
    storage.write(key, _record_text(described))


def record_key(name: str) -> str:
    """The storage key of the record of the last run of this name."""
    return f"{STATUS_FOLDER}/{name}{SUFFIX}"


def history_record_key(name: str, run: RecordedRun) -> str:
    """The storage key of the record that stays: it depends on the steps alone."""
    digest = hashlib.sha256(_record_text(RecordedRun(run.steps))).hexdigest()[:16]
    return f"{STATUS_FOLDER}/{name}/{digest}{SUFFIX}"


def _record_text(run: RecordedRun) -> bytes:
    """The record as JSON. `command` and `recipe` are left out if they are unknown: digests of old records stay."""
    record = {name: value for name, value in to_json(run).items() if value or name in ("steps", "begun")}
    return canonical_json(record).encode()


def list_runs(storage: Storage) -> list[str]:
    """The names of all runs that were started in this storage."""
    return run_names(key.removeprefix(f"{STATUS_FOLDER}/") for key, _ in storage.list(STATUS_FOLDER))


def run_names(files: Iterable[str]) -> list[str]:
    """The names of the runs whose records are among these files of the folder STATUS_FOLDER."""
    return sorted(
        key.removesuffix(SUFFIX) for key in files if "/" not in key and not key.endswith(PROGRESS_SUFFIX)
    )


def load_workflow(storage: Storage, name: str) -> Workflow:
    """The last run of this name, to read its state; it cannot be run. FileNotFoundError: there is none.

    ValueError: its record is damaged, or from a release whose steps had other keys.
    """
    return _read(storage, record_key(name)).as_workflow(storage, name)


def find_run(wanted: Workflow, ignored_fields: Collection[str] = ()) -> Workflow | None:
    """The recorded run with the steps of `wanted`, or with the first of them, to read its state. None: there is none.

    `ignored_fields`, fields of configs that do not follow from a recipe, may differ. Of several such runs, the one that
    was started last.
    """
    storage, matches = wanted.storage, []
    with suppress(FileNotFoundError, ValueError):
        last = load_workflow(storage, wanted.name)
        if not list_differences(last, wanted, ignored_fields):
            return last
    for key, _ in storage.list(f"{STATUS_FOLDER}/{wanted.name}"):
        with suppress(ValueError):
            run = _read(storage, key)
            workflow = run.as_workflow(storage, wanted.name)
            if not list_differences(workflow, wanted, ignored_fields):
                matches.append((len(workflow.steps), run.begun, key, workflow))
    return max(matches)[-1] if matches else None


def list_differences(recorded: Workflow, wanted: Workflow, ignored_fields: Collection[str] = ()) -> list[str]:
    """The steps of a recorded run that `wanted` lacks or configures otherwise, as `train-x (options, train)`."""
    steps = {step.id: RecordedStep.from_step(step) for step in wanted.steps}
    differences = []
    for old in map(RecordedStep.from_step, recorded.steps):
        new = steps.get(old.id)
        if new is None:
            differences.append(old.id.name)
            continue
        fields = [
            name
            for name in {**old.config, **new.config}
            if name not in ignored_fields and old.config.get(name) != new.config.get(name)
        ]
        fields += ["version"] if old.version != new.version else []
        fields += ["inputs"] if old.inputs != new.inputs else []
        if fields:
            differences.append(f"{old.id.name} ({', '.join(fields)})")
    return differences


def _read(storage: Storage, key: str) -> RecordedRun:
    return parse_record(storage.read(key), key)


def parse_record(text: bytes, key: str) -> RecordedRun:
    """A run's record. ValueError: it is damaged, or from a release whose steps had other keys."""
    data = json.loads(text)
    if isinstance(data, dict) and "given" in data:  # a field of release 0.1.0
        raise ValueError(
            f"{key} was written by an earlier release, whose steps had other keys: their work is repeated by `inpaint run`"
        )
    return from_json(RecordedRun, data, key)


def load_progress(storage: Storage, name: str) -> dict[str, StepProgress]:
    """Step name -> its last report; empty if none was recorded."""
    with suppress(FileNotFoundError, ValueError):
        return parse_progress(storage.read(progress_key(name)))
    return {}


def progress_key(name: str) -> str:
    """The storage key of the last reports of the steps of the run of this name."""
    return f"{STATUS_FOLDER}/{name}{PROGRESS_SUFFIX}"


def parse_progress(text: bytes) -> dict[str, StepProgress]:
    """Step name -> its last report. ValueError: damaged."""
    records = decode(dict[str, Any], text, "progress")
    return {step: from_json(StepProgress, record, step) for step, record in records.items()}


class StatusWriter:
    """Context manager: called with step events, it writes their progress to the storage from a thread."""

    def __init__(self, workflow: Workflow, write_seconds: float = WRITE_SECONDS) -> None:
        self.storage, self.write_seconds = workflow.storage, write_seconds
        self.key = progress_key(workflow.name)
        self.reports: dict[str, StepProgress] = {}
        self.first_reports: dict[str, tuple[float, float]] = {}  # step -> done and time of its first report
        self.notes: dict[str, tuple[StepNote, ...]] = {}
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.dirty = True  # the stored progress is an earlier run's
        self.thread = threading.Thread(target=self._write_forever, name="status writer", daemon=True)

    def __enter__(self) -> StatusWriter:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()

    def __call__(self, event: StepEvent) -> None:
        if event.substep:  # a trial of a sweep: the sweep's trial store records more
            return
        name, done, total = event.step, event.done, event.total
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self.lock:
            if event.state == "note":
                self.notes[name] = (*self.notes.get(name, ()), StepNote(now, event.note))[-MAX_NOTES:]
                if name in self.reports:
                    self.reports[name] = replace(self.reports[name], notes=self.notes[name])
                    self.dirty = True
            elif event.state != "running":
                self.first_reports.pop(name, None)
                self.notes.pop(name, None)
                self.dirty |= self.reports.pop(name, None) is not None
            elif total:
                first, start_time = self.first_reports.setdefault(name, (done, time.monotonic()))
                seconds = time.monotonic() - start_time
                self.reports[name] = StepProgress(
                    done, total, event.note, first, seconds, now, self.notes.get(name, ())
                )
                self.dirty = True

    def _write_forever(self) -> None:
        while not self.stopped.wait(self.write_seconds):
            with self.lock:
                records = {name: asdict(report) for name, report in self.reports.items()}
                dirty, self.dirty = self.dirty, False
            if dirty:
                with suppress(StorageError):
                    self.storage.write(self.key, json.dumps(records).encode())
