"""A recorded workflow whose state is read from files that are listed and kept by StorageFiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.records import decode
from data_prep.storage import StorageError
from pipelines.durable import lease, run_status
from pipelines.durable.run_status import RecordedRun
from pipelines.durable.steps import Step, StepManifest
from pipelines.durable.workflow import AttemptRecord, Driver, StepStatus, Workflow
from pipelines.studio.run_views import FAILED, INTERRUPTED, TO_RUN, StepView
from pipelines.studio.storage_files import StorageFiles

_ATTEMPT = re.compile(r"^attempt \d+: ")
MANIFESTS, ATTEMPTS, LEASES = "manifests", "attempts", "leases"


@dataclass(frozen=True)
class SeenRecord:
    """A run's record, its steps, and the key of the record that stays."""

    run: RecordedRun
    steps: tuple[Step, ...]
    history_key: str


def parse_seen_record(text: bytes, key: str) -> SeenRecord:
    """ValueError in one line: the record is damaged, or from a release whose steps had other keys."""
    try:
        run = run_status.parse_record(text, key)
        steps = tuple(step.as_step() for step in run.steps)
    except ValueError as error:
        reason = str(error)
        if not reason.startswith(key):
            reason = f"{key} is damaged ({reason}): the next run of this name writes it anew"
        raise ValueError(reason) from None
    return SeenRecord(run, steps, run_status.history_record_key("", run))


@dataclass(frozen=True)
class SeenWorkflow(Workflow):
    """A recorded workflow, to show its state. Steps count as finished by their manifests alone: whether their files
    still exist is not looked for, which takes a listing per step."""

    files: StorageFiles = field(kw_only=True, repr=False)

    def step_views(self) -> Iterator[StepView]:
        steps = {step.id: step for step in self.steps}
        for status in self.status():
            yield self._view(steps[status.id], status)

    def read_valid_manifest(self, step: Step, key: str) -> tuple[StepManifest | None, str]:
        if not self.files.exists(MANIFESTS, f"{key}.json"):
            return None, ""
        try:
            return self.files.decoded(MANIFESTS, f"{key}.json", _parse_manifest), ""
        except (ValueError, StorageError):
            return None, "its manifest is unreadable"

    def attempts(self, key: str) -> list[AttemptRecord]:
        records = []
        for name in self.files.names_below(ATTEMPTS, key):
            try:
                records.append(self.files.decoded(ATTEMPTS, f"{key}/{name}", _parse_attempt))
            except (ValueError, StorageError) as error:
                number = name.partition(".")[0]
                records.append(
                    AttemptRecord(int(number) if number.isdigit() else 0, key, "", Driver("", 0), str(error))
                )
        return sorted(records, key=lambda record: record.attempt)

    def holder(self, key: str) -> lease.LeaseHolder | None:
        return lease.current_holder(self.storage, key) if self.files.exists(LEASES, f"{key}.lock") else None

    def outputs(self, key: str) -> dict[str, Any]:
        """The outputs of a finished step as JSON; empty if they cannot be read."""
        try:
            return self.files.decoded(MANIFESTS, f"{key}.json", _parse_manifest).value
        except (ValueError, StorageError):
            return {}

    def _explain_change(self, step: Step) -> str:
        return "has not run"

    def _view(self, step: Step, status: StepStatus) -> StepView:
        records = self.attempts(status.key) if status.key else []
        last = records[-1] if records else None
        manifest = None
        if status.key and status.state == "finished":
            manifest = self.read_valid_manifest(step, status.key)[0]
        state = status.state
        if state == TO_RUN and last is not None:
            state = INTERRUPTED if last.error.startswith("interrupted") else FAILED
        seconds = status.seconds
        if seconds is None and last is not None and state in (FAILED, INTERRUPTED):
            seconds = last.seconds or None
        return StepView(
            name=step.name,
            kind=str(step.id.kind),
            subject=step.id.subject,
            needs=tuple(id.name for id in step.needs),
            state=state,
            reason="" if state == "running" else status.reason,
            key=status.key or "",
            started=manifest.started if manifest else last.started if last else "",
            seconds=seconds,
            attempts=status.attempts,
            errors=tuple(_ATTEMPT.sub("", error) for error in status.errors),
            host=(manifest.host if manifest else last.host if last else ""),
        )


def _parse_manifest(text: bytes, key: str) -> StepManifest:
    return decode(StepManifest, text, key)


def _parse_attempt(text: bytes, key: str) -> AttemptRecord:
    return decode(AttemptRecord, text, key)
