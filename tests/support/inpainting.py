"""A photograph, a hole mask and a minimal model, for tests of inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipelines.registry import LoadedModel
from pipelines.weights import CheckpointInfo

HEIGHT, WIDTH = 44, 60


def mean_color(x: torch.Tensor) -> torch.Tensor:
    """A minimal exported program: fills the hole with the mean colour of the known pixels."""
    image, hole = x[:, :3], x[:, 3:4] > 0.5
    known = torch.where(hole, torch.zeros_like(image), image)
    mean = known.sum((2, 3), keepdim=True) / (~hole).sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(hole, mean, image)


def loaded_model(
    program: Callable[[torch.Tensor], torch.Tensor] = mean_color, **metadata: Any
) -> LoadedModel:
    return LoadedModel(
        program, "toy", "1", CheckpointInfo.from_record({"name": "toy", "size": 16, **metadata}, "toy")
    )


def photograph(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """uint8 [H,W,3], without any symmetry."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return (np.stack([x * 150 / width, y * 150 / height, (x + 2 * y) % 100], axis=2) + noise).astype(np.uint8)


def hole_mask(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[10:21, 30:45] = True
    return mask
