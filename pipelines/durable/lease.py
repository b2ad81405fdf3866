"""Leases: locks in the storage, so that two drivers never work on the same workflow or step.

In a folder a lease is an flock, which the kernel releases when its holder dies. In a bucket it is an object that its
holder renews. Another process may take it over when it has not been renewed for `expire_seconds` by the server's clock,
or when its holder was a process of this machine and is dead. A lease names its holder.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from data_prep.os_errors import explain_os_error
from data_prep.records import RecordError, decode, from_json, to_json
from data_prep.storage import Storage, StorageError

RENEW_SECONDS = 10.0  # between renewals of a lease in a bucket
EXPIRE_SECONDS = 60.0  # without a renewal, after which the holder counts as dead
POLL_SECONDS = 1.0  # between checks of a lease that may expire
LOCK_WAIT_SECONDS = 0.5  # to retry a file's lock: `current_holder` takes it for an instant

_STORED = {"machine_id": "pids", "renewals": "renewed"}
"""field of LeaseHolder -> its name in a lease's JSON, where they differ"""


@dataclass(frozen=True)
class LeaseHolder:
    """The holder that a lease names. The defaults stand for what it does not record."""

    host: str = "?"
    pid: int | None = None
    since: str = "just now"
    """UTC, ISO 8601."""
    machine_id: str | None = None
    """Where `pid` is valid: one boot of one machine and its PID namespace. None: unknown."""
    token: str | None = None
    """Unique for each acquisition."""
    renewals: int = 0
    """How often the lease was renewed (buckets only)."""

    @classmethod
    def parse(cls, text: str | bytes) -> LeaseHolder:
        """Parse a lease's JSON. If it is damaged or empty, the holder is unknown: a file is empty between its lock and
        its first write."""
        try:
            record = decode(dict[str, str | int | None], text, "a lease")
            fields = {field: record.pop(name) for field, name in _STORED.items() if name in record}
            return from_json(cls, record | fields, "a lease")
        except RecordError:
            return cls()

    def to_bytes(self) -> bytes:
        return json.dumps(
            {_STORED.get(field, field): value for field, value in to_json(self).items()}
        ).encode()

    def is_dead(self) -> bool:
        """Whether it was a process of this machine (and container) that no longer exists."""
        if not self.machine_id or self.machine_id != _machine_id() or self.pid is None:
            return False
        try:
            os.kill(self.pid, 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)  # PermissionError: alive, of another user
        return False

    def __str__(self) -> str:
        return f"process {'?' if self.pid is None else self.pid} on {self.host}"


class LeaseHeld(RuntimeError):
    """Another driver holds the lease. One line that names its host, process and start."""


class Lease:
    """Held until `release`, the end of the with block, or the end of the process."""

    lost = False  # another driver took it over because it was not renewed: stop

    def renew(self) -> bool:
        """Renew the lease now; returns whether it is still held."""
        return not self.lost

    def release(self) -> None:
        """Release the lease. May be called more than once."""

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire(
    storage: Storage,
    name: str,
    *,
    renew_seconds: float = RENEW_SECONDS,
    expire_seconds: float = EXPIRE_SECONDS,
) -> Lease:
    """Acquire the lease `name` of this storage. Raises LeaseHeld. The seconds apply to buckets only."""
    path = storage.local_path(_key(name))
    return (
        _FileLease(storage, name, path)
        if path
        else _ObjectLease(storage, name, renew_seconds, expire_seconds)
    )


def acquire_or_wait(
    storage: Storage,
    name: str,
    report: Callable[[str], None] = lambda text: None,
    *,
    renew_seconds: float = RENEW_SECONDS,
    expire_seconds: float = EXPIRE_SECONDS,
    poll_seconds: float = POLL_SECONDS,
) -> Lease:
    """Like `acquire`, but waits for a lease of another machine to expire: a killed cluster leaves its leases behind.

    Takes it over after `expire_seconds`. Raises LeaseHeld once the holder renews it; a live holder does so within
    `renew_seconds`. `report` gets one line when the wait begins.
    """
    first_etag = ""
    while True:
        try:
            return acquire(storage, name, renew_seconds=renew_seconds, expire_seconds=expire_seconds)
        except LeaseHeld:
            if storage.local_path() is not None:  # the kernel knows that the holder is alive
                raise
            try:
                stored = storage.read_with_etag(_key(name))
            except FileNotFoundError:
                continue
            holder = LeaseHolder.parse(stored.data)
            if first_etag not in ("", stored.etag) or holder.machine_id == _machine_id():
                raise
        if not first_etag:
            first_etag = stored.etag
            age = max(0.0, stored.server_time - stored.modified)
            report(
                f"{holder} held {name!r} and last renewed its lease {age:.0f} s ago: "
                f"taking over in {max(0.0, expire_seconds - age):.0f} s unless it renews"
            )
        time.sleep(poll_seconds)


