"""The inside of a step's task: it does the work, tells where it is, and says in one line what went wrong."""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from pipelines.durable.steps import StepContext, Value, canonical
from pipelines.tracking import be_patient

PERIOD = 0.2  # seconds between two reports of one step, and between two looks at them

Report = tuple[str, float, float, str]  # state, done, total, note

# What a second attempt would only repeat: errors of the user and of the programmer.
FINAL: tuple[type[Exception], ...] = (
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


FULL = ("the disk is full", "disk quota is used up", "No space left on device", "database or disk is full")


class Progress:
    """Tells the driver where a step is, at most five times a second however often it is called; can be pickled.

    The last report always arrives: one that comes too soon waits for its turn and is replaced by a newer one.
    """

    def __init__(self, board: Any, name: str) -> None:
        self.board, self.name = board, name
        self.lock = threading.Lock()
        self.report: Report | None = None
        self.sent = 0.0
        self.timer: threading.Timer | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Progress, (self.board, self.name)

    def child(self, name: str) -> Progress:
        """Of a part of the step that is shown beside it, such as one trial of a sweep."""
        return Progress(self.board, f"{self.name}/{name}")

    def __call__(self, done: float, total: float, note: str = "", state: str = "running") -> None:
        with self.lock:
            self.report = (state, done, total, note)
            if self.timer is None:
                self.timer = threading.Timer(max(0.0, self.sent + PERIOD - time.monotonic()), self.send)
                self.timer.daemon = True
                self.timer.start()

    def send(self) -> None:
        with self.lock:
            report, self.report, self.timer, self.sent = self.report, None, None, time.monotonic()
        if report:
            with suppress(Exception):  # the driver may be gone, or this task at its end
                self.board.report.remote(self.name, *report)


class Board:
    """The actor between the steps and the driver: the newest report of each step since the last look."""

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}

    def report(self, name: str, *report: Any) -> None:
        self.reports[name] = report  # type: ignore[assignment]

    def read(self) -> dict[str, Report]:
        reports, self.reports = self.reports, {}
        return reports


def perform(run: Any, context: StepContext) -> Value:
    """In the task: the step's value, or what went wrong as plain data, since errors do not always survive pickling."""
    host = {"host": socket.gethostname()}
    be_patient()
    try:
        value = run(context)
        if not isinstance(value, dict):
            raise TypeError(f"a step returns a dict, not {type(value).__name__}")
        return {"value": json.loads(canonical(value))} | host
    except (Exception, SystemExit) as error:
        return failure(error) | host


def failure(error: BaseException) -> Value:
    """An error in one line, its whole traceback, and whether trying again may help."""
    cause = root_cause(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    plain = bool(lines) and isinstance(cause, (ValueError, RuntimeError, OSError))
    text = lines[0] if plain else ": ".join([type(cause).__name__, *lines[:1]])
    if isinstance(cause, WorkerCrashedError):
        text = "its process died: killed, crashed, or out of memory"
    elif isinstance(cause, OutOfMemoryError):
        text = "its process was ended, as the machine ran out of memory"
    return {
        "error": text,
        "traceback": "".join(traceback.format_exception(error)),
        "again": not isinstance(cause, FINAL) and not any(words in str(cause) for words in FULL),
    }


INNER = ("controller_failure", "health_check_failure", "cause")


def root_cause(error: BaseException) -> BaseException:
    """What really happened, under Ray's and Ray Train's wrappings."""
    while True:
        workers = getattr(error, "worker_failures", None) or {}
        inner = [*workers.values(), *(getattr(error, name, None) for name in INNER)]
        found = next((each for each in inner if isinstance(each, BaseException)), None)
        if found is None:
            return error
        error = found
