"""What a sweep found: settings over seeds, the best of them, the front; kept as JSON."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipelines.sweeps.result import FAILED, STOPPED, SweepResult, Trial


def trial(number: int, sigma: float, psnr: float, fd: float, seed: int = 0, **more: Any) -> Trial:
    values = {"edges.sigma": sigma, "seed": seed}
    return Trial(number, values, "finished", scores={"psnr_rgb_hole": psnr, "fd": fd}, **more)


def result(*trials: Trial) -> SweepResult:
    return SweepResult(
        "s", "edge_connect", {"edges.sigma": {"grid": [1, 2]}}, ("psnr_rgb_hole", "fd"), trials
    )


def test_a_setting_is_the_mean_of_its_seeds() -> None:
    found = result(trial(0, 1, 20, 9), trial(1, 2, 21, 8), trial(2, 1, 23, 5, seed=1))
    first, second = found.groups
    assert (first.values, first.mean("psnr_rgb_hole"), first.mean("fd")) == ({"edges.sigma": 1}, 21.5, 7)
    assert first.spread("psnr_rgb_hole") == pytest.approx(math.sqrt(2 * 1.5**2))  # of two: n - 1 is 1
    assert second.spread("fd") == 0
    assert found.best == first


def test_what_failed_or_was_stopped_has_no_part_in_it() -> None:
    failed = Trial(1, {"edges.sigma": 2}, FAILED, "not finite")
    found = result(trial(0, 1, 20, 9), failed, Trial(2, {"edges.sigma": 3}, STOPPED))
    assert [group.values["edges.sigma"] for group in found.ranked] == [1]
    assert result(failed).best is None
    assert result(trial(0, 1, math.nan, 1)).best is None
    (half,) = result(trial(0, 1, 20, 3), trial(1, 1, 21, math.nan, seed=1)).groups
    assert (half.mean("psnr_rgb_hole"), math.isnan(half.mean("fd")), math.isnan(half.spread("fd"))) == (
        20.5,
        True,
        True,
    )


def test_the_front_holds_what_nothing_beats_in_everything() -> None:
    scores = [(20, 10), (21, 12), (19, 9), (19, 10), (22, 30), (21, 13), (18, math.nan)]
    found = result(*(trial(i, i, psnr, fd) for i, (psnr, fd) in enumerate(scores)))
    by_hand = [
        i
        for i, a in enumerate(scores[:6])
        if not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in scores)
    ]
    assert sorted(group.values["edges.sigma"] for group in found.front) == by_hand == [0, 1, 2, 4]
    assert [group.values["edges.sigma"] for group in found.front] == [4, 1, 0, 2]  # best PSNR first


def test_it_comes_back_from_json_as_it_was() -> None:
    found = result(
        trial(0, 1, 20, math.nan, curve=[(10, 15.5)], changes=[(0, {"model.lambda_s": 1.0}), (10, {})]),
        Trial(1, {"edges.sigma": [1, 2]}, FAILED, "a\nb"),
    )
    again = SweepResult.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert again.trials[0].curve == [(10, 15.5)]
    assert again.trials[1] == found.trials[1]