def current_holder(
    storage: Storage, name: str, *, expire_seconds: float = EXPIRE_SECONDS
) -> LeaseHolder | None:
    """The live holder of the lease, or None. Changes nothing."""
    path = storage.local_path(_key(name))
    with suppress(FileNotFoundError):
        if path is None:
            stored = storage.read_with_etag(_key(name))
            holder = LeaseHolder.parse(stored.data)
            expired = stored.server_time - stored.modified > expire_seconds
            return None if expired or holder.is_dead() else holder
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return LeaseHolder.parse(file.read())
    return None


class _FileLease(Lease):
    def __init__(self, storage: Storage, name: str, path: Path) -> None:
        self.path = path
        self.descriptor = -1  # closed on exec: a child process must not keep the lock
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while self.descriptor < 0:
            descriptor = _open(storage, name, path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):  # the previous holder may have deleted the file since _open
                    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, _this_process().to_bytes(), 0)
                        self.descriptor = descriptor
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _held_error(
                        storage, name, LeaseHolder.parse(os.pread(descriptor, 4096, 0))
                    ) from None
                time.sleep(0.02)
            finally:
                if self.descriptor < 0:
                    os.close(descriptor)

    def release(self) -> None:
        if self.descriptor >= 0:
            # Delete before unlocking: a process that has the file open then finds it deleted.
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1


def _open(storage: Storage, name: str, path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(
            f"cannot acquire the lease {name!r} in {storage.uri}: {explain_os_error(error)}"
        ) from error


class _ObjectLease(Lease):
    def __init__(self, storage: Storage, name: str, renew_seconds: float, expire_seconds: float) -> None:
        self.storage, self.key, self.renew_seconds = storage, _key(name), renew_seconds
        self.holder = _this_process()
        self.lock, self.released = threading.Lock(), threading.Event()
        if not storage.put_if_absent(self.key, self.holder.to_bytes()):
            stored = storage.read_with_etag(self.key)
            holder = LeaseHolder.parse(stored.data)
            free = stored.server_time - stored.modified > expire_seconds or holder.is_dead()
            if (
                not (free and storage.put_if_match(self.key, self.holder.to_bytes(), stored.etag))
                and not self._is_owner()
            ):
                raise _held_error(storage, name, holder)
        self.renew_thread = threading.Thread(target=self._renew_forever, name=f"lease {name}", daemon=True)
        self.renew_thread.start()

    def renew(self) -> bool:
        with self.lock:
            with suppress(FileNotFoundError):
                stored = self.storage.read_with_etag(self.key)
                if LeaseHolder.parse(stored.data).token == self.holder.token:
                    # Each renewal changes the text, and so the ETag: a process that read the lease while it was
                    # expired must fail to replace it.
                    self.holder = replace(self.holder, renewals=self.holder.renewals + 1)
                    if self.storage.put_if_match(self.key, self.holder.to_bytes(), stored.etag):
                        return True
            self.lost = not self._is_owner()
            return not self.lost

    def _renew_forever(self) -> None:
        while not self.lost and not self.released.wait(self.renew_seconds):
            with suppress(
                StorageError
            ):  # the server is unreachable: retry, nobody else can acquire it either
                self.renew()

    def _is_owner(self) -> bool:
        """Whether the stored token is ours. It can be even if our write was refused: the response to an earlier attempt
        may have been lost."""
        with suppress(FileNotFoundError):
            return LeaseHolder.parse(self.storage.read(self.key)).token == self.holder.token
        return False

    def release(self) -> None:
        if not self.released.is_set():
            self.released.set()
            self.renew_thread.join()
            with suppress(StorageError):  # a lease that cannot be deleted expires
                if self._is_owner():
                    self.storage.delete(self.key)


def _key(name: str) -> str:
    return f"leases/{name}.lock"


def _this_process() -> LeaseHolder:
    """This process as the holder of a lease acquired now."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return LeaseHolder(socket.gethostname(), os.getpid(), since, _machine_id(), uuid.uuid4().hex)


def _held_error(storage: Storage, name: str, holder: LeaseHolder) -> LeaseHeld:
    return LeaseHeld(
        f"{storage.uri} is busy: {holder} has been running {name!r} since {holder.since}; wait for it, stop it, or "
        f"choose another storage"
    )


def _machine_id() -> str | None:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None
