"""The Ray task of one step attempt: run the step, report its progress, turn exceptions into one-line errors."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from data_prep.network import enable_long_retries
from data_prep.records import from_json, to_json
from pipelines.durable import memory
from pipelines.durable.steps import StepContext, StepEvent, StepId
from pipelines.errors import explain_error

if TYPE_CHECKING:
    from pipelines.contracts import ProgressCallback

REPORT_SECONDS = 0.2  # between reports of one step, and between reads of all reports
# Not in the placement group that this process may run in: a trial's driver is a Ray task.
ANY_NODE: dict[str, Any] = {"scheduling_strategy": "DEFAULT"}

# Errors that a retry cannot fix: the user's and the programmer's.
PERMANENT_ERRORS: tuple[type[Exception], ...] = (
    *(
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        NameError,
        ImportError,
        ArithmeticError,
        AssertionError,
    ),
    *(NotImplementedError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
)


DISK_FULL_MESSAGES = (
    "the disk is full",
    "disk quota is used up",
    "No space left on device",
    "database or disk is full",
)


@dataclass(frozen=True)
class AttemptError:
    """Why an attempt failed: one line, the whole traceback, and whether a retry may succeed."""

    message: str
    traceback: str
    retryable: bool


@dataclass(frozen=True)
class AttemptOutcome:
    """Result of an attempt: its outputs as JSON, or its error. Plain data, as exceptions do not always unpickle."""

    host: str = ""
    value: dict[str, Any] | None = None
    error: AttemptError | None = None


class ProgressReporter:
    """Reports a step's progress to the driver, at most once per REPORT_SECONDS. Can be pickled.

    A report that comes too soon is delayed, and replaced by a newer one; so the last report always arrives.
    """

    def __init__(self, actor: Any, step: StepId, substep: str = "") -> None:
        self.actor, self.step, self.substep = actor, step, substep
        self.lock = threading.Lock()
        self.pending: StepEvent | None = None
        self.sent_at = 0.0
        self.timer: threading.Timer | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ProgressReporter, (self.actor, self.step, self.substep)

    def child(self, substep: str) -> ProgressReporter:
        """The reporter of a substep, which is displayed beside the step; such as one trial of a sweep."""
        return ProgressReporter(self.actor, self.step, substep)

    def __call__(self, done: float, total: float, note: str = "", state: str = "running") -> None:
        with self.lock:
            self.pending = StepEvent(self.step, state, done, total, note, self.substep)
            if self.timer is None:
                delay = max(0.0, self.sent_at + REPORT_SECONDS - time.monotonic())
                self.timer = threading.Timer(delay, self.send)
                self.timer.daemon = True
                self.timer.start()

    def announce(self, text: str) -> None:
        """Show a note beside the progress, at once; unlike reports, no later one replaces it."""
        self._send(StepEvent(self.step, "note", note=text, substep=self.substep))

    def send(self) -> None:
        with self.lock:
            event, self.pending, self.timer, self.sent_at = self.pending, None, None, time.monotonic()
        if event:
            self._send(event)

    def _send(self, event: StepEvent) -> None:
        with suppress(Exception):  # the driver may have died, or this task may be ending
            self.actor.report.remote(event)


def announce(progress: ProgressCallback | None, text: str) -> None:
    """Show a note beside a step's progress; does nothing where nobody follows the step."""
    if isinstance(progress, ProgressReporter):
        progress.announce(text)


class ProgressActor:
    """The Ray actor between the steps and the driver.

    It holds the notes since the last read, and the newest other event of each step and substep.
    """

    def __init__(self) -> None:
        self.notes: list[StepEvent] = []
        self.events: dict[tuple[str, str], StepEvent] = {}

    def report(self, event: StepEvent) -> None:
        if event.state == "note":
            self.notes.append(event)
        else:
            self.events[event.step, event.substep] = event

    def read(self) -> list[StepEvent]:
        """The notes, oldest first, then the other events."""
        read = [*self.notes, *self.events.values()]
        self.notes, self.events = [], {}
        return read


def start_progress_actor() -> Any:
    """Start a ProgressActor. Its calls, several per second, are not listed among the tasks in Ray's dashboard."""
    options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1, "enable_task_events": False}
    return ray.remote(ProgressActor).options(num_cpus=0, **options, **ANY_NODE).remote()


def submit_step(
    name: str, function: str, context: StepContext[Any, Any, Any], outputs_type: type
) -> ray.ObjectRef:
    """Submit an attempt as a Ray task of this name, which the dashboard and `ps` show."""
    # No CPU: a step waits for its own tasks or trainer, which need the CPUs.
    remote_step = ray.remote(num_cpus=0, max_retries=0, **ANY_NODE)(run_step)
    return remote_step.options(name=name).remote(function, context, outputs_type)


def run_step(function: str, context: StepContext[Any, Any, Any], outputs_type: type) -> AttemptOutcome:
    """Run `function` ("module:object") in this process; returns its checked outputs or its error."""
    host = socket.gethostname()
    enable_long_retries()
    try:
        outputs = resolve_name(function)(context)
        if not isinstance(outputs, outputs_type):
            raise TypeError(
                f"a step of this kind returns {outputs_type.__name__}, not {type(outputs).__name__}"
            )
        value = to_json(outputs)
        from_json(outputs_type, value, f"step {context.name}, outputs")
        return AttemptOutcome(host, value)
    except (Exception, SystemExit) as error:
        return AttemptOutcome(host, error=to_attempt_error(error))


def to_attempt_error(error: BaseException, memory_hint: str = "") -> AttemptError:
    """Convert an exception. `memory_hint`: the step's advice (Step.memory_hint) for when Ray killed its process because
    the machine ran out of memory."""
    cause = root_cause(error)
    text = explain_error(cause)
    if isinstance(cause, WorkerCrashedError):
        text = "its process died: killed, crashed, or out of memory"
    elif isinstance(cause, OutOfMemoryError):
        advice = memory_hint or "its process was killed: the machine ran out of memory"
        who = "this training" if memory_hint else "this step"
        text, _ = memory.explain_out_of_memory(str(cause), advice, ray_job_id(), who)
    return AttemptError(
        text,
        memory.strip_arguments("".join(traceback.format_exception(error))),
        not isinstance(cause, PERMANENT_ERRORS)
        and not any(message in str(cause) for message in DISK_FULL_MESSAGES),
    )


def ray_job_id() -> str:
    """The Ray job id of this process; '' outside Ray."""
    return ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""


CAUSE_ATTRIBUTES = ("controller_failure", "health_check_failure", "cause")


def root_cause(error: BaseException) -> BaseException:
    """The original exception inside Ray's and Ray Train's wrappers."""
    while True:
        workers = getattr(error, "worker_failures", None) or {}
        wrapped = [*workers.values(), *(getattr(error, name, None) for name in CAUSE_ATTRIBUTES)]
        cause = next((value for value in wrapped if isinstance(value, BaseException)), None)
        if cause is None:
            return error
        error = cause
