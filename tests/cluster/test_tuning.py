"""Ray Tune itself over trials that train nothing: who is stopped, who is copied, how a trial ends, what one costs."""

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
from pipelines.durable.attempt import Progress
from pipelines.reading import parse_recipe
from pipelines.sweeps.ledger import Ledger
from pipelines.sweeps.result import FAILED, FINISHED, STOPPED, Trial
from pipelines.sweeps.space import milestones, sweep_of
from pipelines.sweeps.trial import Trials
from pipelines.sweeps.tuning import Books, tune_trials

FIELD = "model.lambda_adv"
STEPS = 90
NOBODY = SimpleNamespace(report=SimpleNamespace(remote=lambda *_: None))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def pretend(config: dict[str, Any], trials: Trials) -> None:
    """A trial whose score is its weight, plus what it was trained with before; a weight of 0.4 fails, 0.3 dies once."""
    from ray import tune

    number, weight = int(tune.get_context().get_trial_name()[-4:]), config["values"][FIELD]
    checkpoint = tune.get_checkpoint()
    chain: list[Any] = []
    if checkpoint:
        with checkpoint.as_directory() as folder:
            chain = json.loads((Path(folder) / "chain").read_text())
    died = Path(trials.local["trials"]) / f"{number}-died"
    if weight == 0.3 and not died.exists():
        died.touch()
        os._exit(1)
    if weight == 0.4:
        tune.report({"failed": "not finite", "steps": 0, "seconds": 0.0, "run": ""})
        return
    for until in milestones(sweep_of(trials.recipe), 0, trials.total):
        if chain and until <= chain[-1][0]:
            continue
        chain = [*chain, (until, {FIELD: weight})]
        report = {"steps": until, "trained": until, "chain": chain, "seconds": 0.1, "run": ""}
        report["val"] = sum(values[FIELD] for _, values in chain)
        if until == trials.total:
            report["scores"] = {"psnr_rgb_hole": report["val"]}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "chain").write_text(json.dumps(chain))
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def run(folder: Path, weights: list[float], at_once: int = 2, **sweep: Any) -> list[Trial]:
    model = {"name": "context_encoder", "size": 32, "width": 0.1, "overlap": 0}
    fields = sweep.pop("fields", {FIELD: weights})
    recipe = parse_recipe(
        {"name": "test", "data": {"size": 32}, "model": model, "sweep": {"fields": fields, **sweep}}
    )
    storage, local = open_storage(str(folder)), {"trials": str(folder), "scaling": {}}
    trials = Trials("key", recipe, storage, {}, local, 0, STEPS, "", None, Progress(NOBODY, "sweep"))
    ledger = Ledger(storage, "trials", STEPS)
    tune_trials(trials, ledger, Books(ledger, trials, 0, None), at_once, str(folder), None, pretend)
    return Ledger(storage, "trials", STEPS).trials


def test_a_grid_in_which_one_fails_and_one_dies_and_is_started_again(tmp_path: Path) -> None:
    trials = run(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert [trial.state for trial in trials] == [FINISHED, FINISHED, FINISHED, FAILED, FINISHED]
    assert trials[3].reason == "not finite"
    assert [trial.scores["psnr_rgb_hole"] for trial in trials if trial.scores] == [0.1, 0.2, 0.3, 0.5]
    assert (tmp_path / "2-died").exists()


def test_successive_halving_stops_what_falls_behind(tmp_path: Path) -> None:
    trials = run(tmp_path, [0.9, 0.1, 0.2, 0.8, 0.15], at_once=1, scheduler="asha", every=10, reduction=3)
    assert trials[0].state == FINISHED
    stopped = [trial for trial in trials if trial.state == STOPPED]
    assert {trial.values[FIELD] for trial in stopped} >= {0.1, 0.2, 0.15}
    assert all(trial.steps in (10, 30) and "fell behind" in trial.reason for trial in stopped)


def test_the_median_stops_what_is_below_it(tmp_path: Path) -> None:
    trials = run(tmp_path, [0.5, 0.6, 0.7, 0.1, 0.8], at_once=1, scheduler="median", every=30)
    assert [trial.state for trial in trials] == [FINISHED, FINISHED, FINISHED, STOPPED, FINISHED]


def test_a_population_copies_its_best_and_changes_their_weights(tmp_path: Path) -> None:
    fields = {FIELD: {"uniform": [0.5, 1]}}
    trials = run(
        tmp_path,
        [],
        fields=fields,
        search="random",
        scheduler="pbt",
        every=30,
        budget={"trials": 4},
    )
    assert [trial.state for trial in trials] == [FINISHED] * 4
    changed = [trial for trial in trials if trial.changes]
    assert changed
    for trial in changed:
        assert trial.values == trial.changes[-1][1]
        assert {step for step, _ in trial.changes} <= {0, 30, 60}
        # its first weight is one that another, better one began with
        assert any(trial.changes[0][1] == other.values for other in trials) or len(changed) > 1
    before = Ledger(open_storage(str(tmp_path)), "trials", STEPS)
    first = {number: entry.first[FIELD] for number, entry in before.entries.items()}
    worst = min(first, key=first.__getitem__)
    assert trials[worst].changes  # after the first look it went on from the best one's training
    assert trials[worst].changes[0][1][FIELD] == max(first.values())


@pytest.mark.benchmark
def test_what_a_trial_costs(tmp_path: Path) -> None:
    """Twenty trials of one second, two at once."""
    weights = [1 + number / 100 for number in range(20)]
    began = time.monotonic()
    states = [trial.state for trial in run(tmp_path, weights)]
    seconds = time.monotonic() - began
    assert states == [FINISHED] * 20
    print(f"\n20 trials that train nothing, two at once: {seconds:.1f} s, {seconds / 20:.2f} s a trial")
