"""`inpaint studio`: its link, its port, and its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from http.cookiejar import CookieJar
from pathlib import Path

import pytest

from support.cluster_harness import clean_environment, find_listeners, process_tree, wait_for
from support.mlflow_server import QUIET
from support.ports import free_port

TOKEN = "a-token-of-the-test-itself"


@pytest.mark.slow
def test_the_studio_prints_its_link_serves_and_ends_cleanly(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = clean_environment() | QUIET | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "studio", "--port", str(port)],
            cwd=tmp_path,
            env=environment | {"INPAINT_STUDIO_TOKEN": TOKEN},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "Ctrl-C ends it" in log.read_text(), "the link")
        started = time.monotonic() - began
        link = f"http://127.0.0.1:{port}/?token={TOKEN}"
        assert log.read_text().count(link) == 1
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        with browser.open(link) as answer:
            page = answer.read().decode()
            assert answer.url == f"http://127.0.0.1:{port}/"
        assert re.search(r'csrf-token" content="[\w-]{43}"', page)
        assert time.monotonic() - began < 15
        with browser.open(f"http://127.0.0.1:{port}/api/versions") as answer:
            assert answer.read() == b"[]"
        with browser.open(f"http://127.0.0.1:{port}/models") as answer:
            assert "inpaint run demo" in answer.read().decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/photos/sample/rocket",
            method="POST",
            headers={
                "Origin": f"http://127.0.0.1:{port}",
                "X-CSRF-Token": re.search(r'csrf-token" content="([\w-]+)"', page)[1],  # type: ignore[index]
            },
        )
        browser.open(request).close()
        assert [*folder.glob("inpaint-studio-*/*/*/photo.png")]
        processes = process_tree(process.pid)
        wait_for(lambda: len(process_tree(process.pid)) > 1, "the worker process")
        processes = process_tree(process.pid)
        assert {address for _, address in find_listeners(processes)} <= {"127.0.0.1"}
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(15) == 0
        wait_for(lambda: not any(child.is_running() for child in processes), "the end of all processes")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert text.endswith("the studio has ended\n")
    assert "Traceback" not in text
    assert "GET" not in text
    assert not [*folder.glob("inpaint-studio-*")]
    assert not (tmp_path / "runs").exists()
    assert started < 10


@pytest.mark.slow  # listens
def test_a_port_in_use_is_named(command_line: Callable[..., tuple[int, str, str]]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, out, err = command_line("studio", "--port", port)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert f"port {port} is in use" in err
    assert "--port" in err


def test_a_weak_token_is_refused(
    command_line: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in ("short", "with a space and long enough", "ümlaut-and-long-enough"):
        monkeypatch.setenv("INPAINT_STUDIO_TOKEN", token)
        status, _, err = command_line("studio")
        assert status == 1
        assert "INPAINT_STUDIO_TOKEN: at least 16" in err
        assert token not in err


def test_there_is_no_other_host(command_line: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = command_line("studio", "--host", "0.0.0.0")
    assert status == 2
    assert "no option --host" in err


def test_nothing_heavy_is_imported_before_the_studio_listens() -> None:
    code = "import sys, pipelines.cli.studio, pipelines.studio.app; print({'mlflow', 'torch', 'ray'} & {*sys.modules})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
