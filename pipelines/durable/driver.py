"""One run of a workflow on Ray: starts steps whose inputs are there, shows their progress, publishes what they did."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, RayError

from data_prep.storage import TEMPORARY, StorageError
from pipelines.durable import lease
from pipelines.durable.attempt import PERIOD, Board, Progress, failure, perform, root_cause
from pipelines.durable.lease import Lease, StorageBusy
from pipelines.durable.steps import Show, Step, StepContext, StepFailed, Value, canonical, step_key

if TYPE_CHECKING:
    from pipelines.durable.steps import Workflow

HEARTBEAT = 2.0  # seconds between two looks at Ray itself
ANYWHERE: dict[str, Any] = {
    "scheduling_strategy": "DEFAULT"
}  # also when this driver is a trial in a placement group
GRACE = 5.0  # seconds that interrupted steps have to clean up before their processes are ended


@dataclass
class _Attempt:
    """A step that is running."""

    step: Step
    lease: Lease
    inputs: dict[str, Value]  # the manifests of what it needs
    context: StepContext
    record: Value  # what attempts/<key>/<n>.json says
    tries: int  # in this run; `context.attempt` counts those of all runs
    clock: float  # time.monotonic() at its start


class Driver:
    def __init__(self, workflow: Workflow, show: Show) -> None:
        self.workflow, self.storage, self.show = workflow, workflow.storage, show
        self.done: dict[str, Value] = dict(workflow.given)  # manifests
        self.failed: dict[str, RuntimeError] = {}
        self.running: dict[ray.ObjectRef, _Attempt] = {}
        self.leases = ExitStack()
        self.board: Any = None
        self.asked: ray.ObjectRef | None = None

    def drive(self) -> dict[str, Value]:
        """Every step's value."""
        heartbeat = time.monotonic()
        with self.leases:
            try:
                self.start_ready()
                while self.running:
                    ended, _ = ray.wait(list(self.running), timeout=PERIOD)
                    self.relay()
                    for task in ended:
                        self.settle(task)
                    if time.monotonic() > heartbeat + HEARTBEAT:
                        self.check()
                        heartbeat = time.monotonic()
                    self.start_ready()
            except BaseException as error:
                self.abandon(error)
                raise
        for cause in self.failed.values():
            raise cause
        return {step.name: self.done[step.name]["value"] for step in self.workflow.steps}

    def start_ready(self) -> None:
        ended = True
        while ended:  # a step found finished may let others start
            running = {attempt.step.name for attempt in self.running.values()}
            ready = [
                step
                for step in self.workflow.steps
                if step.name not in running | self.done.keys() | self.failed.keys()
                and all(name in self.done for name in step.needs)
            ]
            for step in ready:
                self.start(step)
            ended = any(step.name in self.done for step in ready)

    def start(self, step: Step) -> None:
        inputs = {name: self.done[name] for name in step.needs}
        key = step_key(step, inputs)
        manifest, _ = self.workflow.inspect(step, key)
        if manifest is None:
            try:
                held = self.leases.enter_context(lease.outwait(self.storage, key))
            except StorageBusy as busy:
                self.failed[step.name] = busy
                self.show(step.name, "failed", 0, 0, str(busy))
                return
            manifest, _ = self.workflow.inspect(step, key)  # another driver may have finished it meanwhile
            if manifest is None:
                self.storage.delete(f"manifests/{key}.json")  # one whose outputs are lost
                self.launch(step, key, inputs, held, tries=1)
                return
            held.release()
        self.done[step.name] = manifest
        self.show(step.name, "cached", 0, 0, "")

    def launch(self, step: Step, key: str, inputs: dict[str, Value], held: Lease, tries: int) -> None:
        if self.board is None:
            self.board = ray.remote(num_cpus=0, max_restarts=-1, **ANYWHERE)(Board).remote()
        record = self.open_record(key)
        number = record["attempt"]
        self.delete_attempts(key, number - 1)
        context = StepContext(
            key=key,
            name=step.name,
            attempt=number,
            config=json.loads(canonical(step.config)),
            local=json.loads(canonical(step.local)),
            storage=self.storage,
            manifests=inputs,
            work=f"work/{key}/a{number}",
            stable=f"work/{key}/stable",
            progress=Progress(self.board, step.name),
        )
        # No CPU: a step that waits for its own tasks or trainer must not keep one from them.
        performing = ray.remote(num_cpus=0, max_retries=0, **ANYWHERE)(perform).options(name=step.name)
        task = performing.remote(step.run, context)
        self.running[task] = _Attempt(step, held, inputs, context, record, tries, time.monotonic())
        self.show(step.name, "running", 0, 0, "")

    def settle(self, task: ray.ObjectRef) -> None:
        """A task has ended: publish its step's manifest, try again, or give the step up."""
        attempt = self.running.pop(task)
        step, key = attempt.step, attempt.context.key
        try:
            outcome = ray.get(task)
            if "error" not in outcome:
                outcome = self.publish(attempt, outcome)
        except StorageBusy:
            self.running[task] = attempt  # ended, with the others, by `abandon`
            raise
        except Exception as error:
            outcome = failure(error)
            if step.memory and isinstance(root_cause(error), OutOfMemoryError):
                outcome["error"] = step.memory
        self.close_record(attempt, outcome)
        reason, again = outcome.get("error", ""), outcome.get("again", False)
        if reason and again and attempt.tries <= step.retries:
            self.show(step.name, "retry", 0, 0, reason)
            self.launch(step, key, attempt.inputs, attempt.lease, attempt.tries + 1)
            return
        attempt.lease.release()
        if reason:
            tried = (
                f"{attempt.tries} of {step.retries + 1} attempts" if again else "not worth another attempt"
            )
            where = f"traceback in {self.storage.uri}/{_record_key(attempt.context)}"
            self.failed[step.name] = StepFailed(f"step {step.name!r} failed: {reason} ({tried}; {where})")
        self.show(step.name, "failed" if reason else "finished", 0, 0, reason)

    def publish(self, attempt: _Attempt, outcome: Value) -> Value:
        """Write the manifest, which makes the step finished. The first one stands, should there be two."""
        step, context, value = attempt.step, attempt.context, outcome["value"]
        outputs = self.workflow.sizes(context.key, value.get("outputs", ()))
        if missing := [output for output, size in outputs.items() if size is None]:
            raise ValueError(
                f"its output {missing[0]} is not in {self.storage.uri} as seen from {socket.gethostname()}: was it "
                "written, and is the storage shared by all machines?"
            )
        for other in re.findall(r"work/([0-9a-f]{16}-[^/\"]+)", canonical(value)):
            if other != context.key:
                raise ValueError(
                    f"its value names work/{other}, another step's folder: take it from the inputs"
                )
        manifest = {
            "step": step.name,
            "key": context.key,
            "version": step.version,
            "config": context.config,
            "inputs": {name: inner["key"] for name, inner in attempt.inputs.items()},
            "value": value,
            "outputs": [{"key": output, "bytes": size} for output, size in outputs.items()],
            "started": attempt.record["started"],
            "seconds": round(time.monotonic() - attempt.clock, 3),
            "attempt": context.attempt,
            "host": outcome["host"],
        }
        name = f"manifests/{context.key}.json"
        if not attempt.lease.renew():
            raise _taken(step)
        if not self.storage.create(name, _pretty(manifest)):
            first, _ = self.workflow.inspect(step, context.key)
            if first is None:  # of a driver that lost its lease, and its outputs with it
                self.storage.write(name, _pretty(manifest))
            manifest = first or manifest
        self.done[step.name] = manifest
        self.delete_attempts(context.key, context.attempt, but=manifest["attempt"])
        return outcome

    def open_record(self, key: str) -> Value:
        """The record of a new attempt, which says how it ended should nobody live to write that."""
        number = max((record["attempt"] for record in self.workflow.attempts(key)), default=0)
        while True:
            number += 1
            record = {
                "attempt": number,
                "key": key,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "driver": {"host": socket.gethostname(), "pid": os.getpid()},
                "error": "interrupted: its driver died",
            }
            if self.storage.create(f"attempts/{key}/{number}.json", _pretty(record)):
                return record

    def close_record(self, attempt: _Attempt, outcome: Value) -> None:
        told = {name: outcome.get(name, "") for name in ("host", "error", "traceback")}
        seconds = round(time.monotonic() - attempt.clock, 3)
        # a full disk must not hide the error
        with suppress(StorageError) if told["error"] else nullcontext():
            self.storage.write(
                _record_key(attempt.context), _pretty({**attempt.record, **told, "seconds": seconds})
            )

    def delete_attempts(self, key: str, last: int, but: int = 0) -> None:
        """The work of attempts up to `last`, which nothing names, and files that a killed process did not publish."""
        for number in range(1, last + 1):
            if number != but:
                self.storage.delete_tree(f"work/{key}/a{number}")
        for folder in (f"work/{key}/stable", f"attempts/{key}"):
            if path := self.storage.path(folder):
                for leftover in path.rglob(f"{TEMPORARY}*"):
                    leftover.unlink(missing_ok=True)

    def relay(self) -> None:
        """Show what the steps reported, without ever waiting for it: progress is a courtesy."""
        if self.asked is None and self.board is not None:
            self.asked = self.board.read.remote()
        if self.asked is not None and ray.wait([self.asked], timeout=0)[0]:
            with suppress(RayError):
                names = {attempt.step.name for attempt in self.running.values()}
                for name, report in ray.get(self.asked).items():
                    if name.partition("/")[0] in names:
                        self.show(name, *report)
            self.asked = None

    def check(self) -> None:
        """Whether this run still makes sense: its leases stand, and so does Ray on this machine.

        A driver whose raylet was killed would wait for ever: its tasks run on, but no new one can start.
        """
        for attempt in self.running.values():
            if attempt.lease.lost:
                raise _taken(attempt.step)
        here = ray.get_runtime_context().get_node_id()
        if any(node["NodeID"] == here and not node["Alive"] for node in ray.nodes()):
            raise StepFailed("Ray on this machine died; run again to continue")

    def abandon(self, error: BaseException) -> None:
        """End what runs: politely, then not. Nothing in here hides the error that led here."""
        stopped = isinstance(error, SystemExit)  # what Ray makes of SIGTERM
        reason = "its driver was told to end" if stopped else str(error) or type(error).__name__
        with suppress(Exception):
            for task in self.running:
                ray.cancel(task, recursive=True)
            _, stubborn = ray.wait(list(self.running), num_returns=len(self.running), timeout=GRACE)
            for task in stubborn:
                ray.cancel(task, force=True, recursive=True)
        for attempt in self.running.values():
            with suppress(Exception):
                self.close_record(attempt, {"error": f"interrupted: {reason}"})


def _taken(step: Step) -> StorageBusy:
    return StorageBusy(f"step {step.name!r} was taken over by another driver while this one stood still")


def _record_key(context: StepContext) -> str:
    return f"attempts/{context.key}/{context.attempt}.json"


def _pretty(value: Value) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode()
