"""The proposals of a sweep: they depend on the trial store only, also after interruptions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from data_prep.storage import open_storage
from pipelines.recipe import Recipe
from pipelines.recipe.load import parse_recipe
from pipelines.sweeps.results import FAILED, FINISHED, STOPPED, SweepResult, TrialRecord
from pipelines.sweeps.searcher import TrialSearcher
from pipelines.sweeps.trial_store import RUNNING, StoredTrial, TrialStore

FIELD, OTHER = "model.lambda_adv", "model.lambda_rec"


def recipe(**sweep: Any) -> Recipe:
    model = {"name": "context_encoder", "size": 32, "width": 0.1, "overlap": 0}
    return parse_recipe({"name": "test", "data": {"size": 32}, "model": model, "sweep": sweep})


@pytest.fixture
def store(tmp_path: Path) -> TrialStore:
    return TrialStore(open_storage(str(tmp_path)), "trials", steps_per_trial=100)


def reopened(store: TrialStore) -> TrialStore:
    return TrialStore(store.storage, store.folder, store.steps_per_trial)


def end(store: TrialStore, number: int, state: str = FINISHED, **fields: Any) -> None:
    store.write(StoredTrial(TrialRecord(**vars(store.by_number[number].record) | {"state": state, **fields})))


def test_a_resumed_sweep_proposes_unfinished_trials_again_and_ended_ones_not(
    store: TrialStore,
) -> None:
    space = recipe(fields={FIELD: [0.1, 0.2, 0.3, 0.4]})
    searcher = TrialSearcher(space, store)
    assert [searcher.suggest("")["values"][FIELD] for _ in range(3)] == [0.1, 0.2, 0.3]
    end(store, 1)
    segments = [(50, {FIELD: 0.35})]  # population-based training changed it
    store.write(
        StoredTrial(
            TrialRecord(2, {FIELD: 0.35}, RUNNING, steps=50),
            {FIELD: 0.3},
            segments,
            reported_scores=[(50, 20.0)],
        )
    )

    resumed = TrialSearcher(space, reopened(store))
    assert [resumed.suggest("") for _ in range(3)] == [
        {"number": 0, "values": {FIELD: 0.1}},
        {"number": 2, "values": {FIELD: 0.35}},
        {"number": 3, "values": {FIELD: 0.4}},
    ]
    assert resumed.suggest("") == Searcher.FINISHED
    assert [trial.number for trial in resumed.store.records] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("budget", "started"),
    [({"trials": 3}, 3), ({"steps": 250}, 2), ({"steps": 99}, 0), ({"minutes": 1e-9}, 0)],
)
def test_a_budget_ends_the_proposals(store: TrialStore, budget: dict[str, float], started: int) -> None:
    fields = {FIELD: {"uniform": [0, 1]}}
    searcher = TrialSearcher(recipe(fields=fields, search="random", budget=budget), store)
    proposals = [searcher.suggest("") for _ in range(5)]
    assert [values != Searcher.FINISHED for values in proposals] == [True] * started + [False] * (5 - started)


def test_a_stopped_trials_unused_steps_stay_in_the_budget(store: TrialStore) -> None:
    fields = {FIELD: {"uniform": [0, 1]}}
    searcher = TrialSearcher(recipe(fields=fields, search="random", budget={"steps": 250}), store)
    for number in range(2):
        searcher.suggest("")
        end(store, number, STOPPED, steps=20)
    assert [searcher.suggest("") != Searcher.FINISHED for _ in range(3)] == [True, True, False]


def test_run_time_is_counted_over_all_processes(store: TrialStore) -> None:
    store.earlier_seconds = 1000.0
    store.write(StoredTrial(TrialRecord(0, {FIELD: 1}, FINISHED)))
    assert reopened(store).total_seconds >= 1000.0


def objective(values: dict[str, Any]) -> dict[str, float]:
    """PSNR is best at an adversarial weight of 0.01; FD also grows with the other weight."""
    away = (math.log10(values[FIELD]) + 2) ** 2
    return {"psnr_rgb_hole": 20 - away, "fd": 100 + 10 * away + values[OTHER]}


def run_optuna(store: TrialStore, metrics: tuple[str, ...], trials: int) -> list[TrialRecord]:
    fields = {FIELD: {"loguniform": [1e-4, 1]}, OTHER: {"uniform": [0, 100]}}
    space = recipe(fields=fields, search="optuna", metrics=metrics, budget={"trials": trials})
    searcher = TrialSearcher(space, store)
    while (proposal := searcher.suggest("")) != Searcher.FINISHED:
        number = proposal["number"]
        if number % 7 == 3:  # failed trials neither inform nor end the search
            end(store, number, FAILED, reason="not finite")
        else:
            end(store, number, scores=objective(proposal["values"]))
    return store.records


def test_optuna_finds_the_best_weight(store: TrialStore) -> None:
    trials = run_optuna(store, ("psnr_rgb_hole",), 40)
    assert len(trials) == 40
    late = [abs(math.log10(trial.values[FIELD]) + 2) for trial in trials[25:]]
    assert sum(late) / len(late) < 0.5  # uniform draws over four decades: 1.0 from the middle
    best = SweepResult("", "", {}, ("psnr_rgb_hole",), tuple(trials)).best_group
    assert best is not None
    assert abs(math.log10(best.values[FIELD]) + 2) < 0.15


def test_optuna_with_two_metrics_resumes_with_the_same_proposals(store: TrialStore, tmp_path: Path) -> None:
    metrics = ("psnr_rgb_hole", "fd")
    uninterrupted = run_optuna(store, metrics, 24)
    assert sum(trial.values[OTHER] for trial in uninterrupted[14:]) / 10 < 40  # uniform draws: 50
    other = TrialStore(open_storage(str(tmp_path / "other")), "trials", steps_per_trial=100)
    run_optuna(other, metrics, 11)
    resumed = run_optuna(reopened(other), metrics, 24)
    assert [trial.values for trial in resumed] == [trial.values for trial in uninterrupted]


def test_optuna_never_repeats_a_setting_and_satisfies_the_constraints(store: TrialStore) -> None:
    fields = {FIELD: {"choice": [0.1, 0.2, 0.3]}, OTHER: {"choice": [1, 2]}}
    space = recipe(
        fields=fields,
        search="optuna",
        constraints=[f"{FIELD} * {OTHER} < 0.5"],
        budget={"trials": 50},
        metrics=["psnr_rgb_hole"],
    )
    searcher, proposed = TrialSearcher(space, store), []
    while (proposal := searcher.suggest("")) != Searcher.FINISHED:
        proposed.append(tuple(proposal["values"].values()))
        end(store, proposal["number"], scores={"psnr_rgb_hole": 1.0})
    assert sorted(proposed) == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2), (0.3, 1)]
