"""Lines on stderr that say what a command is doing before it has output: imports of libraries take seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

DELAY_SECONDS = 0.4  # until the first line; a command that ends before prints none
SLOW_IMPORTS = {
    "cv2",
    "matplotlib",
    "mlflow",
    "onnx",
    "pandas",
    "ray",
    "sklearn",
    "skimage",
    "torch",
}


class _Notices:
    """Holds the first line until DELAY_SECONDS have passed, a slow import begins, or the next line comes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pending = ""
        self.active = self.quiet = False

    def flush(self) -> None:
        with self.lock:
            text, self.pending = self.pending, ""
            if text:
                _print(f"{text} ...")

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Called first of sys.meta_path, before an import: the timer's thread may not run during an import."""
        if name in SLOW_IMPORTS:
            self.flush()


_notices = _Notices()


@contextmanager
def command(text: str, quiet: bool = False) -> Iterator[None]:
    """Context of a command. `text`: what it does first, printed unless it ends at once. `quiet`: print nothing."""
    _notices.active, _notices.quiet, _notices.pending = not quiet, quiet, "" if quiet else text
    timer = threading.Timer(DELAY_SECONDS, _notices.flush)
    timer.daemon = True
    timer.start()
    finder: Any = _notices
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        timer.cancel()
        sys.meta_path.remove(finder)
        _notices.active, _notices.quiet, _notices.pending = False, False, ""


def announce(text: str) -> None:
    """Print the next thing that the command does and that takes seconds. Silent outside a command, or in a quiet one."""
    _notices.flush()
    if _notices.active:
        _print(f"{text} ...")


def discard_pending() -> None:
    """Drop the pending line: the command prints its own output from now on."""
    with _notices.lock:
        _notices.pending = ""


def note(text: str) -> None:
    """Print a remark for the user; also outside a command."""
    _notices.flush()
    if not _notices.quiet:
        _print(f"note: {text}")


def _print(line: str) -> None:
    if sys.stderr is not None:  # print(file=None) would print to stdout
        with suppress(OSError):  # the reader of a pipe has closed it
            print(line, file=sys.stderr, flush=True)
