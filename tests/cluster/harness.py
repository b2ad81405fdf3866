"""A small run of the whole chain, and what tests of kills need: starting it, finding its processes, its traces."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

DEADLINE = 400.0  # seconds within which whatever is waited for has to happen

RECIPE = {
    "data": {"size": 32, "margin": 4, "format": "png", "shard_photos": 24, "max_rejects": 0.2},
    "edges": {"sigma": 1.5},
    "train": {"batch": 8, "ema": 0.9, "checkpoint_every": 20, "log_every": 5},
    "models": {
        "context_encoder": {
            "size": 32, "width": 0.1, "overlap": 0, "train": {"steps": {"train": 160}},
        },
        "edge_connect": {
            "width": 0.08, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0,
            "train": {"steps": {"edge": 40, "inpaint_canny": 40, "inpaint": 40, "joint": 40}},
        },
    },
    "evaluate": {"count": 8, "distance": None, "samples": 3},
}  # fmt: skip


@dataclass
class Run:
    """`inpaint run` (or another command) on one storage, as often as a test likes."""

    folder: Path
    recipe: dict = field(default_factory=lambda: json.loads(json.dumps(RECIPE)))
    command: str = "run"
    environment: dict[str, str] = field(default_factory=dict)
    output: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def start(self, *more: str, storage: bool = True) -> subprocess.Popen[str]:
        path = self.folder / "small.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        where = ["--storage", str(self.storage)] if storage else []
        command = [sys.executable, "-m", "pipelines", self.command, str(path), *where, *more]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment() | self.environment,
            start_new_session=True,
        )

    def finish(self, driver: subprocess.Popen[str] | None = None) -> int:
        driver = driver or self.start()
        try:
            self.output, _ = driver.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            kill(family(driver.pid))
            raise
        return driver.returncode

    def latest(self, model: str) -> str:
        """The name of a training's last checkpoint, such as step-00000040; empty before the first."""
        found = self.storage.glob(f"work/*-train-{model}/stable/**/step-*/state.pt")
        return max((path.parent.name for path in found), default="")

    def manifests(self) -> dict[str, tuple[int, int]]:
        """path -> (inode, time): a step done again would have written another file."""
        found = self.storage.glob("manifests/*.json")
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    def value(self, step: str) -> dict:
        """The value of a finished step."""
        (manifest,) = self.storage.glob(f"manifests/*-{step}.json")
        return json.loads(manifest.read_text())["value"]

    def weights(self, model: str) -> str:
        return digest(self.storage / self.value(f"train-{model}")["weights"])

    def rows(self, query: str) -> list[tuple]:
        with sqlite3.connect(self.storage / "mlflow.db") as database:
            return database.execute(query).fetchall()

    def points(self) -> int:
        ((count,),) = self.rows("select count(*) from metrics where key like 'loss/%' or key like 'val/%'")
        return count

    def leftovers(self) -> list[Path]:
        """Files that were not published, and locks."""
        return [path for path in self.storage.rglob("*") if ".tmp-" in path.name or path.suffix == ".lock"]


@dataclass(frozen=True)
class Finished:
    """A run that ended undisturbed: what others must end like."""

    run: Run
    weights: dict[str, str]
    points: int


def digest(folder: Path) -> str:
    """Of a checkpoint folder's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def clean_environment() -> dict[str, str]:
    dropped = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    return {key: value for key, value in os.environ.items() if key not in dropped} | {"OMP_NUM_THREADS": "1"}


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def wait_for(condition: Callable[[], object], what: str, driver: subprocess.Popen | None = None) -> None:
    """Polls until `condition` holds; fails when the driver ends first or the deadline passes."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if driver is not None and driver.poll() is not None:
            output = driver.stdout.read() if driver.stdout else ""
            pytest.fail(f"the run ended before {what}:\n{output[-3000:]}")
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {DEADLINE:.0f} s")
        time.sleep(0.02)
