"""A value that is slow to read, such as the registry or all runs of a storage, kept for many requests.

Only the first request waits. A later one gets the value that there is; if that is old, a thread reads it again. So a page
never waits for a slow server, and nothing is read while no page is open.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from data_prep.uris import path_from_sqlite_url
from pipelines.errors import explain_error

T = TypeVar("T")
LOADS_SHARE = 1 / 3  # of the time: the most that loading takes, at least for one thread


class NotLoaded(ValueError):
    """The first load failed. One line, the reason."""


class Cached(Generic[T]):
    """The value of `load`, at most about `seconds` old while it is asked for.

    `load` runs in one thread at a time. If it takes long, it runs less often: at most LOADS_SHARE of the time. `check`
    returns something cheap that differs whenever the value may differ (`files_state`); while it is the same, nothing is
    loaded. Values are compared with `==`, so a value holds no ages, and nothing else that changes by itself.
    """

    def __init__(
        self,
        load: Callable[[], T],
        seconds: float,
        check: Callable[[], Hashable] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._load_value, self._check, self.seconds = load, check, seconds
        self._clock, self._start = clock, start or _start_thread
        self._loading = threading.Lock()  # held by the thread that loads
        self._state_lock = threading.Lock()
        self._idle = threading.Event()  # no refresh is running
        self._idle.set()
        self._value: T | None = None
        self._loaded = False
        self._checked: Hashable = None
        self._due_at = float("-inf")
        self._prefix, self._number = secrets.token_hex(4), 0
        self.error = ""
        """Why the last load failed, in one line; '' if it did not. The value is then an earlier one."""

    @property
    def id(self) -> str:
        """Changes exactly when the value or `error` does; differs between processes. Loads nothing."""
        return f"{self._prefix}-{self._number}"

    def get(self, wait_seconds: float = 0.0) -> T:
        """The value. If it is old, starts a refresh and waits at most `wait_seconds` for its end.

        Raises NotLoaded while the first load fails; that is repeated after `seconds` at the earliest.
        """
        if not self._loaded:
            with self._loading:
                if not self._loaded and self._clock() >= self._due_at:
                    self._load(checked=False)
        elif self._clock() >= self._due_at and self._loading.acquire(blocking=False):
            self._idle.clear()
            try:
                self._start(self._refresh_in_thread)
            except BaseException:
                self._end_refresh()
                raise
        if wait_seconds:
            self._idle.wait(wait_seconds)
        if not self._loaded:
            raise NotLoaded(self.error)
        return self._value  # type: ignore[return-value]  # T may include None

    def refresh(self) -> T:
        """Load now, and return the value: after a change that this process made."""
        with self._loading:
            self._load(checked=False)
        return self.get()

    def _refresh_in_thread(self) -> None:
        try:
            self._load(checked=True)
        finally:
            self._end_refresh()

    def _end_refresh(self) -> None:
        self._loading.release()
        self._idle.set()

    def _load(self, checked: bool) -> None:
        """Load, unless `checked` and nothing has changed. The caller holds the lock `_loading`."""
        started = self._clock()
        try:
            state = self._check() if self._check else None  # before loading, so that no change is missed
            if not (checked and self._check and not self.error and state == self._checked):
                self._set_value(self._load_value(), state)
        except Exception as error:
            self._set_error(explain_error(error))
        self._due_at = started + max(self.seconds, (self._clock() - started) / LOADS_SHARE)

    def _set_value(self, value: T, state: Hashable) -> None:
        with self._state_lock:
            if not self._loaded or self.error or value != self._value:
                self._number += 1
            self._value, self._checked, self.error, self._loaded = value, state, "", True

    def _set_error(self, error: str) -> None:
        with self._state_lock:
            if error != self.error:
                self._number += 1
            self.error = error


def _start_thread(target: Callable[[], None]) -> None:
    threading.Thread(target=target, name="studio refresh", daemon=True).start()


def files_state(*paths: Path) -> Hashable:
    """Changes when one of these files is written, made or deleted: their times and sizes."""
    return tuple(_file_state(path) for path in paths)


def _file_state(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size


def database_check(tracking_uri: str) -> Callable[[], Hashable] | None:
    """For `Cached`: whether MLflow's database may have changed. None if it is not a SQLite file."""
    path = path_from_sqlite_url(tracking_uri)
    if path is None:
        return None
    # in WAL mode, commits are in the second file until a checkpoint
    return lambda: files_state(path, path.with_name(f"{path.name}-wal"))
