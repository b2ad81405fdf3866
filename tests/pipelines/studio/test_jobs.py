"""Jobs in worker processes: progress, cancellation, death; and the models that a worker keeps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.studio import worker
from pipelines.studio.jobs import MAX_KEPT, MAX_WAITING, Job, JobRunner
from pipelines.studio.worker import ModelCache, find_function

pytestmark = pytest.mark.slow  # processes
TRIALS = "pipelines.studio.trial_jobs"


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobRunner]:
    folder = tmp_path / "pipelines_more"
    folder.mkdir()
    (folder / "trial_jobs.py").write_text(CODE)
    # the worker imports it as a module of the studio
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys, pipelines.studio as s\ns.__path__.append({str(folder)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    runner = JobRunner("trials", f"sqlite:///{tmp_path}/mlflow.db")
    yield runner
    runner.close()
    assert runner.process_id is None


CODE = """
import os, time

def count(context, steps, seconds=0.01):
    for step in range(steps):
        context.progress(step, steps, f"step {step} in /home/ann/x")
        time.sleep(seconds)
    return {"pid": os.getpid(), "uri": os.environ["MLFLOW_TRACKING_URI"]}

def sleep(context, seconds):
    context.progress(0, 1, "asleep")
    time.sleep(seconds)

def fail(context):
    raise ValueError("the file /home/ann/x is missing")

def die(context):
    os.kill(os.getpid(), 9)

def unsendable(context):
    return {1, 2}
"""


def start(runner: JobRunner, function: str, session: str = "me", **arguments: Any) -> Job:
    return runner.submit(session, "trial", f"{TRIALS}:{function}", arguments)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(job: Job) -> dict[str, Any]:
    wait_until(lambda: job.has_ended)
    return job.as_json()


def test_jobs_run_one_after_another_in_one_process(runner: JobRunner, tmp_path: Path) -> None:
    assert runner.process_id is None
    first, second = start(runner, "count", steps=30), start(runner, "count", steps=2)
    wait_until(lambda: first.done > 0)
    assert second.state == "waiting"
    seen = first.as_json()
    assert (seen["state"], seen["total"]) == ("running", 30)
    assert seen["note"].endswith("in …/x")
    assert seen["eta_seconds"] is not None
    results = [ended(job) for job in (first, second)]
    assert [result["state"] for result in results] == ["finished", "finished"]
    assert results[0]["result"] == results[1]["result"]
    assert results[0]["result"] == {"pid": runner.process_id, "uri": f"sqlite:///{tmp_path}/mlflow.db"}


def test_jobs_belong_to_their_session(runner: JobRunner) -> None:
    job = start(runner, "count", steps=1)
    assert runner.get("me", job.id) is job
    assert runner.get("other", job.id) is None
    assert runner.cancel("other", job.id) is None
    assert runner.get("me", "nothing") is None


def test_a_job_that_reports_progress_is_cancelled_and_its_process_stays(runner: JobRunner) -> None:
    job, waiting = start(runner, "count", steps=10_000), start(runner, "count", steps=1)
    wait_until(lambda: job.done > 0)
    process = runner.process_id
    runner.cancel("me", waiting.id)
    assert waiting.state == "cancelled"
    runner.cancel("me", job.id)
    assert ended(job)["state"] == "cancelled"
    assert ended(start(runner, "count", steps=1))["result"]["pid"] == process
    assert waiting.result is None


def test_an_interrupt_from_the_terminal_is_left_to_the_parent(
    runner: JobRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one that comes while the process starts."""
    runner.prepare()
    wait_until(lambda: runner.process_id is not None)
    process = runner.process_id
    assert process is not None
    os.kill(process, signal.SIGINT)
    assert ended(start(runner, "count", steps=1))["result"]["pid"] == process
    assert "Traceback" not in capfd.readouterr().err


