"""What an evaluation says about a trained model in one sentence: its score, compared with the best untrained method."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from models.classical import METHODS
from pipelines.evaluation.comparison import MIN_PAIRS, PairedDifference, complete_scores, paired_difference
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.metrics import ALL_COLUMNS, higher_is_better
from pipelines.evaluation.results import EvaluationResult, masks_title

TITLES = {
    "telea": "Telea",
    "navier_stokes": "Navier-Stokes",
    "patchmatch": "PatchMatch",
    "mean_colour": "the mean colour",
}


@dataclass(frozen=True)
class Verdict:
    """One trained model's score in one metric on the first mask set, and its difference to the best untrained method."""

    method: str
    """The model's name in the evaluation."""
    metric: str
    score: float | None
    """Mean over the photographs, infinite if all results are exact; None: the model failed on a photograph."""
    photographs: int
    baseline: str = ""
    """The untrained method with the best mean score; '': none was scored on all photographs."""
    difference: PairedDifference | None = None
    """The model minus the baseline; None: no baseline, or no photograph on which both scores are finite."""
    problem: str = ""
    """Why there is no score."""
    masks: str = ""
    """The mask set, if there are several."""

    @property
    def caveat(self) -> str:
        """What a text that calls this model the best of something must add; '' if it is better than untrained methods."""
        if self.difference is None or self.difference.verdict == "better":
            return ""
        are_classical = self.baseline in METHODS
        methods = "classical methods" if are_classical else _title(self.baseline)
        if self.difference.verdict == "worse":
            return f"{methods} {'are' if are_classical else 'is'} better"
        return f"not shown to be better than {methods}"

    def sentence(self, name: str = "") -> str:
        """`demo version 3: 17.93 dB in the hole, 1.81 dB worse than PatchMatch, the best classical method ...`

        `name`: of the model, if it is not its name in the evaluation.
        """
        subject = name or self.method
        if self.score is None:
            return f"{subject}: no score, {self.problem}."
        where = f" ({masks_title(self.masks)})" if self.masks else ""
        text = f"{subject}: {format_score(self.metric, self.score)}{where}"
        photographs = f"{self.photographs} photograph{'' if self.photographs == 1 else 's'}"
        if self.difference is None:
            reason = (
                "not compared with an untrained method" if self.baseline else "no untrained method was scored"
            )
            return f"{text} on {photographs}; {reason}."
        return f"{text}, {self._comparison(self.difference, photographs)}."

    def _comparison(self, difference: PairedDifference, photographs: str) -> str:
        kind = "classical" if self.baseline in METHODS else "untrained"
        title = f"{_title(self.baseline)}, the best {kind} method"
        size = _format_difference(self.metric, abs(difference.mean_difference))
        direction = "better" if difference.improvement > 0 else "worse"
        if difference.low is None or difference.high is None:
            return f"{size} {direction} than {title}, on {photographs}: fewer than {MIN_PAIRS}, so this may be chance"
        ends = (difference.low, difference.high)
        if difference.verdict == "the same":
            return f"the same as {title}, on {photographs}"
        if difference.verdict == "no difference shown":
            low, high = sorted(ends if higher_is_better(self.metric) else (-ends[0], -ends[1]))
            return (
                f"not distinguishable from {title}: {size} {direction} on {photographs}, 95 % interval "
                f"{_format_number(self.metric, low, '+')} to {_format_number(self.metric, high, '+')}"
            )
        low, high = sorted(map(abs, ends))
        return (
            f"{size} {direction} than {title} (95 % interval {_format_number(self.metric, low)} to "
            f"{_format_number(self.metric, high)}), on {photographs}"
        )


def verdict(evaluation: EvaluationResult, method: str, metric: str) -> Verdict:
    """Compare a model with the untrained method that has the best mean, on the same photographs and masks."""
    masks = next(iter(evaluation.bands))
    row, several = evaluation.row(method, masks), masks if len(evaluation.bands) > 1 else ""
    if metric not in row.metrics:
        problem = f"{row.failed} of {row.n} photographs were not completed ({row.reason})"
        if not row.failed:
            problem = f"{metric} does not exist for these photographs"
        return Verdict(method, metric, None, row.n, problem=problem, masks=several)
    scores = {
        name: evaluation.row(name, masks).metrics.get(metric)
        for name in baseline_methods()
        if name in evaluation.methods and name != method
    }
    known = {name: score for name, score in scores.items() if score is not None}
    if not known:
        return Verdict(method, metric, row.metrics[metric], row.n, masks=several)
    baseline = (max if higher_is_better(metric) else min)(known, key=lambda name: known[name])
    untrained, trained = (complete_scores(evaluation, name, masks)[metric] for name in (baseline, method))
    difference = paired_difference(untrained, trained, metric, masks)
    return Verdict(method, metric, row.metrics[metric], row.n, baseline, difference, masks=several)


def trained_methods(methods: Iterable[str]) -> list[str]:
    """The methods of an evaluation that are not baselines."""
    return [method for method in methods if method not in baseline_methods()]


def format_score(metric: str, score: float) -> str:
    """A score in words: `17.93 dB in the hole`, `SSIM 0.8123`, `l1 2.556 %`."""
    place = " in the hole" if metric.endswith("_hole") else ""
    if math.isinf(score):
        return f"exact results{place}"
    value = _format_number(metric, score)
    if metric == "psnr_rgb_hole":
        return f"{value} dB{place}"
    heading = next((title for title, name, _ in ALL_COLUMNS if name == metric), "")
    if not heading:
        return f"{metric} {value}"
    return f"{heading.removesuffix(' %')} {value}{' %' if heading.endswith('%') else _unit(metric)}"


def _format_difference(metric: str, difference: float) -> str:
    """A difference with its unit; points are those of a percentage."""
    unit = " points" if "percent" in metric else _unit(metric)
    return _format_number(metric, difference) + unit


def _format_number(metric: str, value: float, sign: str = "") -> str:
    digits = next((digits for _, name, digits in ALL_COLUMNS if name == metric), 3)
    return f"{value:{sign}.{digits}f}"


def _unit(metric: str) -> str:
    return " dB" if metric.startswith("psnr") else ""


def _title(baseline: str) -> str:
    return TITLES.get(baseline, baseline)
