"""The result of a sweep: settings over seeds, the best setting, the Pareto front, and its JSON."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipelines.sweeps.results import FAILED, STOPPED, SweepResult, TrialRecord, trial_run_name


def trial(number: int, sigma: float, psnr: float, fd: float, seed: int = 0, **fields: Any) -> TrialRecord:
    values = {"edges.sigma": sigma, "seed": seed}
    return TrialRecord(number, values, "finished", scores={"psnr_rgb_hole": psnr, "fd": fd}, **fields)


def result(*trials: TrialRecord) -> SweepResult:
    return SweepResult(
        "s", "edge_connect", {"edges.sigma": {"grid": [1, 2]}}, ("psnr_rgb_hole", "fd"), trials
    )


def test_scores_of_a_setting_are_means_over_its_seeds() -> None:
    sweep = result(trial(0, 1, 20, 9), trial(1, 2, 21, 8), trial(2, 1, 23, 5, seed=1))
    first, second = sweep.groups
    assert (first.values, first.mean("psnr_rgb_hole"), first.mean("fd")) == ({"edges.sigma": 1}, 21.5, 7)
    assert first.std("psnr_rgb_hole") == pytest.approx(math.sqrt(2 * 1.5**2))  # n - 1 = 1
    assert second.std("fd") == 0
    assert sweep.best_group == first


def test_failed_and_stopped_trials_are_left_out() -> None:
    failed = TrialRecord(1, {"edges.sigma": 2}, FAILED, "not finite")
    sweep = result(trial(0, 1, 20, 9), failed, TrialRecord(2, {"edges.sigma": 3}, STOPPED))
    assert [group.values["edges.sigma"] for group in sweep.ranked_groups] == [1]
    assert result(failed).best_group is None
    assert result(trial(0, 1, math.nan, 1)).best_group is None
    (incomplete,) = result(trial(0, 1, 20, 3), trial(1, 1, 21, math.nan, seed=1)).groups
    assert (
        incomplete.mean("psnr_rgb_hole"),
        math.isnan(incomplete.mean("fd")),
        math.isnan(incomplete.std("fd")),
    ) == (
        20.5,
        True,
        True,
    )


def test_the_pareto_front() -> None:
    scores = [(20, 10), (21, 12), (19, 9), (19, 10), (22, 30), (21, 13), (18, math.nan)]
    sweep = result(*(trial(i, i, psnr, fd) for i, (psnr, fd) in enumerate(scores)))
    expected = [
        i
        for i, a in enumerate(scores[:6])
        if not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in scores)
    ]
    assert sorted(group.values["edges.sigma"] for group in sweep.pareto_front) == expected == [0, 1, 2, 4]
    assert [group.values["edges.sigma"] for group in sweep.pareto_front] == [4, 1, 0, 2]  # best PSNR first


def test_a_result_survives_json() -> None:
    original = result(
        trial(0, 1, 20, math.nan, curve=[(10, 15.5)], changes=[(0, {"model.lambda_s": 1.0}), (10, {})]),
        TrialRecord(1, {"edges.sigma": [1, 2]}, FAILED, "a\nb"),
    )
    decoded = SweepResult.from_json(original.to_json())
    assert decoded.to_json() == original.to_json()
    assert decoded.trials[0].curve == [(10, 15.5)]
    assert decoded.trials[1] == original.trials[1]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"edges.sigma": 2, "model.lambda_adv2": 0.1, "seed": 0}, "sigma=2 lambda_adv2=0.1 seed=0"),
        ({"model.lambda_p": 0.123456789, "edges.sigma": [1.0, 2.5]}, "lambda_p=0.1235 sigma=1,2.5"),
        ({"models.a.lambda_p": 1, "models.b.lambda_p": 2}, "models.a.lambda_p=1 models.b.lambda_p=2"),
        ({}, ""),
    ],
)
def test_trials_are_named_by_their_values(values: dict[str, Any], name: str) -> None:
    assert trial_run_name(values) == name


def test_names_of_trials_are_short() -> None:
    assert len(trial_run_name({f"model.lambda_{i}": i / 7 for i in range(40)})) == 100
