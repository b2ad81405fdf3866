"""Sweeps on a real Ray: interrupted and resumed, a failing trial, population-based training, an unreachable server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from data_prep.uris import sqlite_url
from pipelines import registry
from pipelines.recipe.load import load_recipe
from pipelines.sweeps.results import FAILED, FINISHED, STOPPED, SweepResult, trial_run_name
from support.cluster_harness import (
    PHOTOGRAPHS,
    CliRun,
    hash_weights,
    kill_processes,
    process_tree,
    set_options,
    wait_for,
)
from support.mlflow_curves import check_curves, check_not_ahead_of_checkpoints
from support.mlflow_server import MlflowServer
from support.notebooks import execute

pytestmark = pytest.mark.timeout(600)

TRAIN = {"batch": 8, "ema_decay": 0.9, "checkpoint_every": 5, "log_every": 5}
ENCODER = {"size": 32, "width": 0.1, "overlap": 0}
EVALUATE = {"max_photos": 8, "grid_rows": 2, "distance": {"crops_per_photo": 64}}


def make_sweep(
    make_run: Callable[..., CliRun], name: str, model: dict, steps: dict, **sweep: object
) -> CliRun:
    run = make_run(
        name,
        models={"model": {**model, "train": {"steps": steps}}},
        train=TRAIN,
        evaluate=EVALUATE,
        sweep={"split": "test", **sweep},
    )
    run.command = "sweep"
    return run


def result(run: CliRun) -> SweepResult:
    return SweepResult.from_json((run.storage / run.step_outputs("sweep")["result"]).read_text())


def stored_trials(run: CliRun) -> list[dict]:
    """The records of a running sweep's trials."""
    paths = sorted(run.storage.glob("work/*-sweep/stable/trials/0*.json"))
    return [json.loads(path.read_text())["trial"] for path in paths]


def validation(run: str) -> str:
    return f"select step, value from metrics where key = 'val/psnr_rgb_hole' and run_uuid = '{run}'"


def check_runs(run: CliRun) -> None:
    """Check that each trial has one MLflow run, a child of the sweep's, with its curves and its final status."""
    check_curves(run.storage)
    duplicates = run.query_mlflow(
        "select run_uuid, key, step, count(*) n from metrics group by 1, 2, 3 having n > 1"
    )
    assert duplicates == []
    states = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}
    parent = "select value from tags where key = 'mlflow.parentRunId' and run_uuid ="
    for trial in result(run).trials:
        rows = run.query_mlflow(f"select status, name from runs where run_uuid = '{trial.run}'")
        assert rows == [(states[trial.state], rows[0][1] if trial.changes else trial_run_name(trial.values))]
        assert run.query_mlflow(f"{parent} '{trial.run}'") == [(run.step_outputs("sweep")["run_id"],)]
        logged = dict(run.query_mlflow(f"select key, value from params where run_uuid = '{trial.run}'"))
        assert trial.changes or logged == {path: str(value) for path, value in trial.values.items()}
    trials = [f"'{trial.run}'" for trial in result(run).trials]
    assert len(set(trials)) == len(trials)
    assert run.query_mlflow("select name from runs where status = 'RUNNING'") == []


MODEL = "models.edge_connect-canny"
SWEEP = (
    *PHOTOGRAPHS,
    *set_options(
        "data={size: 32, margin: 4, val: 0.4, max_reject_fraction: 0.2}",
        "train={batch: 4, checkpoint_every: 5, log_every: 5}",
        "evaluate={max_photos: 8, grid_rows: 2, distance: null}",
        f"{MODEL}.width=0.08",
        f"{MODEL}.residual_blocks=1",
        f"{MODEL}.lambda_p=0",
        f"{MODEL}.lambda_s=0",
        f"{MODEL}.train.steps={{inpaint_canny: 10}}",
        "sweep.fields={model.lambda_adv2: [0.02, 3.0e38], edges.sigma: [1, 2]}",
        "sweep.constraints=[model.lambda_adv2 < 1 or edges.sigma < 2]",
        "sweep.metrics=[psnr_rgb_hole]",
        "sweep.train={}",
    ),
)


