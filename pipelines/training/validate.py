"""A look at a training while it runs: a few held-out photographs, always the same, with always the same masks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from data_prep.canny import canny_edges
from data_prep.masks import fixed_masks
from data_prep.shards import load_manifest
from data_prep.storage import Storage
from data_prep.stream import read_split
from pipelines.evaluation.figures import encode_png, sample_strip
from pipelines.training.learner import Learner

LOOKED_AT, PHOTOGRAPHS, DRAWN = 256, 16, 4


@dataclass(frozen=True)
class Validation:
    """image uint8 [N,S,S,3], mask uint8 [N,S,S], edge bool [N,S,S]: Canny that never looked into the hole, unless the
    model is one that paints over true edges."""

    image: np.ndarray
    mask: np.ndarray
    edge: np.ndarray

    @classmethod
    def load(
        cls, shards: Storage, size: int, masks: dict[str, Any], sigma: float, true_edges: bool = False
    ) -> Validation:
        """Photographs spread over the validation split, or over the training split where there is no validation."""
        split = "val" if load_manifest(shards)["splits"].get("val") else "train"
        found = [photo for _, photo in islice(read_split(shards, split, size), LOOKED_AT)]
        spread = np.linspace(0, len(found) - 1, min(PHOTOGRAPHS, len(found))).round().astype(int)
        photos = [found[index] for index in spread]
        drawn = fixed_masks(masks, size, size, len(photos), 0)
        hidden = [None if true_edges else mask for mask in drawn]
        edges = [canny_edges(photo, sigma, mask=mask) for photo, mask in zip(photos, hidden, strict=True)]
        return cls(np.stack(photos), np.stack(drawn), np.stack(edges))

    def look(self, learner: Learner) -> tuple[float, bytes]:
        """Mean PSNR inside the holes in dB, and a PNG of the first few."""
        image = torch.from_numpy(self.image).permute(0, 3, 1, 2).float().div(255).to(learner.device)
        mask = torch.from_numpy(self.mask).unsqueeze(1).float().to(learner.device)
        edge = torch.from_numpy(self.edge).unsqueeze(1).float().to(learner.device)
        with learner.averaged(), torch.no_grad():
            result = learner.model.complete(image, mask, edge)
        hole = mask.expand_as(image)
        error = ((result - image).square() * hole).sum((1, 2, 3)) / hole.sum((1, 2, 3)).clamp(min=1)
        score = float((-10 * torch.log10(error.clamp(min=1e-10))).mean())
        shown = (result[:DRAWN] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return score, encode_png(
            sample_strip(self.image[:DRAWN], self.mask[:DRAWN], self.edge[:DRAWN], shown)
        )
