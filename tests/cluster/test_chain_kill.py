"""The whole pipeline under kill -9: finished steps are not repeated, weights are bit-identical, nothing is logged twice."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from mlflow import MlflowClient

from data_prep.uris import sqlite_url
from support.cluster_harness import CliRun, FinishedDemo, kill_processes, process_tree, wait_for
from support.mlflow_curves import check_curves, check_not_ahead_of_checkpoints

pytestmark = pytest.mark.timeout(600)


def workers(pid: int) -> list[psutil.Process]:
    """The training workers among a driver's descendants, any of which may end during the search."""
    workers = []
    for process in process_tree(pid):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                workers.append(process)
    return workers


@pytest.mark.soak
def test_a_killed_run_resumes_and_ends_with_the_same_bits(
    make_run: Callable[..., CliRun],
) -> None:
    undisturbed, run = make_run("calm"), make_run("killed")
    assert undisturbed.finish() == 0, undisturbed.output

    # kill the driver during both training steps
    driver = run.start()
    wait_for(
        lambda: run.latest_checkpoint("edge_connect") and run.latest_checkpoint("context_encoder"),
        "two checkpoints",
        driver,
    )
    manifests = run.manifests()
    assert len(manifests) >= 2  # shards and edges
    driver.kill()
    driver.wait()

    # kill a worker, which Ray Train replaces, and then all processes at once
    checkpoint = run.latest_checkpoint("edge_connect")
    driver = run.start()
    wait_for(
        lambda: run.latest_checkpoint("edge_connect") > checkpoint and workers(driver.pid),
        "a training worker",
        driver,
    )
    kill_processes(workers(driver.pid)[:1])
    later_checkpoint = run.latest_checkpoint("edge_connect")
    wait_for(
        lambda: run.latest_checkpoint("edge_connect") > later_checkpoint,
        "a later checkpoint",
        driver,
    )
    kill_processes(process_tree(driver.pid))
    driver.wait()
    assert check_not_ahead_of_checkpoints(run.storage) > 0

    assert run.finish() == 0, run.output
    for path, content in manifests.items():
        assert run.manifests()[path] == content  # cached, not run again
    for model in run.recipe["models"]:
        assert run.weights_digest(model) == undisturbed.weights_digest(model), (
            f"{model} ended with other bits"
        )

    check_traces(run)
    assert run.count_points() == undisturbed.count_points()


def check_traces(run: CliRun) -> None:
    assert check_curves(run.storage) == 2
    duplicates = run.query_mlflow(
        "select run_uuid, key, step, count(*) n from metrics group by 1, 2, 3 having n > 1"
    )
    assert duplicates == []
    versions = run.query_mlflow("select name, count(*) from model_versions group by name")
    assert sorted(versions) == [("context_encoder", 1), ("edge_connect", 1)]
    assert run.unpublished_files() == []
    for path in run.storage.glob("work/*/stable/*.tar"):
        with tarfile.open(path) as tar:
            assert tar.getnames()
    steps = run.query_mlflow("select value, count(*) from tags where key = 'inpaint.key' group by value")
    assert all(count == 1 for _, count in steps)  # one MLflow run per step, whatever the number of attempts
    assert run.query_mlflow("select status, count(*) from runs where status != 'FINISHED' group by 1") == []
    users = run.query_mlflow("select count(*) from tags where key = 'mlflow.user'")
    assert users == [(len(steps),)]
    parent = "select run_uuid from runs where run_uuid not in (select run_uuid from tags where key = 'mlflow.parentRunId')"
    ((name,),) = run.query_mlflow(f"select name from runs where run_uuid in ({parent})")
    sources = run.query_mlflow("select distinct value from tags where key = 'mlflow.source.name'")
    assert sources == [(f"inpaint run {name}",)]
    names = {name for (name,) in run.query_mlflow(f"select key from params where run_uuid in ({parent})")}
    assert {"data.size", "train.checkpoint_every", "models.edge_connect.name"} <= names
    scores = {name for (name,) in run.query_mlflow(f"select key from metrics where run_uuid in ({parent})")}
    assert {"context_encoder/center/psnr_rgb_hole", "edge_connect/center/psnr_rgb_hole"} <= scores
    assert list(run.storage.glob("mlflow-artifacts/*/artifacts/report.html"))
    ((note,),) = run.query_mlflow(
        f"select value from tags where key = 'mlflow.note.content' and run_uuid in ({parent})"
    )
    assert note.startswith("context_encoder version 1: ")
    (parents,) = run.query_mlflow("select count(*) from tags where key = 'mlflow.parentRunId'")
    assert parents[0] == len(steps) - 1


