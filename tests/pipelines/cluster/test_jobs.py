"""The package of a job, and the errors if it cannot be submitted."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from aiohttp import web
from ray._private.runtime_env.packaging import create_package

from pipelines.cluster.jobs import (
    SubmitError,
    connect,
    follow_logs,
    make_portable,
    package_source,
    submission_id,
)
from pipelines.cluster.loopback import is_loopback
from pipelines.recipe.load import load_recipe, parse_recipe

ROOT = Path(__file__).parents[3]
HEAD = "http://head.example:8265"
LIMIT = 5_000_000
PLANTED = "planted-secret-123"


@pytest.fixture(autouse=True)
def no_local_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def zipped(folder: Path, target: Path) -> set[str]:
    """The files in Ray's package of a working_dir. Fails if it has 5 MB."""
    create_package(str(folder), target, include_gitignore=True)
    assert target.stat().st_size < LIMIT
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


@pytest.mark.slow
def test_the_package_contains_only_the_source_and_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
    recipe = load_recipe("demo", ["seed=7", "storage=/shared/runs"])
    with package_source(recipe) as folder:
        assert load_recipe(str(folder / "recipe.yaml")) == recipe
        names = zipped(folder, tmp_path / "package.zip")
        for path in folder.rglob("*"):
            assert not path.is_file() or PLANTED.encode() not in path.read_bytes()
        listed = subprocess.run(
            [sys.executable, "-m", "pipelines", "plan", "recipe.yaml", "--storage", str(tmp_path / "runs")],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
        )
        assert listed.returncode == 0, listed.stderr  # it runs from there
    assert not folder.exists()
    assert {name.partition("/")[0] for name in names} == {"data_prep", "models", "pipelines", "recipe.yaml"}
    assert not any("__pycache__" in name or "results/" in name for name in names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "storage = runs is a path of this machine"),
        ({"data": {"source": "photos"}}, "data.source = photos"),
        ({"data": {"source": "s3://b/list.txt", "root": "photos"}}, "data.root = photos"),
        ({"tracking_uri": "sqlite:///mlflow.db"}, "tracking_uri = sqlite:///mlflow.db"),
        ({"masks": {"folder/of": 1, "box": 1}}, "masks = folder/of"),
        ({"evaluate": {"masks": ["center", "my/masks"]}}, "evaluate.masks = my/masks"),
        ({"evaluate": {"masks": ["center", "thick.tar"]}}, "evaluate.masks = thick.tar"),
        ({"evaluate": {"distance": {"weights": "vgg.pt"}}}, "evaluate.distance.weights = vgg.pt"),
        (
            {"tracking_uri": "https://me:pw@mlflow.example"},
            "tracking_uri has a user's name or password in it",
        ),
    ],
)
def test_a_path_that_the_cluster_lacks_is_refused_with_its_field(fields: dict, message: str) -> None:
    storage = {} if "storage" in message else {"storage": "s3://bucket/runs"}
    recipe = parse_recipe({"name": "x", "models": {"context_encoder": {}}, **storage, **fields})
    with pytest.raises(SubmitError, match=f"^{re.escape(message)}") as refused:
        make_portable(recipe, HEAD)
    assert "pw" not in str(refused.value).replace("password", "")


def test_a_shared_folder_is_a_note_and_urls_are_accepted() -> None:
    shared = {
        "storage": "/shared/runs",
        "tracking_uri": "https://mlflow.example",
        "masks": {"s3://b/masks": 1},
    }
    recipe = parse_recipe({"name": "x", "models": {"context_encoder": {}}, **shared})
    same, notes = make_portable(recipe, HEAD)
    assert same == recipe
    assert notes == ["storage = /shared/runs must be a folder that all nodes of the cluster share"]


def test_submission_ids_are_unique_and_share_the_recipes_digest() -> None:
    recipe = load_recipe("demo")
    first, second = submission_id(recipe), submission_id(recipe)
    assert first != second
    assert first[:-6] == second[:-6] == f"demo-{recipe.digest[:12]}-"


def test_an_unreachable_head_is_a_one_line_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(SubmitError, match=f"the head at {address} cannot be reached"):
            connect(address)
    with pytest.raises(SubmitError, match="head:6379: give the dashboard's, for example http://head:8265"):
        connect("head:6379")


@contextmanager
def server_that_answers(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow  # servers
def test_another_server_is_not_a_head() -> None:
    for status, body in ((200, b"<html>"), (404, b"")):
        with (
            server_that_answers(status, body) as address,
            pytest.raises(SubmitError, match=f"not a Ray dashboard \\(HTTP status {status}\\)"),
        ):
            connect(address)


@pytest.mark.slow  # a server
def test_a_silent_head_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.jobs.CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SubmitError, match="does not answer"):
            connect(address)


@contextmanager
def head_that_drops_connections() -> Iterator[str]:
    """Speaks the Jobs API as far as following a job needs it; the log's WebSocket ends without a closing handshake."""

    async def version(request: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__}
        )

    async def tail(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("step 1\n")
        assert request.transport
        request.transport.close()
        return socket

    app = web.Application()
    app.router.add_get("/api/version", version)
    app.router.add_get("/api/jobs/{job}/logs/tail", tail)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.slow  # a server
def test_a_lost_connection_names_the_command_that_follows_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.cluster.jobs.MAX_RECONNECTS", 1)
    with (
        head_that_drops_connections() as address,
        pytest.raises(
            SubmitError, match=f"lost the connection .*: inpaint submit --attach job --address {address}"
        ),
    ):
        follow_logs("job", address, threading.Event())
    assert capsys.readouterr().out == "step 1\n"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:6379", True),
        ("http://localhost:8265", True),
        ("ray://127.0.0.1:10001", True),
        ("[::1]:6379", True),
        ("10.0.0.1:6379", False),
        ("http://127.0.0.1.example.org:8265", False),
        ("auto", False),
    ],
)
def test_which_addresses_are_on_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) == expected
