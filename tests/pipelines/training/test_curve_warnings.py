"""What is found in training curves, and what is not."""

from __future__ import annotations

import math

import pytest

from pipelines.training.curve_warnings import (
    DISCRIMINATOR_WINDOW,
    EDGE_METRIC,
    EDGE_WINDOW,
    curve_warnings,
    explain_standstill,
    explain_winner,
)


def scores(*values: float) -> list[tuple[int, float]]:
    return [(100 * (i + 1), value) for i, value in enumerate(values)]


def test_edges_that_get_no_better_stand_still() -> None:
    text = explain_standstill(scores(0.1, 0.2, 0.2, 0.205, 0.19, 0.2, 0.209), 1000)
    assert text == (
        "the generated edges stand still: F1 within one pixel 0.209 at step 700, and no better than 0.205 at step 400 in "
        "the last 3 validations"
    )
    assert explain_standstill(scores(*[0.0] * 6), 1000)  # it draws no edges at all
    assert explain_standstill(
        scores(0.5, 0.4, 0.3, 0.2, 0.1, 0.05), 1000
    )  # getting worse is no progress either


@pytest.mark.parametrize(
    "values",
    [
        (),
        (0.1,) * EDGE_WINDOW,  # too few to tell
        (0.1, 0.2, 0.2, 0.2, 0.2, 0.211),  # a gain of more than 0.01 within the window
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
        (0.2, 0.19, 0.18, 0.17, 0.16, 0.3),
    ],
)
def test_edges_that_improve_do_not(values: tuple[float, ...]) -> None:
    assert explain_standstill(scores(*values), 1000) == ""


def test_the_window_covers_a_part_of_the_phase() -> None:
    still = scores(*[0.1] * 10)  # ten validations, 900 steps from the first to the last
    assert explain_standstill(still, 4000).endswith(
        "at step 100 in the last 9 validations"
    )  # 800 steps: a fifth
    assert explain_standstill(still, 5000) == ""
    losses = scores(*[0.001] * 12)
    assert explain_winner(losses, "D1", 11_000)
    assert explain_winner(losses, "D1", 12_000) == ""


def test_a_discriminator_wins_if_its_loss_stays_near_zero() -> None:
    text = explain_winner(scores(0.5, *[0.01] * DISCRIMINATOR_WINDOW), "D1", 2000)
    assert text == (
        "the discriminator has won: the loss D1 is at most 0.01 from step 200 to 1100, so the generator learns nothing "
        "from it"
    )
    assert explain_winner(scores(*[0.0] * DISCRIMINATOR_WINDOW), "D1", 2000)


@pytest.mark.parametrize(
    "values",
    [
        (0.01,) * (DISCRIMINATOR_WINDOW - 1),
        (0.01,) * DISCRIMINATOR_WINDOW + (0.3,),
        (0.01,) * 5 + (0.3,) + (0.01,) * 5,
        (-0.01,) * DISCRIMINATOR_WINDOW,  # a Wasserstein loss
        (math.nan,) * DISCRIMINATOR_WINDOW,
        (0.69,) * 30,
    ],
)
def test_other_losses_are_no_victory(values: tuple[float, ...]) -> None:
    assert explain_winner(scores(*values), "D1", 1000) == ""


def test_the_scores_of_an_untrained_edge_generator_do_not_count() -> None:
    values = (0.3, 0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12)
    points = [(step, {EDGE_METRIC: value, "loss/FM": 0.1}) for step, value in scores(*values)]
    assert curve_warnings(points, [("edge", 0, 1000)]) == []  # it improves from step 200 on
    assert explain_standstill(scores(*values), 1000)


def test_each_phase_is_judged_by_its_own_points() -> None:
    phases = [("edge", 0, 800), ("inpaint", 800, 2000), ("joint", 2000, 2400)]
    points = [
        *((step, {EDGE_METRIC: 0.1, "loss/D1": 0.5, "loss/FM": 0.1}) for step in range(100, 900, 100)),
        # the moving average of the edge generator still changes, but the phase does not train it
        *((step, {EDGE_METRIC: 100 / step, "loss/D2": 0.001}) for step in range(900, 2100, 100)),
        *((step, {EDGE_METRIC: 0.5, "loss/D2": 0.5, "loss/FM": 0.1}) for step in range(2100, 2300, 100)),
    ]
    found = curve_warnings(points, phases)
    assert [(w.phase, w.metric) for w in found] == [("edge", EDGE_METRIC), ("inpaint", "loss/D2")]
    assert found[0].text.startswith(
        "phase edge: the generated edges stand still: F1 within one pixel 0.100 at step 800"
    )
    assert found[1].text.startswith("phase inpaint: the discriminator has won: the loss D2 is at most 0.001")
    # while the second phase runs, and before it has lasted long enough
    assert len(curve_warnings([point for point in points if point[0] <= 1700], phases)) == 1
    assert curve_warnings([], phases) == []


@pytest.mark.parametrize(
    "term", ["loss/FM", "loss/adv1", "loss/rec", "loss/global", "loss/gp_global", "loss/Dice"]
)
def test_losses_of_generators_and_wasserstein_critics_may_be_zero(term: str) -> None:
    points = [(step, {term: 0.0}) for step in range(1, 50)]
    assert curve_warnings(points, [("a", 0, 50)]) == []


@pytest.mark.parametrize("term", ["loss/discriminator", "loss/D", "loss/D2"])
def test_the_losses_of_discriminators_are_known_by_name(term: str) -> None:
    points = [(step, {term: 0.0}) for step in range(1, 50)]
    assert [w.metric for w in curve_warnings(points, [("a", 0, 50)])] == [term]
