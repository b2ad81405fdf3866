"""Jobs that run in a worker process, one after another, with progress and cancellation."""

from __future__ import annotations

import multiprocessing
import queue
import secrets
import signal
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from pipelines.studio.shown import shown
from pipelines.studio.worker import receive, send, work

CANCEL_SECONDS = 2.0  # after which a job that does not react is ended with its process
POLL_SECONDS = 0.1
PREPARE = "prepare"  # in the queue of jobs
MAX_WAITING = 8  # jobs of one session
MAX_KEPT = 200  # ended jobs of a runner
INTERNAL_RESULTS = ("comparison", "promotion")
"""Kinds of jobs whose results may hold paths of this machine: pages get them from their templates, which cut paths."""


@dataclass(eq=False)
class Job:
    """One job; its runner's thread changes it."""

    id: str
    session_id: str
    kind: str
    function: str
    arguments: dict[str, Any]
    state: str = "waiting"
    """waiting, running, finished, failed or cancelled."""
    done: float = 0
    total: float = 0
    note: str = ""
    error: str | None = None
    result: Any = None
    started: float | None = None
    ended: float | None = None
    cancel_requested: float | None = None
    progress_started: float | None = field(default=None, repr=False)
    """When `done` was 0 last: the time before is not part of the estimate."""

    @property
    def has_ended(self) -> bool:
        return self.state in ("finished", "failed", "cancelled")

    def as_json(self) -> dict[str, Any]:
        """For the page; `seconds` is the time since the start, `eta_seconds` an estimate or None."""
        now = time.monotonic() if self.ended is None else self.ended
        eta = None
        if self.state == "running" and self.done and self.progress_started is not None:
            eta = max(0.0, (now - self.progress_started) * (self.total - self.done) / self.done)
        return {
            "id": self.id,
            "kind": self.kind,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "note": shown(self.note),
            "seconds": 0.0 if self.started is None else round(now - self.started, 2),
            "eta_seconds": None if eta is None else round(eta, 1),
            "error": None if self.error is None else shown(self.error),
            "result": None if self.kind in INTERNAL_RESULTS else self.result,
        }


