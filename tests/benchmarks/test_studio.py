"""How quick the studio is with 500 versions and 50 runs: its start, first pages, later pages, and changes made elsewhere.

`inpaint studio` is a process of its own, the registry a SQLite file, the storage a folder, two cores. `make bench` prints
the table.
"""

from __future__ import annotations

import json
import re
import statistics
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from registry_versions import VERSIONS, create_versions

from pipelines import registry
from pipelines.durable import run_status
from support.studio_server import StudioServer
from support.studio_storage import FAILED_RUN, RUNNING_RUN, SWEEP_RUN, StudioStorage

RUNS, ROUNDS, POLL_SECONDS = 50, 30, 3.0  # POLL_SECONDS: as studio.js
FIRST_SECONDS, MEDIAN_SECONDS, CHANGE_SECONDS, IDLE_CORES = 2.0, 0.7, 10.0, 1 / 3
SLACK = 1.5  # for a machine that does other work too
PAGES = ("/", "/models", "/models/facades", "/models/facades/299", "/runs", f"/runs/{FAILED_RUN}")
FIRST_PAGES = ("/", "/models", "/runs")
PROMOTED = "7"


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as response:
        text: str = response.read().decode()
    return text


def seconds_of(url: str) -> float:
    start = time.perf_counter()
    fetch(url)
    return time.perf_counter() - start


def create_runs(folder: Path) -> StudioStorage:
    """The four runs of the studio's tests, and finished ones with reports; no two share a step."""
    made = StudioStorage.create(folder)
    for number in range(RUNS - 4):
        run = made.record(
            f"run-{number:02d}", ["data.source=/srv/photographs", f"data.size={512 + 8 * number}"]
        )
        made.finish(run, [step.name for step in run.steps])
        made.write_report(run)
    assert len(run_status.list_runs(made.storage)) == RUNS
    return made


def seconds_until_shown(server: StudioServer, page: str, section: str, shows: Callable[[str], bool]) -> float:
    """Until an open page, which asks every POLL_SECONDS, shows a change: it fetches itself when the id is another."""
    start, address = time.perf_counter(), f"{server.url}/api/snapshot?section={section}"
    seen = re.search(r'data-snapshot="([^"]*)"', fetch(f"{server.url}{page}"))
    assert seen
    snapshot = seen[1]
    while time.perf_counter() - start < 60:
        new = json.loads(fetch(address))["snapshot"]
        if new != snapshot and shows(fetch(f"{server.url}{page}")):
            return time.perf_counter() - start
        snapshot = new
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"{page} does not show the change")


def idle_cores(server: StudioServer, seconds: float = 30.0) -> float:
    """Cores that the studio uses while a page is open and nothing changes."""
    assert server.process
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)

    def cpu() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    before, start = cpu(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        for section in ("runs", "models"):
            fetch(f"{server.url}/api/snapshot?section={section}")
        time.sleep(POLL_SECONDS)
    return (cpu() - before) / (time.perf_counter() - start)


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_pages_with_500_versions_and_50_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    create_versions(uri)
    made = create_runs(tmp_path)
    rows: list[tuple[str, float, float]] = []
    try:
        _measure(uri, made, tmp_path, rows)
    finally:
        with capsys.disabled():
            print(f"\nThe studio with {VERSIONS} versions and {RUNS} runs: seconds, and the limit")
            for name, value, limit in rows:
                print(f"{name:<62}{value:>8.3f}{limit:>8.2f}")
    assert {name: value for name, value, limit in rows if value > SLACK * limit} == {}


def _measure(uri: str, made: StudioStorage, folder: Path, rows: list[tuple[str, float, float]]) -> None:
    """Append (what, value, limit) for each measurement."""
    with made.running():
        for page in FIRST_PAGES:
            start = time.perf_counter()
            with StudioServer(uri, made.folder, folder) as server:
                rows.append((f"start until it listens, before {page}", time.perf_counter() - start, 60.0))
                rows.append((f"first page {page}", seconds_of(f"{server.url}{page}"), FIRST_SECONDS))
        with StudioServer(uri, made.folder, folder) as server:
            for page in PAGES:
                fetch(f"{server.url}{page}")
            for page in (*PAGES, f"/runs/{SWEEP_RUN}"):
                times = [seconds_of(f"{server.url}{page}") for _ in range(ROUNDS)]
                rows.append((f"median of {page}", statistics.median(times), MEDIAN_SECONDS))
                rows.append((f"slowest of {page}", max(times), FIRST_SECONDS))
            for alias in ("shadow", "canary"):
                registry.promote("facades", PROMOTED, alias, tracking_uri=uri)
                shown = seconds_until_shown(
                    server, "/models/facades", "models", lambda page, alias=alias: alias in page
                )
                rows.append((f"a promotion elsewhere (alias {alias}) is shown", shown, CHANGE_SECONDS))
            for done in (200, 300):
                made.report_progress(done)
                shown = seconds_until_shown(
                    server, f"/runs/{RUNNING_RUN}", "runs", lambda page, done=done: f"{done} of 400" in page
                )
                rows.append((f"progress of a run ({done} of 400) is shown", shown, CHANGE_SECONDS))
            rows.append(
                ("cores used while two pages are open and nothing changes", idle_cores(server), IDLE_CORES)
            )
