"""What a sweep tries next: from its ledger alone, whatever died in between."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from data_prep.storage import open_storage
from pipelines.reading import parse_recipe
from pipelines.recipe import Recipe
from pipelines.sweeps.ledger import RUNNING, Entry, Ledger
from pipelines.sweeps.proposals import Proposals
from pipelines.sweeps.result import FAILED, FINISHED, STOPPED, SweepResult, Trial

FIELD, OTHER = "model.lambda_adv", "model.lambda_rec"


def recipe(**sweep: Any) -> Recipe:
    model = {"name": "context_encoder", "size": 32, "width": 0.1, "overlap": 0}
    return parse_recipe({"name": "test", "data": {"size": 32}, "model": model, "sweep": sweep})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_storage(str(tmp_path)), "trials", steps=100)


def reopened(ledger: Ledger) -> Ledger:
    return Ledger(ledger.storage, ledger.folder, ledger.steps)


def end(ledger: Ledger, number: int, state: str = FINISHED, **told: Any) -> None:
    ledger.write(Entry(Trial(**vars(ledger.entries[number].trial) | {"state": state, **told})))


def test_the_next_life_of_a_sweep_proposes_what_was_begun_and_nothing_that_is_over(ledger: Ledger) -> None:
    space = recipe(fields={FIELD: [0.1, 0.2, 0.3, 0.4]})
    first = Proposals(space, ledger)
    assert [first.suggest("")["values"][FIELD] for _ in range(3)] == [0.1, 0.2, 0.3]
    end(ledger, 1)
    chain = [(50, {FIELD: 0.35})]  # population-based training changed it
    ledger.write(Entry(Trial(2, {FIELD: 0.35}, RUNNING, steps=50), {FIELD: 0.3}, chain, looks=[(50, 20.0)]))

    second = Proposals(space, reopened(ledger))
    assert [second.suggest("") for _ in range(3)] == [
        {"number": 0, "values": {FIELD: 0.1}},
        {"number": 2, "values": {FIELD: 0.35}},
        {"number": 3, "values": {FIELD: 0.4}},
    ]
    assert second.suggest("") == Searcher.FINISHED
    assert [trial.number for trial in second.ledger.trials] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("budget", "begun"), [({"trials": 3}, 3), ({"steps": 250}, 2), ({"steps": 99}, 0), ({"minutes": 1e-9}, 0)]
)
def test_a_budget_ends_the_proposals(ledger: Ledger, budget: dict[str, float], begun: int) -> None:
    fields = {FIELD: {"uniform": [0, 1]}}
    proposals = Proposals(recipe(fields=fields, search="random", budget=budget), ledger)
    found = [proposals.suggest("") for _ in range(5)]
    assert [values != Searcher.FINISHED for values in found] == [True] * begun + [False] * (5 - begun)


def test_steps_that_a_stopped_trial_left_are_for_others(ledger: Ledger) -> None:
    fields = {FIELD: {"uniform": [0, 1]}}
    proposals = Proposals(recipe(fields=fields, search="random", budget={"steps": 250}), ledger)
    for number in range(2):
        proposals.suggest("")
        end(ledger, number, STOPPED, steps=20)
    assert [proposals.suggest("") != Searcher.FINISHED for _ in range(3)] == [True, True, False]


def test_time_counts_over_all_lives(ledger: Ledger) -> None:
    ledger.before = 1000.0
    ledger.write(Entry(Trial(0, {FIELD: 1}, FINISHED)))
    assert reopened(ledger).seconds >= 1000.0


def objective(values: dict[str, Any]) -> dict[str, float]:
    """Best at an adversarial weight of 0.01, whatever the other is; the distance wants the other one small."""
    away = (math.log10(values[FIELD]) + 2) ** 2
    return {"psnr_rgb_hole": 20 - away, "fd": 100 + 10 * away + values[OTHER]}


def run_optuna(ledger: Ledger, metrics: tuple[str, ...], trials: int) -> list[Trial]:
    fields = {FIELD: {"loguniform": [1e-4, 1]}, OTHER: {"uniform": [0, 100]}}
    space = recipe(fields=fields, search="optuna", metrics=metrics, budget={"trials": trials})
    proposals = Proposals(space, ledger)
    while (proposal := proposals.suggest("")) != Searcher.FINISHED:
        number = proposal["number"]
        if number % 7 == 3:  # what fails tells nothing, and stops nothing
            end(ledger, number, FAILED, reason="not finite")
        else:
            end(ledger, number, scores=objective(proposal["values"]))
    return ledger.trials


def test_optuna_finds_the_best_weight(ledger: Ledger) -> None:
    trials = run_optuna(ledger, ("psnr_rgb_hole",), 40)
    assert len(trials) == 40
    late = [abs(math.log10(trial.values[FIELD]) + 2) for trial in trials[25:]]
    assert sum(late) / len(late) < 0.5  # even draws over four decades are 1.0 away from the middle
    best = SweepResult("", "", {}, ("psnr_rgb_hole",), tuple(trials)).best
    assert best is not None
    assert abs(math.log10(best.values[FIELD]) + 2) < 0.15


def test_optuna_weighs_two_metrics_and_forgets_nothing_when_killed(ledger: Ledger, tmp_path: Path) -> None:
    metrics = ("psnr_rgb_hole", "fd")
    whole = run_optuna(ledger, metrics, 24)
    assert sum(trial.values[OTHER] for trial in whole[14:]) / 10 < 40  # even draws: 50
    other = Ledger(open_storage(str(tmp_path / "other")), "trials", steps=100)
    run_optuna(other, metrics, 11)
    continued = run_optuna(reopened(other), metrics, 24)
    assert [trial.values for trial in continued] == [trial.values for trial in whole]


def test_optuna_never_repeats_a_choice_and_keeps_the_constraints(ledger: Ledger) -> None:
    fields = {FIELD: {"choice": [0.1, 0.2, 0.3]}, OTHER: {"choice": [1, 2]}}
    space = recipe(
        fields=fields,
        search="optuna",
        constraints=[f"{FIELD} * {OTHER} < 0.5"],
        budget={"trials": 50},
        metrics=["psnr_rgb_hole"],
    )
    proposals, found = Proposals(space, ledger), []
    while (proposal := proposals.suggest("")) != Searcher.FINISHED:
        found.append(tuple(proposal["values"].values()))
        end(ledger, proposal["number"], scores={"psnr_rgb_hole": 1.0})
    assert sorted(found) == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2), (0.3, 1)]
