"""How long `inpaint models ...` takes with 500 versions in the registry: the whole command, with Python's start and MLflow's
import, for SQLite and for servers. `make bench` prints the table."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Metric

from data_prep.masks import HOLE_AREA_BANDS
from models import build_model
from pipelines import registry
from pipelines.evaluation.metrics import METRIC_DEFINITIONS
from pipelines.registry.client import registry_client
from pipelines.registry.searching import SCORES_TAG, scores_json
from support.cluster_harness import clean_environment
from support.mlflow_server import AS_ADMIN, MlflowServer, acting_as

VERSIONS, LIMIT_SECONDS = 500, 5.0
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


def create_versions(uri: str) -> None:
    """Five models with 500 versions in total; each version has scores for two mask kinds in every band."""
    rng = np.random.default_rng(0)
    with registry_client(uri) as client:
        experiment = client.create_experiment("benchmark")
        names = ["facades", *(f"model-{number}" for number in range(4))]
        columns = [
            f"{masks}/{band}/{name}"
            for masks in ("center", "brush")
            for band in HOLE_AREA_BANDS
            for name in METRIC_DEFINITIONS
        ]
        columns += [
            f"{masks}/{name}" for masks in ("center", "brush") for name in (*METRIC_DEFINITIONS, "fd", "kid")
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
            tags |= {
                "inpaint.protocol": f"{number % 3}: 84 photographs of 64x64",
                SCORES_TAG: scores_json(scores),
            }
            client.create_model_version(name, f"models:/{model}", run.run_id, tags=tags, model_id=model)


def champion(uri: str, artifacts: str | None) -> None:
    """Register a version with files; it becomes champion after two versions without files."""
    with registry_client(uri) as client:
        experiment = client.create_experiment(uri, artifact_location=artifacts)
        run = client.create_run(experiment).info.run_id
    small = build_model("context_encoder", size=32, width=0.0625)
    version = registry.register(small, name="facades", run_id=run, step_key=uri, tracking_uri=uri)
    for number in ("1", "2", version):
        registry.promote("facades", number, tracking_uri=uri)


def seconds(command: list[str], uri: str, folder: Path) -> tuple[float, float]:
    """(wall time, the command's CPU time); MLflow's uri and the administrator's name are set in the environment."""
    environment = clean_environment() | AS_ADMIN | {"MLFLOW_TRACKING_URI": uri}
    cpu_before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    wall, cpu_after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, process.stdout + process.stderr
    cpu = cpu_after.ru_utime + cpu_after.ru_stime - cpu_before.ru_utime - cpu_before.ru_stime
    return wall, cpu


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_commands_with_500_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results: dict[str, dict[str, tuple[float, float]]] = {}
    python = [sys.executable, "-m", "pipelines", "models"]
    root = Path(__file__).parents[2]

    def measure(registry_kind: str, uri: str, artifacts: str | None = None) -> None:
        champion(uri, artifacts)
        commands = [*COMMANDS, f"delete facades/{10 + len(results)} --yes"]
        results[registry_kind] = {
            command.split("/1")[0]: seconds([*python, *command.split()], uri, tmp_path)
            for command in commands
        }
        results[registry_kind]["registry.search"] = seconds([sys.executable, "-c", SEARCH], uri, root)

    with MlflowServer(tmp_path) as server:
        create_versions(server.uri)
        measure("server", server.uri)
    measure("SQLite", f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "local").as_uri())
    with MlflowServer(tmp_path, authenticated=True) as server, acting_as(AS_ADMIN):
        measure("with users", server.uri)
    with capsys.disabled():
        head = "".join(f"{registry_kind:>12}" for registry_kind in results)
        print(f"\nSeconds per command with {VERSIONS} versions (its own CPU time)\n{'':<58}{head}")
        for command in results["SQLite"]:
            cells = "".join(
                f"{wall:>6.1f}({cpu:.1f})".rjust(12) for wall, cpu in (p[command] for p in results.values())
            )
            print(f"{command:<58}{cells}")
    slow = {
        (registry_kind, command): wall
        for registry_kind, by_command in results.items()
        for command, (wall, _) in by_command.items()
        if wall > LIMIT_SECONDS and not command.startswith("export")  # loads torch and runs the model
    }
    assert slow == {}
