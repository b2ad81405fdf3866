"""One rank's share of learning: alternating steps, averaged gradients, moving averages, and its state.

Knows torch and the model interface, neither Ray nor MLflow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.base import UNIFORM, Losses, Model, Phase
from models.layers import still_spectral
from pipelines.training.compiling import compilation, compile_networks


class NonFiniteLoss(ValueError):
    """A loss term became infinite or not a number; raised before the optimiser step."""


@dataclass(frozen=True)
class Schedule:
    """The phases of a training, laid end to end: (phase, first step, end)."""

    parts: tuple[tuple[Phase, int, int], ...]

    @property
    def total(self) -> int:
        return self.parts[-1][2]

    def at(self, step: int) -> tuple[Phase, int, int]:
        """The phase of a step, its number in it (0, 1, ...), and the phase's length."""
        return next((phase, step - start, end - start) for phase, start, end in self.parts if step < end)


def make_schedule(model: Model, steps: Mapping[str, int]) -> Schedule:
    """The paper's phases with the recipe's lengths; a phase of 0 steps is left out.

    Raises ValueError when nothing is left to train.
    """
    parts, start = [], 0
    for phase in model.phases:
        length = steps.get(phase.name, phase.steps)
        if length:
            parts.append((phase, start, start + length))
            start += length
    if not parts:
        raise ValueError(f"train.steps leaves no phase of {model.name}: give at least one of them steps")
    return Schedule(tuple(parts))


@dataclass(frozen=True)
class Part:
    """Photographs that a forward pass holds at once: all of a rank's, or some of them."""

    batch: dict[str, Any]
    seed: int
    share: float
    """What its means count for among the means of the ranks: 1 when the ranks have equal parts, and hold them at once."""


