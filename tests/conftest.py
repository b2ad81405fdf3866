"""Fixtures for all tests: an S3 server, small models; and the markers of test tiers."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from filelock import FileLock
from moto.server import ThreadedMotoServer

import models
from support import tiny_model
from support.gateway import running_gateway
from support.small_models import build_small, disable_torch_trace
from support.tiers import HINT, MAX_FAST_SECONDS, SlowTestLog, forbid_servers, tier

if TYPE_CHECKING:
    from models.base import Model

S3_USER = "testing"
S3_SECRET = "very-secret-7f3a"
CLOCK = SlowTestLog()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(tier(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with forbid_servers(item.nodeid) if item.get_closest_marker("fast") else nullcontext():
        return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    CLOCK.record(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if late := CLOCK.lines():
        terminalreporter.section(f"fast tests that took more than {MAX_FAST_SECONDS:.0f} s: {HINT}")
        for line in late:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def server():
    """A real HTTP server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory):
    """A JuiceFS gateway, as `inpaint services s3` starts it. It checks signatures and ignores conditional writes."""
    folder = tmp_path_factory.mktemp("gateway") / "r%20a?1"  # JuiceFS ends a database's path at a '?'
    folder.mkdir()
    with running_gateway(folder, S3_USER, S3_SECRET) as uri:
        yield uri


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch):
    """Restore what tests change in their process: boto3's default session, which keeps the credentials of its first use,
    and the umask, which the servers of `inpaint services` make strict."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    mask = os.umask(0o022)
    os.umask(mask)
    yield
    os.umask(mask)


@pytest.fixture
def opened() -> Iterator[Path]:
    """A folder that all users can read; pytest's own folders are private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def s3(server, monkeypatch):
    """A fresh bucket; returns its uri."""
    return fresh_bucket(server, monkeypatch)


@pytest.fixture
def gateway_s3(gateway, monkeypatch):
    """A fresh bucket of the gateway; returns its uri."""
    return fresh_bucket(gateway, monkeypatch)


def fresh_bucket(server, monkeypatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{os.urandom(4).hex()}"
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def quiet_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        disable_torch_trace(patch)
        yield


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without experiments of ours."""
    from mlflow import MlflowClient  # takes seconds

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """A function that returns `make(folder)`, called in one test process only; the others unpickle its result."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], Any]) -> Any:
        pickle_file = base / f"{name}.pickle"
        with FileLock(f"{pickle_file}.lock"):
            if not pickle_file.exists():
                pickle_file.write_bytes(pickle.dumps(make(tmp_path_factory.mktemp(name))))
            return pickle.loads(pickle_file.read_bytes())

    return once


@pytest.fixture(scope="session")
def small() -> Callable[..., Model]:
    return build_small


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model in tests/ that is registered for the duration of the test."""
    monkeypatch.setenv(models.MODELS_ENV_VAR, os.environ.get(models.MODELS_ENV_VAR, ""))
    models.register(tiny_model.NAME, tiny_model.CLASS_PATH)
    return tiny_model.NAME