def test_a_shipped_sweep_resumes_after_a_kill_and_registers_a_version(
    photographs: Path, make_run: Callable[..., CliRun]
) -> None:
    """Three trials; one of them always fails. `ps` shows which trial a process belongs to."""
    run = make_run("killed")
    (run.folder / "photos").symlink_to(photographs)
    run.command, run.recipe_arguments = "sweep", ("edge_connect-sigma", *SWEEP)
    driver = run.start()

    def running_trials() -> set[int]:
        return {trial["number"] for trial in stored_trials(run) if trial["state"] == "running"}

    titles: set[str] = set()

    def is_one_finished() -> bool:
        for process in process_tree(driver.pid):
            with suppress(psutil.Error):
                titles.add(" ".join(process.cmdline()))
        return bool(FINISHED in {trial["state"] for trial in stored_trials(run)} and running_trials())

    wait_for(is_one_finished, "a finished trial", driver)
    names = {match[1] for text in titles if (match := re.match(r"ray::(trial \d .+)", text))}
    assert any("sigma" in name and "train-" not in name for name in names), titles  # the trial
    assert any("sigma" in name and "train-" in name for name in names), titles  # its step
    finished_steps = run.manifests()
    kill_processes(process_tree(driver.pid))
    driver.wait()
    running = running_trials()
    assert running
    check_not_ahead_of_checkpoints(run.storage)

    assert run.finish() == 0, run.output
    assert run.exposed_listeners == set()
    for path, manifest in finished_steps.items():
        assert run.manifests()[path] == manifest  # finished steps are not run again
    sweep = result(run)
    settings = {(trial.values["edges.sigma"], trial.values["model.lambda_adv2"]) for trial in sweep.trials}
    assert len(sweep.trials) == 3
    assert settings == {(1, 0.02), (2, 0.02), (1, 3e38)}
    (failed,) = [trial for trial in sweep.trials if trial.state == FAILED]
    assert failed.values["model.lambda_adv2"] == 3e38
    assert "not finite" in failed.reason
    assert "not finite" in run.output
    finished = [trial for trial in sweep.trials if trial.state == FINISHED]
    assert len(finished) == 2
    assert all(trial.steps == 10 and "psnr_rgb_hole" in trial.scores for trial in finished)
    check_runs(run)
    assert run.unpublished_files() == []

    folder = (run.storage / run.step_outputs("sweep")["result"]).parent
    best = load_recipe(str(folder / "edge_connect-sigma-best.yaml"))
    assert best.sweep is None
    assert best.edges.sigma == (sweep.best_group.values["edges.sigma"],)
    page = (folder / "sweep.html").read_bytes()
    assert len(page) > 10_000
    (report,) = run.storage.glob("reports/edge_connect-sigma-sweep-*.html")
    assert report.read_bytes() == page
    assert f"report: runs/reports/{report.name}" in run.output
    assert "the best untrained method" in run.output
    notebook = "\n".join(execute("reading-a-sweep", run.folder))
    assert "3 trials of edge_connect-canny" in notebook
    assert failed.reason in notebook
    assert f"best: {sweep.best_group.values}" in notebook
    assert "edges:" in notebook  # the best recipe

    run.command = "run"
    assert run.finish() == 0, run.output
    assert "the sweep is cached" in run.output
    assert "registered models:/edge_connect-canny/1 (champion" in run.output
    run.command = "status"
    assert run.finish() == 0, run.output
    assert [run.output.count(f"trial {number}") for number in range(3)] == [1, 1, 1]
    tracking = sqlite_url(run.storage / "mlflow.db")
    version = registry.show("models:/edge_connect-canny@champion", tracking)
    assert version.sweep["name"] == "edge_connect-sigma"  # the sweep that chose its values


