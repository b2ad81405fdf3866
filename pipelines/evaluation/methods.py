"""The interface of the methods that an evaluation compares, and the classical methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models import classical


class InpaintingMethod(Protocol):
    """Completes one photograph: image uint8 [H,W,3] (black in the hole), mask uint8 [H,W] with 1 = hole, edge bool
    [H,W] or None -> uint8 [H,W,3]. Raises ValueError on a hole that it cannot complete.

    Five attributes are optional:
    - `sigma`: Canny's, for the edges outside the hole. None: the method takes no edges; missing: the evaluation's.
    - `uses_true_edges`: if true, the method gets the edges of the whole photograph, also those in the hole (to study the
      effect of perfect edges; this is not inpainting).
    - `predict_edges(image, mask, edge)`: the edges that it draws in the hole, [H,W] in [0,1], for the sample grids.
    - `complete_with_edges(image, mask, edge)`: the completion and these edges, if that is cheaper than two calls.
    - `visualize_attention(image, mask, edge)`: a picture of its attention, uint8 [H,W,3], for the sample grids.
    - `for_photo(name, mask_set)`: the method to call for this photograph, for results that are looked up by name.
    """

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray: ...


@dataclass(frozen=True)
class Baseline:
    """A method without training: one of models.classical, or `mean_colour`, the mean of the known pixels (a floor)."""

    method: str
    sigma = None

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        if self.method != "mean_colour":
            return classical.inpaint(image, mask, self.method)
        known = mask == 0
        if not known.any():
            raise ValueError("the mask covers the whole photograph: no known pixel to take a mean of")
        return np.where(known[..., None], image, image[known].mean(0).round().astype(np.uint8))


def baseline_methods() -> dict[str, InpaintingMethod]:
    """The methods without training, which are in every table."""
    return {method: Baseline(method) for method in (*classical.METHODS, "mean_colour")}
