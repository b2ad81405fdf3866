"""kill -9 of every process of a workflow: the next run resumes it, and finished steps are not touched."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from data_prep.storage import open_storage
from pipelines.durable import lease
from pipelines.durable.runner import run_workflow
from pipelines.durable.steps import StepId
from pipelines.durable.workflow import StepStatus, Workflow

DEADLINE = 90.0
NAMES = ("one", "two", "three", "four")

# Each step writes half of its output, then a file with its pid, and waits for a file that the test creates.
DRIVER = """
import os, sys, time
from dataclasses import dataclass
import ray
from data_prep.storage import open_storage
from pipelines.durable.runner import run_workflow
from pipelines.durable.steps import Step, StepId
from pipelines.durable.workflow import Workflow


@dataclass(frozen=True)
class Config:
    pass


@dataclass(frozen=True)
class Outputs:
    files: tuple[str, ...]
    sum: int


@dataclass(frozen=True)
class Inputs:
    before: Outputs | None = None


def work(ctx):
    ctx.storage.write(f"{ctx.attempt_folder}/half.txt", b"half")
    ctx.storage.write(f"{ctx.persistent_folder}/{ctx.attempt}.txt", b"checkpoint")
    gates = ctx.storage.local_path("gates")
    (ctx.storage.local_path(ctx.attempt_folder) / ".tmp-left").write_bytes(b"")
    ctx.storage.write(f"gates/{ctx.name}.{ctx.attempt}", str(os.getpid()).encode())
    while not (gates / f"{ctx.name}.go").exists():
        time.sleep(0.01)
        os.utime(gates / f"{ctx.name}.{ctx.attempt}")
    (ctx.storage.local_path(ctx.attempt_folder) / ".tmp-left").unlink()
    ctx.storage.write(f"{ctx.attempt_folder}/whole.txt", b"whole")
    count = 1 + (ctx.inputs.before.sum if ctx.inputs.before else 0)
    return Outputs(tuple(f"{ctx.attempt_folder}/{name}.txt" for name in ("half", "whole")), count)


def chain(uri):
    names = ("one", "two", "three", "four")
    before = [{}, *({"before": StepId(name)} for name in names)]
    steps = [
        Step(StepId(name), "driver:work", Config(), inputs, Inputs, Outputs)
        for name, inputs in zip(names, before)
    ]
    return Workflow("killed", steps, open_storage(uri))


if __name__ == "__main__":
    import driver  # by the name that the workers know it by

    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    try:
        print(run_workflow(driver.chain(sys.argv[1]))[StepId("four")].sum, flush=True)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