def test_a_job_that_does_not_react_is_killed(runner: JobRunner) -> None:
    job = start(runner, "sleep", seconds=60)
    wait_until(lambda: job.note == "asleep")
    process, began = runner.process_id, time.monotonic()
    runner.cancel("me", job.id)
    assert ended(job)["state"] == "cancelled"
    assert time.monotonic() - began < 4
    after = ended(start(runner, "count", steps=1))
    assert after["state"] == "finished"
    assert after["result"]["pid"] != process
    assert process is not None
    assert not Path(f"/proc/{process}").exists()


def test_errors_and_deaths_are_one_line(runner: JobRunner) -> None:
    assert ended(start(runner, "fail"))["error"] == "ValueError: the file …/x is missing"
    answer = ended(start(runner, "die"))
    assert answer["state"] == "failed"
    assert answer["error"] == (
        "the worker process ended by signal 9, often for lack of memory: try again, or with a smaller photograph"
    )
    assert ended(start(runner, "unsendable"))["state"] in ("finished", "failed")
    assert ended(start(runner, "count", steps=1))["state"] == "finished"
    assert "TypeError" in ended(start(runner, "count", nothing=1))["error"]


def test_the_queue_of_a_session_is_bounded(runner: JobRunner) -> None:
    jobs = [start(runner, "sleep", seconds=60) for _ in range(MAX_WAITING)]
    with pytest.raises(ValueError, match="8 jobs wait already"):
        start(runner, "count", steps=1)
    start(runner, "count", session="other", steps=1)
    for job in jobs:
        runner.cancel("me", job.id)


def test_the_end_of_the_runner_ends_its_process_and_jobs(runner: JobRunner) -> None:
    job, waiting = start(runner, "sleep", seconds=60), start(runner, "count", steps=1)
    wait_until(lambda: job.note == "asleep")
    process = runner.process_id
    runner.close()
    assert (job.state, waiting.state) == ("cancelled", "cancelled")
    assert not Path(f"/proc/{process}").exists()
    with pytest.raises(ValueError, match="about to end"):
        start(runner, "count", steps=1)


def test_a_worker_killed_while_idle_is_replaced(runner: JobRunner) -> None:
    process = ended(start(runner, "count", steps=1))["result"]["pid"]
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: runner.process_id is None)
    assert ended(start(runner, "count", steps=1))["result"]["pid"] != process


def test_the_oldest_ended_jobs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = JobRunner("trials", "sqlite:////nowhere/mlflow.db")
    monkeypatch.setattr(runner, "_start_thread", lambda: None)
    jobs = []
    for _ in range(MAX_KEPT + 5):
        jobs.append(start(runner, "count"))
        runner.cancel("me", jobs[-1].id)
    kept = [runner.get("me", job.id) is not None for job in jobs]
    assert kept == [False] * 5 + [True] * MAX_KEPT


def test_two_models_are_kept() -> None:
    loaded: list[str] = []

    def load(version: str) -> str:
        loaded.append(version)
        return version.upper()

    models = ModelCache(load)
    for version in ("a/1", "b/1", "a/1", "c/1", "a/1", "b/1"):
        assert models.get(version) == version.upper()
    assert loaded == ["a/1", "b/1", "c/1", "b/1"]
    assert [version in models for version in ("a/1", "b/1", "c/1")] == [True, True, False]


def test_only_functions_of_the_studio_are_run() -> None:
    assert find_function("pipelines.studio.worker:work") is worker.work
    for name in ("os:system", "pipelines.studios.x:y", "pipelines.registry:delete"):
        with pytest.raises(ValueError, match="not a function of the studio"):
            find_function(name)


@pytest.mark.parametrize("kind", ["comparison", "promotion"])
def test_a_result_with_paths_stays_in_the_server(kind: str) -> None:
    job = Job("1", "mine", kind, "f", {}, state="finished", result={"plan": {"images": "/home/me/shards"}})
    assert "/home/me" not in str(job.as_json())
    assert job.result
