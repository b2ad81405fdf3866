"""One run of a workflow on Ray: starts the steps whose inputs are finished, reports progress, publishes manifests."""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayError

from data_prep.storage import TEMPORARY, StorageError
from pipelines.durable import lease
from pipelines.durable.lease import Lease, LeaseHeld
from pipelines.durable.lost_nodes import LostNodes
from pipelines.durable.steps import (
    OnEvent,
    OutputFile,
    Step,
    StepContext,
    StepEvent,
    StepFailed,
    StepId,
    StepManifest,
    attempt_folder,
    canonical_json,
    persistent_folder,
    record_bytes,
    step_key,
)
from pipelines.durable.task import (
    REPORT_SECONDS,
    AttemptError,
    AttemptOutcome,
    ProgressReporter,
    start_progress_actor,
    submit_step,
    to_attempt_error,
)
from pipelines.durable.workflow import (
    AttemptRecord,
    Driver,
    RunResults,
    Workflow,
    attempt_path,
    manifest_path,
)
from pipelines.errors import error_text

HEARTBEAT_SECONDS = 2.0  # between checks of the leases and of the local Ray node
GRACE_SECONDS = 5.0  # for interrupted steps to clean up before they are killed


@dataclass
class _RunningAttempt:
    step: Step
    lease: Lease
    inputs: dict[StepId, StepManifest]
    context: StepContext[Any, Any, Any]
    record: AttemptRecord
    tries: int  # attempts of the step in this run; `context.attempt` counts those of all runs
    started_at: float  # time.monotonic()


def run_workflow(
    workflow: Workflow,
    on_event: OnEvent = lambda event: None,
    held_lease: Lease | None = None,
    part_of: str = "",
) -> RunResults:
    """Run the steps that are not finished; returns all outputs. The caller initialises Ray.

    `on_event` is called with every StepEvent. `held_lease`: the workflow's lease, if the caller has acquired it.
    `part_of`: the part of a run, such as a trial, that this is; it precedes the names of tasks, and the run announces
    lost nodes. Raises StepFailed once the steps that do not depend on the failed one are finished, and LeaseHeld if
    another driver is running this workflow or one of its steps.
    """
    with held_lease or workflow.acquire_lease():
        return WorkflowRunner(workflow, on_event, part_of).run()


