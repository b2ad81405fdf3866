"""A small run of the whole pipeline, and helpers for tests that kill it: start it, find its processes and files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
DEADLINE_SECONDS = 400.0  # for whatever a test waits for

RECIPE = {
    "data": {"size": 32, "margin": 4, "format": "png", "partition_size": 24, "max_reject_fraction": 0.2},
    "edges": {"sigma": 1.5},
    "train": {"batch": 8, "ema_decay": 0.9, "checkpoint_every": 20, "log_every": 5},
    "models": {
        "context_encoder": {
            "size": 32, "width": 0.1, "overlap": 0, "train": {"steps": {"train": 160}},
        },
        "edge_connect": {
            "width": 0.08, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0,
            "train": {"steps": {"edge": 40, "inpaint_canny": 40, "inpaint": 40, "joint": 40}},
        },
    },
    "evaluate": {"max_photos": 8, "distance": None, "grid_rows": 3},
}  # fmt: skip

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ("--set", "data.source=photos")


def set_options(*values: str) -> tuple[str, ...]:
    return tuple(argument for value in values for argument in ("--set", value))


# a short version of the demo
DEMO = (
    "demo",
    *PHOTOGRAPHS,
    *set_options(
        "data.size=32",
        "data.margin=4",
        "data.partition_size=24",
        "data.max_reject_fraction=0.2",
        "edges.sigma=1.5",
        "train.checkpoint_every=10",
        "train.log_every=5",
        "models.context_encoder.size=32",
        "models.context_encoder.width=0.1",
        "models.context_encoder.train.steps={train: 20}",
        "models.edge_connect.width=0.08",
        "models.edge_connect.residual_blocks=1",
        "models.edge_connect.train.steps={edge: 10, inpaint_canny: 0, inpaint: 10, joint: 0}",
        "evaluate={max_photos: 8, distance: null, grid_rows: 3}",
    ),
)


@dataclass
class CliRun:
    """`inpaint run` (or another command) in a folder with its storage; a test may repeat it."""

    folder: Path
    recipe: dict = field(default_factory=lambda: json.loads(json.dumps(RECIPE)))
    recipe_arguments: tuple[str, ...] = ()  # a shipped recipe and its options, instead of `recipe`
    command: str = "run"
    environment: dict[str, str] = field(default_factory=dict)
    output: str = ""
    # its processes that listened on other addresses than loopback
    exposed_listeners: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def start(self, *extra_arguments: str, storage: bool = True) -> subprocess.Popen[str]:
        recipe = list(self.recipe_arguments)
        if not recipe:
            path = self.folder / "small.yaml"
            path.write_text(yaml.safe_dump(self.recipe))
            recipe = [str(path)]
        storage_option = ["--storage", str(self.storage)] if storage else []
        command = [
            sys.executable,
            "-m",
            "pipelines",
            self.command,
            *recipe,
            *storage_option,
            *extra_arguments,
        ]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment() | self.environment,
            start_new_session=True,
        )

    def finish(self, driver: subprocess.Popen[str] | None = None) -> int:
        driver = driver or self.start()
        with ListenerWatch(driver.pid) as watch:
            try:
                self.output, _ = driver.communicate(timeout=DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                kill_processes(process_tree(driver.pid))
                raise
        self.exposed_listeners |= watch.exposed
        return driver.returncode

    def latest_checkpoint(self, model: str) -> str:
        """The name of the last training checkpoint, such as step-00000040; empty before the first."""
        states = self.storage.glob(f"work/*-train-{model}/stable/**/step-*/state.pt")
        return max((path.parent.name for path in states), default="")

    def manifests(self) -> dict[str, tuple[int, int]]:
        """path -> (inode, time): a repeated step would have written a new file."""
        manifests = self.storage.glob("manifests/*.json")
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in manifests}

    def step_outputs(self, step: str) -> dict:
        """The outputs of a finished step, from its manifest."""
        (manifest,) = self.storage.glob(f"manifests/*-{step}.json")
        return json.loads(manifest.read_text())["value"]

    def weights_digest(self, model: str) -> str:
        return hash_weights(self.storage / self.step_outputs(f"train-{model}")["weights"])

    def query_mlflow(self, query: str) -> list[tuple]:
        with sqlite3.connect(self.storage / "mlflow.db") as database:
            return database.execute(query).fetchall()

    def count_points(self) -> int:
        ((count,),) = self.query_mlflow(
            "select count(*) from metrics where key like 'loss/%' or key like 'val/%'"
        )
        return count

    def unpublished_files(self) -> list[Path]:
        """Temporary files and locks."""
        return [path for path in self.storage.rglob("*") if ".tmp-" in path.name or path.suffix == ".lock"]


@dataclass(frozen=True)
class FinishedDemo:
    """The README's demo, finished although it was started a second time while it ran."""

    run: CliRun
    driver_pid: int
    second_run: CliRun
    second_exit_status: int  # of the second run


def hash_weights(folder: Path) -> str:
    """sha256 of a checkpoint folder's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def clean_environment() -> dict[str, str]:
    dropped = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    return {key: value for key, value in os.environ.items() if key not in dropped} | {"OMP_NUM_THREADS": "1"}


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def find_listeners(processes: list[psutil.Process]) -> set[tuple[str, str]]:
    """(process name, address) of every listening socket."""
    listeners = set()
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listeners.add((process.name(), connection.laddr.ip))
    return listeners


def find_exposed_listeners(processes: list[psutil.Process]) -> set[str]:
    """'name address' of the processes that listen on another address than loopback."""
    return {f"{name} {address}" for name, address in find_listeners(processes) if address not in LOOPBACK}


class ListenerWatch:
    """Context manager that records once per second which descendants of a process listen on which address."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.listeners: set[tuple[str, str]] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.poll, daemon=True)

    def poll(self) -> None:
        while not self.ended.wait(1):
            with suppress(psutil.Error):
                self.listeners |= find_listeners(process_tree(self.pid))

    @property
    def exposed(self) -> set[str]:
        return {f"{name} {address}" for name, address in self.listeners if address not in LOOPBACK}

    def __enter__(self) -> ListenerWatch:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()


def kill_processes(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def wait_for(condition: Callable[[], object], event: str, driver: subprocess.Popen | None = None) -> None:
    """Polls until `condition` holds; fails when the driver ends first or the deadline passes."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if driver is not None and driver.poll() is not None:
            output = driver.stdout.read() if driver.stdout else ""
            pytest.fail(f"the run ended before {event}:\n{output[-3000:]}")
        if time.monotonic() > deadline:
            pytest.fail(f"{event} did not happen within {DEADLINE_SECONDS:.0f} s")
        time.sleep(0.02)