@pytest.mark.parametrize(
    ("parts", "first"),
    [
        ({}, "train-model"),
        # several segments per training; the median rule stops no trial before there are three
        pytest.param({"scheduler": "median", "report_every": 5}, "train-model-15", marks=pytest.mark.soak),
    ],
)
def test_shared_phases_are_trained_once_also_while_the_mlflow_server_restarts(
    parts: dict, first: str, make_run: Callable[..., CliRun]
) -> None:
    """G1 in a sweep over a weight of G2: the trials' weights are bit-identical to a training without sharing."""
    model = {"name": "edge_connect", "width": 0.08, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0}
    steps = {"edge": 10, "inpaint_canny": 0, "inpaint": 10, "joint": 0}
    run = make_sweep(make_run, "shared", model, steps, fields={"model.lambda_adv2": [0.5, 0.01]}, **parts)
    run.storage.mkdir()
    with MlflowServer(run.storage) as server:
        driver = run.start("--tracking-uri", server.uri)
        started = f"work/*-{first}/stable/*/.validate_storage_marker"
        wait_for(lambda: any(run.storage.glob(started)), "the beginning of a trial's training", driver)
        server.stop()
        trained = f"work/*-{first}/stable/*/step-*"
        wait_for(lambda: any(run.storage.glob(trained)), "a checkpoint without the server", driver)
        server.start()
        assert run.finish(driver) == 0, run.output
    assert run.step_outputs("begin-model-0")["steps"] == 10
    sweep = result(run)
    assert [(trial.state, trial.steps) for trial in sweep.trials] == [(FINISHED, 20)] * 2
    assert re.fullmatch(r"photographs \w{12}, masks \w{12}", sweep.about["digests"])
    assert all({"psnr_rgb_hole", "fd"} <= trial.scores.keys() for trial in sweep.trials)
    for trial in sweep.trials:  # each has its complete curve, shared steps included
        curve = f"select step from metrics where key = 'loss/D1' and run_uuid = '{trial.run}' order by step"
        assert run.query_mlflow(curve) == [(5,), (10,)]
        curve = f"select step from metrics where key = 'loss/D2' and run_uuid = '{trial.run}' order by step"
        assert run.query_mlflow(curve) == [(15,), (20,)]
    check_runs(run)

    # the shards are cached; this training has no shared steps, so it is another step
    trained = set(run.storage.glob("manifests/*-train-model.json"))
    plain = make_run("shared", models={"model": {**model, "lambda_adv2": 0.01, "train": {"steps": steps}}})
    plain.recipe["train"], plain.command = TRAIN, "train"
    assert plain.finish() == 0, plain.output
    (manifest,) = set(run.storage.glob("manifests/*-train-model.json")) - trained
    weights = hash_weights(run.storage / json.loads(manifest.read_text())["value"]["weights"])
    assert hash_weights(run.storage / sweep.trials[1].weights) == weights
    assert hash_weights(run.storage / sweep.trials[0].weights) != weights


@pytest.mark.soak
def test_each_mlflow_run_of_a_population_has_one_training(make_run: Callable[..., CliRun]) -> None:
    """The worse of two members continues from the better one's training, in a new MLflow run."""
    run = make_sweep(
        make_run,
        "population",
        {"name": "context_encoder", **ENCODER, "lambda_adv": 0},
        {"train": 20},
        fields={"model.lambda_rec": {"uniform": [0.001, 1.0]}},
        metrics=["psnr_rgb_hole"],
        search="random",
        scheduler="pbt",
        report_every=10,
        budget={"trials": 2},
    )
    run.recipe["evaluate"] = EVALUATE | {"distance": None}
    assert run.finish() == 0, run.output
    check_runs(run)
    (copied,) = [trial for trial in result(run).trials if trial.changes]
    runs = f"select run_uuid from tags where key = 'inpaint.trial' and value = '{copied.number}'"
    statuses = dict(run.query_mlflow(f"select run_uuid, status from runs where run_uuid in ({runs})"))
    assert statuses.pop(copied.run) == "FINISHED"
    assert list(statuses.values()) == ["KILLED"]
    value = f"select step, value from metrics where key like 'value/%' and run_uuid = '{copied.run}'"
    steps = [step for step, _ in sorted(run.query_mlflow(value))]
    assert steps == [10, 20]
