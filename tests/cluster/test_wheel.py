"""The wheel, installed with constraints.txt into an empty environment, runs the demo from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.cluster_harness import DEMO, PHOTOGRAPHS, ROOT, clean_environment

pytestmark = pytest.mark.soak
PACKAGES = ("data_prep", "models", "pipelines")
SHORT_DEMO = ("demo", *DEMO[1 + len(PHOTOGRAPHS) :])  # on the bundled photographs


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    return [name for name in listing.splitlines() if (ROOT / name).is_file()] or pytest.skip(
        "no git checkout"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files: setuptools would pack what earlier builds left in the checkout's build folder."""
    checkout, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in tracked_files():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist), "."]
    subprocess.run(command, cwd=checkout, check=True)
    (file,) = dist.glob("*.whl")
    return file


def test_the_wheel_has_the_packages_with_their_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked_files() if name.startswith(tuple(f"{part}/" for part in PACKAGES))}
    results = {name for name in expected if name.startswith("pipelines/results/")}
    assert names == expected - results - {"models/RESULTS.md"}
    assert {"pipelines/recipes/demo.yaml", "pipelines/templates/report.html", "models/py.typed"} <= names


@pytest.mark.timeout(3600)
def test_the_installed_wheel_runs_the_demo_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    programs, folder = tmp_path / "env" / "bin", tmp_path / "work"
    folder.mkdir()
    environment = {key: value for key, value in clean_environment().items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"

    def run(*command: str) -> str:
        return subprocess.run(
            command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    run(sys.executable, "-m", "venv", str(programs.parent))
    run(f"{programs}/pip", "install", "--quiet", "-c", f"{ROOT}/constraints.txt", str(wheel))
    for package in PACKAGES:
        file = Path(run("python", "-c", f"import {package}; print({package}.__file__)").strip())
        assert file.is_relative_to(programs.parent)
    run("inpaint", "run", *SHORT_DEMO)
    versions = json.loads(run("inpaint", "models", "list", "--json"))
    assert {entry["name"] for entry in versions} == {"context_encoder", "edge_connect"}
