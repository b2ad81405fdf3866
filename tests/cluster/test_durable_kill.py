"""kill -9 of whatever works on a workflow; the next run goes on, and what was finished is not touched."""

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
from pipelines.durable.steps import Step, StepStatus, Workflow

DEADLINE = 90.0
NAMES = ("one", "two", "three", "four")

# Each step writes half of its work, tells its process and driver, and waits for a gate that the test opens.
DRIVER = """
import os, sys, time
import ray
from data_prep.storage import open_storage
from pipelines.durable.steps import Step, Workflow


def work(ctx):
    ctx.storage.write(f"{ctx.work}/half.txt", b"half")
    ctx.storage.write(f"{ctx.stable}/{ctx.attempt}.txt", b"checkpoint")
    signs = ctx.storage.path("signs")
    (ctx.storage.path(ctx.work) / ".tmp-left").write_bytes(b"")
    ctx.storage.write(f"signs/{ctx.name}.{ctx.attempt}", str(os.getpid()).encode())
    while not (signs / f"{ctx.name}.go").exists():
        time.sleep(0.01)
        os.utime(signs / f"{ctx.name}.{ctx.attempt}")
    (ctx.storage.path(ctx.work) / ".tmp-left").unlink()
    ctx.storage.write(f"{ctx.work}/whole.txt", b"whole")
    count = 1 + sum(value["sum"] for value in ctx.inputs.values())
    return {"outputs": [f"{ctx.work}/half.txt", f"{ctx.work}/whole.txt"], "sum": count}


names = ("one", "two", "three", "four")
steps = [Step(name, work, {}, names[:n][-1:]) for n, name in enumerate(names)]
workflow = Workflow("killed", steps, open_storage(sys.argv[1]))
ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
try:
    print(workflow.run()["four"]["sum"], flush=True)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Run:
    """A driver in its own process group, on its own Ray."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.storage = open_storage(folder / "runs")
        self.signs = folder / "runs/signs"
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

    def begun(self, step: str, attempt: int) -> int:
        """Wait for an attempt; the process that works on it."""
        self.wait(lambda: (self.signs / f"{step}.{attempt}").exists(), f"{step}.{attempt}")
        pid = int((self.signs / f"{step}.{attempt}").read_text())
        self.pids |= {pid, *self.children()}
        return pid

    def open(self, *steps: str) -> None:
        for step in steps:
            (self.signs / f"{step}.go").touch()

    def children(self, name: str = "") -> list[int]:
        found = subprocess.run(
            ["ps", "-o", "pid=,comm=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [line.split(None, 1) for line in found.stdout.splitlines()]
        return [int(pid) for pid, command in rows if command.startswith(name)]

    def ended(self) -> int:
        return self.process.wait(timeout=DEADLINE)

    def wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None, (
                f"the driver ended before {what}: {self.log.read_text()[-2000:]}"
            )
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.01)

    def all_gone(self) -> None:
        """Every process of the run dies by itself once its driver is dead."""
        deadline = time.monotonic() + DEADLINE
        while alive := [pid for pid in self.pids if running(pid)]:
            assert time.monotonic() < deadline, f"{alive} live on"
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
def workflow(tmp_path) -> Workflow:
    steps = [Step(name, print, {}, NAMES[:n][-1:]) for n, name in enumerate(NAMES)]
    return Workflow("killed", steps, open_storage(tmp_path / "runs"))


def manifests(workflow: Workflow) -> dict[str, tuple[int, int, bytes]]:
    folder = workflow.storage.path("manifests")
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
    }


def check_left(workflow: Workflow, finished: int) -> None:
    """After a kill: whole manifests of the finished steps alone, and no lease that anybody holds."""
    found = manifests(workflow)
    assert len(found) == finished
    for _, _, text in found.values():
        assert json.loads(text)["value"]["sum"] <= finished
    assert [s.state for s in workflow.plan()][:finished] == ["finished"] * finished
    for path in workflow.storage.path("leases").iterdir():
        assert lease.holder(workflow.storage, path.stem) is None


def test_whatever_is_killed_the_next_run_goes_on(start, workflow, tmp_path):
    # The driver, in the middle of step two of four.
    run = start()
    run.begun("one", 1)
    run.open("one")
    stray = run.begun("two", 1)
    os.kill(run.process.pid, signal.SIGKILL)
    run.ended()
    check_left(workflow, finished=1)
    first = manifests(workflow)
    two = workflow.plan()[1]
    assert (two.state, two.why) == ("to run", "attempt 1: interrupted: its driver died")

    # The driver and all of its Ray, in the middle of step three: nothing is left to tidy up.
    run = start()
    run.begun("two", 2)
    assert not running(stray)  # Ray ended it with its driver
    run.open("two")
    run.begun("three", 1)
    for pid in [run.process.pid, *run.pids]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.ended()
    check_left(workflow, finished=2)
    assert first.items() <= manifests(workflow).items()
    second = manifests(workflow)

    # The process that works on a step: the same driver tries again.
    run = start()
    worker = run.begun("three", 2)
    os.kill(worker, signal.SIGKILL)
    run.begun("three", 3)
    run.open("three", "four")
    assert run.ended() == 0, run.log.read_text()[-2000:]
    assert run.process.stdout.read().splitlines()[-1] == "4"  # Ray itself mentions the dead worker before
    assert second.items() <= manifests(workflow).items()
    check_left(workflow, finished=4)
    run.all_gone()

    assert set(workflow.finished()) == set(NAMES)
    status = {s.name: s for s in workflow.status()}
    assert {name: found.attempts for name, found in status.items()} == {
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

    # Once more, without any Ray: all is found finished, nothing is written.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*") if path.is_file()}
    seen: list[tuple] = []
    assert workflow.run(lambda *event: seen.append(event[:2]))["four"]["sum"] == 4
    assert seen == [(name, "cached") for name in NAMES]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*") if path.is_file()} == before


def check_tidy(workflow: Workflow, status: dict[str, StepStatus]) -> None:
    """No lease, no temporary file, no folder of another attempt than the one that succeeded; stable folders stay."""
    storage = workflow.storage
    assert not list(storage.path("leases").iterdir())
    assert not list(storage.path().rglob(".tmp-*"))
    for name, found in status.items():
        folder = storage.path(f"work/{found.key}")
        assert sorted(path.name for path in folder.iterdir()) == [f"a{found.attempts}", "stable"], name
        stable = sorted(path.name for path in (folder / "stable").iterdir())
        assert stable == [f"{n}.txt" for n in range(1, found.attempts + 1)]


def test_a_driver_whose_ray_dies_ends_and_says_so(start, workflow):
    """Its task would go on for ever and nothing new could start; and it would hold its leases."""
    run = start(RAY_health_check_period_ms="500", RAY_health_check_timeout_ms="2000")  # 15 s otherwise
    run.begun("one", 1)
    (raylet,) = run.children("raylet")
    os.kill(raylet, signal.SIGKILL)
    assert run.ended() == 1
    assert (
        run.log.read_text().splitlines()[-1] == "StepFailed: Ray on this machine died; run again to continue"
    )
    run.all_gone()
    assert not list(workflow.storage.path("leases").iterdir())
    assert workflow.plan()[0].why == "attempt 1: interrupted: Ray on this machine died; run again to continue"
