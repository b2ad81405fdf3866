"""Ray Tune with trials that do not train: which are stopped and copied, how trials end, and the overhead of one."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from data_prep.storage import open_storage
from pipelines.contracts import RunSettings
from pipelines.durable.steps import StepId
from pipelines.durable.task import ProgressReporter
from pipelines.recipe.load import parse_recipe
from pipelines.sweeps.results import FAILED, FINISHED, STOPPED, TrialRecord
from pipelines.sweeps.space import report_steps, sweep_section
from pipelines.sweeps.trial import SweepContext
from pipelines.sweeps.trial_store import TrialStore
from pipelines.sweeps.tuner import TrialCallback, tune_trials

FIELD = "model.lambda_adv"
STEPS = 90
FAKE_ACTOR = SimpleNamespace(report=SimpleNamespace(remote=lambda *_: None))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def fake_trial(config: dict[str, Any], context: SweepContext) -> None:
    """A trial whose score is the sum of its segments' weights. A weight of 0.4 fails; 0.3 crashes once."""
    from ray import tune

    number, weight = int(tune.get_context().get_trial_name()[-4:]), config["values"][FIELD]
    checkpoint = tune.get_checkpoint()
    segments: list[Any] = []
    if checkpoint:
        with checkpoint.as_directory() as folder:
            segments = json.loads((Path(folder) / "segments").read_text())
    crashed = Path(context.store_folder) / f"{number}-crashed"
    if weight == 0.3 and not crashed.exists():
        crashed.touch()
        os._exit(1)
    if weight == 0.4:
        tune.report({"failure_reason": "not finite", "steps": 0, "seconds": 0.0, "run_id": ""})
        return
    for until in report_steps(sweep_section(context.recipe), 0, context.total_steps):
        if segments and until <= segments[-1][0]:
            continue
        segments = [*segments, (until, {FIELD: weight})]
        report = {"steps": until, "trained_steps": until, "segments": segments, "seconds": 0.1, "run_id": ""}
        report["validation_psnr"] = sum(values[FIELD] for _, values in segments)
        if until == context.total_steps:
            report["scores"] = {"psnr_rgb_hole": report["validation_psnr"]}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "segments").write_text(json.dumps(segments))
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def run_sweep(
    folder: Path, weights: list[float], max_concurrent_trials: int = 2, **sweep: Any
) -> list[TrialRecord]:
    model = {"name": "context_encoder", "size": 32, "width": 0.1, "overlap": 0}
    fields = sweep.pop("fields", {FIELD: weights})
    recipe = parse_recipe(
        {"name": "test", "data": {"size": 32}, "model": model, "sweep": {"fields": fields, **sweep}}
    )
    storage, progress = open_storage(str(folder)), ProgressReporter(FAKE_ACTOR, StepId("sweep"))
    context = SweepContext("key", recipe, storage, {}, str(folder), RunSettings(), 0, STEPS, progress)
    store = TrialStore(storage, "trials", STEPS)
    callback = TrialCallback(store, context, 0, None)
    tune_trials(context, store, callback, max_concurrent_trials, str(folder), None, fake_trial)
    return TrialStore(storage, "trials", STEPS).records


def test_in_a_grid_one_trial_fails_and_a_crashed_one_is_restarted(tmp_path: Path) -> None:
    trials = run_sweep(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert [trial.state for trial in trials] == [FINISHED, FINISHED, FINISHED, FAILED, FINISHED]
    assert trials[3].reason == "not finite"
    assert [trial.scores["psnr_rgb_hole"] for trial in trials if trial.scores] == [0.1, 0.2, 0.3, 0.5]
    assert (tmp_path / "2-crashed").exists()


def test_asha_stops_trials_that_fall_behind(tmp_path: Path) -> None:
    trials = run_sweep(
        tmp_path,
        [0.9, 0.1, 0.2, 0.8, 0.15],
        max_concurrent_trials=1,
        scheduler="asha",
        report_every=10,
        reduction_factor=3,
    )
    assert trials[0].state == FINISHED
    stopped = [trial for trial in trials if trial.state == STOPPED]
    assert {trial.values[FIELD] for trial in stopped} >= {0.1, 0.2, 0.15}
    assert all(trial.steps in (10, 30) and "fell behind" in trial.reason for trial in stopped)


def test_the_median_rule_stops_trials_below_the_median(tmp_path: Path) -> None:
    trials = run_sweep(
        tmp_path, [0.5, 0.6, 0.7, 0.1, 0.8], max_concurrent_trials=1, scheduler="median", report_every=30
    )
    assert [trial.state for trial in trials] == [FINISHED, FINISHED, FINISHED, STOPPED, FINISHED]


def test_population_based_training_copies_the_best_and_changes_weights(tmp_path: Path) -> None:
    fields = {FIELD: {"uniform": [0.5, 1]}}
    trials = run_sweep(
        tmp_path,
        [],
        fields=fields,
        search="random",
        scheduler="pbt",
        report_every=30,
        budget={"trials": 4},
    )
    assert [trial.state for trial in trials] == [FINISHED] * 4
    changed = [trial for trial in trials if trial.changes]
    assert changed
    for trial in changed:
        assert trial.values == trial.changes[-1][1]
        assert {step for step, _ in trial.changes} <= {0, 30, 60}
        # its first weight is the initial weight of a better trial
        assert any(trial.changes[0][1] == other.values for other in trials) or len(changed) > 1
    store = TrialStore(open_storage(str(tmp_path)), "trials", STEPS)
    initial = {number: stored.initial_values[FIELD] for number, stored in store.by_number.items()}
    worst = min(initial, key=initial.__getitem__)
    assert trials[worst].changes  # after the first report it continued from the best trial's training
    assert trials[worst].changes[0][1][FIELD] == max(initial.values())


@pytest.mark.benchmark
def test_overhead_per_trial(tmp_path: Path) -> None:
    """Twenty trials, two of them concurrently."""
    weights = [1 + number / 100 for number in range(20)]
    began = time.monotonic()
    states = [trial.state for trial in run_sweep(tmp_path, weights)]
    seconds = time.monotonic() - began
    assert states == [FINISHED] * 20
    print(
        f"\n20 trials that train nothing, two concurrently: {seconds:.1f} s, {seconds / 20:.2f} s per trial"
    )
