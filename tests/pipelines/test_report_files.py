"""Reports in a storage: their names sort by time, and the newest is found in a folder and in a bucket."""

from __future__ import annotations

import json
import re
import webbrowser
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from data_prep.storage import Storage, open_storage
from pipelines.report_files import (
    ReportError,
    as_local_file,
    headline,
    keys_digest,
    list_reports,
    newest_report,
    report_key,
)
from pipelines.run_report import ReportData, report_html

CommandLine = Callable[..., tuple[int, str, str]]
SENTENCES = ["demo version 1: 17.93 dB & more.", 'a "second" <sentence>.']


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "runs")
    return open_storage(f"{request.getfixturevalue('s3')}/runs")


def at(day: int, hour: int = 12) -> datetime:
    return datetime(2026, 11, day, hour, 5, tzinfo=UTC)


def write(storage: Storage, name: str, ended: datetime, digest: str = "0123abcd") -> str:
    key = report_key(name, ended, digest)
    storage.write(key, report_html(ReportData(name, summary=SENTENCES)).encode())
    return key


@pytest.fixture
def filled(storage: Storage) -> Storage:
    """Reports of three recipes, and one of an earlier release, without a date."""
    for name, day in (("demo", 3), ("demo", 9), ("faces-sweep", 12), ("faces-best", 5), ("demo-2", 20)):
        write(storage, name, at(day), keys_digest([name, str(day)]))
    storage.write("reports/old-0a1b2c3d.html", b"<!doctype html><title>old</title>")
    storage.write("reports/notes.txt", b"no report")
    return storage


def test_the_newest_report_is_found(filled: Storage) -> None:
    assert newest_report(filled).name == "demo-2"
    assert newest_report(filled, "demo").date == at(9)
    assert newest_report(filled, "faces").name == "faces-sweep", (
        "a sweep and its best recipe are the recipe's"
    )
    assert newest_report(filled, "old").date_text == "unknown"
    assert newest_report(filled, "demo", keys_digest(["demo", "3"])).date == at(3)
    assert [report.name for report in list_reports(filled)] == [
        *("demo-2", "faces-sweep", "demo", "faces-best", "demo", "old")
    ]


def test_headlines_are_read_from_the_page(filled: Storage) -> None:
    assert headline(filled, newest_report(filled).key) == SENTENCES
    assert headline(filled, newest_report(filled, "old").key) == []


def test_a_missing_report_is_one_line(storage: Storage) -> None:
    with pytest.raises(ReportError, match="has no report: runs and sweeps write one when they end"):
        newest_report(storage)
    write(storage, "demo", at(1))
    with pytest.raises(ReportError, match="has no report of faces: it has reports of demo"):
        newest_report(storage, "faces")
    with pytest.raises(ReportError, match="no report of demo with these options"):
        newest_report(storage, "demo", "ffffffff")


def test_a_report_becomes_a_local_file(filled: Storage, tmp_path: Path) -> None:
    report = newest_report(filled)
    path = as_local_file(filled, report, tmp_path / "fetched")
    assert path.read_bytes() == filled.read(report.key)
    assert path == (filled.local_path(report.key) or tmp_path / "fetched" / Path(report.key).name)
    assert as_local_file(filled, report, tmp_path / "fetched") == path


def test_the_command(
    filled: Storage,
    tmp_path: Path,
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: not opened.append(url))
    status, out, _ = command_line("report", "faces", "--storage", filled.uri, "--open")
    assert status == 0
    *sentences, last = out.splitlines()
    assert sentences == SENTENCES
    match = re.fullmatch(r"faces-sweep, 2026-11-12 12:05 UTC: (\S+\.html)", last)
    assert match
    assert opened == [Path(match[1]).absolute().as_uri()]
    assert Path(match[1]).read_text().startswith("<!doctype html>")
    if filled.local_path() is None:
        assert Path(match[1]).parent == Path("reports")

    status, out, _ = command_line("report", "--list", "--storage", filled.uri)
    assert status == 0
    rows = out.splitlines()
    assert rows[0].split() == ["date", "recipe", "report"]
    assert re.match(r"2026-11-20 12:05 UTC +demo-2 +\S+demo-2-20261120T120500Z-\w{8}\.html$", rows[1])
    assert rows[-1].startswith("unknown")
    assert len(rows) == 7
    _, out, _ = command_line("report", "demo", "--list", "--json", "--storage", filled.uri)
    assert [(row["recipe"], row["date"][:10]) for row in json.loads(out)] == [
        ("demo", "2026-11-09"),
        ("demo", "2026-11-03"),
    ]
    status, out, err = command_line("report", "glcic", "--storage", filled.uri)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"inpaint report: {filled.uri} has no report of glcic: it has reports of demo, ")


def test_without_a_browser_the_path_is_named(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "runs")
    key = write(storage, "demo", at(1))
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    status, _, err = command_line("report", "--storage", storage.uri, "--open")
    assert status == 1
    assert err == f"inpaint report: no browser can be started here: open {storage.local_path(key)} yourself\n"