class WorkflowRunner:
    def __init__(self, workflow: Workflow, on_event: OnEvent, part_of: str = "") -> None:
        self.workflow, self.storage, self.on_event = workflow, workflow.storage, on_event
        self.part_of, self.lost_nodes = part_of, LostNodes()
        self.finished: dict[StepId, StepManifest] = dict(workflow.finished_manifests)
        self.failed: dict[StepId, RuntimeError] = {}
        self.running: dict[ray.ObjectRef, _RunningAttempt] = {}
        self.leases = ExitStack()
        self.progress_actor: Any = None
        self.pending_read: ray.ObjectRef | None = None

    def run(self) -> RunResults:
        """Run until no step is left; returns all outputs, or raises the first step's error."""
        heartbeat = time.monotonic()
        with self.leases:
            try:
                self.start_ready()
                while self.running:
                    ended, _ = ray.wait(list(self.running), timeout=REPORT_SECONDS)
                    self.forward_progress()
                    for task in ended:
                        self.handle_ended(task)
                    if time.monotonic() > heartbeat + HEARTBEAT_SECONDS:
                        self.check_alive()
                        heartbeat = time.monotonic()
                    self.start_ready()
            except BaseException as error:
                self.cancel_all(error)
                raise
        for cause in self.failed.values():
            raise cause
        return RunResults(
            {step.id: step.read_outputs(self.finished[step.id].value) for step in self.workflow.steps}
        )

    def emit(self, step: Step, state: str, note: str = "") -> None:
        self.on_event(StepEvent(step.id, state, note=note))

    def fail(self, step: Step, error: RuntimeError, reason: str) -> None:
        self.failed[step.id] = error
        self.emit(step, "failed", reason)

    def start_ready(self) -> None:
        any_cached = True
        while any_cached:  # a cached step may let others start
            running = {attempt.step.id for attempt in self.running.values()}
            ready = [
                step
                for step in self.workflow.steps
                if step.id not in running | self.finished.keys() | self.failed.keys()
                and all(id in self.finished for id in step.needs)
            ]
            for step in ready:
                self.start(step)
            any_cached = any(step.id in self.finished for step in ready)

    def start(self, step: Step) -> None:
        inputs = {id: self.finished[id] for id in step.needs}
        key = step_key(step, inputs)
        manifest, _ = self.workflow.read_valid_manifest(step, key)
        if manifest is None:
            try:
                step_lease = self.leases.enter_context(lease.acquire_or_wait(self.storage, key))
            except LeaseHeld as error:
                self.fail(step, error, str(error))
                return
            # Another driver may have finished the step before the lease was acquired.
            manifest, _ = self.workflow.read_valid_manifest(step, key)
            if manifest is None:
                self.storage.delete(manifest_path(key))  # it is not valid: its files are lost
                self.start_attempt(step, key, inputs, step_lease, tries=1)
                return
            step_lease.release()
        self.accept(step, manifest, "cached")

    def accept(self, step: Step, manifest: StepManifest, state: str) -> None:
        """Mark the step as finished, or as failed if its `check` raises: the next steps could not use its outputs."""
        try:
            note = step.check(step.read_outputs(manifest.value)) if step.check else ""
        except ValueError as error:
            self.fail(step, StepFailed(error_text(error)), error_text(error))
            return
        self.finished[step.id] = manifest
        self.emit(step, state)
        if note:
            self.emit(step, "note", note)

    def start_attempt(
        self, step: Step, key: str, inputs: dict[StepId, StepManifest], step_lease: Lease, tries: int
    ) -> None:
        if self.progress_actor is None:
            self.progress_actor = start_progress_actor()
        record = self.create_attempt_record(key)
        number = record.attempt
        self.delete_attempt_files(key, number - 1)
        context = StepContext(
            id=step.id,
            key=key,
            attempt=number,
            config=step.config,
            inputs=step.read_inputs(inputs),
            settings=step.settings,
            storage=self.storage,
            attempt_folder=attempt_folder(key, number),
            persistent_folder=persistent_folder(key),
            progress=ProgressReporter(self.progress_actor, step.id),
            input_manifests=inputs,
        )
        name = f"{self.part_of} {step.name}".strip()
        task = submit_step(name, step.function, context, step.outputs_type)
        self.running[task] = _RunningAttempt(
            step, step_lease, inputs, context, record, tries, time.monotonic()
        )
        self.emit(step, "running")

    def handle_ended(self, task: ray.ObjectRef) -> None:
        """Handle a task that has ended: publish its step's manifest, retry the step, or fail it."""
        attempt = self.running.pop(task)
        step, key, manifest = attempt.step, attempt.context.key, None
        try:
            outcome: AttemptOutcome = ray.get(task)
            if outcome.error is None:
                manifest = self.publish_manifest(attempt, outcome)
        except LeaseHeld:
            self.running[task] = attempt  # `cancel_all` records its end
            raise
        except Exception as error:
            outcome = AttemptOutcome(error=to_attempt_error(error, step.memory_hint))
        self.finish_attempt_record(attempt, outcome.error, outcome.host)
        problem = outcome.error
        if problem and problem.retryable and attempt.tries <= step.retries:
            self.emit(step, "retry", problem.message)
            self.start_attempt(step, key, attempt.inputs, attempt.lease, attempt.tries + 1)
            return
        attempt.lease.release()
        if problem:
            attempts = (
                f"{attempt.tries} of {step.retries + 1} attempts" if problem.retryable else "not retryable"
            )
            traceback = f"traceback in {self.storage.uri}/{attempt_path(key, attempt.context.attempt)}"
            text = f"step {step.name!r} failed: {problem.message} ({attempts}; {traceback})"
            self.fail(step, StepFailed(text), problem.message)
        elif manifest:
            self.accept(step, manifest, "finished")

    def publish_manifest(self, attempt: _RunningAttempt, outcome: AttemptOutcome) -> StepManifest:
        """Write the manifest, which makes the step finished; returns it, or the valid one that exists already."""
        step, context, value = attempt.step, attempt.context, outcome.value or {}
        files = self.workflow.output_sizes(context.key, value.get("files", ()))
        if missing := [name for name, size in files.items() if size is None]:
            raise ValueError(
                f"its output {missing[0]} is not in {self.storage.uri} as seen from {socket.gethostname()}: was it "
                "written, and is the storage shared by all machines?"
            )
        for other in re.findall(r"work/([0-9a-f]{16}-[^/\"]+)", canonical_json(value)):
            if other != context.key:
                raise ValueError(
                    f"its outputs name work/{other}, another step's folder: take it from the inputs"
                )
        manifest = StepManifest(
            step=step.name,
            key=context.key,
            version=step.version,
            config=step.config_json,
            inputs={id.name: needed.key for id, needed in attempt.inputs.items()},
            value=value,
            outputs=tuple(OutputFile(name, size or 0) for name, size in files.items()),
            started=attempt.record.started,
            seconds=round(time.monotonic() - attempt.started_at, 3),
            attempt=context.attempt,
            host=outcome.host,
        )
        path = manifest_path(context.key)
        if not attempt.lease.renew():
            raise _lease_lost_error(step)
        if not self.storage.put_if_absent(path, record_bytes(manifest)):
            existing, _ = self.workflow.read_valid_manifest(step, context.key)
            if existing is None:  # written by a driver that lost its lease; its outputs are deleted
                self.storage.write(path, record_bytes(manifest))
            manifest = existing or manifest
        self.delete_attempt_files(context.key, context.attempt, keep=manifest.attempt)
        return manifest

    def create_attempt_record(self, key: str) -> AttemptRecord:
        """Store the record of a new attempt. It says "interrupted", which stands if the driver dies."""
        number = max((record.attempt for record in self.workflow.attempts(key)), default=0)
        driver = Driver(socket.gethostname(), os.getpid())
        while True:
            number += 1
            record = AttemptRecord(number, key, datetime.now(UTC).isoformat(timespec="seconds"), driver)
            if self.storage.put_if_absent(attempt_path(key, number), record_bytes(record)):
                return record

    def finish_attempt_record(
        self, attempt: _RunningAttempt, error: AttemptError | None, host: str = ""
    ) -> None:
        record = replace(
            attempt.record,
            host=host,
            error=error.message if error else "",
            traceback=error.traceback if error else "",
            seconds=round(time.monotonic() - attempt.started_at, 3),
        )
        # A full disk must not hide the attempt's error.
        with suppress(StorageError) if error else nullcontext():
            self.storage.write(attempt_path(record.key, record.attempt), record_bytes(record))

    def delete_attempt_files(self, key: str, last: int, keep: int = 0) -> None:
        """Delete the folders of attempts 1 to `last` but `keep`, and temporary files of killed processes."""
        for number in range(1, last + 1):
            if number != keep:
                self.storage.delete_tree(f"work/{key}/a{number}")
        for folder in (f"work/{key}/stable", f"attempts/{key}"):
            if path := self.storage.local_path(folder):
                for temporary in path.rglob(f"{TEMPORARY}*"):
                    temporary.unlink(missing_ok=True)

    def forward_progress(self) -> None:
        """Forward the steps' progress reports to `on_event`. Never blocks."""
        if self.pending_read is None and self.progress_actor is not None:
            self.pending_read = self.progress_actor.read.remote()
        if self.pending_read is not None and ray.wait([self.pending_read], timeout=0)[0]:
            with suppress(RayError):
                running = {attempt.step.id for attempt in self.running.values()}
                for event in ray.get(self.pending_read):
                    if event.id in running:
                        self.on_event(event)
            self.pending_read = None

    def check_alive(self) -> None:
        """Raise if a lease was lost or the local Ray node has died; announce other nodes that have.

        A driver whose raylet was killed would wait for ever: its tasks continue, but no new task can start.
        """
        for attempt in self.running.values():
            if attempt.lease.lost:
                raise _lease_lost_error(attempt.step)
        node_id, nodes = ray.get_runtime_context().get_node_id(), ray.nodes()
        if any(node["NodeID"] == node_id and not node["Alive"] for node in nodes):
            raise StepFailed("Ray on this machine died; run again to continue")
        if (text := self.lost_nodes.describe_new(nodes)) and not self.part_of and self.running:
            self.emit(next(iter(self.running.values())).step, "note", text)

    def cancel_all(self, error: BaseException) -> None:
        """Cancel the running tasks, and kill them after GRACE_SECONDS. Never masks `error`, the reason for it."""
        terminated = isinstance(error, SystemExit)  # Ray turns SIGTERM into SystemExit
        reason = "its driver was terminated" if terminated else str(error) or type(error).__name__
        with suppress(Exception):
            for task in self.running:
                ray.cancel(task, recursive=True)
            _, running = ray.wait(list(self.running), num_returns=len(self.running), timeout=GRACE_SECONDS)
            for task in running:
                ray.cancel(task, force=True, recursive=True)
        for attempt in self.running.values():
            with suppress(Exception):
                self.finish_attempt_record(attempt, AttemptError(f"interrupted: {reason}", "", True))


def _lease_lost_error(step: Step) -> LeaseHeld:
    return LeaseHeld(
        f"step {step.name!r} was taken over by another driver: this one did not renew its lease in time"
    )
