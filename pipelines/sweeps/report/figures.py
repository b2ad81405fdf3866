"""Chooses a sweep's plots: scores per field, strips, parallel coordinates, importance, Pareto front, training curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.evaluation.results import EvaluationResult
from pipelines.sweeps.report.field_plots import importance_png, response_png
from pipelines.sweeps.report.setting_plots import (
    finite_points,
    groups_with_two_scores,
    parallel_png,
    pareto_png,
    training_png,
)
from pipelines.sweeps.report.statistics import (
    Axis,
    field_importance,
    response_points,
    scored_groups,
    varying_axes,
)
from pipelines.sweeps.report.strips import completion_strips
from pipelines.sweeps.report.text import metric_title
from pipelines.sweeps.results import SweepResult


@dataclass(frozen=True)
class Picture:
    """A PNG with its file name, title and alternative text."""

    name: str
    title: str
    png: bytes
    alt_text: str


def sweep_pictures(result: SweepResult, evaluations: Mapping[int, EvaluationResult]) -> dict[str, bytes]:
    """File name -> PNG of each picture, in the report's order."""
    return {picture.name: picture.png for picture in draw_pictures(result, evaluations)}


def draw_pictures(result: SweepResult, evaluations: Mapping[int, EvaluationResult]) -> list[Picture]:
    """All pictures for which the trials have data. evaluations: trial number -> its evaluation.

    Scores against each field, strips of completions, the Pareto front of the first two metrics, the validation curves,
    and for several fields parallel coordinates and field importance.
    """
    axes, metrics = varying_axes(result), result.metrics[:2]
    importances = {metric: field_importance(result, metric) for metric in metrics} if len(axes) > 1 else {}
    pictures: list[Picture] = []
    metric_names = " and ".join(metric_title(metric) for metric in metrics)
    for axis in axes:
        if any(len(response_points(result, axis.path, metric)) > 1 for metric in metrics):
            name = f"response-{file_name_part(axis.path)}.png"
            pictures.append(
                Picture(
                    name,
                    f"{metric_names} by {axis.path}",
                    response_png(result, axis),
                    f"{metric_names} against {axis.path}",
                )
            )
    pictures += [Picture(*strip) for strip in completion_strips(result, evaluations)]
    if len(axes) > 1:
        if len(scored_groups(result, metrics[0])) > 1:
            alt_text = "parallel coordinates: each setting is a line through its values and scores"
            pictures.append(Picture("parallel.png", "All settings", parallel_png(result), alt_text))
        if any(isinstance(importance, dict) for importance in importances.values()):
            alt_text = "fraction of the variance between settings that each field explains by itself"
            pictures.append(
                Picture("importance.png", "Field importance", importance_png(result, importances), alt_text)
            )
    if len(metrics) > 1 and len(groups_with_two_scores(result)) > 1:
        alt_text = f"settings by {metric_names}, with the Pareto front"
        pictures.append(Picture("front.png", f"Pareto front of {metric_names}", pareto_png(result), alt_text))
    if any(len(finite_points(trial.curve)) > 1 for trial in result.trials):
        alt_text = "validation PSNR in the holes against steps, one line per trial"
        pictures.append(
            Picture(
                "training.png",
                "Training curves",
                training_png(result, _most_important_axis(axes, importances)),
                alt_text,
            )
        )
    return pictures


def file_name_part(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _most_important_axis(
    axes: Sequence[Axis], importances: Mapping[str, dict[str, float] | str]
) -> Axis | None:
    """The field that explains most of the first metric's variance; if unknown, the first field."""
    fractions = next(iter(importances.values()), "")
    if isinstance(fractions, dict):
        return max(axes, key=lambda axis: fractions[axis.path])
    return axes[0] if axes else None
