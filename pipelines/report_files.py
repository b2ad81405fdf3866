"""The reports of runs and sweeps in a storage: one self-contained HTML page each, in one folder.

    reports/NAME-DATE-DIGEST.html

NAME is the run's: the recipe's, for a sweep with `-sweep`. DATE is when the last step ended, DIGEST a hash of the steps'
keys: the same run has one report, and the names sort by time in a bucket too.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from data_prep.storage import Storage

REPORTS_FOLDER = "reports"
HEAD_BYTES = 16_384  # the beginning of a page, which has its headline
_DATE_FORMAT = "%Y%m%dT%H%M%SZ"
_FILE = re.compile(r"(?P<name>.+?)(-(?P<date>\d{8}T\d{6}Z))?-(?P<digest>[0-9a-f]{8})\.html")
_HEADLINE = re.compile(r'<meta name="description" content="([^"]*)">')


class ReportError(ValueError):
    """There is no such report. One line with the storage and what it has."""


@dataclass(frozen=True)
class ReportFile:
    """A report in a storage."""

    key: str
    name: str
    """Of the run: the recipe's name, for a sweep with `-sweep`."""
    digest: str
    date: datetime | None
    """When the run ended; None: a report of an earlier release."""

    @property
    def date_text(self) -> str:
        return format_date(self.date) if self.date else "unknown"


def format_date(date: datetime) -> str:
    """`2026-11-30 15:51 UTC`."""
    return date.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def keys_digest(step_keys: Sequence[str | None]) -> str:
    """Identifies a run by the keys of its steps."""
    return hashlib.sha256(json.dumps(list(step_keys)).encode()).hexdigest()[:8]


def report_key(name: str, ended: datetime, digest: str) -> str:
    """The storage key of a report."""
    return f"{REPORTS_FOLDER}/{name}-{ended.astimezone(UTC).strftime(_DATE_FORMAT)}-{digest}.html"


def list_reports(
    storage: Storage, names: Collection[str] | None = None, digest: str | None = None
) -> list[ReportFile]:
    """The reports in the storage, newest first; only those of runs with these names, or of the run with this digest."""
    reports = []
    for key, _ in storage.list(REPORTS_FOLDER):
        match = _FILE.fullmatch(key.removeprefix(f"{REPORTS_FOLDER}/"))
        if match is None or (names is not None and match["name"] not in names):
            continue
        if digest is not None and match["digest"] != digest:
            continue
        date = None
        if match["date"]:
            date = datetime.strptime(match["date"], _DATE_FORMAT).replace(tzinfo=UTC)
        reports.append(ReportFile(key, match["name"], match["digest"], date))
    oldest = datetime.min.replace(tzinfo=UTC)
    return sorted(reports, key=lambda report: (report.date or oldest, report.key), reverse=True)


def run_names(recipe_name: str) -> tuple[str, ...]:
    """The names of a recipe's runs: its own, its sweep's, and that of the best recipe of its sweep."""
    return recipe_name, f"{recipe_name}-sweep", f"{recipe_name}-best"


def newest_report(storage: Storage, recipe_name: str | None = None, digest: str | None = None) -> ReportFile:
    """The newest report, of one recipe or of all. Raises ReportError."""
    names = None if recipe_name is None else run_names(recipe_name)
    if reports := list_reports(storage, names, digest):
        return reports[0]
    others = sorted({report.name for report in list_reports(storage)})
    of_recipe = f" of {recipe_name}" if recipe_name else ""
    if others and digest:
        raise ReportError(
            f"{storage.uri} has no report{of_recipe} with these options: their run has not ended there; without --set, the "
            "newest report of the recipe is shown"
        )
    existing = (
        f"it has reports of {', '.join(others)}" if others else "runs and sweeps write one when they end"
    )
    raise ReportError(f"{storage.uri} has no report{of_recipe}: {existing}")


def headline(storage: Storage, key: str) -> list[str]:
    """The sentences in which a report says what came out; none in a report of an earlier release."""
    size = min(storage.size(key) or 0, HEAD_BYTES)
    match = _HEADLINE.search(storage.read_range(key, 0, size).decode(errors="replace"))
    return html.unescape(match[1]).splitlines() if match else []


def as_local_file(storage: Storage, report: ReportFile, folder: Path) -> Path:
    """The report's path; from a bucket it is copied into `folder`, unless that has it already."""
    if path := storage.local_path(report.key):
        return path
    path = folder / Path(report.key).name
    if not path.is_file() or path.stat().st_size != storage.size(report.key):
        folder.mkdir(parents=True, exist_ok=True)
        storage.download(report.key, path)
    return path
