"""Leases: who is working on what, so that two drivers never work on one thing.

In a folder a lease is an flock, which the kernel drops when its holder dies, however it dies. In a bucket it is an
object that its holder renews; one that was not renewed for `stale` seconds by the server's clock, or whose holder
was a process of this machine and is dead, may be taken over. Both name their holder to the one who comes second.
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
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.storage import Storage

EVERY = 10.0  # seconds between two renewals in a bucket
STALE = 60.0  # seconds without one after which the holder is taken for dead
LOOK = 1.0  # seconds between two looks at a lease that may go stale
PATIENCE = 0.5  # seconds: who only looks at a folder's lease holds its lock for an instant

Card = dict[str, Any]  # what a lease says about its holder: host, pid, since, token, renewed, pids


class StorageBusy(RuntimeError):
    """One line: another driver is at work on this; it names the host, the process and since when."""


class Lease:
    """Held until `release`, the end of the with block, or the end of the process."""

    lost = False  # another driver took it over, as this one could not renew it: stop

    def renew(self) -> bool:
        """Whether it is still held, as of now."""
        return not self.lost

    def release(self) -> None:
        """Let others have it; again is harmless."""

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take(storage: Storage, name: str, *, every: float = EVERY, stale: float = STALE) -> Lease:
    """The lease `name` of this storage, or StorageBusy. `every` and `stale` (seconds) matter in buckets only."""
    path = storage.path(_key(name))
    return _FileLease(storage, name, path) if path else _ObjectLease(storage, name, every, stale)


def outwait(
    storage: Storage,
    name: str,
    tell: Callable[[str], None] = lambda text: None,
    *,
    every: float = EVERY,
    stale: float = STALE,
    look: float = LOOK,
) -> Lease:
    """`take`, where a holder elsewhere that may be dead is waited for: what ended a whole cluster left its leases.

    Takes over after `stale` seconds; StorageBusy as soon as the holder renews, within `every` seconds if it lives.
    """
    first = ""
    while True:
        try:
            return take(storage, name, every=every, stale=stale)
        except StorageBusy:
            if storage.path() is not None:  # the kernel knows
                raise
            try:
                found = storage.read_tagged(_key(name))
            except FileNotFoundError:
                continue
            card = _parse(found.data)
            if first not in ("", found.etag) or card.get("pids") == _pids():
                raise
        if not first:
            first = found.etag
            silent = max(0.0, found.server_now - found.modified)
            tell(
                f"process {card.get('pid')} on {card.get('host')} was at {name!r}, and last said so {silent:.0f} s ago: "
                f"going on in {max(0.0, stale - silent):.0f} s unless it does again"
            )
        time.sleep(look)


def holder(storage: Storage, name: str, *, stale: float = STALE) -> Card | None:
    """Who holds the lease now; None when nobody living does. Changes nothing."""
    path = storage.path(_key(name))
    with suppress(FileNotFoundError):
        if path is None:
            found = storage.read_tagged(_key(name))
            card = _parse(found.data)
            return None if found.server_now - found.modified > stale or _dead(card) else card
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _parse(file.read())
    return None


class _FileLease(Lease):
    def __init__(self, storage: Storage, name: str, path: Path) -> None:
        self.path = path
        self.descriptor = -1  # closed on exec, so that no child process keeps the lock alive
        deadline = time.monotonic() + PATIENCE
        while self.descriptor < 0:
            descriptor = _open(storage, name, path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):  # its last holder may have deleted it since we opened it
                    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, _card(uuid.uuid4().hex, _now()), 0)
                        self.descriptor = descriptor
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _busy(storage, name, _parse(os.pread(descriptor, 4096, 0))) from None
                time.sleep(0.02)
            finally:
                if self.descriptor < 0:
                    os.close(descriptor)

    def release(self) -> None:
        if self.descriptor >= 0:
            self.path.unlink(missing_ok=True)  # still locked: whoever has it open sees that it is gone
            os.close(self.descriptor)
            self.descriptor = -1


def _open(storage: Storage, name: str, path: Path) -> int:
    from data_prep.storage import StorageError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(
            f"cannot take the lease {name!r} in {storage.uri}: {error.strerror}; check the folder's owner and rights"
        ) from error


class _ObjectLease(Lease):
    def __init__(self, storage: Storage, name: str, every: float, stale: float) -> None:
        self.storage, self.key, self.every = storage, _key(name), every
        self.token, self.since, self.renewals = uuid.uuid4().hex, _now(), 0
        self.lock, self.released = threading.Lock(), threading.Event()
        if not storage.create(self.key, _card(self.token, self.since)):
            found = storage.read_tagged(self.key)
            card = _parse(found.data)
            free = found.server_now - found.modified > stale or _dead(card)
            if (
                not (free and storage.replace_if(self.key, _card(self.token, self.since), found.etag))
                and not self._mine()
            ):
                raise _busy(storage, name, card)
        self.renewer = threading.Thread(target=self._renew_forever, name=f"lease {name}", daemon=True)
        self.renewer.start()

    def renew(self) -> bool:
        with self.lock:
            with suppress(FileNotFoundError):
                found = self.storage.read_tagged(self.key)
                if _parse(found.data).get("token") == self.token:
                    # A new text each time: were the tag to stay the same, who saw it stale could still replace it.
                    self.renewals += 1
                    if self.storage.replace_if(
                        self.key, _card(self.token, self.since, self.renewals), found.etag
                    ):
                        return True
            self.lost = not self._mine()
            return not self.lost

    def _renew_forever(self) -> None:
        """A server that is away is asked again and again: meanwhile nobody else can take the lease either."""
        from data_prep.storage import StorageError

        while not self.lost and not self.released.wait(self.every):
            with suppress(StorageError):
                self.renew()

    def _mine(self) -> bool:
        """Whether the token there is ours; it can be after a refusal, when the answer to our first request was lost."""
        with suppress(FileNotFoundError):
            return _parse(self.storage.read(self.key)).get("token") == self.token
        return False

    def release(self) -> None:
        from data_prep.storage import StorageError

        if not self.released.is_set():
            self.released.set()
            self.renewer.join()
            with suppress(StorageError):  # one that cannot be deleted goes stale
                if self._mine():
                    self.storage.delete(self.key)


def _key(name: str) -> str:
    return f"leases/{name}.lock"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _card(token: str, since: str, renewed: int = 0) -> bytes:
    card = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "pids": _pids()}
    return json.dumps({**card, "token": token, "renewed": renewed}).encode()


def _parse(card: str | bytes) -> Card:
    """Nothing yet in the instant between a file's lock and its text."""
    with suppress(ValueError):
        found = json.loads(card)
        return found if isinstance(found, dict) else {}
    return {}


def _busy(storage: Storage, name: str, by: Card) -> StorageBusy:
    return StorageBusy(
        f"{storage.uri} is busy: process {by.get('pid', '?')} on {by.get('host', '?')} has been at {name!r} since "
        f"{by.get('since', 'just now')}; wait for it, stop it, or choose another storage"
    )


def _pids() -> str | None:
    """Where this process's number means this process: one start of one machine, one container. None: unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _dead(card: Card) -> bool:
    """Whether the holder was a process of this machine (of this container), and is no more."""
    if not card.get("pids") or card["pids"] != _pids():
        return False
    try:
        os.kill(int(card["pid"]), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)  # not a PermissionError: somebody else's, and alive
    return False
