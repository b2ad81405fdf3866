"""Workflows of durable steps on Ray tasks: any process may be killed; the next run reuses the finished steps.

All state is in the storage, a folder or a bucket:

    manifests/<key>.json      written once, on success: the step's outputs and files. It makes the step finished
    work/<key>/a<attempt>/    the output of an attempt; the folders of other attempts are deleted
    work/<key>/stable/        what all attempts share, such as training checkpoints
    attempts/<key>/<n>.json   where and when attempt n started, how it ended, its traceback
    leases/<key>.lock         the driver that is running the step (lease.py)

Only the driver that holds a step's lease writes its manifest. A task that outlives a killed driver writes to its own
attempt's folder, which no manifest names. This module plans and reads the state, without Ray; runner.py runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

from data_prep.records import decode
from pipelines.durable import lease
from pipelines.durable.steps import STEP_NAME, Step, StepId, StepManifest, step_key

if TYPE_CHECKING:
    from data_prep.storage import Storage

T = TypeVar("T")


@dataclass(frozen=True)
class StepStatus:
    """The state of a step in the storage."""

    id: StepId
    key: str | None  # None: unknown until the steps that it needs are finished
    state: str  # finished, running, to run, waiting
    reason: str = ""
    seconds: float | None = None
    attempts: int = 0
    errors: tuple[str, ...] = ()  # of the failed attempts, oldest first

    @property
    def name(self) -> str:
        return self.id.name

    @property
    def error(self) -> str:
        """Why the last attempt failed; '' if it did not."""
        return self.errors[-1] if self.errors and self.state != "finished" else ""


@dataclass(frozen=True)
class Driver:
    """The process that started an attempt."""

    host: str
    pid: int


@dataclass(frozen=True)
class AttemptRecord:
    """attempts/<key>/<n>.json. The default error stands if the driver died before it recorded the end."""

    attempt: int
    key: str
    started: str
    driver: Driver
    error: str = "interrupted: its driver died"
    traceback: str = ""
    host: str = ""
    """The machine that ran the step."""
    seconds: float = 0.0


class RunResults(Mapping[StepId, Any]):
    """Step id -> the step's outputs."""

    def __init__(self, outputs: Mapping[StepId, Any]) -> None:
        self._outputs = dict(outputs)

    def __getitem__(self, id: StepId) -> Any:
        return self._outputs[id]

    def __iter__(self) -> Iterator[StepId]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def of(self, id: StepId, outputs_type: type[T]) -> T:
        """One step's outputs. LookupError: there is no such step; TypeError: its outputs have another type."""
        outputs = self._outputs[id]
        if not isinstance(outputs, outputs_type):
            raise TypeError(
                f"step {id.name}: its outputs are {type(outputs).__name__}, not {outputs_type.__name__}"
            )
        return outputs

    def of_kind(self, kind: str, outputs_type: type[T]) -> dict[str, T]:
        """Subject -> outputs, for all steps of a kind, in the workflow's order."""
        return {id.subject: self.of(id, outputs_type) for id in self._outputs if id.kind == kind}