def test_a_second_run_is_cached_and_starts_no_ray(finished: FinishedDemo) -> None:
    run = finished.run
    check_traces(run)
    (manifest,) = run.storage.glob("work/*-shard/stable/manifest.json")
    shards = json.loads(manifest.read_text())
    assert {kind: entry["count"] for kind, entry in shards["left_out"].items()} == {
        "companions": 2,
        "repeated folders": 1,
    }
    report = next(run.storage.glob("reports/*.html"))
    for text in (run.output, report.read_text()):
        assert "2 companions (.DS_Store, ._a b 0.png)" in text
        assert "1 repeated folder (loop/: the same folder as the source itself)" in text
    counts = ", ".join(f"{count} {split}" for split, count in shards["splits"].items())
    for text in (run.output, report.read_text()):
        assert f"{counts}; 4 rejects, " in text
        assert "empty.jpg: empty file" in text
        # few photographs and a few steps of training
        assert re.search(
            r"context_encoder version 1: \d+\.\d\d dB in the hole, .+ best classical method", text
        )
    assert re.fullmatch(r"demo-\d{8}T\d{6}Z-[0-9a-f]{8}\.html", report.name)
    rejects = {reject["name"]: reject["reason"] for reject in shards["rejects"]}
    assert set(rejects) == {"truncated.png", "empty.jpg", "notes.txt", "dot.png"}
    manifests, points = run.manifests(), run.query_mlflow("select count(*) from metrics")
    driver = run.start(storage=False)
    started_processes: set[str] = set()
    while driver.poll() is None:
        started_processes.update(name for p in process_tree(driver.pid) if "raylet" in (name := _name(p)))
    assert run.finish(driver) == 0
    assert "all steps are cached" in run.output
    assert "PSNR" in run.output
    assert f"photographs: {counts}; 4 rejects, " in run.output
    assert "context_encoder version 1: " in run.output, "read from the report, which is not written again"
    assert [*run.storage.glob("reports/*")] == [report]
    shown = replace(run, command="report")  # of the run with these options
    assert shown.finish(shown.start(storage=False)) == 0, shown.output
    assert f": runs/reports/{report.name}\n" in shown.output
    assert started_processes == set()
    assert run.manifests() == manifests
    assert run.query_mlflow("select count(*) from metrics") == points


@pytest.mark.soak
def test_a_deleted_version_is_registered_again_and_no_other_step_runs(
    finished: FinishedDemo,
) -> None:
    run = finished.run
    manifests_before = run.manifests()
    MlflowClient(sqlite_url(run.storage / "mlflow.db")).delete_model_version("context_encoder", "1")
    assert run.finish(run.start(storage=False)) == 0, run.output
    manifests_after = run.manifests()
    changed = {path for path in manifests_before if manifests_after[path] != manifests_before[path]}
    assert changed == {path for path in manifests_before if path.endswith("register-context_encoder.json")}
    condition = "name = 'context_encoder' and current_stage != 'Deleted_Internal'"
    assert run.query_mlflow(f"select version from model_versions where {condition}") == [(2,)]


def test_a_second_driver_on_the_same_storage_fails_in_one_line(finished: FinishedDemo) -> None:
    assert finished.second_exit_status == 1
    (line,) = [line for line in finished.second_run.output.splitlines() if line.startswith("inpaint run:")]
    assert str(finished.driver_pid) in line
    assert "starting Ray" not in finished.second_run.output


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""
