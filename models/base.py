"""The interface of every model: networks, training phases, named losses, completion.

A batch is a mapping: `image` float32 [B,3,H,W] in [0,1], `mask` float32 [B,1,H,W] with 1 = hole, `edge` float32
[B,1,H,W] in {0,1} or None. Two more keys, both optional, make several ranks learn the same as one: `mask_mean`, the mean
of the mask over the batches of all ranks, and `uniform` [B,RANDOMS_PER_SAMPLE] in [0,1), random numbers per photograph.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.checkpoint_layout import CheckpointLayout
from models.layers import fold_spectral_norm_

Batch = Mapping[str, Any]
Losses = dict[str, Tensor]
RANDOMS_PER_SAMPLE = 4  # random numbers per photograph and step
HardwareKind = Literal["gpu", "amx", "avx512_bf16", "cpu"]
"""What trains: a GPU, or a CPU by its bfloat16 instructions, matrix (AMX) or vector ones; `cpu` has none."""


@dataclass(frozen=True)
class Precision:
    """The arithmetic and the memory layout of a training."""

    bfloat16: bool = False
    """Forward passes and losses run under autocast; parameters, gradients and optimizers stay float32."""
    channels_last: bool = False
    """Memory layout of images and weights."""


@dataclass(frozen=True)
class Phase:
    """A training phase of a paper: which networks are trained, for how many steps, at which learning rates."""

    name: str
    steps: int
    """The paper's (or the released code's) number of steps; recipes set their own."""
    generators: tuple[str, ...]
    discriminators: tuple[str, ...]
    lr: dict[str, float]
    """Learning rate per trained network."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    uses_edges: bool = False
    """Whether `edge` must be in the batch."""
    optimizer: Literal["adam", "adadelta"] = "adam"
    lr_drop_at: float = 1.0
    """Fraction of the phase's steps after which the learning rates are divided by 10; 1: never."""
    critic_steps: int = 1
    """Discriminator steps per generator step, each on its own batch: the generators learn at every `critic_steps`-th
    step of the phase."""


@dataclass(frozen=True)
class Schedule:
    """The phases of a training run, one after the other: (phase, first step, end)."""

    phase_spans: tuple[tuple[Phase, int, int], ...]

    @property
    def total_steps(self) -> int:
        return self.phase_spans[-1][2]

    def phase_at(self, step: int) -> tuple[Phase, int, int]:
        """The phase of a step, the step's index in it (0, 1, ...), and the phase's length in steps."""
        return next(
            (phase, step - start, end - start) for phase, start, end in self.phase_spans if step < end
        )


@dataclass(frozen=True)
class PublishedTraining:
    """How long a paper's authors trained, to compare with an estimate; only what a source confirms."""

    device_hours: float
    """Hours of one device."""
    device: str
    source: str
    """The authors' statement, and where it is."""
    batch_size: int
    image_size: int
    """Side of the training photographs in pixels."""
    steps_range: tuple[float, float] | None = None
    """Lower and upper bound of the steps of ours that the hours correspond to; None: unknown."""


@dataclass(frozen=True)
class SmallConfig:
    """The smallest configuration worth training, for tests and demos: seconds on a CPU. With the overfit_ fields it
    overfits eight photographs: the l1 error in their holes falls by at least 60 %."""

    options: Mapping[str, Any]
    image_size: int
    """Side of the training photographs in pixels."""
    overfit_steps: Mapping[str, int]
    """Steps per phase; phases not listed are skipped."""
    overfit_lr: float | None = 2e-3
    """Learning rate of all networks; None: the paper's."""
    overfit_options: Mapping[str, Any] = field(default_factory=dict)
    """Further options."""


class Completion(nn.Module, abc.ABC):
    """The exported module: one float32 tensor [B,5,H,W] (RGB in [0,1]; mask, 1 = hole; edge) -> [B,3,H,W] in [0,1].

    Any B, H and W. Known pixels are exactly those of the input; the input's RGB inside the hole is never read.
    """

    @abc.abstractmethod
    def inpaint_hole(self, image: Tensor, hole: Tensor, edge: Tensor) -> Tensor:
        """[B,3,H,W] in [0,1]; only its pixels in the hole are used. `image` is 0 in the hole, `hole` [B,1,H,W] is bool,
        `edge` [B,1,H,W] is in {0,1}."""

    def forward(self, x: Tensor) -> Tensor:
        image, hole, edge = x[:, :3], x[:, 3:4] > 0.5, x[:, 4:5] > 0.5
        # where(), not a product: 0 * NaN is NaN
        known = torch.where(hole, torch.zeros_like(image), image)
        filled = self.inpaint_hole(known, hole, edge.to(x.dtype))
        return torch.where(hole, filled.clamp(0, 1), image)


