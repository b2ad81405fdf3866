"""What travels with a job, and what a person is told when it cannot be submitted."""

from __future__ import annotations

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
from ray._private.runtime_env.packaging import create_package

from pipelines.cluster.loopback import is_loopback
from pipelines.cluster.submitting import SubmitError, connect, package, portable, submission_id
from pipelines.reading import load_recipe, parse_recipe

ROOT = Path(__file__).parents[3]
HEAD = "http://head.example:8265"
LIMIT = 5_000_000
PLANTED = "planted-secret-123"


@pytest.fixture(autouse=True)
def no_cluster_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def zipped(folder: Path, target: Path) -> set[str]:
    """Ray's own package of a working_dir: the files in it. Fails when it has 5 MB."""
    create_package(str(folder), target, include_gitignore=True)
    assert target.stat().st_size < LIMIT
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_the_package_has_the_source_and_the_recipe_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
    recipe = load_recipe("demo", ["seed=7", "storage=/shared/runs"])
    with package(recipe) as folder:
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


def test_a_checkout_as_working_dir_leaves_everything_else_at_home(tmp_path: Path) -> None:
    """As `ray job submit --working-dir .` packs it, with what people keep beside it."""
    checkout = tmp_path / "checkout"
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in [name for name in known if (ROOT / name).is_file()] or pytest.skip("no git checkout"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for name in (
        ".env",
        "credentials.env",
        "photos/a.jpg",
        "runs/mlflow.db",
        ".git/config",
        ".venv/x",
        "s3/s3.env",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(PLANTED)
    (checkout / "mine.yaml").write_text("name: mine\n")
    names = zipped(checkout, tmp_path / "package.zip")
    assert {"mine.yaml", "pyproject.toml", "pipelines/__main__.py", "pipelines/recipes/demo.yaml"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"data_prep", "models", "pipelines", "pyproject.toml", "mine.yaml"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "storage = runs is a path of this machine"),
        ({"data": {"source": "photos"}}, "data.source = photos"),
        ({"data": {"source": "s3://b/list.txt", "root": "photos"}}, "data.root = photos"),
        ({"tracking": "sqlite:///mlflow.db"}, "tracking = sqlite:///mlflow.db"),
        ({"masks": {"folder/of": 1, "box": 1}}, "masks = folder/of"),
        ({"evaluate": {"masks": ["center", "my/masks"]}}, "evaluate.masks = my/masks"),
        ({"evaluate": {"distance": {"weights": "vgg.pt"}}}, "evaluate.distance.weights = vgg.pt"),
        ({"tracking": "https://me:pw@mlflow.example"}, "tracking has a user's name or password in it"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_by_its_field(fields: dict, said: str) -> None:
    storage = {} if "storage" in said else {"storage": "s3://bucket/runs"}
    recipe = parse_recipe({"name": "x", "models": {"context_encoder": {}}, **storage, **fields})
    with pytest.raises(SubmitError, match=f"^{re.escape(said)}") as refused:
        portable(recipe, HEAD)
    assert "pw" not in str(refused.value).replace("password", "")


def test_a_shared_folder_is_a_note_and_addresses_are_nothing() -> None:
    shared = {"storage": "/shared/runs", "tracking": "https://mlflow.example", "masks": {"s3://b/masks": 1}}
    recipe = parse_recipe({"name": "x", "models": {"context_encoder": {}}, **shared})
    same, notes = portable(recipe, HEAD)
    assert same == recipe
    assert notes == ["storage = /shared/runs has to be a folder that all nodes of the cluster share"]


def test_submissions_of_a_recipe_are_told_apart_and_belong_together() -> None:
    recipe = load_recipe("demo")
    first, second = submission_id(recipe), submission_id(recipe)
    assert first != second
    assert first[:-6] == second[:-6] == f"demo-{recipe.digest[:12]}-"


def test_a_head_that_is_not_there_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(SubmitError, match=f"the head at {address} cannot be reached"):
            connect(address)
    with pytest.raises(SubmitError, match="head:6379: give the dashboard's, for example http://head:8265"):
        connect("head:6379")


@contextmanager
def server_that_says(status: int, body: bytes) -> Iterator[str]:
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


def test_another_server_is_no_head() -> None:
    for status, body in ((200, b"<html>"), (404, b"")):
        with (
            server_that_says(status, body) as address,
            pytest.raises(SubmitError, match=f"no Ray dashboard \\(it answers {status}\\)"),
        ):
            connect(address)


def test_a_silent_head_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.submitting.REACH", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SubmitError, match="does not answer"):
            connect(address)


@pytest.mark.parametrize(
    ("address", "here"),
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
def test_what_is_on_loopback(address: str, here: bool) -> None:
    assert is_loopback(address) == here
