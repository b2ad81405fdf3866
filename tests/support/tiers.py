"""Classifies tests as fast, slow, soak, browser or benchmark, and keeps fast tests fast.

A test is `fast` unless it has another mark (slow, soak, browser, benchmark) or uses an expensive fixture. A fast test cannot
start servers; one that takes too long is named at the end of the run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# fixtures that start a server, Ray or processes, export models or compile; a test that uses one is not fast
COSTLY_FIXTURES = {"server", "gateway", "cluster", "made_once", "of_ranks", "compile_with"}
# parameter values for which a fixture requests one of them at run time (request.getfixturevalue)
SERVER_PARAMETERS = {"bucket", "s3", "gateway_s3"}
OTHER_TIERS = ("slow", "soak", "browser", "benchmark")
SERVER_PROGRAMS = {"gcs_server", "raylet", "juicefs", "mlflow", "uvicorn", "gunicorn", "mlflow.server"}
MAX_FAST_SECONDS = 4.0  # on an idle machine
HINT = "mark it slow, or remove this"


def tier(item: pytest.Item) -> str:
    """The tier of a test: soak, browser, benchmark, slow or fast."""
    if item.path.parent.name in ("cluster", "benchmarks") and item.path.parents[1].name == "tests":
        return "slow"
    if is_soak_only(item):
        item.add_marker("soak")
    for name in OTHER_TIERS:
        if item.get_closest_marker(name):
            return name
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    needs_server = any(isinstance(value, str) and value in SERVER_PARAMETERS for value in parameters)
    return "slow" if needs_server or COSTLY_FIXTURES & set(getattr(item, "fixturenames", ())) else "fast"


def is_soak_only(item: pytest.Item) -> bool:
    """Whether a test is parametrized with a model that its mark soak_for names: others represent it in the slow tier."""
    mark, callspec = item.get_closest_marker("soak_for"), getattr(item, "callspec", None)
    return mark is not None and callspec is not None and callspec.params.get("name") in mark.args


@contextmanager
def forbid_servers(test: str) -> Iterator[None]:
    """Inside the block, starting a server program or listening on a TCP port raises an error that names the test."""
    original_init = subprocess.Popen.__init__

    def popen(self: Any, args: Any, *positional: Any, **options: Any) -> None:
        arguments = [args] if isinstance(args, (str, bytes, os.PathLike)) else [*args]
        programs = SERVER_PROGRAMS & {Path(str(argument)).name for argument in arguments}
        if programs:
            raise AssertionError(f"{test} is a fast test and starts {', '.join(sorted(programs))}: {HINT}")
        original_init(self, args, *positional, **options)

    def listen(self: socket.socket, *backlog: int) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"{test} is a fast test and listens on a TCP port: {HINT}")
        super(socket.socket, self).listen(*backlog)

    def grpc_server(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{test} is a fast test and starts a gRPC server: {HINT}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", popen)
        patch.setattr(socket.socket, "listen", listen)
        if "grpc" in sys.modules:
            patch.setattr("grpc.server", grpc_server)
        yield


class SlowTestLog:
    """Collects the fast tests that took too long."""

    def __init__(self) -> None:
        self.slow_tests: list[tuple[float, str]] = []

    def record(self, report: pytest.TestReport) -> None:
        if "fast" in report.keywords and report.duration > MAX_FAST_SECONDS:
            self.slow_tests.append((report.duration, f"{report.nodeid} ({report.when})"))

    def lines(self) -> list[str]:
        return [f"{seconds:.1f} s  {name}" for seconds, name in sorted(self.slow_tests, reverse=True)]