class Model(nn.Module, abc.ABC):
    """A paper's model. Subclasses set `networks` and `phases`, implement the abstract methods, and set the class
    attributes that apply to them."""

    name: ClassVar[str]
    Options: ClassVar[type]
    """Frozen dataclass of its options."""
    size_multiple: ClassVar[int] = 1
    """Training sizes are multiples of this; `complete` takes any size."""
    feature_loss_options: ClassVar[tuple[str, ...]] = ()
    """Options that weight the losses on frozen features: if all are 0, the feature network is never loaded."""
    published_training: ClassVar[PublishedTraining | None] = None
    small_config: ClassVar[SmallConfig]
    precisions: ClassVar[Mapping[HardwareKind, Precision]] = {}
    """What `train.precision: auto` means, by hardware: as measured, never by a timing. Hardware that is not listed trains
    in float32 on contiguous tensors."""
    checkpoint_layout: ClassVar[CheckpointLayout | None] = None
    """The public implementation whose checkpoints can be imported."""

    needs_edges: bool = False
    """Whether `complete` needs the edges outside the hole (or all edges, with `uses_true_edges`)."""
    takes_edges: bool = False
    """Whether training reads edges, and `complete` follows user-drawn edges inside the hole."""
    uses_true_edges: bool = False
    """Whether its edge input is the true edges of the whole photograph: for studies, not for real completion."""
    resamples_hole: ClassVar[bool] = False
    """Whether the completion resamples the surroundings of a hole to the training size, however large the hole is."""
    visualizations: tuple[Literal["edges", "attention"], ...] = ()
    """Which of `predict_edges` and `visualize_attention` it implements."""

    options: Any
    networks: nn.ModuleDict
    phases: tuple[Phase, ...]

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    @abc.abstractmethod
    def generate(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """Run the phase's generators once; the result is the `out` of both loss methods."""

    @abc.abstractmethod
    def discriminator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        """Named, unweighted discriminator losses on detached `out`; {} without discriminators."""

    @abc.abstractmethod
    def generator_losses(self, batch: Batch, out: dict[str, Tensor], phase: Phase) -> Losses:
        """Named, unweighted generator losses on the graph of `out`. The discriminators run again, as they have just
        been updated."""

    @abc.abstractmethod
    def weights(self, phase: Phase) -> dict[str, float]:
        """The weight (lambda) of each loss of both loss methods in this phase."""

    @abc.abstractmethod
    def _build_completion(self) -> Completion:
        """A completion module that shares this model's networks."""

    def load_loss_networks(self, phase: Phase) -> None:
        """Load the frozen networks that the phase's losses need.

        FileNotFoundError, with the way to get them: weights of a feature network are missing.
        """

    def frozen_modules(self, phase: Phase) -> list[nn.Module]:
        """Modules inside the phase's trained networks that stay frozen."""
        return []

    def set_phase(self, phase: Phase) -> None:
        """Make the phase's networks trainable; everything else is frozen and in evaluation mode."""
        self.load_loss_networks(phase)
        for name, network in self.networks.items():
            trained = name in phase.generators or name in phase.discriminators
            network.requires_grad_(trained).train(trained)
        for module in self.frozen_modules(phase):
            module.requires_grad_(False).eval()

    def phase(self, name: str) -> Phase:
        """The phase of that name. ValueError: there is none, naming the phases."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise ValueError(f"{self.name} has no phase {name!r}: {', '.join(p.name for p in self.phases)}")

    def check_hole(self, mask: Tensor) -> None:
        """One-line ValueError if a hole of `mask` [B,1,H,W] (1 = hole) cannot be completed."""

    def complete(self, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
        """The completed photographs [B,3,H,W] in [0,1]: known pixels bit-identical to `image`, any H and W.

        image [B,3,H,W] in [0,1] (its hole is never read), mask [B,1,H,W] with 1 = hole, edge [B,1,H,W].
        Uses running statistics, and leaves modes and buffers as they were. ValueError: shapes that do not match, a
        hole the model cannot fill, or missing edges.
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
        with torch.no_grad(), eval_mode(self.networks):
            return self._build_completion()(x)

    def predict_edges(self, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
        """The edge generator's edge map [B,1,H,W] in [0,1]; arguments as for `complete`."""
        raise NotImplementedError(f"{self.name} has no edge generator")

    def visualize_attention(self, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
        """Attention as an image, uint8 [B,3,H,W]: the colour of each position is the direction and distance of the
        patch with the highest attention weight. Arguments as for `complete`."""
        raise NotImplementedError(f"{self.name} has no attention layer")

    def frozen_completion(self) -> Completion:
        """A frozen copy of the completion module, for export: generators only, spectral norm folded into the weights."""
        module = copy.deepcopy(self._build_completion()).eval()
        fold_spectral_norm_(module)
        for parameter in module.parameters():
            parameter.requires_grad_(False).grad = None
        return module


def make_schedule(model: Model, steps: Mapping[str, int]) -> Schedule:
    """The paper's phases with the recipe's lengths; phases with 0 steps are left out.

    ValueError: no phase has any steps.
    """
    spans, start = [], 0
    for phase in model.phases:
        length = steps.get(phase.name, phase.steps)
        if length:
            spans.append((phase, start, start + length))
            start += length
    if not spans:
        raise ValueError(f"train.steps leaves no phase of {model.name}: give at least one of them steps")
    return Schedule(tuple(spans))


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; restores the mode of each submodule afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def sample_uniform(batch: Batch, index: int) -> Tensor:
    """Random numbers in [0,1), one per photograph [B]: column `index` of the batch's `uniform`, so that they do not
    depend on the number of ranks; freshly sampled if the batch has none."""
    numbers: Tensor | None = batch.get("uniform")
    if numbers is not None:
        return numbers[:, index]
    return torch.rand(len(batch["image"]), device=batch["image"].device)


def global_mask_mean(batch: Batch) -> Tensor:
    """mean(mask) over the batches of all ranks if the batch has it (`mask_mean`), else over this batch."""
    mean: Tensor | None = batch.get("mask_mean")
    return batch["mask"].mean() if mean is None else mean
