"""Verdicts: better, worse and undecided models, by the direction of the metric, against the best untrained method."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest

from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.verdict import trained_methods, verdict

PSNR, L1 = "psnr_rgb_hole", "l1_percent"


def evaluation(
    scores: dict[str, list[float]], metric: str = PSNR, masks: tuple[str, ...] = ("center",), **fields: Any
) -> EvaluationResult:
    """Scores per method and photograph, the same for all mask sets."""
    count = len(next(iter(scores.values())))
    return EvaluationResult(
        methods=tuple(scores),
        photos=tuple(f"p{i}" for i in range(count)),
        bands={name: ["20-30"] * count for name in masks},
        values={
            name: {method: {metric: list(column)} for method, column in scores.items()} for name in masks
        },
        failures=fields.pop("failures", {}),
        distances={},
        truth={},
        protocol=cast(Any, None),  # a verdict does not depend on it
    )


def around(mean: float, count: int = 84, spread: float = 0.5, seed: int = 0) -> list[float]:
    """Scores with exactly this mean."""
    values = np.random.default_rng(seed).normal(0, spread, count)
    return (values - values.mean() + mean).tolist()


def test_a_worse_model_is_not_praised() -> None:
    found = verdict(
        evaluation({"telea": around(16.7), "patchmatch": around(19.8, seed=1), "net": around(17.93, seed=2)}),
        "net",
        PSNR,
    )
    sentence = found.sentence("demo-net version 3")
    assert sentence.startswith(
        "demo-net version 3: 17.93 dB in the hole, 1.87 dB worse than PatchMatch, the best classical method "
        "(95 % interval 1."
    )
    assert sentence.endswith(", on 84 photographs.")
    low, high = (float(x) for x in sentence.partition("interval ")[2].partition(")")[0].split(" to "))
    assert 1.6 < low < 1.87 < high < 2.1
    assert found.caveat == "classical methods are better"


def test_a_better_model_has_no_caveat() -> None:
    found = verdict(evaluation({"telea": around(16.7), "net": around(18.0, seed=2)}), "net", PSNR)
    assert "18.00 dB in the hole, 1.30 dB better than Telea, the best classical method" in found.sentence()
    assert found.caveat == ""


def test_a_difference_within_chance_is_called_so() -> None:
    found = verdict(evaluation({"telea": around(18.0), "net": around(18.02, seed=2)}), "net", PSNR)
    assert (
        "not distinguishable from Telea, the best classical method: 0.02 dB better on 84" in found.sentence()
    )
    assert "95 % interval -0." in found.sentence()
    assert " to +0." in found.sentence()
    assert found.caveat == "not shown to be better than classical methods"


def test_few_photographs_prove_nothing() -> None:
    found = verdict(evaluation({"telea": around(17, 8), "net": around(19, 8, seed=2)}), "net", PSNR)
    assert "2.00 dB better than Telea, the best classical method, on 8 photographs: fewer than 10" in (
        found.sentence()
    )
    assert found.caveat == "not shown to be better than classical methods"


def test_lower_errors_are_better() -> None:
    scores = {"telea": around(3.0), "patchmatch": around(2.5, seed=1), "net": around(2.0, seed=2)}
    found = verdict(evaluation(scores, L1), "net", L1)
    assert "net: l1 2.000 %, 0.500 points better than PatchMatch, the best classical" in found.sentence()
    assert found.caveat == ""
    worse = verdict(evaluation(scores | {"net": around(3.0, seed=2)}, L1), "net", L1)
    assert "0.500 points worse than PatchMatch" in worse.sentence()
    assert worse.caveat == "classical methods are better"


def test_a_model_below_the_mean_colour() -> None:
    found = verdict(evaluation({"mean_colour": around(18), "net": around(16, seed=2)}), "net", PSNR)
    assert "2.00 dB worse than the mean colour, the best untrained method" in found.sentence()
    assert found.caveat == "the mean colour is better"


def test_equal_scores_and_no_baselines() -> None:
    same = around(18.0)
    found = verdict(evaluation({"telea": same, "net": same}), "net", PSNR)
    assert found.sentence() == (
        "net: 18.00 dB in the hole, the same as Telea, the best classical method, on 84 photographs."
    )
    alone = verdict(evaluation({"net": around(18.0)}), "net", PSNR)
    assert alone.sentence() == "net: 18.00 dB in the hole on 84 photographs; no untrained method was scored."
    assert alone.caveat == ""


def test_several_mask_sets_are_named() -> None:
    scores = {"telea": around(16.7), "net": around(18.0, seed=2)}
    sentence = verdict(evaluation(scores, masks=("center", "brush")), "net", PSNR).sentence()
    assert "18.00 dB in the hole (center masks), 1.30 dB better" in sentence


@pytest.mark.parametrize("failing", ["telea", "net"])
def test_a_method_that_failed_is_not_compared(failing: str) -> None:
    failures: Any = {"center": {failing: {3: "no known pixels"}}}
    found = verdict(
        evaluation({"telea": around(20), "net": around(18, seed=2)}, failures=failures), "net", PSNR
    )
    if failing == "net":
        assert found.sentence() == "net: no score, 1 of 84 photographs were not completed (no known pixels)."
    else:
        assert found.sentence().endswith("no untrained method was scored.")


def test_exact_results_are_left_out_of_the_difference() -> None:
    exact = [math.inf, *around(18.0, 83)]
    found = verdict(evaluation({"telea": around(17.0, 84), "net": exact}), "net", PSNR)
    assert found.difference is not None
    assert (found.difference.n, found.difference.excluded) == (83, 1)
    assert "better than Telea" in found.sentence()
    all_exact = verdict(evaluation({"telea": [math.inf] * 3, "net": [math.inf] * 3}), "net", PSNR)
    assert all_exact.sentence().startswith("net: exact results in the hole on 3 photographs")


def test_baselines_are_not_trained() -> None:
    assert trained_methods(("telea", "mean_colour", "net", "patchmatch")) == ["net"]
