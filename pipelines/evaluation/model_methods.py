"""Trained models as methods of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.base import Model
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.weights import CheckpointInfo


@dataclass(frozen=True)
class ModelMethod:
    """A model in memory. `sigma` is Canny's for its input edges; None if the model takes no edges."""

    model: Model
    sigma: float | None

    @property
    def uses_true_edges(self) -> bool:
        return self.model.uses_true_edges

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        return to_uint8(self.model.complete(*to_tensors(image, mask, edge)))


class EdgeDrawingMethod(ModelMethod):
    """A model that also draws its edges."""

    def predict_edges(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        """The edges in the hole: float [H,W] in [0,1]."""
        return self.model.predict_edges(*to_tensors(image, mask, edge))[0, 0].numpy()

    def complete_with_edges(
        self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The completion, and the edges of `predict_edges`, with one pass of the edge generator for both."""
        outputs: list[torch.Tensor] = []
        hooks = [
            network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for network in self.model.networks.values()
        ]
        try:
            result = self(image, mask, edge)
        finally:
            for hook in hooks:
                hook.remove()
        # the only network with one channel in a completion; it sees a photograph of another size padded
        drawn = [output for output in outputs if output.shape == (1, 1, *mask.shape)]
        return result, drawn[0][0, 0].numpy() if drawn else self.predict_edges(image, mask, edge)


class AttentionDrawingMethod(ModelMethod):
    """A model that also draws its attention."""

    def visualize_attention(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        """A picture of the attention: uint8 [H,W,3]."""
        return self.model.visualize_attention(*to_tensors(image, mask, edge))[0].permute(1, 2, 0).numpy()


class EdgeAndAttentionMethod(EdgeDrawingMethod, AttentionDrawingMethod):
    """A model that draws both."""


def model_method(model: Model, info: CheckpointInfo) -> InpaintingMethod:
    """A loaded checkpoint as a method. Raises ValueError if the model needs edges and their sigma is not recorded."""
    if model.needs_edges and info.sigma is None:
        raise ValueError(f"{model.name} takes edges, but its model.json does not name their sigma")
    kind = {
        (False, False): ModelMethod,
        (True, False): EdgeDrawingMethod,
        (False, True): AttentionDrawingMethod,
        (True, True): EdgeAndAttentionMethod,
    }["edges" in model.visualizations, "attention" in model.visualizations]
    return kind(model.eval(), info.sigma if model.needs_edges else None)


def to_tensors(
    image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """uint8 [H,W,3], uint8 [H,W], bool [H,W] -> a batch of one: [1,3,H,W] in [0,1], [1,1,H,W], [1,1,H,W]."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    hole, known = (None if a is None else torch.from_numpy(a)[None, None].float() for a in (mask, edge))
    assert hole is not None
    return x, hole, known


def to_uint8(result: torch.Tensor) -> np.ndarray:
    """[1,3,H,W] in [0,1] -> uint8 [H,W,3], rounded."""
    return (result[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