@dataclass
class Learner:
    """A model with its optimisers. `step` is a pure function of (state, step number, batch).

    Nothing random is carried from step to step: torch is seeded anew by (seed, step, rank) before each, so the
    state is networks, optimisers, moving averages and a position.
    """

    model: Model
    schedule: Schedule
    seed: int
    rank: int = 0
    world: int = 1
    lr_scale: float = 1.0
    ema_decay: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bfloat16: bool = False
    """Forward passes and losses under autocast; parameters, gradients and optimisers stay float32."""
    channels_last: bool = False
    compiled: bool = False
    at_once: int | None = None
    """Photographs that a forward pass holds at most; gradients of more are accumulated. None: a rank's whole part."""

    def __post_init__(self) -> None:
        self.model.to(self.device)
        # on CPUs each rank's statistics are its own photographs'
        if self.world > 1 and self.device.type == "cuda":
            self.model.networks = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.networks)
        if self.channels_last:
            self.model.networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            compile_networks(self.model.networks.values())
        self.phase: Phase | None = None
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.gradients: dict[str, Tensor] = {}
        self.ema: dict[str, Tensor] = {}
        if self.world > 1:
            for tensor in self.model.networks.state_dict().values():
                dist.broadcast(tensor, src=0)
        if self.ema_decay:
            self.ema = {key: value.clone() for key, value in self._averaged()}

    def step(self, step: int, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Discriminators first, then generators, after papers.md 0.3; returns this rank's unweighted terms, whose mean
        over the ranks is the global batch's.

        Raises NonFiniteLoss, on every rank alike, before a parameter changes.
        """
        with (
            _sound_convolutions(self.bfloat16 and self.device.type == "cpu"),
            compilation() if self.compiled else nullcontext(),
        ):
            return self._step(step, batch)

    def _step(self, step: int, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        phase, within, length = self.schedule.at(step)
        self.enter(phase)
        self._set_rates(phase, 0.1 if within >= phase.drop_at * length else 1.0)
        generators_learn = bool(phase.generators) and (within + 1) % phase.critic_steps == 0
        parts = self._parts(step, self._to_device(step, batch))
        alone = self._generate(parts[0], generators_learn) if len(parts) == 1 else None
        terms: dict[str, Tensor] = {}
        if phase.discriminators:

            def judge(part: Part) -> Losses:
                out = self._generate(part, False) if alone is None else alone
                with self._autocast():
                    return self.model.discriminator_losses(part.batch, out, phase)

            terms |= self._descend(step, parts, judge, phase.discriminators)
        if generators_learn:
            ran = [n for name, n in self.model.networks.items() if name not in phase.discriminators]

            def complete(part: Part) -> Losses:
                if alone is None:
                    with still_spectral(ran if phase.discriminators else ()):  # they ran before, for those
                        out = self._generate(part, True)
                else:
                    out = alone
                with self._autocast():
                    return self.model.generator_losses(part.batch, out, phase)

            with _frozen(self.model.networks[name] for name in phase.discriminators):
                terms |= self._descend(step, parts, complete, phase.generators)
        if self.ema_decay:
            for key, value in self._averaged():
                if value.is_floating_point():
                    self.ema[key].lerp_(value, 1 - self.ema_decay)
                else:
                    self.ema[key].copy_(value)
        return terms

    def _parts(self, step: int, batch: dict[str, Any]) -> list[Part]:
        """A rank's photographs, `at_once` at a time."""
        mine, fair = len(batch["image"]), batch["whole"] / self.world
        count = -(-mine // (self.at_once or mine))
        parts = []
        for number in range(count):
            own = slice(number * mine // count, (number + 1) * mine // count)
            cut = {
                key: value[own] if isinstance(value, Tensor) and value.ndim else value
                for key, value in batch.items()
            }
            place = (step, self.rank, number) if number else (step, self.rank)
            seed = int(np.random.SeedSequence([self.seed, *place]).generate_state(1)[0])
            parts.append(Part(cut, seed, len(cut["image"]) / fair))
        return parts

    def _generate(self, part: Part, learns: bool) -> dict[str, Tensor]:
        """The same for the same part, with gradients or without."""
        assert self.phase is not None
        torch.manual_seed(part.seed)
        with torch.set_grad_enabled(learns), self._autocast():
            return self.model.generate(part.batch, self.phase)

    def _set_rates(self, phase: Phase, factor: float) -> None:
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = phase.lr[name] * self.lr_scale * factor

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def enter(self, phase: Phase) -> Phase:
        """Change to a phase: freeze and thaw its networks, and start their optimisers afresh."""
        if self.phase is not phase:
            self.phase = phase
            self.model.set_phase(phase)
            self._share_statistics()
            for parameter in self.model.parameters():
                parameter.grad = None
            names = (*phase.discriminators, *phase.generators)
            self.gradients = {name: _flat_gradient(self.model.networks[name]) for name in names}
            self.optimisers = {name: self._optimiser(phase, name) for name in names}
        return phase

    def _share_statistics(self) -> None:
        """Rank 0's running statistics for all: a phase that uses them, as they are, is then the same function on every
        rank, and what a checkpoint holds. While batch norm trains, each rank's are its own and used by nobody."""
        if self.world > 1:
            for buffer in self.model.networks.buffers():
                dist.broadcast(buffer, src=0)

    def _optimiser(self, phase: Phase, name: str) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.networks[name].parameters() if p.requires_grad]
        if phase.optimiser == "adadelta":
            return torch.optim.Adadelta(parameters)
        return torch.optim.Adam(parameters, betas=phase.betas, fused=True)

    def _descend(
        self, step: int, parts: Iterable[Part], losses_of: Callable[[Part], Losses], names: Iterable[str]
    ) -> dict[str, Tensor]:
        """One optimiser step on the weighted sum, with gradients averaged over the photographs of all ranks; the terms.

        A network's gradients lie in one flat tensor: one all_reduce instead of DDP's hooks, which change their
        buckets after the first iteration, so that a resumed run would sum in another order and differ in its last
        bits from three ranks up; and no memory is handed back and asked for again in every step.
        """
        assert self.phase is not None
        weights = self.model.weights(self.phase)
        flats = [self.gradients[name] for name in names]
        for flat in flats:
            flat.zero_()
        terms: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            # one power iteration a step, whatever a forward pass holds
            with still_spectral(self.model.networks.values() if number else ()):
                losses = losses_of(part)
            loss: Any = sum(weights[name] * value.to(flats[0]) for name, value in losses.items())
            (loss * part.share).backward()
            for name, value in losses.items():
                counted = value.detach() * part.share
                terms[name] = terms[name] + counted if name in terms else counted
        for flat in flats:
            if self.world > 1:
                dist.all_reduce(flat)
                flat /= self.world
            if not torch.isfinite(flat.sum()):
                raise NonFiniteLoss(self._blame(step, terms))
        for name in names:
            self.optimisers[name].step()
        return terms

    def _blame(self, step: int, losses: Mapping[str, Tensor]) -> str:
        """Which terms are not finite, asked of all ranks: only some of them may have seen it."""
        bad = sorted(name for name, value in losses.items() if not torch.isfinite(value).all())
        if self.world > 1:
            gathered: list[list[str]] = [[] for _ in range(self.world)]
            dist.all_gather_object(gathered, bad)
            bad = sorted({name for names in gathered for name in names})
        what = f"the loss term {', '.join(bad)}" if bad else f"the gradient of {', '.join(losses)}"
        phase = self.phase.name if self.phase else "?"
        return (
            f"{what} is not finite at step {step} (phase {phase}); nothing was changed by this step. "
            "Lower train.lr_scale or the term's weight"
        )

    def _to_device(self, step: int, batch: Mapping[str, Any]) -> dict[str, Any]:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        moved: dict[str, Any] = {
            key: _floats(torch.from_numpy(value).to(self.device, non_blocking=True), layout)
            for key, value in batch.items()
            if isinstance(value, np.ndarray)
        }
        moved.setdefault("edge", None)
        moved["image"] = moved["image"].contiguous(memory_format=layout)
        mine = len(moved["image"])
        whole = moved["whole"] = batch.get("whole", self.world * mine)
        part = batch.get("part", range(self.rank * mine, (self.rank + 1) * mine))
        moved["mask_mean"] = self.mean(moved["mask"].mean() * (mine * self.world / whole))
        numbers = np.random.default_rng([self.seed, step]).random((whole, UNIFORM))
        moved["uniform"] = torch.from_numpy(numbers[part.start : part.stop]).to(moved["image"])
        return moved

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def total(self, count: int) -> int:
        """The sum over the ranks."""
        if self.world > 1:
            counts = torch.tensor(count, device=self.device)
            dist.all_reduce(counts)
            return int(counts)
        return count

    def _averaged(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors the moving average follows: all but the discriminators'."""
        judges = {name for phase in self.model.phases for name in phase.discriminators}
        for name, network in self.model.networks.items():
            if name not in judges:
                for key, value in network.state_dict().items():
                    yield f"{name}.{key}", value

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the generators have their averaged weights, where the recipe asks for an average."""
        own = {key: value.clone() for key, value in self._averaged()} if self.ema else {}
        self._overwrite(self.ema)
        try:
            yield
        finally:
            self._overwrite(own)

    @torch.no_grad()
    def _overwrite(self, values: Mapping[str, Tensor]) -> None:
        for key, value in self._averaged():
            if key in values:
                value.copy_(values[key])

    def state(self, step: int) -> dict[str, Any]:
        """Everything the next step depends on, after `step` steps; loads with weights_only."""
        return {
            "step": step,
            "seed": self.seed,
            "phase": self.phase.name if self.phase else None,
            "networks": self.model.networks.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "ema": self.ema,
        }

    def load(self, state: Mapping[str, Any]) -> int:
        """Take over a state; returns the number of steps it has behind it."""
        self.model.networks.load_state_dict(state["networks"])
        self.ema = {key: value.to(self.device) for key, value in state["ema"].items()}
        for phase, _, _ in self.schedule.parts:
            if phase.name == state["phase"]:
                self.enter(phase)
                for name, optimiser in self.optimisers.items():
                    optimiser.load_state_dict(state["optimisers"][name])
                    _lay_out(optimiser)
        return int(state["step"])


def _floats(value: Tensor, layout: torch.memory_format) -> Tensor:
    """What the stream gives as the model takes it: uint8 [B,H,W,3] -> float32 [B,3,H,W] in [0,1], and masks and edges
    [B,H,W] -> [B,1,H,W]. Floats are that already."""
    if value.is_floating_point():
        return value
    if value.ndim == 3:
        return value.unsqueeze(1).float()
    return value.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout).mul_(1 / 255)


def _flat_gradient(network: nn.Module) -> Tensor:
    """One tensor for all gradients of a network; each parameter's `grad` is a view of its part."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    like = parameters[0]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=like.device, dtype=like.dtype)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.as_strided(
            parameter.shape, parameter.stride()
        )  # channels_last, if that is the layout
    return flat


def _lay_out(optimiser: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their parameters: fused Adam goes through both as they lie, and a state may
    come from a learner with another layout."""
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter).copy_(value)


@contextmanager
def _sound_convolutions(bfloat16_on_cpu: bool) -> Iterator[None]:
    """Without oneDNN where it is wrong: in bfloat16 it leaves parts of a weight's gradient unwritten when a strided
    convolution's input is a single pixel (torch 2.13: seen on 5x5 kernels; plain kernels agree with float64)."""
    if not bfloat16_on_cpu:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch also touches TF32, and says so
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextmanager
def _frozen(networks: Iterable[nn.Module]) -> Iterator[None]:
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
