"""The whole chain under kill -9: nothing finished is repeated, training ends with the same bits, nothing is logged twice."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest
from harness import Finished, Run, family, kill, wait_for

pytestmark = pytest.mark.timeout(600)


def workers(pid: int) -> list[psutil.Process]:
    """The training workers among a driver's descendants, any of which may end while we look."""
    found = []
    for process in family(pid):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.soak
def test_killed_anywhere_the_next_run_continues_and_ends_like_an_uninterrupted_one(
    finished: Finished, make_run: Callable[..., Run]
) -> None:
    run = make_run("killed")

    # the driver, in the middle of both trainings
    driver = run.start()
    wait_for(
        lambda: run.latest("edge_connect") and run.latest("context_encoder"),
        "two checkpoints",
        driver,
    )
    done = run.manifests()
    assert len(done) >= 2  # shards and edges
    driver.kill()
    driver.wait()

    # a worker, which Ray Train replaces by itself, and then everything at once
    before = run.latest("edge_connect")
    driver = run.start()
    wait_for(
        lambda: run.latest("edge_connect") > before and workers(driver.pid),
        "a training worker",
        driver,
    )
    kill(workers(driver.pid)[:1])
    reached = run.latest("edge_connect")
    wait_for(
        lambda: run.latest("edge_connect") > reached,
        "going on",
        driver,
    )
    kill(family(driver.pid))
    driver.wait()

    assert run.finish() == 0, run.output
    for path, was in done.items():
        assert run.manifests()[path] == was  # found finished, not done again
    for model in run.recipe["models"]:
        assert run.weights(model) == finished.weights[model], f"{model} ended with other bits"

    check_traces(run)
    assert run.points() == finished.points


def check_traces(run: Run) -> None:
    doubled = run.rows("select run_uuid, key, step, count(*) n from metrics group by 1, 2, 3 having n > 1")
    assert doubled == []
    versions = run.rows("select name, count(*) from model_versions group by name")
    assert sorted(versions) == [(name, 1) for name in sorted(run.recipe["models"])]
    assert run.leftovers() == []
    for path in run.storage.glob("work/*/stable/*.tar"):
        with tarfile.open(path) as tar:
            assert tar.getnames()
    steps = run.rows("select value, count(*) from tags where key = 'inpaint.key' group by value")
    assert all(count == 1 for _, count in steps)  # one MLflow run a step, however often it was tried
    (parents,) = run.rows("select count(*) from tags where key = 'mlflow.parentRunId'")
    assert parents[0] == len(steps) - 1


def test_run_again_everything_is_found_finished_without_ray(finished: Finished) -> None:
    run = finished.run
    (manifest,) = run.storage.glob("work/*-shard/stable/manifest.json")
    rejects = {reject["name"]: reject["reason"] for reject in json.loads(manifest.read_text())["rejects"]}
    assert set(rejects) == {"truncated.png", "empty.jpg", "notes.txt", "dot.png"}
    before, points = run.manifests(), run.rows("select count(*) from metrics")
    driver = run.start()
    started: set[str] = set()
    while driver.poll() is None:
        started.update(name for p in family(driver.pid) if "raylet" in (name := _name(p)))
    assert run.finish(driver) == 0
    assert "found finished" in run.output
    assert "PSNR" in run.output
    assert started == set()
    assert run.manifests() == before
    assert run.rows("select count(*) from metrics") == points

    # a version that somebody deleted is registered again, and nothing else is done again
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{run.storage}/mlflow.db").delete_model_version("context_encoder", "1")
    assert run.finish() == 0, run.output
    again = run.manifests()
    changed = {path for path in before if again[path] != before[path]}
    assert changed == {path for path in before if path.endswith("register-context_encoder.json")}
    living = "name = 'context_encoder' and current_stage != 'Deleted_Internal'"
    assert run.rows(f"select version from model_versions where {living}") == [(2,)]


def test_a_second_driver_on_the_same_storage_is_told_so_in_one_line(make_run: Callable[..., Run]) -> None:
    run = make_run("busy")
    first = run.start()
    wait_for(lambda: run.manifests(), "the first step", first)
    assert run.finish(run.start()) == 1
    (line,) = [line for line in run.output.splitlines() if line.startswith("inpaint run:")]
    assert str(first.pid) in line
    kill(family(first.pid))
    first.wait()


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""
