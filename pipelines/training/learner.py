"""One rank's training step: discriminators then generators, gradient all-reduce, moving averages, state dict.

Uses torch and the model interface; no Ray, no MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.base import RANDOMS_PER_SAMPLE, HardwareKind, Losses, Model, Phase, Precision, Schedule
from models.layers import freeze_power_iteration
from pipelines.training.bfloat16 import proven_bfloat16
from pipelines.training.numerics import (
    compile_networks,
    flatten_gradients,
    match_memory_format,
    requires_grad_off,
    shorten_compiler_errors,
    to_float_tensor,
    update_averages,
)
from pipelines.training.precision import TrainedPrecision


class NonFiniteLoss(ValueError):
    """A loss term is infinite or NaN. Raised before the optimizer step."""


@dataclass(frozen=True)
class MicroBatch:
    """The photographs of one forward pass: a rank's whole batch, or a part of it."""

    batch: dict[str, Any]
    seed: int
    sample_fraction: float
    """Weight of this micro-batch's loss in the global mean; 1 if all ranks have equal batches and do not accumulate."""


@dataclass
class Learner:
    """A model with its optimizers. `step` is a pure function of (state, step number, batch).

    No random state is carried between steps: torch is seeded from (seed, step, rank) before each. So the state is
    the networks, the optimizers, the moving averages and the step number.
    """

    model: Model
    schedule: Schedule
    seed: int
    rank: int = 0
    world_size: int = 1
    lr_scale: float = 1.0
    ema_decay: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bfloat16: bool = False
    """Forward passes and losses run under autocast; parameters, gradients and optimizers stay float32."""
    channels_last: bool = False
    hardware: HardwareKind = "cpu"
    """On which the training began: recorded beside the precision, without effect on a step."""
    compiled: bool = False
    micro_batch_size: int | None = None
    """Photographs per forward pass at most; gradients are accumulated over a rank's batch. None: no accumulation."""

    def __post_init__(self) -> None:
        self.model.to(self.device)
        # SyncBatchNorm needs GPUs: on CPUs each rank normalises with the statistics of its own photographs
        if self.world_size > 1 and self.device.type == "cuda":
            self.model.networks = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.networks)
        if self.channels_last:
            self.model.networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            compile_networks(self.model.networks.values())
        self.phase: Phase | None = None
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.flat_gradients: dict[str, Tensor] = {}
        self.ema: dict[str, Tensor] = {}
        if self.world_size > 1:
            for tensor in self.model.networks.state_dict().values():
                dist.broadcast(tensor, src=0)
        if self.ema_decay:
            self.ema = {key: value.clone() for key, value in self._ema_tensors()}

    def step(self, step: int, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Update the discriminators, then the generators (docs/papers.md 0.3).

        Returns this rank's unweighted loss terms; their mean over the ranks is that of the global batch. Raises
        NonFiniteLoss on all ranks before any parameter changes.
        """
        with (
            proven_bfloat16() if self.bfloat16 and self.device.type == "cpu" else nullcontext(),
            shorten_compiler_errors() if self.compiled else nullcontext(),
        ):
            return self._step(step, batch)

    def _step(self, step: int, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        phase, step_in_phase, phase_length = self.schedule.phase_at(step)
        self.enter_phase(phase)
        self._set_learning_rates(phase, 0.1 if step_in_phase >= phase.lr_drop_at * phase_length else 1.0)
        generators_learn = bool(phase.generators) and (step_in_phase + 1) % phase.critic_steps == 0
        micro_batches = self._micro_batches(step, self._to_device(step, batch))
        shared_output = (
            self._generate(micro_batches[0], generators_learn) if len(micro_batches) == 1 else None
        )
        terms: dict[str, Tensor] = {}
        if phase.discriminators:

            def discriminator_losses(micro_batch: MicroBatch) -> Losses:
                out = self._generate(micro_batch, False) if shared_output is None else shared_output
                with self._autocast():
                    return self.model.discriminator_losses(micro_batch.batch, out, phase)

            terms |= self._optimizer_step(step, micro_batches, discriminator_losses, phase.discriminators)
        if generators_learn:
            generator_networks = [
                n for name, n in self.model.networks.items() if name not in phase.discriminators
            ]

            def generator_losses(micro_batch: MicroBatch) -> Losses:
                if shared_output is None:
                    # these networks ran before, for the discriminators' losses: no second power iteration
                    with freeze_power_iteration(generator_networks if phase.discriminators else ()):
                        out = self._generate(micro_batch, True)
                else:
                    out = shared_output
                with self._autocast():
                    return self.model.generator_losses(micro_batch.batch, out, phase)

            with requires_grad_off(self.model.networks[name] for name in phase.discriminators):
                terms |= self._optimizer_step(step, micro_batches, generator_losses, phase.generators)
        if self.ema_decay:
            update_averages(self.ema, dict(self._ema_tensors()), 1 - self.ema_decay)
        return terms

    def _micro_batches(self, step: int, batch: dict[str, Any]) -> list[MicroBatch]:
        """Split a rank's batch into micro-batches of at most `micro_batch_size` photographs."""
        local_size, mean_local_size = len(batch["image"]), batch["global_size"] / self.world_size
        count = -(-local_size // (self.micro_batch_size or local_size))
        micro_batches = []
        for number in range(count):
            indices = slice(number * local_size // count, (number + 1) * local_size // count)
            fields = {
                key: value[indices] if isinstance(value, Tensor) and value.ndim else value
                for key, value in batch.items()
            }
            seed_key = (step, self.rank, number) if number else (step, self.rank)
            seed = int(np.random.SeedSequence([self.seed, *seed_key]).generate_state(1)[0])
            micro_batches.append(MicroBatch(fields, seed, len(fields["image"]) / mean_local_size))
        return micro_batches

    def _generate(self, micro_batch: MicroBatch, requires_grad: bool) -> dict[str, Tensor]:
        """The model's output for a micro-batch. Seeded: the same with gradients as without."""
        assert self.phase is not None
        torch.manual_seed(micro_batch.seed)
        with torch.set_grad_enabled(requires_grad), self._autocast():
            return self.model.generate(micro_batch.batch, self.phase)

    def _set_learning_rates(self, phase: Phase, factor: float) -> None:
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = phase.lr[name] * self.lr_scale * factor

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def enter_phase(self, phase: Phase) -> Phase:
        """Switch to a phase: freeze and unfreeze its networks, and create new optimizers."""
        if self.phase is not phase:
            self.phase = phase
            self.model.set_phase(phase)
            self._broadcast_buffers()
            for parameter in self.model.parameters():
                parameter.grad = None
            names = (*phase.discriminators, *phase.generators)
            self.flat_gradients = {name: flatten_gradients(self.model.networks[name]) for name in names}
            self.optimizers = {name: self._make_optimizer(phase, name) for name in names}
        return phase

    def _broadcast_buffers(self) -> None:
        """Broadcast rank 0's running statistics.

        A phase whose batch norm uses them is then the same function on every rank, and the one in the checkpoint.
        While batch norm trains, each rank updates its own statistics and nothing reads them.
        """
        if self.world_size > 1:
            for buffer in self.model.networks.buffers():
                dist.broadcast(buffer, src=0)

    def _make_optimizer(self, phase: Phase, name: str) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.networks[name].parameters() if p.requires_grad]
        if phase.optimizer == "adadelta":
            return torch.optim.Adadelta(parameters)
        return torch.optim.Adam(parameters, betas=phase.betas, fused=True)

    def _optimizer_step(
        self,
        step: int,
        micro_batches: Iterable[MicroBatch],
        compute_losses: Callable[[MicroBatch], Losses],
        network_names: Iterable[str],
    ) -> dict[str, Tensor]:
        """One optimizer step on the weighted sum, with gradients averaged over all photographs; returns the terms.

        A network's gradients lie in one flat tensor, which one all_reduce sums. DDP's hooks change their buckets
        after the first iteration: a resumed run would sum in another order, and differ in its last bits from three
        ranks up. The flat tensor also saves freeing and allocating the gradients in every step.
        """
        assert self.phase is not None
        weights = self.model.weights(self.phase)
        gradients = [self.flat_gradients[name] for name in network_names]
        for gradient in gradients:
            gradient.zero_()
        terms: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches):
            # one power iteration per step, not per micro-batch
            with freeze_power_iteration(self.model.networks.values() if number else ()):
                losses = compute_losses(micro_batch)
            loss: Any = sum(weights[name] * value.to(gradients[0]) for name, value in losses.items())
            (loss * micro_batch.sample_fraction).backward()
            for name, value in losses.items():
                weighted = value.detach() * micro_batch.sample_fraction
                terms[name] = terms[name] + weighted if name in terms else weighted
        for gradient in gradients:
            if self.world_size > 1:
                dist.all_reduce(gradient)
                gradient /= self.world_size
            if not torch.isfinite(gradient.sum()):
                raise NonFiniteLoss(self._nonfinite_message(step, terms))
        for name in network_names:
            self.optimizers[name].step()
        return terms

    def _nonfinite_message(self, step: int, losses: Mapping[str, Tensor]) -> str:
        """Name the non-finite terms of all ranks: the terms of this rank may all be finite."""
        bad = sorted(name for name, value in losses.items() if not torch.isfinite(value).all())
        if self.world_size > 1:
            gathered: list[list[str]] = [[] for _ in range(self.world_size)]
            dist.all_gather_object(gathered, bad)
            bad = sorted({name for names in gathered for name in names})
        subject = f"the loss term {', '.join(bad)}" if bad else f"the gradient of {', '.join(losses)}"
        phase = self.phase.name if self.phase else "?"
        return (
            f"{subject} is not finite at step {step} (phase {phase}); this step changed nothing. "
            "Lower train.lr_scale or the term's weight"
        )

    def _to_device(self, step: int, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as float tensors on the device, with `global_size`, `mask_mean` and `uniform` for the model."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        tensors: dict[str, Any] = {
            key: to_float_tensor(torch.from_numpy(value).to(self.device, non_blocking=True), memory_format)
            for key, value in batch.items()
            if isinstance(value, np.ndarray)
        }
        tensors.setdefault("edge", None)
        tensors["image"] = tensors["image"].contiguous(memory_format=memory_format)
        local_size = len(tensors["image"])
        global_size = tensors["global_size"] = batch.get("global_size", self.world_size * local_size)
        global_indices = batch.get("rank_slice", range(self.rank * local_size, (self.rank + 1) * local_size))
        tensors["mask_mean"] = self.all_reduce_mean(
            tensors["mask"].mean() * (local_size * self.world_size / global_size)
        )
        uniform = np.random.default_rng([self.seed, step]).random((global_size, RANDOMS_PER_SAMPLE))
        tensors["uniform"] = torch.from_numpy(uniform[global_indices.start : global_indices.stop]).to(
            tensors["image"]
        )
        return tensors

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def all_reduce_sum(self, count: int) -> int:
        """Sum over the ranks."""
        if self.world_size > 1:
            counts = torch.tensor(count, device=self.device)
            dist.all_reduce(counts)
            return int(counts)
        return count

    def _ema_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that the moving average tracks: every network but the discriminators."""
        discriminators = {name for phase in self.model.phases for name in phase.discriminators}
        for name, network in self.model.networks.items():
            if name not in discriminators:
                for key, value in network.state_dict().items():
                    yield f"{name}.{key}", value

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside this context the generators have their averaged weights, if the recipe asks for an average."""
        trained_weights = {key: value.clone() for key, value in self._ema_tensors()} if self.ema else {}
        self._copy_tensors(self.ema)
        try:
            yield
        finally:
            self._copy_tensors(trained_weights)

    @torch.no_grad()
    def _copy_tensors(self, values: Mapping[str, Tensor]) -> None:
        for key, value in self._ema_tensors():
            if key in values:
                value.copy_(values[key])

    @property
    def trained_precision(self) -> TrainedPrecision:
        return TrainedPrecision(Precision(self.bfloat16, self.channels_last), self.hardware)

    def state(self, step: int) -> dict[str, Any]:
        """All that the next step depends on, after `step` steps. Can be loaded with weights_only."""
        return {
            "step": step,
            "seed": self.seed,
            "phase": self.phase.name if self.phase else None,
            "precision": self.trained_precision.to_state(),
            "networks": self.model.networks.state_dict(),
            "optimisers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema": self.ema,
        }

    def load(self, state: Mapping[str, Any]) -> int:
        """Restore a state; returns the number of steps done."""
        self.model.networks.load_state_dict(state["networks"])
        self.ema = {key: value.to(self.device) for key, value in state["ema"].items()}
        for phase, _, _ in self.schedule.phase_spans:
            if phase.name == state["phase"]:
                self.enter_phase(phase)
                for name, optimizer in self.optimizers.items():
                    optimizer.load_state_dict(state["optimisers"][name])
                    match_memory_format(optimizer)
        return int(state["step"])
