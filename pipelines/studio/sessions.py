"""Sessions of browsers that showed the studio's token; each has a temporary folder for its photographs."""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.studio.photo import Photo

PREFIX, LOCK = "inpaint-studio-", "lock"  # of the folder with all sessions' files
MAX_SESSIONS = 32
MAX_FAILURES, FAILURE_SECONDS = 10, 60.0
"""Wrong tokens that the form accepts in this time before it refuses to look at more."""


@dataclass(eq=False)
class Session:
    """One browser that may write."""

    id: str
    csrf: str
    """Secret that each writing request repeats in its header X-CSRF-Token."""
    folder: Path
    """Of this session alone, mode 700; removed with it."""
    photos: OrderedDict[str, Photo] = field(default_factory=OrderedDict)
    """By id, the one used last at the end."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while `photos` changes."""


class Sessions:
    """The sessions by id. Thread-safe; `close` removes all files."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._failures: deque[float] = deque()
        self._root: Path | None = None
        self._lock_file = -1
        self._lock = threading.Lock()

    def is_token(self, token: str) -> bool:
        """Whether this is the studio's token, compared in constant time."""
        return hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token)

    def is_blocked(self) -> bool:
        """Whether too many wrong tokens were typed within the last minute."""
        with self._lock:
            while self._failures and self._failures[0] < time.monotonic() - FAILURE_SECONDS:
                self._failures.popleft()
            return len(self._failures) >= MAX_FAILURES

    def count_failure(self) -> None:
        with self._lock:
            self._failures.append(time.monotonic())

    def open(self) -> Session:
        """A new session; the one used least recently ends if there are too many."""
        with self._lock:
            if self._root is None:
                remove_left_folders()
                self._root = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 700
                self._lock_file = os.open(self._root / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            folder = Path(tempfile.mkdtemp(dir=self._root))
            session = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32), folder)
            self._sessions[session.id] = session
            dropped = self._sessions.popitem(last=False)[1] if len(self._sessions) > MAX_SESSIONS else None
        if dropped:
            shutil.rmtree(dropped.folder, ignore_errors=True)
        return session

    def get(self, session_id: str | None) -> Session | None:
        """The session with this id, of a cookie; None: there is none."""
        if not session_id:
            return None
        with self._lock:
            session = self._sessions.get(session_id)
            if session:
                self._sessions.move_to_end(session_id)
            return session

    def close(self) -> None:
        """End all sessions and remove their files."""
        with self._lock:
            self._sessions.clear()
            root, self._root = self._root, None
        if root:
            shutil.rmtree(root, ignore_errors=True)
            os.close(self._lock_file)


def remove_left_folders() -> None:
    """Remove the folders of this user's studios that were killed: a living one holds the lock in its folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            state = folder.lstat()
            if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
                continue
            file = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its studio lives
            continue
        finally:
            os.close(file)
