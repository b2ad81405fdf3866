"""Errors as one line: what was being done, the cause, and what to try.

Frequent errors of libraries are translated here. Of all others the library's message is passed on.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from data_prep.os_errors import explain_os_error

MAX_MESSAGE_CHARS = 700  # of a library's message: some contain whole programs
PACKAGES = ("data_prep", "models", "pipelines")
PACKAGE_FOLDERS = tuple(str(Path(__file__).parents[1] / package) for package in PACKAGES)
NOTE_PREFIX = "while "  # of the notes that `doing` adds to exceptions

SQLITE_CAUSES: tuple[tuple[str, str], ...] = (
    ("database is locked", "{} is locked by another process: try again"),
    (
        "file is not a database|file is encrypted|database disk image is malformed",
        "{} is damaged or not a SQLite file: restore a copy of it, or move it away and a new one is created",
    ),
    ("readonly database", "this user may not write {}: ask for write permission on the file and its folder"),
    (
        "unable to open database file",
        "this user may not open {}, or its folder does not exist: ask for write permission on the file and its folder",
    ),
    (
        "disk is full",
        "{} cannot be written: the disk is full; free some space, or choose another storage",
    ),
    ("no such table", "{} lacks MLflow's tables: name another"),
)
"""(pattern in SQLite's message, which SQLAlchemy and MLflow pass on; message that replaces it, {} for the database)"""

KNOWN_CAUSES: tuple[tuple[str, str], ...] = (
    # MLflow
    (r"^mlflow.*INVALID_PARAMETER_VALUE: (.*)", r"MLflow refuses it: \1"),
    # Ray
    (
        r"Version mismatch: (.*)",
        r"this Python and the cluster need the same version of Ray: \1",
    ),
    # torch
    (
        r"allocate [\d.]+ ?\w+|CUDA out of memory",
        "there is not enough memory: end other programs, or make pictures and batches smaller",
    ),
    (
        r"PytorchStreamWriter failed writing|file write failed",
        "a file could not be written completely: is the disk full?",
    ),
    # requests, urllib3, botocore
    (
        r"CERTIFICATE_VERIFY_FAILED|SSL validation failed",
        "the server's certificate is not trusted here: set AWS_CA_BUNDLE (buckets) or REQUESTS_CA_BUNDLE (MLflow) to its "
        "authority's file, and check the address",
    ),
    # Python
    (r"No module named '([\w.]+)'", r"the package \1 is not installed here: install it with pip"),
)
"""(pattern in "module.Type: message", message that replaces it)"""


@contextmanager
def doing(action: str) -> Iterator[None]:
    """Note in exceptions from the block what was being done, such as "starting Ray", for `explain_error`."""
    try:
        yield
    except Exception as error:
        error.add_note(NOTE_PREFIX + action)
        raise


def error_text(error: BaseException) -> str:
    """The error's message without line breaks and temporary paths; its type's name if it has none."""
    text = " ".join(str(error).split())
    return hide_temporary_paths(text) or type(error).__name__


def hide_temporary_paths(text: str) -> str:
    """Replace the random names of unpublished and temporary files."""
    text = re.sub(r"/\.tmp-[0-9a-f]{32}[\w.]*", "/(a file not yet published)", text)
    temp_dir = tempfile.gettempdir()
    folder = rf"(?:{re.escape(temp_dir)}/(?:tmp|inpaint-[a-z]+-)|/[^\s'\"]*/\.onnx-)\w{{8}}"
    text = re.sub(rf"{folder}/([^\s'\":,;]+)", r"\1 (a temporary copy)", text)
    return re.sub(rf"{folder}\b", f"the temporary folder {temp_dir}", text)


def known_cause(error: BaseException) -> str:
    """The translation of a library's error; '' if there is none."""
    if isinstance(error, OSError) and error.errno and type(error).__module__ == "builtins":
        path = f"{error.filename}: " if error.filename else ""
        return hide_temporary_paths(f"{path}{explain_os_error(error)}")
    if type(error).__module__ == "builtins" and _raised_by_us(error) and not isinstance(error, ImportError):
        return ""
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return ""
    text = f"{type(error).__module__}.{type(error).__name__}: {error_text(error)}"
    if cause := sqlite_cause(text):
        return cause
    for pattern, message in KNOWN_CAUSES:
        if match := re.search(pattern, text):
            return match.expand(message)[:MAX_MESSAGE_CHARS]
    return ""


def sqlite_cause(text: str, database: str = "the database") -> str:
    """The translation of a text that contains one of SQLite's messages; '' if it contains none."""
    return next(
        (message.format(database) for pattern, message in SQLITE_CAUSES if re.search(pattern, text)), ""
    )


def explain_error(error: BaseException, fallback_hint: str = "") -> str:
    """An error as one line: our own message unchanged; a library's with the action of `doing`, translated if it is known.

    `fallback_hint` is appended to messages that are not known.
    """
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return error_text(error)
    note = next((note for note in getattr(error, "__notes__", ()) if note.startswith(NOTE_PREFIX)), "")
    action = f"{note.removeprefix(NOTE_PREFIX)}: " if note else ""
    if cause := known_cause(error):
        return f"{action}{cause}"
    text = error_text(error)
    if isinstance(error, ValueError | RuntimeError | OSError) and _raised_by_us(error) and str(error):
        return text
    name = type(error).__name__
    message = name if text == name else f"{name}: {_strip_sql(text)[:MAX_MESSAGE_CHARS]}"
    return f"{action}{message}{fallback_hint}"


def is_explained(error: BaseException) -> bool:
    """Whether the message is the project's own, written for a user."""
    return type(error).__module__.partition(".")[0] in PACKAGES or (
        isinstance(error, ValueError | RuntimeError | OSError) and _raised_by_us(error) and bool(str(error))
    )


def user_message(error: BaseException) -> str:
    """The error for the user. Of a Ray task's error, its cause: the message of the error itself is a stack trace."""
    while isinstance(getattr(error, "cause", None), BaseException):
        error = error.cause  # type: ignore[attr-defined]
    return explain_error(error, " (--debug shows where)")


def _raised_by_us(error: BaseException) -> bool:
    """Whether the project's own code raised it. Without a traceback (from another process), whether it is a builtin."""
    trace: TracebackType | None = error.__traceback__
    if trace is None:
        return type(error).__module__ == "builtins"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename.startswith(PACKAGE_FOLDERS)


def _strip_sql(text: str) -> str:
    """SQLAlchemy's message without the statement and the link to its manual."""
    return re.sub(r"\s*\[SQL: .*|\s*\(Background on this error at: .*", "", text)
