"""The arithmetic and memory layout of a training: the recipe's, or the model's table for this hardware (`auto`).

Resolved once, when a training begins: its checkpoints carry the result, and a resume keeps it on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from models.base import HardwareKind, Model, Precision

if TYPE_CHECKING:
    from pipelines.contracts import TrainSchedule

HARDWARE_NAMES: dict[HardwareKind, str] = {
    "gpu": "a GPU",
    "amx": "a CPU with AMX",
    "avx512_bf16": "a CPU with AVX512-BF16",
    "cpu": "a CPU without bfloat16 instructions",
}


@dataclass(frozen=True)
class TrainedPrecision:
    """The precision of a training, and the hardware that it began on."""

    precision: Precision
    hardware: HardwareKind

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TrainedPrecision | None:
        """Of a checkpoint's state; None: it was written before precisions were recorded."""
        record = state.get("precision")
        if record is None:
            return None
        return cls(Precision(record["bfloat16"], record["channels_last"]), record["hardware"])

    def to_state(self) -> dict[str, Any]:
        """What `from_state` reads, for a checkpoint's state."""
        return {**asdict(self.precision), "hardware": self.hardware}

    @property
    def data_type(self) -> Literal["bfloat16", "float32"]:
        return "bfloat16" if self.precision.bfloat16 else "float32"

    def describe(self) -> str:
        """`trains in bfloat16, channels_last, on a CPU with AMX`."""
        layout = ", channels_last," if self.precision.channels_last else ""
        return f"trains in {self.data_type}{layout} on {HARDWARE_NAMES[self.hardware]}"


def hardware_kind(device: torch.device) -> HardwareKind:
    """The kind of hardware that trains on this device, as far as it matters to precision."""
    if device.type == "cuda":
        return "gpu"
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16"):
        return "amx"
    return "avx512_bf16" if capabilities.get("avx512_bf16") else "cpu"


def resolve_precision(train: TrainSchedule, model: type[Model], hardware: HardwareKind) -> Precision:
    """The recipe's precision; for `auto`, that of the model's table."""
    if train.precision == "auto":
        return model.precisions.get(hardware, Precision())
    return Precision(train.precision == "bfloat16", train.channels_last)


def begin_precision(
    train: TrainSchedule, model: type[Model], device: torch.device, world_size: int
) -> TrainedPrecision:
    """The precision of a training that begins: resolved by rank 0, the same on all ranks. A collective call."""
    hardware = hardware_kind(device)
    resolved = [TrainedPrecision(resolve_precision(train, model, hardware), hardware)]
    if world_size > 1:
        dist.broadcast_object_list(resolved)
    return resolved[0]


def describe_resumed_precision(trained: TrainedPrecision, device: torch.device) -> str:
    """A note on a training that resumes on hardware of another kind; '' if there is nothing to say."""
    here = hardware_kind(device)
    if here == trained.hardware:
        return ""
    kind = trained.data_type
    slower = ": its steps are slower here" if trained.precision.bfloat16 and here == "cpu" else ""
    return (
        f"this training began in {kind} on {HARDWARE_NAMES[trained.hardware]} and goes on in {kind} on "
        f"{HARDWARE_NAMES[here]}{slower}"
    )
