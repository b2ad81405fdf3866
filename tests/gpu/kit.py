"""What the parts share: settings, photographs, models of the shipped recipes, one training step, results."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
import yaml

from data_prep.canny import canny_edges
from data_prep.masks import open_masks
from models import build_model, meta_model, model_class
from models.base import Model, Phase, Schedule
from models.features import VGG_CHANNELS, VGG_CONVS_PER_LEVEL
from pipelines.training.learner import Learner

RECIPES = Path(__file__).parents[2] / "pipelines/recipes"
MODELS = (
    "edge_connect",
    "deepfill_v2",
    "deepfill_v1",
    "partial_conv",
    "context_encoder",
    "glcic",
    "context_encoder_region",
)
"""the most used first"""
PHOTOGRAPHS = ("astronaut", "coffee", "cat", "rocket")
"""of scikit-image, which are in its package"""


@dataclass
class Settings:
    """How the programme runs."""

    device: torch.device
    out: Path
    toy: bool = False
    """The smallest models and few repetitions, to test the programme itself."""
    weights: Mapping[str, Path] = field(default_factory=dict)
    """vgg16, vgg19 -> file; without it random weights, which cost the same and have no meaning."""
    deadline: float = float("inf")
    """time.monotonic() at which parts stop to measure more"""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass
class Part:
    """The result of one part of the programme."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """A table: one dict per row, with the same keys."""
    failures: list[str] = field(default_factory=list)
    """What is wrong, a line each."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, is_right: bool, failure: str) -> None:
        if not is_right:
            self.failures.append(failure)


@cache
def recipe(name: str) -> dict[str, Any]:
    """A shipped recipe, as its YAML has it."""
    body: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return body


@dataclass(frozen=True)
class ModelSetup:
    """A model as a recipe, or its smallest configuration, defines it."""

    name: str
    options: Mapping[str, Any]
    size: int
    batch: int
    masks: Any
    steps: Mapping[str, int]
    """The recipe's, per phase."""

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
        """The model with the weights of seed 0, the same on every device."""
        torch.manual_seed(0)
        return build_model(self.name, **self.options).to(device=device, dtype=dtype)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return meta_model(self.name, self.options).phases


def setup(name: str, settings: Settings, small: bool) -> ModelSetup:
    """The model of the recipe NAME-small or NAME; with `toy` its smallest configuration."""
    body = recipe(f"{name}-small" if small else name)
    section = dict(body.get("model") or next(iter(body["models"].values())) or {})
    train = {**body.get("train", {}), **(section.pop("train", None) or {})}
    size, batch = body["data"]["size"], train.get("batch", 16)
    masks = section.pop("masks", None) or body["masks"]
    for key in ("name", "seed", "edges", "register_as"):
        section.pop(key, None)
    if settings.toy:
        small_config = model_class(name).small_config
        section, size, batch = dict(small_config.options), small_config.image_size, 2
    for option in fields(model_class(name).Options):
        if option.name == "features":  # the paper's, also where a small recipe has another network
            section["features"] = {
                "name": option.default,
                "weights": str(feature_weights(str(option.default), settings)),
            }
    return ModelSetup(name, section, size, batch, masks, train.get("steps", {}))


def feature_weights(network: str, settings: Settings) -> Path:
    """The given file of a VGG, or one with random weights of the same shapes."""
    if network in settings.weights:
        return settings.weights[network]
    path = settings.out / f"{network}-random.pth"
    if not path.is_file():
        torch.manual_seed(0)
        state: dict[str, torch.Tensor] = {}
        index, c_in = 0, 3
        for c, count in zip(VGG_CHANNELS, VGG_CONVS_PER_LEVEL[network], strict=True):
            for _ in range(count):
                state[f"features.{index}.weight"] = torch.randn(c, c_in, 3, 3) * (2 / (9 * c_in)) ** 0.5
                state[f"features.{index}.bias"] = torch.zeros(c)
                index, c_in = index + 2, c
            index += 1
        torch.save(state, path)
    return path


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """uint8 [H,W,3] each."""
    return tuple(np.ascontiguousarray(getattr(skimage.data, name)()[..., :3]) for name in PHOTOGRAPHS)