class JobRunner:
    """One worker process, started by the first job. `close` ends it; jobs belong to the session that submitted them."""

    def __init__(self, name: str, tracking_uri: str) -> None:
        self.name, self._tracking_uri = name, tracking_uri
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue: queue.SimpleQueue[Job | str | None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._closed = False

    @property
    def process_id(self) -> int | None:
        """Of the worker process; None: none runs."""
        process = self._process
        return process.pid if process is not None and process.is_alive() else None

    def submit(self, session_id: str, kind: str, function: str, arguments: dict[str, Any]) -> Job:
        """Append a job: `function`, as package.module:name, called as function(context, **arguments) in the worker.

        `arguments` must be JSON. ValueError: the session has too many jobs that wait.
        """
        job = Job(secrets.token_urlsafe(16), session_id, kind, function, arguments)
        with self._lock:
            if self._closed:
                raise ValueError("the studio is about to end")
            waiting = [
                job for job in self._jobs.values() if job.session_id == session_id and not job.has_ended
            ]
            if len(waiting) >= MAX_WAITING:
                raise ValueError(f"{len(waiting)} jobs wait already: let one end, or cancel one")
            self._jobs[job.id] = job
            ended = [old for old in self._jobs.values() if old.has_ended]
            for old in ended[: max(0, len(self._jobs) - MAX_KEPT)]:
                del self._jobs[old.id]
            self._start_thread()
        self._queue.put(job)
        return job

    def prepare(self) -> None:
        """Start the worker process, if none runs, and let it import what jobs need: that takes seconds."""
        with self._lock:
            if self._closed or self.process_id is not None:
                return
            self._start_thread()
        self._queue.put(PREPARE)

    def get(self, session_id: str, job_id: str) -> Job | None:
        """The session's job; None: it has none with this id."""
        with self._lock:
            job = self._jobs.get(job_id)
        return job if job is not None and job.session_id == session_id else None

    def cancel(self, session_id: str, job_id: str) -> Job | None:
        """Cancel the session's job, and return it; a running one ends within CANCEL_SECONDS."""
        job = self.get(session_id, job_id)
        if job is not None:
            with self._lock:
                if job.state == "waiting":
                    self._end(job, "cancelled")
                elif job.state == "running" and job.cancel_requested is None:
                    job.cancel_requested = time.monotonic()
        return job

    def close(self) -> None:
        """End the worker process and all jobs."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                if not job.has_ended:
                    self._end(job, "cancelled")
        self._queue.put(None)
        self._kill()
        if self._thread is not None:
            self._thread.join(5)

    def _start_thread(self) -> None:
        if self._thread is None:
            name = f"studio-{self.name}"
            self._thread = threading.Thread(target=self._run_jobs, name=name, daemon=True)
            self._thread.start()

    def _run_jobs(self) -> None:
        while (job := self._queue.get()) is not None:
            if isinstance(job, str):
                with suppress(EOFError, OSError):
                    send(self._connect(), {"prepare": True})
                continue
            with self._lock:
                if job.state != "waiting":
                    continue
                job.state, job.started = "running", time.monotonic()
                job.note = "starting" if self.process_id is None else ""
            try:
                self._run(job)
            except (EOFError, OSError):
                self._worker_died(job)
            except Exception as error:  # a result that is not JSON; the thread must go on
                self._kill()
                with self._lock:
                    self._end(job, "failed", f"the job could not be run: {error}")

    def _run(self, job: Job) -> None:
        connection = self._connect()
        send(connection, {"job": job.id, "function": job.function, "arguments": job.arguments})
        asked = False
        while True:
            if connection.poll(POLL_SECONDS):
                message = receive(connection)
                with self._lock:
                    if job.has_ended:
                        return
                    if "state" in message:
                        job.result = message.get("result")
                        self._end(job, message["state"], message.get("error"))
                        return
                    job.done, job.total, job.note = message["done"], message["total"], message["note"]
                    if not job.done:
                        job.progress_started = time.monotonic()
            with self._lock:
                requested, closed = job.cancel_requested, self._closed
            if closed:
                return
            if requested is not None and not asked:
                send(connection, {"cancel": job.id})
                asked = True
            if requested is not None and time.monotonic() - requested > CANCEL_SECONDS:
                self._kill()
                with self._lock:
                    self._end(job, "cancelled")
                return

    def _worker_died(self, job: Job) -> None:
        process = self._process
        if process is not None:
            process.join(2)
        code = None if process is None else process.exitcode
        self._kill()
        with self._lock:
            if job.has_ended:
                return
            if job.cancel_requested is not None:
                self._end(job, "cancelled")
                return
            cause = (
                f"by signal {-code}, often for lack of memory"
                if code and code < 0
                else f"with exit code {code}"
            )
            self._end(
                job, "failed", f"the worker process ended {cause}: try again, or with a smaller photograph"
            )

    def _end(self, job: Job, state: str, error: str | None = None) -> None:
        if not job.has_ended:
            job.state, job.error, job.ended = state, error, time.monotonic()

    def _connect(self) -> Connection:
        """The connection to the worker process, which is started if none runs."""
        with self._lock:
            if self._closed:
                raise EOFError
            if self.process_id is None or self._connection is None:
                context = multiprocessing.get_context("spawn")
                self._connection, other = context.Pipe()
                process = context.Process(
                    target=work,
                    args=(other, self._tracking_uri),
                    name=f"inpaint-studio-{self.name}",
                    daemon=True,
                )
                # Ctrl-C goes to all processes of a terminal: this one never sees it, and is ended by `close`
                resource_tracker.ensure_running()  # else the start starts it, and that unblocks the signal
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                other.close()
                self._process = process
            return self._connection

    def _kill(self) -> None:
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
        if process is not None:
            process.kill()  # its own files are temporary, and torch does not always react to SIGTERM soon
            process.join(5)
        if connection is not None:
            connection.close()
