"""How long `inpaint models ...` takes with 500 versions in the registry: the whole command, with Python's start and MLflow's
import, for SQLite and for servers; and look-ups beside importing MLflow and one search. `make bench` prints the tables."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_latency import RATIO_LIMIT, YARDSTICK, lookup_commands, measure
from registry_versions import VERSIONS, champion, create_versions

from support.cluster_harness import clean_environment
from support.mlflow_server import AS_ADMIN, MlflowServer, acting_as

LIMIT_SECONDS = 5.0
ROUNDS = 4  # the best of these
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


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_lookups_cost_little_more_than_importing_mlflow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Side by side in one run: the look-ups alternate with a program that imports MLflow and searches once."""
    environment = clean_environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    results = {}
    with MlflowServer(tmp_path) as server:
        create_versions(server.uri)
        champion(server.uri, None)
        commands = lookup_commands(server.uri, VERSIONS)
        results["server"] = measure(commands, tmp_path, environment, ROUNDS)
    file = f"sqlite:///{tmp_path}/mlflow.db"
    champion(file, (tmp_path / "local").as_uri())
    results["SQLite"] = measure(lookup_commands(file, VERSIONS), tmp_path, environment, ROUNDS)
    slow = {}
    with capsys.disabled():
        for kind, latencies in results.items():
            yardstick = latencies[YARDSTICK]
            print(f"\n{kind}: seconds (CPU seconds), as multiples of the first line")
            for name, latency in latencies.items():
                ratios = latency.wall / yardstick.wall, latency.cpu / yardstick.cpu
                print(
                    f"{name:<75}{latency.wall:>6.2f} ({latency.cpu:.2f}){ratios[0]:>7.2f} ({ratios[1]:.2f})"
                )
                if max(ratios) > RATIO_LIMIT:
                    slow[kind, name] = ratios
    assert slow == {}