class Run:
    """A driver in its own process group, with its own Ray."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.storage = open_storage(folder / "runs")
        self.gates = folder / "runs/gates"
        script = folder / "driver.py"
        script.write_text(DRIVER)
        with open(folder / "log.txt", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), self.storage.uri],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=os.environ | env,
            )
        self.log = folder / "log.txt"
        self.pids: set[int] = set()

    def wait_for_attempt(self, step: str, attempt: int) -> int:
        """Wait until an attempt runs; returns the pid of its process."""
        self.wait(lambda: (self.gates / f"{step}.{attempt}").exists(), f"{step}.{attempt}")
        pid = int((self.gates / f"{step}.{attempt}").read_text())
        self.pids |= {pid, *self.children()}
        return pid

    def open(self, *steps: str) -> None:
        for step in steps:
            (self.gates / f"{step}.go").touch()

    def children(self, name: str = "") -> list[int]:
        result = subprocess.run(
            ["ps", "-o", "pid=,comm=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [line.split(None, 1) for line in result.stdout.splitlines()]
        return [int(pid) for pid, command in rows if command.startswith(name)]

    def wait_for_exit(self) -> int:
        return self.process.wait(timeout=DEADLINE)

    def wait(self, condition, event: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None, (
                f"the driver ended before {event}: {self.log.read_text()[-2000:]}"
            )
            assert time.monotonic() < deadline, f"no {event}"
            time.sleep(0.01)

    def wait_for_processes(self) -> None:
        """Wait until all processes of the run have died; they do so once the driver is dead."""
        deadline = time.monotonic() + DEADLINE
        while alive := [pid for pid in self.pids if running(pid)]:
            assert time.monotonic() < deadline, f"{alive} are still running"
            time.sleep(0.02)


def running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def start(tmp_path):
    runs: list[Run] = []

    def new(**env: str) -> Run:
        runs.append(Run(tmp_path, **env))
        return runs[-1]

    yield new
    for run in runs:
        for pid in {run.process.pid, *run.children(), *run.pids}:
            if running(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        run.process.wait()


@pytest.fixture
def workflow(tmp_path, monkeypatch) -> Workflow:
    """The workflow of the driver."""
    (tmp_path / "driver.py").write_text(DRIVER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "driver", raising=False)
    killed: Workflow = importlib.import_module("driver").chain(str(tmp_path / "runs"))
    monkeypatch.delitem(sys.modules, "driver")
    return killed


def manifests(workflow: Workflow) -> dict[str, tuple[int, int, bytes]]:
    folder = workflow.storage.local_path("manifests")
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
    }


def check_storage(workflow: Workflow, finished: int) -> None:
    """After a kill: complete manifests of the finished steps only, and no held lease."""
    contents = manifests(workflow)
    assert len(contents) == finished
    for _, _, text in contents.values():
        assert json.loads(text)["value"]["sum"] <= finished
    assert [s.state for s in workflow.plan()][:finished] == ["finished"] * finished
    for path in workflow.storage.local_path("leases").iterdir():
        assert lease.current_holder(workflow.storage, path.stem) is None


def test_a_run_resumes_after_any_process_is_killed(start, workflow, tmp_path):
    # Kill the driver during step two of four.
    run = start()
    run.wait_for_attempt("one", 1)
    run.open("one")
    orphan = run.wait_for_attempt("two", 1)
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait_for_exit()
    check_storage(workflow, finished=1)
    first = manifests(workflow)
    two = workflow.plan()[1]
    assert (two.state, two.reason) == ("to run", "attempt 1: interrupted: its driver died")

    # Kill the driver and all Ray processes during step three: nothing is left to clean up.
    run = start()
    run.wait_for_attempt("two", 2)
    assert not running(orphan)  # Ray ended it with its driver
    run.open("two")
    run.wait_for_attempt("three", 1)
    for pid in [run.process.pid, *run.pids]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait_for_exit()
    check_storage(workflow, finished=2)
    assert first.items() <= manifests(workflow).items()
    second = manifests(workflow)

    # Kill the process of a step: the same driver retries.
    run = start()
    worker = run.wait_for_attempt("three", 2)
    os.kill(worker, signal.SIGKILL)
    run.wait_for_attempt("three", 3)
    run.open("three", "four")
    assert run.wait_for_exit() == 0, run.log.read_text()[-2000:]
    assert run.process.stdout.read().splitlines()[-1] == "4"  # Ray itself mentions the dead worker before
    assert second.items() <= manifests(workflow).items()
    check_storage(workflow, finished=4)
    run.wait_for_processes()

    assert [id.name for id in workflow.finished_outputs()] == list(NAMES)
    status = {s.name: s for s in workflow.status()}
    assert {name: step.attempts for name, step in status.items()} == {
        "one": 1,
        "two": 2,
        "three": 3,
        "four": 1,
    }
    assert status["three"].errors == (
        "attempt 1: interrupted: its driver died",
        "attempt 2: its process died: killed, crashed, or out of memory",
    )
    check_tidy(workflow, status)

    # Run again, without Ray: all steps are cached, nothing is written.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*") if path.is_file()}
    events: list[tuple] = []
    results = run_workflow(workflow, lambda event: events.append((event.step, event.state)))
    assert results[StepId("four")].sum == 4
    assert events == [(name, "cached") for name in NAMES]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*") if path.is_file()} == before


def check_tidy(workflow: Workflow, status: dict[str, StepStatus]) -> None:
    """No leases, temporary files or folders of failed attempts are left; stable folders are kept."""
    storage = workflow.storage
    assert not list(storage.local_path("leases").iterdir())
    assert not list(storage.local_path().rglob(".tmp-*"))
    for name, step in status.items():
        folder = storage.local_path(f"work/{step.key}")
        assert sorted(path.name for path in folder.iterdir()) == [f"a{step.attempts}", "stable"], name
        stable = sorted(path.name for path in (folder / "stable").iterdir())
        assert stable == [f"{n}.txt" for n in range(1, step.attempts + 1)]


def test_a_driver_ends_with_an_error_when_its_ray_dies(start, workflow):
    """Otherwise it would wait for ever, unable to start tasks, and keep its leases."""
    run = start(RAY_health_check_period_ms="500", RAY_health_check_timeout_ms="2000")  # 15 s otherwise
    run.wait_for_attempt("one", 1)
    (raylet,) = run.children("raylet")
    os.kill(raylet, signal.SIGKILL)
    assert run.wait_for_exit() == 1
    assert (
        run.log.read_text().splitlines()[-1] == "StepFailed: Ray on this machine died; run again to continue"
    )
    run.wait_for_processes()
    assert not list(workflow.storage.local_path("leases").iterdir())
    assert (
        workflow.plan()[0].reason == "attempt 1: interrupted: Ray on this machine died; run again to continue"
    )
