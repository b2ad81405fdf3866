"""Servers as processes: one per service and folder, detached ones with a log, and ended exactly.

A small HTTP server stands for MLflow's and JuiceFS's; tests/cluster/test_jobs.py starts those.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipelines.cli import services as commands
from pipelines.cluster import service_process
from pipelines.cluster.service_process import (
    ServerCommand,
    ServiceError,
    ServiceRecord,
    list_records,
    locked,
    start_detached,
    stop,
)
from support.ports import free_port

SERVER = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # a worker process
print("noise of the server", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
FOREGROUND = """
import sys
from pathlib import Path
from pipelines.cluster.service_process import ServerCommand, exec_server, locked
folder = Path(sys.argv[1])
with locked(folder, "s3") as lock:
    exec_server(ServerCommand("s3", folder, sys.argv[2], [sys.executable, "-c", "input()"], {}), lock)
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder of its own; what still runs at the end is ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = os.umask(0o022)
    yield tmp_path / "state"
    os.umask(before)
    for record in list_records():
        stop(record)


def command(folder: Path, script: str = SERVER) -> ServerCommand:
    port = free_port()
    return ServerCommand(
        "s3", folder, f"http://127.0.0.1:{port}", [sys.executable, "-c", script, str(port)], dict(os.environ)
    )


def start(folder: Path, script: str = SERVER) -> ServiceRecord:
    with locked(folder, "s3") as lock:
        return start_detached(command(folder, script), lock)


def run(action: str, folder: Path | None = None, service: str | None = None) -> int:
    args = argparse.Namespace(action=action, folder=folder and str(folder), service=service)
    return commands.services_command(args)


def test_a_detached_server_has_its_own_session_and_a_private_log(tmp_path: Path) -> None:
    record = start(tmp_path / "data")
    assert urllib.request.urlopen(record.uri, timeout=5).status == 200
    assert os.getsid(record.pid) == record.pid != os.getsid(0)  # a closed terminal does not end it
    assert "noise of the server" in Path(record.log).read_text()
    assert Path(record.log).stat().st_mode & 0o777 == 0o600
    assert record.is_running


def test_a_second_server_of_the_folder_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = start(tmp_path / "data")
    with pytest.raises(ServiceError) as refused:
        start(tmp_path / "data")
    assert str(refused.value) == (
        f"the s3 server of {tmp_path}/data runs already at {record.uri} (process {record.pid}): "
        f"inpaint services stop s3 --folder {tmp_path}/data ends it"
    )
    with locked(tmp_path / "data", "mlflow"), locked(tmp_path / "other", "s3"):
        pass  # other services and folders are free
    assert stop(record)
    with locked(tmp_path / "data", "s3"):
        pass


def test_a_server_in_the_foreground_holds_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FOREGROUND, str(tmp_path), "http://127.0.0.1:1"], stdin=subprocess.PIPE
    )
    try:
        wait_until(lambda: list_records(tmp_path))
        with (
            pytest.raises(ServiceError, match=rf"\(process {process.pid}\): Ctrl-C there ends it$"),
            locked(tmp_path, "s3"),
        ):
            pass
        assert run("status", tmp_path) == 0
        with pytest.raises(ServiceError, match=r"in the foreground .*Ctrl-C"):
            run("stop", tmp_path)
        assert process.poll() is None
    finally:
        process.communicate(b"\n", timeout=30)
    assert list_records(tmp_path) == []
    with locked(tmp_path, "s3"):
        pass


def test_stop_ends_the_server_and_its_children_and_no_other_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, record = start(tmp_path / "kept"), start(tmp_path / "ended")
    members = [psutil.Process(record.pid), *psutil.Process(record.pid).children(recursive=True)]
    assert len(members) == 2
    assert run("stop", tmp_path / "ended", "s3") == 0
    assert capsys.readouterr().out == f"the s3 server of {tmp_path}/ended is stopped: 2 processes\n"
    assert not any(member.is_running() for member in members)
    assert kept.is_running
    assert list_records() == [kept]
    assert run("status") == 0
    assert re.search(rf"^s3 +running +{kept.uri} +{kept.pid} ", capsys.readouterr().out, re.M)
    assert run("stop") == 0
    assert run("status") == 1


def test_stop_ends_the_children_of_a_server_that_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = start(tmp_path)
    (child,) = psutil.Process(record.pid).children()
    leader = psutil.Process(record.pid)
    leader.kill()
    psutil.wait_procs([leader], 10)
    assert run("status", tmp_path) == 1
    assert re.search(r"^s3 +ended ", capsys.readouterr().out, re.M)
    assert stop(record) == 1
    assert not child.is_running()


def test_a_process_that_has_the_id_of_an_ended_server_is_not_stopped(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        started_at = psutil.Process(other.pid).create_time()
        record = ServiceRecord("s3", str(tmp_path), "http://x", other.pid, started_at - 1, "s3.log")
        assert not record.is_running
        assert stop(record) == 0
        assert other.poll() is None
        assert replace(record, started_at=started_at).is_running
    finally:
        other.communicate(b"\n", timeout=30)


def test_an_error_at_the_start_is_one_line_and_leaves_nothing_running(tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as failed:
        start(tmp_path, "import sys; print('trace', file=sys.stderr); sys.exit('the database is damaged')")
    assert str(failed.value) == (f"the s3 server ended: the database is damaged (log: {tmp_path}/s3.log)")
    assert list_records() == list_records(tmp_path) == []
    with locked(tmp_path, "s3"):
        pass


def test_a_server_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_process, "START_SECONDS", 0.5)
    with pytest.raises(ServiceError, match=r"does not answer at http://127\.0\.0\.1:.* starting"):
        start(tmp_path, "import time; print('starting', flush=True); time.sleep(1000)")
    assert list_records() == []


def wait_until(condition: Callable[[], object]) -> None:
    import time

    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
