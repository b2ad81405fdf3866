"""What training curves say that needs attention: generated edges that stand still, discriminators that have won."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EDGE_METRIC = "val/edge_f1_1px"
EDGE_LOSS = "loss/FM"
"""A loss of the edge generator: a phase without it does not train it (its moving average may still change)."""
EDGE_WINDOW, EDGE_FRACTION = 3, 0.2
"""Validations, and fraction of the phase, without a better score after which generated edges stand still."""
EDGE_START = 0.1
"""Fraction of the phase whose scores do not count: an untrained generator covers holes with edges, which scores well."""
EDGE_PROGRESS = 0.01
"""Least gain of that score that counts."""
DISCRIMINATOR_TERM = re.compile(r"loss/(discriminator|D\d*)")
"""The losses of discriminators that are 0 if they tell everything apart. Wasserstein critics, whose losses have no such
end, have other names (DeepFill v1's `global` and `local`)."""
DISCRIMINATOR_WINDOW, DISCRIMINATOR_FRACTION = 10, 0.1
"""Points of the curve, and fraction of the phase, with a loss near 0 after which a discriminator has won."""
DISCRIMINATOR_LIMIT = 0.02
"""Largest loss that is near 0. A discriminator that knows nothing has 0.69 to 2, depending on the loss."""

CurvePoints = Sequence[tuple[int, Mapping[str, float]]]
"""(step, metric -> value), by increasing step."""
Curve = Sequence[tuple[int, float]]
"""(step, value) of one metric."""


@dataclass(frozen=True)
class CurveWarning:
    """A finding about one curve in one phase."""

    metric: str
    phase: str
    text: str


def curve_warnings(points: CurvePoints, phases: Sequence[tuple[str, int, int]]) -> list[CurveWarning]:
    """The findings at the end of each phase, or, in the phase that has not ended, at the last point.

    phases: (name, first step, end).
    """
    found = []
    for name, start, end in phases:
        inside = [(step, values) for step, values in points if start < step <= end]
        texts: dict[str, str] = {}
        if any(EDGE_LOSS in values for _, values in inside):
            trained = [point for point in inside if point[0] > start + EDGE_START * (end - start)]
            texts[EDGE_METRIC] = explain_standstill(_curve(trained, EDGE_METRIC), end - start)
        for metric in sorted({metric for _, values in inside for metric in values}):
            if DISCRIMINATOR_TERM.fullmatch(metric):
                texts[metric] = explain_winner(
                    _curve(inside, metric), metric.removeprefix("loss/"), end - start
                )
        found += [
            CurveWarning(metric, name, f"phase {name}: {text}") for metric, text in texts.items() if text
        ]
    return found


def explain_standstill(scores: Curve, phase_steps: int) -> str:
    """Why generated edges stand still, given the F1 within one pixel of the validations of a phase; '' if not.

    They stand still if none of the last EDGE_WINDOW validations, which cover EDGE_FRACTION of the phase at least, is better
    than the best before by EDGE_PROGRESS.
    """
    size = _window_size(scores, EDGE_WINDOW, EDGE_FRACTION * phase_steps)
    before, window = scores[: len(scores) - size], scores[len(scores) - size :]
    if not before or len(window) < EDGE_WINDOW:
        return ""
    best_step, best = max(before, key=lambda score: (score[1], -score[0]))
    if max(value for _, value in window) >= best + EDGE_PROGRESS:
        return ""
    return (
        f"the generated edges stand still: F1 within one pixel {window[-1][1]:.3f} at step {window[-1][0]}, and no better "
        f"than {best:.3f} at step {best_step} in the last {size} validations"
    )


def explain_winner(losses: Curve, name: str, phase_steps: int) -> str:
    """Why a discriminator has won for good, given its losses in a phase; '' if not.

    It has if its last DISCRIMINATOR_WINDOW losses, which cover DISCRIMINATOR_FRACTION of the phase at least, are all
    between 0 and DISCRIMINATOR_LIMIT.
    """
    size = _window_size(losses, DISCRIMINATOR_WINDOW, DISCRIMINATOR_FRACTION * phase_steps)
    window = losses[len(losses) - size :]
    if len(window) < DISCRIMINATOR_WINDOW or not all(0 <= loss <= DISCRIMINATOR_LIMIT for _, loss in window):
        return ""
    return (
        f"the discriminator has won: the loss {name} is at most {max(loss for _, loss in window):.2g} from step "
        f"{window[0][0]} to {window[-1][0]}, so the generator learns nothing from it"
    )


def _window_size(curve: Curve, least: int, steps: float) -> int:
    """How many last points are at least `least` and cover `steps`; 0 if the curve has not so many or is shorter."""
    for size in range(least, len(curve) + 1):
        if curve[-1][0] - curve[-size][0] >= steps:
            return size
    return 0


def _curve(points: CurvePoints, metric: str) -> list[tuple[int, float]]:
    return [(step, values[metric]) for step, values in points if metric in values]
