"""The one interface every model keeps: its networks, its training phases, its losses by name, and completion.

A batch is a mapping: `image` float32 [B,3,H,W] in [0,1], `mask` float32 [B,1,H,W] with 1 = hole, `edge` float32
[B,1,H,W] in {0,1} or None, and optionally what makes several ranks learn what one would: `mask_mean`, the mean of
the mask over the batches of all ranks, and `uniform` [B,UNIFORM] in [0,1), random numbers of each photograph.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.layers import fold_spectral_

Batch = Mapping[str, Any]
Losses = dict[str, Tensor]
UNIFORM = 4  # random numbers that a step has for each photograph


@dataclass(frozen=True)
class Phase:
    """A training phase of a paper: which networks learn, for how long and at which rates."""

    name: str
    steps: int
    """The paper's (or the released code's) number of steps; a recipe gives its own."""
    generators: tuple[str, ...]
    discriminators: tuple[str, ...]
    lr: dict[str, float]
    """Learning rate of each trained network."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    uses_edges: bool = False
    """Whether `edge` must be in the batch."""
    optimiser: Literal["adam", "adadelta"] = "adam"
    drop_at: float = 1.0
    """The share of the phase's steps after which its rates are a tenth."""
    critic_steps: int = 1
    """Steps of the discriminators to one of the generators, each on a batch of its own: the generators learn at
    every `critic_steps`-th step of the phase."""


class Completion(nn.Module, abc.ABC):
    """What is exported: one float32 tensor [B,5,H,W] (RGB in [0,1]; mask, 1 = hole; edge) -> [B,3,H,W] in [0,1].

    Any B, H and W. Known pixels are exactly those of the input; the input's RGB inside the hole is never read.
    """

    @abc.abstractmethod
    def fill(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        """[B,3,H,W] in [0,1], right inside the hole. `image` is 0 in the hole, `hole` [B,1,H,W] is bool,
        `edge` [B,1,H,W] is in {0,1}."""

    def forward(self, x: Tensor) -> Tensor:
        image, hole, edge = x[:, :3], x[:, 3:4] > 0.5, x[:, 4:5] > 0.5
        # where() and not a product: 0 * NaN is NaN
        known = torch.where(hole, torch.zeros_like(image), image)
        filled = self.fill(known, hole, edge.to(x.dtype))
        return torch.where(hole, filled.clamp(0, 1), image)


class Model(nn.Module, abc.ABC):
    """A paper's model. Subclasses set `networks`, `phases` and `options`, and give the losses."""

    name: ClassVar[str]
    Options: ClassVar[type]
    """The frozen dataclass of its options."""
    multiple: ClassVar[int] = 1
    """Training sizes are multiples of this; `complete` takes any size."""

    needs_edges: bool = False
    """Whether `complete` needs the edges outside the hole (or all of them, with `true_edges`)."""
    takes_edges: bool = False
    """Whether training reads edges, and `complete` follows those that a person draws inside the hole."""
    true_edges: bool = False
    """Whether what it paints over are the true edges of the whole photograph: a study, not a completion."""

    options: Any
    networks: nn.ModuleDict
    phases: tuple[Phase, ...]

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    @abc.abstractmethod
    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """Run the generators of a phase once; both loss methods take what it returns."""

    @abc.abstractmethod
    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        """Named, unweighted discriminator terms on `out`, detached; {} without discriminators."""

    @abc.abstractmethod
    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        """Named, unweighted generator terms on the graph of `out`; discriminators run again, as they have
        just been updated."""

    @abc.abstractmethod
    def weights(self, phase: Phase) -> dict[str, float]:
        """The weight (lambda) of every term of both loss methods in this phase."""

    @abc.abstractmethod
    def _completion(self) -> Completion:
        """A completion that shares this model's networks."""

    def prepare(self, phase: Phase) -> None:
        """Load what the phase's losses need beside the networks.

        Raises FileNotFoundError, saying how to get them, when a feature stack's weights are missing.
        """

    def frozen(self, phase: Phase) -> list[nn.Module]:
        """The modules inside the phase's own networks that it leaves as they are."""
        return []

    def set_phase(self, phase: Phase) -> None:
        """Make the phase's networks trainable; all else is frozen and in evaluation mode."""
        self.prepare(phase)
        for name, network in self.networks.items():
            trained = name in phase.generators or name in phase.discriminators
            network.requires_grad_(trained).train(trained)
        for module in self.frozen(phase):
            module.requires_grad_(False).eval()

    def phase(self, name: str) -> Phase:
        """The phase of that name; ValueError naming those there are."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise ValueError(f"{self.name} has no phase {name!r}: {', '.join(p.name for p in self.phases)}")

    def check_hole(self, mask: Tensor) -> None:
        """ValueError, in one line, when a hole of `mask` [B,1,H,W] (1 = hole) cannot be completed."""

    def complete(self, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
        """The completed photographs [B,3,H,W] in [0,1]: known pixels bit-identical to `image`, any H and W.

        image [B,3,H,W] in [0,1] (its hole is never read), mask [B,1,H,W] with 1 = hole, edge [B,1,H,W].
        Uses running statistics, and leaves modes and buffers as they were. ValueError: shapes that do not
        go together, a hole the model cannot fill, or edges missing.
        """
        b, _, h, w = image.shape
        if (
            image.shape[1] != 3
            or mask.shape != (b, 1, h, w)
            or (edge is not None and edge.shape != mask.shape)
        ):
            shapes = [tuple(t.shape) for t in (image, mask, edge) if t is not None]
            raise ValueError(f"complete takes image [B,3,H,W], mask and edge [B,1,H,W], not {shapes}")
        if edge is None and self.needs_edges:
            raise ValueError(
                f"{self.name} needs edges: give edge= the edges outside the hole, "
                "or use pipelines.registry.load_model(uri).complete, which computes them"
            )
        self.check_hole(mask)
        edge = torch.zeros_like(mask) if edge is None else edge
        x = torch.cat([image, mask.to(image.dtype), edge.to(image.dtype)], dim=1)
        with torch.no_grad(), evaluating(self.networks):
            return self._completion()(x)

    def completion(self) -> Completion:
        """A frozen copy of what completes, for export: holds the generators only, spectral norm folded in."""
        module = copy.deepcopy(self._completion()).eval()
        fold_spectral_(module)
        for parameter in module.parameters():
            parameter.requires_grad_(False).grad = None
        return module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each submodule's own mode again outside."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def uniform(batch: Batch, column: int) -> Tensor:
    """Random numbers in [0,1), one a photograph [B]: the global batch's own when the caller gives them, so that they
    do not depend on how many ranks share it; freshly drawn otherwise."""
    given: Tensor | None = batch.get("uniform")
    if given is not None:
        return given[:, column]
    return torch.rand(len(batch["image"]), device=batch["image"].device)


def hole_mean(batch: Batch) -> Tensor:
    """mean(mask) over the global batch when the caller gives it, else over this one."""
    mean: Tensor | None = batch.get("mask_mean")
    return batch["mask"].mean() if mean is None else mean
