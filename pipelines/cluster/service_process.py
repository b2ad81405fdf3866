"""The processes of `inpaint services`: one server per service and folder, in the foreground or detached.

DIR/SERVICE.lock is locked by the server for as long as it runs, and holds its record. The user's state folder lists the
folders of detached servers, so that `status` and `stop` find them from anywhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from pipelines.cluster.folders import state_folder

START_SECONDS = 120.0  # until a server answers: MLflow creates its database first
GRACE_SECONDS = 10.0  # for a server to end before it is killed
POLL_SECONDS = 0.2
SERVICES = ("mlflow", "s3")


class ServiceError(RuntimeError):
    """A server that cannot be started or stopped; one line."""


@dataclass(frozen=True)
class ServerCommand:
    """What to run for a service, and the URL by which this machine reaches it."""

    service: str
    folder: Path
    uri: str
    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class ServiceRecord:
    """A server that was started. `started_at` is its process's start time, as process ids are reused."""

    service: str
    folder: str
    uri: str
    pid: int
    started_at: float
    log: str
    """The file with its output; '' if it runs in the foreground."""

    @property
    def is_running(self) -> bool:
        return _process(self) is not None


@contextmanager
def locked(folder: Path, service: str) -> Iterator[int]:
    """Lock a service of a folder; the lock's descriptor is for `exec_server` or `start_detached`.

    Creates the folder. Raises ServiceError, which names the server that holds the lock.
    """
    os.umask(0o077)  # databases, artifacts and logs are readable by their owner only
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(_lock_path(folder, service), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(_held_message(folder, service)) from None
        yield lock
    finally:
        os.close(lock)


def exec_server(server: ServerCommand, lock: int) -> NoReturn:
    """Replace this process by the server, which keeps the lock."""
    os.set_inheritable(lock, True)
    _write_record(lock, _record(server, os.getpid(), ""))
    os.chdir(server.folder)
    os.execve(server.command[0], server.command, _with_path(server.environment))


def start_detached(server: ServerCommand, lock: int) -> ServiceRecord:
    """Start the server in a session of its own, so that it survives this terminal, and wait until it answers.

    Its output goes to DIR/SERVICE.log. Raises ServiceError with the last line of its log if it ends or does not answer;
    then nothing is left running.
    """
    log = server.folder / f"{server.service}.log"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        process = subprocess.Popen(
            server.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_with_path(server.environment),
            cwd=server.folder,
            start_new_session=True,
            pass_fds=(lock,),
        )
    record = _record(server, process.pid, str(log))
    try:
        _write_record(lock, record)
        _remember(record)
        _wait_until_it_answers(server, process, log)
    except BaseException:
        stop(record)
        os.ftruncate(lock, 0)  # `stop` does not get the lock that this process holds
        raise
    return record


def list_records(folder: Path | None = None) -> list[ServiceRecord]:
    """The records of a folder's servers, or of all detached servers of this user that were not stopped."""
    if folder is not None:
        paths = [_lock_path(folder, service) for service in SERVICES]
    else:
        paths = [Path(entry.read_text()) for entry in sorted(state_folder("services").glob("*"))]
    records = [record for path in paths if (record := _read_record(path)) is not None]
    return [record for record in records if record.log or record.is_running]


def stop(record: ServiceRecord) -> int:
    """End the processes of a detached server, and no others; returns their number. Raises ServiceError."""
    processes = _session_processes(record)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, remaining = psutil.wait_procs(processes, GRACE_SECONDS)
    for process in remaining:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, remaining = psutil.wait_procs(remaining, GRACE_SECONDS)
    if remaining:
        raise ServiceError(f"process {remaining[0].pid} of the {record.service} server does not end")
    _forget(record)
    return len(processes)


def _session_processes(record: ServiceRecord) -> list[psutil.Process]:
    """The server and its children: a detached server leads a session, whose id is the leader's process id.

    Empty if another process has that id now. While members remain, the system does not give a dead leader's id away.
    """
    with suppress(psutil.NoSuchProcess):
        if psutil.Process(record.pid).create_time() != record.started_at:
            return []
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == record.pid and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def _process(record: ServiceRecord) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(record.pid)
        if process.create_time() == record.started_at and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _wait_until_it_answers(server: ServerCommand, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(server.uri):
        if process.poll() is not None:
            raise ServiceError(f"the {server.service} server ended: {_last_line(log)} (log: {log})")
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the {server.service} server does not answer at {server.uri} after {START_SECONDS:.0f} s: "
                f"{_last_line(log)} (log: {log})"
            )
        time.sleep(POLL_SECONDS)


def _answers(uri: str) -> bool:
    """Whether an HTTP server answers, with whatever status; proxies are bypassed."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{uri}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _held_message(folder: Path, service: str) -> str:
    record = _read_record(_lock_path(folder, service))
    if record is None or not record.is_running:
        return f"another command is starting the {service} server of {folder}; wait for it, or give another --folder"
    remedy = (
        f"inpaint services stop {service} --folder {folder} ends it" if record.log else "Ctrl-C there ends it"
    )
    return f"the {service} server of {folder} runs already at {record.uri} (process {record.pid}): {remedy}"


def _record(server: ServerCommand, pid: int, log: str) -> ServiceRecord:
    started_at = psutil.Process(pid).create_time()
    return ServiceRecord(server.service, str(server.folder), server.uri, pid, started_at, log)


def _write_record(lock: int, record: ServiceRecord) -> None:
    content = json.dumps(asdict(record)).encode()
    os.pwrite(lock, content, 0)
    os.ftruncate(lock, len(content))


def _read_record(path: Path) -> ServiceRecord | None:
    try:
        return ServiceRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # no server was started there, or one is being started
        return None


def _remember(record: ServiceRecord) -> None:
    """List the folder in the user's state folder; without it, `status` and `stop` need --folder."""
    entry = _entry(record)
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        entry.write_text(str(_lock_path(Path(record.folder), record.service)))


def _forget(record: ServiceRecord) -> None:
    """Remove the record, unless another server holds the lock by now."""
    path = _lock_path(Path(record.folder), record.service)
    with suppress(OSError), open(path, "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate()
    with suppress(OSError):
        _entry(record).unlink()


def _entry(record: ServiceRecord) -> Path:
    path = _lock_path(Path(record.folder), record.service)
    return state_folder("services") / hashlib.sha256(str(path).encode()).hexdigest()[:16]


def _lock_path(folder: Path, service: str) -> Path:
    return folder / f"{service}.lock"


def _with_path(environment: dict[str, str]) -> dict[str, str]:
    """The environment with this Python's programs first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return {**environment, "PATH": path}
