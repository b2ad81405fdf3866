"""The record of a folder's fills: one JSON line for each written file, by which an interrupted fill resumes.

The record is locked while a command writes to the folder, so that no two commands mix their files.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any

from pipelines.inference.writing import TEMPORARY, WriteError

RECORD_FILE = "fill-record.jsonl"


@dataclass(frozen=True)
class FillInputs:
    """All that decides the bytes of a filled file."""

    photo: str
    """sha256 of the file; of `mask` too."""
    mask: str
    model: str
    """The result of `model_digest`."""
    options: dict[str, Any]


@dataclass(frozen=True)
class FillEntry:
    """A line of the record: a written file."""

    out: str
    """Its path in the folder, with slashes."""
    sha256: str
    """Of the written file."""
    inputs: FillInputs
    model: str
    """Its name and version, for people."""
    hole_percent: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


class FillRecord:
    """The entries of a folder. Use it inside `open_record`."""

    def __init__(self, folder: Path, file: IO[str], entries: Mapping[str, FillEntry]) -> None:
        self._folder, self._file, self._entries = folder, file, dict(entries)

    def is_filled(self, out: str, inputs: FillInputs) -> bool:
        """Whether the file was written from the same inputs and is unchanged."""
        entry = self._entries.get(out)
        return (
            entry is not None
            and entry.inputs == inputs
            and (path := self._folder / out).is_file()
            and sha256_of(path) == entry.sha256
        )

    def has(self, out: str) -> bool:
        return out in self._entries

    def add(self, entry: FillEntry) -> None:
        """Append the entry. WriteError in one line: the disk is full."""
        self._entries[entry.out] = entry
        try:
            self._file.write(json.dumps(asdict(entry), sort_keys=True) + "\n")
            self._file.flush()
        except OSError as error:
            raise WriteError(f"--out {self._folder} cannot be written: {error.strerror or error}") from None


@contextmanager
def open_record(folder: Path) -> Iterator[FillRecord]:
    """The record of a folder, which is created if it does not exist; removes unfinished files of killed commands.

    ValueError in one line: another command writes to the folder. WriteError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / RECORD_FILE, "a+", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        raise WriteError(f"--out {folder} cannot be written: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with its process
        except BlockingIOError:
            raise ValueError(
                f"another `inpaint fill` writes to {folder}: wait until it has ended, or name another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        for path in folder.rglob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)
        file.seek(0)
        text = file.read()
        if text and not text.endswith("\n"):
            file.write("\n")  # the last line is cut: its writer was killed
        yield FillRecord(folder, file, _parse(text))


def sha256_of(path: Path) -> str:
    """Raises OSError."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _parse(text: str) -> dict[str, FillEntry]:
    """The last entry of each file; lines that are cut or of another release are skipped: their files are filled again."""
    entries = {}
    for line in text.splitlines():
        try:
            values = json.loads(line)
            values["inputs"] = FillInputs(**values["inputs"])
            entry = FillEntry(**{item.name: values[item.name] for item in fields(FillEntry)})
        except (ValueError, TypeError, KeyError):
            continue
        entries[entry.out] = entry
    return entries
