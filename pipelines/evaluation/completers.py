"""Trained models as methods of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_prep.shards import load_manifest
from data_prep.storage import Storage
from data_prep.stream import read_split
from models.attention import ContextualAttention, flow_picture
from models.base import Model
from models.edge_connect import EdgeConnect, grey
from pipelines.evaluation.evaluate import Completer

if TYPE_CHECKING:
    from pipelines.filling.loading import LoadedModel  # not to import: tasks that score would wait for MLflow


@dataclass(frozen=True)
class ModelCompleter:
    """A model in memory; `sigma` is Canny's for the edges that it takes, None for a model that takes none."""

    model: Model
    sigma: float | None

    @property
    def true_edges(self) -> bool:
        return self.model.true_edges

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        return to_pixels(self.model.complete(*to_tensors(image, mask, edge)))


class EdgeDrawingCompleter(ModelCompleter):
    """edge_connect: its first generator's edges are shown too."""

    def draw_edges(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        """What G1 draws, [H,W] in [0,1]."""
        x, hole, known = to_tensors(image, mask, edge)
        g1 = self.model.networks["edge_generator"]
        with torch.no_grad():
            return g1(grey(x), torch.zeros_like(hole) if known is None else known, hole)[0, 0].numpy()


class AttentionDrawingCompleter(ModelCompleter):
    """deepfill_v1 and v2: where each place of the photograph looks is shown too."""

    def draw_attention(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        """uint8 [H,W,3]: the colour is the direction and distance of the patch that a place attends to most."""
        attention = next(m for m in self.model.modules() if isinstance(m, ContextualAttention))
        seen: list[tuple[torch.Tensor, ...]] = []
        hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        try:
            self.model.complete(*to_tensors(image, mask, edge))
        finally:
            hook.remove()
        picture = flow_picture(attention.offsets(*seen[0])[0])
        pixels = picture.repeat(8, axis=0).repeat(
            8, axis=1
        )  # features at a quarter of the size, places at half of that
        return pixels[: mask.shape[0], : mask.shape[1]]


@dataclass(frozen=True)
class LoadedCompleter:
    """A version from the registry, with edges at the sigma that it was trained on."""

    loaded: LoadedModel

    @property
    def sigma(self) -> float | None:
        return self.loaded.sigma if self.loaded.needs_edges else None

    @property
    def true_edges(self) -> bool:
        return bool(self.loaded.metadata.get("true_edges"))

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        return self.loaded.complete(image, mask, edge)


def completer(model: Model, about: Mapping[str, Any]) -> Completer:
    """A checkpoint folder's model as a method."""
    kind = ModelCompleter
    if isinstance(model, EdgeConnect) and model.options.edges == "generated":
        kind = EdgeDrawingCompleter
    elif any(isinstance(module, ContextualAttention) for module in model.modules()):
        kind = AttentionDrawingCompleter
    return kind(model.eval(), about["sigma"] if model.needs_edges else None)


def to_tensors(
    image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """uint8 [H,W,3], uint8 [H,W], bool [H,W] -> a batch of one: [1,3,H,W] in [0,1], [1,1,H,W], [1,1,H,W]."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    hole, known = (None if a is None else torch.from_numpy(a)[None, None].float() for a in (mask, edge))
    assert hole is not None
    return x, hole, known


def to_pixels(result: torch.Tensor) -> np.ndarray:
    """[1,3,H,W] in [0,1] -> uint8 [H,W,3], rounded."""
    return (result[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def photographs(shards: Storage, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """(key, uint8 [S,S,3]) of a split at its training size. ValueError when the split is empty."""
    manifest = load_manifest(shards)
    if not manifest["splits"].get(split):
        raise ValueError(
            f"the split {split} of {manifest['source']} holds no photographs; give more, or raise data.{split}"
        )
    return read_split(shards, split, manifest["options"]["size"])
