"""How long a person waits for `inpaint models ...` with 500 versions in the registry: the whole command, Python's start
and MLflow's import included, against SQLite and against servers. `make bench` prints the table."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import clean_environment
from mlflow.entities import Metric
from mlflow_server import AS_ADMIN, Server, acting_as

from models import build_model
from pipelines import registry
from pipelines.evaluation.metrics import BANDS, DEFINITIONS
from pipelines.registry.searching import SCORES, scores_tag
from pipelines.registry.versions import connected

VERSIONS, LIMIT = 500, 5.0  # seconds
COMMANDS = (
    "list",
    "show facades",
    "show facades@champion",
    "best facades --metric psnr --masks center --band 20-30",
    "history facades",
    "promote facades/7 --alias shadow",
    "promote facades/8 --alias shadow",
    "rollback facades --alias shadow",
    "export facades --pt2 --out facades.pt2",
)
SEARCH = """
from pipelines import registry
frame = registry.search(where="center/20-30/psnr > 17", order_by="center/fd", limit=10)
assert len(frame) == 10
"""


def fill(uri: str) -> None:
    """Five models with 500 versions together, each with the scores of two kinds of masks in every band."""
    rng = np.random.default_rng(0)
    with connected(uri) as client:
        experiment = client.create_experiment("benchmark")
        names = ["facades", *(f"model-{number}" for number in range(4))]
        columns = [
            f"{masks}/{band}/{name}"
            for masks in ("center", "brush")
            for band in BANDS
            for name in DEFINITIONS
        ]
        columns += [
            f"{masks}/{name}" for masks in ("center", "brush") for name in (*DEFINITIONS, "fd", "kid")
        ]
        for name in names:
            client.create_registered_model(name)
        for number in range(VERSIONS):
            name = names[0] if number % 2 else names[number % 5]
            run = client.create_run(experiment).info
            model = client.create_logged_model(experiment, name, run.run_id).model_id
            scores = dict(zip(columns, rng.uniform(16, 20, len(columns)).tolist(), strict=True))
            metrics = [Metric(key, value, run.start_time, 0, model) for key, value in scores.items()]
            client.log_batch(run.run_id, metrics=metrics)
            tags = {"step_key": str(number), "model": "context_encoder", "sigma": "2", "size": "64"}
            tags |= {"inpaint.protocol": f"{number % 3}: 84 photographs of 64x64", SCORES: scores_tag(scores)}
            client.create_model_version(name, f"models:/{model}", run.run_id, tags=tags, model_id=model)


def champion(uri: str, artifacts: str | None) -> None:
    """A version with files becomes champion after two without."""
    with connected(uri) as client:
        experiment = client.create_experiment(uri, artifact_location=artifacts)
        run = client.create_run(experiment).info.run_id
    small = build_model("context_encoder", size=32, width=0.0625)
    version = registry.register(small, name="facades", run_id=run, step_key=uri, tracking_uri=uri)
    for number in ("1", "2", version):
        registry.promote("facades", number, tracking_uri=uri)


def seconds(command: list[str], uri: str, folder: Path) -> tuple[float, float]:
    """Of the wall's clock and of this process's own; MLflow's address and the administrator's name in the environment."""
    environment = clean_environment() | AS_ADMIN | {"MLFLOW_TRACKING_URI": uri}
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    took, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_commands_with_500_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places: dict[str, dict[str, tuple[float, float]]] = {}
    python = [sys.executable, "-m", "pipelines", "models"]
    root = Path(__file__).parents[2]

    def measure(place: str, uri: str, artifacts: str | None = None) -> None:
        champion(uri, artifacts)
        commands = [*COMMANDS, f"delete facades/{10 + len(places)} --yes"]
        found = {
            command.split("/1")[0]: seconds([*python, *command.split()], uri, tmp_path)
            for command in commands
        }
        found["registry.search"] = seconds([sys.executable, "-c", SEARCH], uri, root)
        places[place] = found

    with Server(tmp_path) as server:
        fill(server.uri)
        measure("server", server.uri)
    measure("SQLite", f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "local").as_uri())
    with Server(tmp_path, authenticated=True) as server, acting_as(AS_ADMIN):
        measure("with users", server.uri)
    with capsys.disabled():
        head = "".join(f"{place:>12}" for place in places)
        print(f"\nSeconds of a command with {VERSIONS} versions (its own CPU time)\n{'':<58}{head}")
        for command in places["SQLite"]:
            cells = "".join(
                f"{wall:>6.1f}({own:.1f})".rjust(12) for wall, own in (p[command] for p in places.values())
            )
            print(f"{command:<58}{cells}")
    slow = {
        (place, command): wall
        for place, found in places.items()
        for command, (wall, _) in found.items()
        if wall > LIMIT and not command.startswith("export")  # which loads torch and runs the version
    }
    assert slow == {}