@dataclass(frozen=True)
class Workflow:
    """Steps and the storage that holds their state. Each step comes after those that it needs.

    `finished_manifests`: manifests of finished steps of another workflow, on which these steps may depend. Raises
    ValueError in one line for duplicate or invalid names, and for inputs that do not exist.
    """

    name: str
    steps: Sequence[Step]
    storage: Storage
    finished_manifests: Mapping[StepId, StepManifest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known, names = set(self.finished_manifests), {id.name for id in self.finished_manifests}
        for step in self.steps:
            if not STEP_NAME.fullmatch(step.name) or step.name in names:
                raise ValueError(f"step {step.name!r}: names are unique, of letters, digits and ._+=-")
            if missing := [id.name for id in step.needs if id not in known]:
                raise ValueError(f"step {step.name!r} needs {missing[0]!r}, which is not an earlier step")
            if error := step.input_error():
                raise ValueError(f"step {step.name!r}: {error}")
            known.add(step.id)
            names.add(step.name)

    def acquire_lease(self, report: Callable[[str], None] = lambda text: None) -> lease.Lease:
        """Acquire the lease on the whole workflow. Raises LeaseHeld. `report` gets one line if it has to wait."""
        return lease.acquire_or_wait(self.storage, run_lease(self.name), report)

    def with_settings(self, **changes: Any) -> Workflow:
        """The same steps, with the same keys, and some settings changed."""
        steps = [replace(step, settings=replace(step.settings, **changes)) for step in self.steps]
        return replace(self, steps=steps)

    def finished_outputs(self) -> RunResults | None:
        """All outputs if every step is finished and its files exist; None otherwise."""
        outputs = {}
        for step, _, manifest, _ in self._iter_manifests():
            if manifest is None:
                return None
            outputs[step.id] = step.read_outputs(manifest.value)
        return RunResults(outputs)

    def check(self) -> list[str]:
        """Run Step.check on the finished steps; returns their remarks. Raises its ValueError."""
        notes = [
            step.check(step.read_outputs(manifest.value))
            for step, _, manifest, _ in self._iter_manifests()
            if manifest and step.check
        ]
        return [note for note in notes if note]

    def keys(self) -> dict[StepId, str]:
        """The keys of the steps whose inputs are finished."""
        return {step.id: key for step, key, _, _ in self._iter_manifests() if key}

    def plan(self) -> list[StepStatus]:
        """Which steps a run would run and why, and how earlier attempts ended. Reads only the storage."""
        return [self._step_status(*entry) for entry in self._iter_manifests()]

    status = plan

    def read_valid_manifest(self, step: Step, key: str) -> tuple[StepManifest | None, str]:
        """The manifest of a finished step and ''; or None and why its manifest is not valid, '' if there is none."""
        try:
            manifest = read_manifest(self.storage, key)
        except FileNotFoundError:
            return None, ""
        except ValueError:
            return None, "its manifest is unreadable"
        try:
            outputs = step.read_outputs(manifest.value)
        except ValueError as error:
            return None, f"its manifest is not valid: {error}"
        expected = {output.key: output.bytes for output in manifest.outputs}
        for name, size in self.output_sizes(key, expected).items():
            if size != expected[name]:
                problem = "is missing" if size is None else f"has {size} bytes instead of {expected[name]}"
                return None, f"output {name} {problem}"
        if step.still_valid and not resolve_name(step.still_valid)(outputs, key, step.settings):
            function = step.still_valid.rpartition(":")[2]
            return None, f"its result outside the storage is gone ({function})"
        return manifest, ""

    def output_sizes(self, key: str, outputs: Iterable[str]) -> dict[str, int | None]:
        """File -> its size in bytes, None if it is missing; for files of the step with this key."""
        sizes = dict(self.storage.list(f"work/{key}"))  # a single listing, however many files there are
        return {name: sizes[name] if name in sizes else self.storage.size(name) for name in outputs}

    def attempts(self, key: str) -> list[AttemptRecord]:
        """The records of a step's attempts, oldest first."""
        names = [name for name, _ in self.storage.list(f"attempts/{key}")]
        records = [decode(AttemptRecord, self.storage.read(name), name) for name in names]
        return sorted(records, key=lambda record: record.attempt)

    def holder(self, key: str) -> lease.LeaseHolder | None:
        """The driver that is running the step with this key."""
        return lease.current_holder(self.storage, key)

    def _iter_manifests(self) -> Iterator[tuple[Step, str | None, StepManifest | None, str]]:
        """(step, its key or None, its manifest or None, why it has none) for each step. The key is None while inputs
        are not finished."""
        manifests = dict(self.finished_manifests)
        for step in self.steps:
            if missing := [id.name for id in step.needs if id not in manifests]:
                yield step, None, None, f"after {', '.join(missing)}"
                continue
            key = step_key(step, manifests)
            manifest, reason = self.read_valid_manifest(step, key)
            if manifest:
                manifests[step.id] = manifest
            yield step, key, manifest, reason

    def _step_status(
        self, step: Step, key: str | None, manifest: StepManifest | None, reason: str
    ) -> StepStatus:
        if key is None:
            return StepStatus(step.id, None, "waiting", reason)
        records = self.attempts(key)
        if manifest is None and (holder := self.holder(key)) is not None:
            state, reason = "running", f"{holder} since {holder.since}"
        else:
            state = "finished" if manifest else "to run"
        ended = records[:-1] if state == "running" else records
        # Skip the attempt that succeeded: its driver may have died before it recorded the success.
        succeeded = manifest.attempt if manifest else 0
        errors = tuple(
            f"attempt {record.attempt}: {record.error}"
            for record in ended
            if record.error and record.attempt != succeeded
        )
        if state == "to run" and not reason:
            reason = errors[-1] if errors else self._explain_change(step)
        seconds = manifest.seconds if manifest else None
        return StepStatus(step.id, key, state, reason, seconds, len(records), errors)

    def _explain_change(self, step: Step) -> str:
        """Why a step that was never attempted has to run: it is new, or its config, version or inputs have changed."""
        pattern = re.compile(rf"manifests/([0-9a-f]{{16}}-{re.escape(step.name)})\.json")
        keys = [match[1] for path, _ in self.storage.list("manifests") if (match := pattern.fullmatch(path))]
        if not keys:
            return "never ran"
        last = max((read_manifest(self.storage, key) for key in keys), key=lambda manifest: manifest.started)
        config = step.config_json
        changed = [name for name in {**config, **last.config} if config.get(name) != last.config.get(name)]
        changed += ["version"] if last.version != step.version else []
        return f"changed since {last.started}: {', '.join(sorted(changed)) or 'its inputs'}"


def read_manifest(storage: Storage, key: str) -> StepManifest:
    """The manifest of the step with this key. FileNotFoundError: there is none; ValueError: it is damaged."""
    return decode(StepManifest, storage.read(manifest_path(key)), f"manifest {key}")


def run_lease(name: str) -> str:
    """The name of the lease on the workflow of this name."""
    return f"run-{name}"


def manifest_path(key: str) -> str:
    return f"manifests/{key}.json"


def attempt_path(key: str, number: int) -> str:
    return f"attempts/{key}/{number}.json"