def random_crop(size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [size,size,3] of one of the photographs, enlarged if it is smaller."""
    photo = photographs()[rng.integers(len(PHOTOGRAPHS))]
    while min(photo.shape[:2]) < size:
        photo = np.repeat(np.repeat(photo, 2, 0), 2, 1)
    top, left = (int(rng.integers(length - size + 1)) for length in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + size, left : left + size])


def make_batch(model: ModelSetup, count: int, seed: int = 0) -> dict[str, Any]:
    """A batch as the stream gives it: image uint8 [B,S,S,3], mask uint8 and edge bool [B,S,S]."""
    rng = np.random.default_rng(seed)
    source = open_masks(model.masks)
    images = np.stack([random_crop(model.size, rng) for _ in range(count)])
    masks = np.stack([source.sample(model.size, model.size, rng) for _ in range(count)])
    return {"image": images, "mask": masks, "edge": np.stack([canny_edges(image, 2) for image in images])}


def as_floats(batch: Mapping[str, np.ndarray], dtype: type) -> dict[str, np.ndarray]:
    """image [B,3,S,S] in [0,1], mask and edge [B,1,S,S], which the learner takes as they are."""
    return {
        "image": np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)).astype(dtype) / dtype(255),
        "mask": batch["mask"][:, None].astype(dtype),
        "edge": batch["edge"][:, None].astype(dtype),
    }


@dataclass(frozen=True)
class StepResult:
    """One step without a change of the weights."""

    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]
    """Per network: float64 on the CPU, flat."""


def gradient_step(
    model: ModelSetup,
    phase_index: int,
    batch: Mapping[str, np.ndarray],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    bfloat16: bool = False,
    **options: Any,
) -> StepResult:
    """The losses and gradients of one training step of a phase, at the weights of seed 0.

    The learning rate is 0, so that the generators' gradients are those at the discriminators' first weights: after
    an update by Adam, whose first step has the size of the learning rate, roundoff would change them.
    """
    network = model.build(dtype=dtype)
    phase = network.phases[phase_index]
    network.set_phase(phase)
    steps = phase.critic_steps
    learner = Learner(
        network, Schedule(((phase, 0, steps),)), 0, lr_scale=0.0, device=device, bfloat16=bfloat16, **options
    )
    arrays = as_floats(batch, np.float64 if dtype == torch.float64 else np.float32)
    extra = {key: value for key, value in batch.items() if not isinstance(value, np.ndarray)}
    losses = learner.step(steps - 1, {**arrays, **extra})
    return StepResult(
        {name: float(value) for name, value in losses.items()},
        {name: gradient.double().cpu() for name, gradient in learner.flat_gradients.items()},
    )


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value - truth‖ / ‖truth‖."""
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """TF32 in matrix products and in cuDNN's convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """Peak memory since the last reset in GiB; 0 on CPUs."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def environment(settings: Settings) -> dict[str, Any]:
    """What the results depend on."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(settings.device) if settings.on_gpu else _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "features": {name: str(path) for name, path in settings.weights.items()} or "random weights",
    }
    if settings.on_gpu:
        properties = torch.cuda.get_device_properties(settings.device)
        facts |= {
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "compute capability": f"{properties.major}.{properties.minor}",
        }
    return facts


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        match = re.search(r"model name\s*:\s*(.+)", file.read())
    return match[1] if match else platform.processor()


def write_results(settings: Settings, parts: Mapping[str, Part]) -> None:
    """gpu.json and gpu.md in the output folder, with the parts that have ended."""
    facts = environment(settings)
    body = {"environment": facts, "parts": {name: asdict(part) for name, part in parts.items()}}
    (settings.out / "gpu.json").write_text(json.dumps(body, indent=1, default=str) + "\n")
    lines = ["# Results", "", *(f"* {key}: {value}" for key, value in facts.items()), ""]
    for name, part in parts.items():
        state = "failed" if part.failures else "passed"
        lines += [f"## {name}: {state} ({part.seconds:.0f} s)", ""]
        lines += [f"* **{failure}**" for failure in part.failures] + [f"* {note}" for note in part.notes]
        if part.failures or part.notes:
            lines.append("")
        if part.rows:
            columns = list(dict.fromkeys(key for row in part.rows for key in row))
            lines += [f"| {' | '.join(columns)} |", f"|{':--|' * len(columns)}"]
            lines += [f"| {' | '.join(_text(row.get(key, '')) for key in columns)} |" for row in part.rows]
            lines.append("")
    (settings.out / "gpu.md").write_text("\n".join(lines))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
