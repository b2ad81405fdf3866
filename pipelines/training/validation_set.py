"""Validation during training: a fixed set of held-out photographs and masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from data_prep.canny import canny_edges
from data_prep.edge_scores import edge_scores
from data_prep.manifest import load_manifest
from data_prep.masks import fixed_masks
from data_prep.storage import Storage
from data_prep.stream import read_split
from pipelines.plots.images import encode_png, sample_strip
from pipelines.training.learner import Learner

MAX_CANDIDATES = 256  # photographs of the split that are read
VALIDATION_SIZE = 16  # of these, evenly spaced: the set
PREVIEW_SIZE = 4  # of these, the first: shown in the sample image


@dataclass(frozen=True)
class ValidationSet:
    """Photographs uint8 [N,S,S,3], masks uint8 [N,S,S] and edges bool [N,S,S].

    The edges are Canny's outside the hole, or of the whole photograph for a model with `uses_true_edges`.
    """

    image: np.ndarray
    mask: np.ndarray
    edge: np.ndarray
    sigma: float
    """Canny's, in pixels."""

    @classmethod
    def load(
        cls,
        shards: Storage,
        size: int,
        masks: dict[str, Any],
        sigma: float,
        uses_true_edges: bool = False,
        scan_cache: Storage | None = None,
    ) -> ValidationSet:
        """Photographs spread over the validation split, or over the training split if there is none.

        `scan_cache` holds cached scans of mask folders.
        """
        split = "val" if load_manifest(shards).splits.get("val") else "train"
        candidates = [photo for _, photo in islice(read_split(shards, split, size), MAX_CANDIDATES)]
        chosen = (
            np.linspace(0, len(candidates) - 1, min(VALIDATION_SIZE, len(candidates))).round().astype(int)
        )
        photos = [candidates[index] for index in chosen]
        hole_masks = fixed_masks(masks, size, size, len(photos), 0, scan_cache)
        canny_masks = [None if uses_true_edges else mask for mask in hole_masks]
        edges = [
            canny_edges(photo, sigma, mask=mask) for photo, mask in zip(photos, canny_masks, strict=True)
        ]
        return cls(np.stack(photos), np.stack(hole_masks), np.stack(edges), sigma)

    @cached_property
    def true_edge(self) -> np.ndarray:
        """Canny's edges of the whole photographs, bool [N,S,S]."""
        return np.stack([canny_edges(photo, self.sigma) for photo in self.image])

    def evaluate(self, learner: Learner) -> tuple[float, bytes]:
        """Mean PSNR inside the holes in dB, and a PNG of the first few completions."""
        image, mask, edge = self._tensors(learner)
        with learner.ema_weights(), torch.no_grad():
            result = learner.model.complete(image, mask, edge)
        hole = mask.expand_as(image)
        error = ((result - image).square() * hole).sum((1, 2, 3)) / hole.sum((1, 2, 3)).clamp(min=1)
        score = float((-10 * torch.log10(error.clamp(min=1e-10))).mean())
        preview = (result[:PREVIEW_SIZE] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return score, encode_png(
            sample_strip(
                self.image[:PREVIEW_SIZE], self.mask[:PREVIEW_SIZE], self.edge[:PREVIEW_SIZE], preview
            )
        )

    def edge_scores(self, learner: Learner) -> dict[str, float]:
        """Precision, recall and F1 of the edges that the model generates, by name; {} if it generates none.

        Over the pixels of all holes together: of few photographs, those without an edge would decide a mean.
        """
        if "edges" not in learner.model.visualizations:
            return {}
        with learner.ema_weights(), torch.no_grad():
            drawn = learner.model.predict_edges(*self._tensors(learner))[:, 0].float().cpu().numpy()

        def below_each_other(images: np.ndarray) -> np.ndarray:
            """[N,S,S] -> [N*(S+1),S], with an empty row between, so that no photograph has a neighbour's edges."""
            return np.pad(images, ((0, 0), (0, 1), (0, 0))).reshape(-1, images.shape[2])

        return edge_scores(*map(below_each_other, (drawn, self.true_edge, self.mask)))

    def _tensors(self, learner: Learner) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Photographs [N,3,S,S] in [0,1], masks and edges [N,1,S,S], on the learner's device."""
        image = torch.from_numpy(self.image).permute(0, 3, 1, 2).float().div(255).to(learner.device)
        mask = torch.from_numpy(self.mask).unsqueeze(1).float().to(learner.device)
        edge = torch.from_numpy(self.edge).unsqueeze(1).float().to(learner.device)
        return image, mask, edge
