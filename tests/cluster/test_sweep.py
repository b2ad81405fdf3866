"""Sweeps on a real Ray: killed and gone on with, a trial that always fails, weights that change, a server that is away."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from harness import Run, digest, family, kill, wait_for
from mlflow_server import Server

from pipelines.reading import load_recipe
from pipelines.sweeps.result import FAILED, FINISHED, STOPPED, SweepResult

pytestmark = pytest.mark.timeout(600)

TRAIN = {"batch": 8, "ema": 0.9, "checkpoint_every": 5, "log_every": 5}
ENCODER = {"size": 32, "width": 0.1, "overlap": 0}
EVALUATE = {"count": 8, "samples": 2, "distance": {"crops": 64}}


def make_sweep(make_run: Callable[..., Run], name: str, model: dict, steps: dict, **sweep: object) -> Run:
    run = make_run(
        name,
        models={"model": {**model, "train": {"steps": steps}}},
        train=TRAIN,
        evaluate=EVALUATE,
        sweep={"split": "test", **sweep},
    )
    run.command = "sweep"
    return run


def result(run: Run) -> SweepResult:
    return SweepResult.from_json((run.storage / run.value("sweep")["result"]).read_text())


def ledger(run: Run) -> list[dict]:
    """The trials of a sweep that is under way."""
    found = sorted(run.storage.glob("work/*-sweep/stable/trials/0*.json"))
    return [json.loads(path.read_text())["trial"] for path in found]


def validation(run: str) -> str:
    return f"select step, value from metrics where key = 'val/psnr_rgb_hole' and run_uuid = '{run}'"


def check_runs(run: Run) -> None:
    """One MLflow run a trial, below the sweep's; no point twice; ended as the trial did."""
    doubled = run.rows("select run_uuid, key, step, count(*) n from metrics group by 1, 2, 3 having n > 1")
    assert doubled == []
    states = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}
    parent = "select value from tags where key = 'mlflow.parentRunId' and run_uuid ="
    for trial in result(run).trials:
        rows = run.rows(f"select status from runs where run_uuid = '{trial.run}'")
        assert rows == [(states[trial.state],)]
        assert run.rows(f"{parent} '{trial.run}'") == [(run.value("sweep")["run"],)]
        logged = dict(run.rows(f"select key, value from params where run_uuid = '{trial.run}'"))
        assert trial.changes or logged == {path: str(value) for path, value in trial.values.items()}
    trials = [f"'{trial.run}'" for trial in result(run).trials]
    assert len(set(trials)) == len(trials)


def test_a_killed_sweep_goes_on_where_it_was(make_run: Callable[..., Run]) -> None:
    """Three trials, the second of which always fails."""
    run = make_sweep(
        make_run,
        "killed",
        {"name": "context_encoder", **ENCODER, "lambda_adv": 0},
        {"train": 40},
        fields={"model.lambda_rec": [1, 3.0e38, 2]},
        metrics=["psnr_rgb_hole"],
    )
    run.recipe["evaluate"] = EVALUATE | {"distance": None}
    driver = run.start()

    def begun() -> set[int]:
        return {trial["number"] for trial in ledger(run) if trial["state"] == "running"}

    wait_for(
        lambda: FINISHED in {trial["state"] for trial in ledger(run)} and begun(), "a finished trial", driver
    )
    done = run.manifests()
    kill(family(driver.pid))
    driver.wait()
    running = begun()
    assert running

    assert run.finish() == 0, run.output
    for path, was in done.items():
        assert run.manifests()[path] == was  # nothing that was finished is done again
    found = result(run)
    assert [trial.values["model.lambda_rec"] for trial in found.trials] == [1, 3e38, 2]
    failed = [trial for trial in found.trials if trial.state == FAILED]
    assert {trial.values["model.lambda_rec"] for trial in failed} == {3e38}
    assert all("not finite" in trial.reason for trial in failed)
    assert "not finite" in run.output
    finished = [trial for trial in found.trials if trial.state == FINISHED]
    assert len(finished) == 2
    assert all(trial.steps == 40 and "psnr_rgb_hole" in trial.scores for trial in finished)
    check_runs(run)
    assert run.leftovers() == []

    folder = (run.storage / run.value("sweep")["result"]).parent
    best = load_recipe(str(folder / "small-best.yaml"))
    assert best.sweep is None
    assert best.models["model"].options["lambda_rec"] == found.best.values["model.lambda_rec"]
    assert (folder / "sweep.html").stat().st_size > 10_000

    assert run.finish() == 0
    assert "found finished" in run.output


def test_what_trials_share_is_trained_once_and_a_server_may_restart_meanwhile(
    make_run: Callable[..., Run],
) -> None:
    """G1 in a sweep of a weight of G2, and trainings in parts: no bit of a trial is another for it."""
    model = {"name": "edge_connect", "width": 0.08, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0}
    steps = {"edge": 10, "inpaint_canny": 0, "inpaint": 10, "joint": 0}
    parts = {"scheduler": "median", "every": 5}  # which stops nobody before there are three
    run = make_sweep(make_run, "shared", model, steps, fields={"model.lambda_adv2": [0.5, 0.01]}, **parts)
    run.storage.mkdir()
    with Server(run.storage) as server:
        driver = run.start("--tracking", server.uri)
        begun = "work/*-train-model-15/stable/*/.validate_storage_marker"
        wait_for(lambda: any(run.storage.glob(begun)), "the beginning of a trial's training", driver)
        server.stop()
        trained = "work/*-train-model-15/stable/*/step-*"
        wait_for(lambda: any(run.storage.glob(trained)), "a checkpoint without the server", driver)
        server.start()
        assert run.finish(driver) == 0, run.output
    assert run.value("begin-model-0")["steps"] == 10
    found = result(run)
    assert [(trial.state, trial.steps) for trial in found.trials] == [(FINISHED, 20)] * 2
    assert all({"psnr_rgb_hole", "fd"} <= trial.scores.keys() for trial in found.trials)
    for trial in found.trials:  # of the shared beginning too: each has its whole curve
        curve = f"select step from metrics where key = 'loss/D1' and run_uuid = '{trial.run}' order by step"
        assert run.rows(curve) == [(5,), (10,)]
        curve = f"select step from metrics where key = 'loss/D2' and run_uuid = '{trial.run}' order by step"
        assert run.rows(curve) == [(15,), (20,)]
    check_runs(run)

    plain = make_run("plain", models={"model": {**model, "lambda_adv2": 0.01, "train": {"steps": steps}}})
    plain.recipe["train"], plain.command = TRAIN, "train"
    assert plain.finish() == 0, plain.output
    assert digest(run.storage / found.trials[1].weights) == plain.weights("model")
    assert digest(run.storage / found.trials[0].weights) != plain.weights("model")
