"""The picture of a model card: few rows and columns of the sample grid, as MLflow's pages do not scale pictures."""

from __future__ import annotations

from dataclasses import replace

import cv2

from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.verdict import verdict
from pipelines.plots.images import encode_png, sample_grid

MAX_ROWS, MAX_WIDTH = 4, 640  # pixels


def card_picture(evaluation: EvaluationResult, method: str, metric: str) -> bytes | None:
    """PNG of the first mask set: ground truth, masked, the best untrained method and `method`. None: no samples."""
    grids = evaluation.sample_grids()
    if not grids:
        return None
    wanted = ("ground truth", "masked", verdict(evaluation, method, metric).baseline, method)
    columns = tuple(name for name in wanted if name in grids[0].columns)
    indices = [grids[0].columns.index(name) for name in columns]
    rows = tuple(tuple(row[index] for index in indices) for row in grids[0].rows[:MAX_ROWS])
    image = sample_grid(replace(grids[0], columns=columns, rows=rows))
    height, width = image.shape[:2]
    if width > MAX_WIDTH:
        image = cv2.resize(
            image, (MAX_WIDTH, round(height * MAX_WIDTH / width)), interpolation=cv2.INTER_AREA
        )
    return encode_png(image)
