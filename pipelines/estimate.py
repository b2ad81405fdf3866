"""Estimates shards, storage, steps and GPU hours of a recipe for a number of photographs, as intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.recipe import Recipe

JPEG_BYTES_PER_PIXEL = (0.45, 1.0)
"""of a stored photograph (JPEG, quality 95, colour not subsampled): measured 0.55 on 447 facades and 0.56 on the bundled
photographs at 256 px, 0.68 at 128"""
PNG_BYTES_PER_PIXEL = (1.3, 2.6)
EDGE_BYTES_PER_PIXEL = (0.008, 0.075)
"""of an edge map, measured at 256 px: sigma 5 and sigma 0.5"""
SAMPLE_OVERHEAD_BYTES = 900
"""per sample, besides the image: the tar's header and padding, the row in the index; measured 895"""
SHARD_PIXELS_PER_SECOND = (12e6, 30e6)
"""pixels of originals that one core decodes, resizes and stores"""
CANNY_PIXELS_PER_SECOND = (25e6, 45e6)
"""pixels of stored photographs for which one core computes edge maps"""
LOADER_PHOTOS_PER_SECOND = (700.0, 1500.0)
"""photographs of 256 x 256 pixels that one core loads for training, with masks and stored edges"""
ORIGINAL_PIXELS = 640 * 480
"""assumed size of an original"""
GPU_FLOPS_PER_SECOND = (5e12, 30e12)
"""float32 throughput of a data-centre GPU of 2020 or later in networks like these. DeepFill v1's authors reached 3.5e12 to
4.6e12 on a GTX 1080 Ti (`DeepFillV1.published_training`), a third of its plain float32 peak; a third is 6.5e12 of an
A100's and 10e12 of an A10G's. The upper end, a fifth of an A100's TensorFloat-32 peak, is a guess"""
STEP_OVERHEAD_SECONDS = (0.005, 0.05)
"""per step, besides arithmetic: kernel launches, optimizers, reading losses back; a guess"""
FEATURE_COST_FACTOR = 1.6
"""factor for frozen VGG features whose weights are not on this machine, so that they cannot be counted"""


@dataclass(frozen=True)
class Interval:
    """The likely minimum and maximum of a quantity."""

    low: float
    high: float

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.high * factor)

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class DataEstimate:
    """Cost of a recipe's shards, and of the edges for one sigma."""

    shards: int
    photographs_gb: Interval
    """size of the shards"""
    edges_gb: Interval
    shard_core_hours: Interval
    edges_core_hours: Interval


@dataclass(frozen=True)
class TrainingEstimate:
    """Cost of training one model."""

    steps: int
    epochs: float
    flops: float
    gpu_hours: Interval
    loading_cores: Interval
    """cores that load photographs as fast as one GPU trains"""
    fully_counted: bool
    """False: the FLOPs of VGG features are a guess."""


def estimate_data(recipe: Recipe, photographs: int) -> DataEstimate:
    """Estimate shards and the edges for one sigma, for landscape photographs of 4:3."""
    data = recipe.data
    side = data.size + data.margin
    pixels = side * side * (1 if data.crop == "square" else 4 / 3)
    bytes_per_pixel = Interval(*(PNG_BYTES_PER_PIXEL if data.format == "png" else JPEG_BYTES_PER_PIXEL))
    overhead_gb = photographs * SAMPLE_OVERHEAD_BYTES / 1e9
    shard_seconds = Interval(
        photographs * ORIGINAL_PIXELS / SHARD_PIXELS_PER_SECOND[1],
        photographs * ORIGINAL_PIXELS / SHARD_PIXELS_PER_SECOND[0],
    )
    canny_seconds = Interval(
        photographs * pixels / CANNY_PIXELS_PER_SECOND[1], photographs * pixels / CANNY_PIXELS_PER_SECOND[0]
    )
    return DataEstimate(
        shards=sum(
            math.ceil(photographs / data.partition_size) for fraction in (1, data.val, data.test) if fraction
        ),
        photographs_gb=bytes_per_pixel * (photographs * pixels / 1e9) + Interval(overhead_gb, overhead_gb),
        edges_gb=Interval(*EDGE_BYTES_PER_PIXEL) * (photographs * pixels / 1e9)
        + Interval(overhead_gb, overhead_gb),
        shard_core_hours=shard_seconds * (1 / 3600),
        edges_core_hours=canny_seconds * (1 / 3600),
    )


def estimate_training(recipe: Recipe, key: str, photographs: int) -> TrainingEstimate:
    """Estimate the training of one model.

    GPU hours come from counted FLOPs, a throughput and a guessed overhead: their ends differ by a factor of six to ten,
    and the true value may lie outside.
    """
    from models.base import make_schedule

    model, fully_counted = _meta_model(recipe, key)
    train = recipe.train_for(key)
    batch = train.batch
    schedule = make_schedule(model, train.steps)
    flops, steps = 0.0, schedule.total_steps
    for phase, start, end in schedule.phase_spans:
        flops += (end - start) * batch * _flops_per_photo(model, phase, recipe.data.size)
    hours = Interval(flops / GPU_FLOPS_PER_SECOND[1] / 3600, flops / GPU_FLOPS_PER_SECOND[0] / 3600)
    if not fully_counted:
        hours = Interval(hours.low, hours.high * FEATURE_COST_FACTOR)
    hours += Interval(*STEP_OVERHEAD_SECONDS) * (steps / 3600)
    train_fraction = 1 - recipe.data.val - recipe.data.test
    photos_per_second = (
        Interval(steps * batch / 3600 / hours.high, steps * batch / 3600 / hours.low)
        if hours.low
        else Interval(0, 0)
    )
    stored = recipe.data.size + recipe.data.margin  # decoded whole, then cropped
    scale = stored * stored * (1 if recipe.data.crop == "square" else 4 / 3) / 256**2
    return TrainingEstimate(
        steps=steps,
        epochs=steps * batch / (photographs * train_fraction),
        flops=flops,
        gpu_hours=hours,
        loading_cores=Interval(
            photos_per_second.low * scale / LOADER_PHOTOS_PER_SECOND[1],
            photos_per_second.high * scale / LOADER_PHOTOS_PER_SECOND[0],
        ),
        fully_counted=fully_counted,
    )


def published_training(recipe: Recipe, key: str, steps: int, flops: float) -> str | None:
    """The authors' published training time, scaled to these steps, and its throughput. None: they published none for this
    batch and image size."""
    from models import model_class

    known = model_class(recipe.models[key].name).published_training
    if known is None or (known.batch_size, known.image_size) != (
        recipe.train_for(key).batch,
        recipe.data.size,
    ):
        return None
    text = f"{known.device_hours:,.0f} hours of {known.device}"
    if known.steps_range is None:
        return f"{text} ({known.source}; the number of steps is not published)"
    low, high = known.steps_range
    hours = Interval(known.device_hours * steps / high, known.device_hours * steps / low)
    tflops = Interval(flops / hours.high / 3600e12, flops / hours.low / 3600e12)
    counts = " to ".join(dict.fromkeys(f"{count:,.0f}" for count in known.steps_range))
    scaled = "" if low == high == steps else f", so {_hours(hours)} for these"
    return f"{text} for {counts} steps{scaled}: {_format_interval(tflops)} TFLOP/s ({known.source})"


def _meta_model(recipe: Recipe, key: str) -> tuple[Any, bool]:
    """The model on the meta device, and True; without feature losses, and False, if their weights are not on this machine.

    Built on the CPU and then moved: the initialisation of spectral norm takes seconds on meta tensors.
    """
    from models import build_model, model_class

    section = recipe.models[key]
    options: Mapping[str, Any] = section.options
    model = build_model(section.name, **options).to("meta")
    try:
        _flops_per_photo(model, model.phases[-1], recipe.data.size)
        return model, True
    except FileNotFoundError:
        none = dict.fromkeys(model_class(section.name).feature_loss_options, 0)
        return build_model(section.name, **{**options, **none}).to("meta"), False


def _flops_per_photo(model: Any, phase: Any, size: int) -> float:
    """FLOPs per photograph and step, forward and backward, counted by torch on meta tensors. A mean over `critic_steps`
    steps, of which one trains the generators."""
    import torch

    from pipelines.private.torch import TorchDispatchMode, flop_formula

    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if (formula := flop_formula(func)) is not None:
                self.total += formula(*args, **(kwargs or {}), out_val=result)
            return result

    count = 2
    with torch.device("meta"), Counter() as counter:
        batch = {
            "image": torch.rand(count, 3, size, size),
            "mask": torch.zeros(count, 1, size, size),
            "edge": torch.zeros(count, 1, size, size),
            "mask_mean": torch.tensor(0.25),
            "uniform": torch.rand(count, 4),
        }
        model.set_phase(phase)
        out = model.generate(batch, phase)
        if phase.discriminators:
            sum(model.discriminator_losses(batch, out, phase).values()).backward()
        discriminator_total = counter.total
        if phase.generators:
            for (
                name
            ) in phase.discriminators:  # as in training, which needs only the gradients of their inputs
                model.networks[name].requires_grad_(False)
            sum(model.generator_losses(batch, out, phase).values()).backward()
    return float(discriminator_total + (counter.total - discriminator_total) / phase.critic_steps) / count


def format_estimate(recipe: Recipe, photographs: int) -> list[str]:
    """The table of `inpaint plan RECIPE --photos N`."""
    data = estimate_data(recipe, photographs)
    lines = [
        f"{photographs:,} photographs of {recipe.data.size} + {recipe.data.margin} pixels "
        f"({recipe.data.format}); ranges are from the likely minimum to the likely maximum",
        f"  shards          {data.shards:,}, {_gb(data.photographs_gb)}, {_hours(data.shard_core_hours)} of one core",
        f"  edges per sigma {_gb(data.edges_gb)}, {_hours(data.edges_core_hours)} of one core",
    ]
    for key in recipe.models:
        train = estimate_training(recipe, key, photographs)
        guess = "" if train.fully_counted else "; VGG's share is a guess"
        workers = recipe.scaling.max_workers
        parallel = f" ({_hours(train.gpu_hours * (1 / workers))} on {workers})" if workers > 1 else ""
        lines.append(
            f"  {key:<15} {train.steps:,} steps, {train.epochs:.1f} epochs, {_hours(train.gpu_hours)} of one GPU"
            f"{parallel}, {_format_interval(train.loading_cores)} cores for data loading{guess}"
        )
        if published := published_training(recipe, key, train.steps, train.flops):
            lines.append(f"    published     {published}")
    return lines


def _gb(value: Interval) -> str:
    return f"{_format_interval(value)} GB"


def _hours(value: Interval) -> str:
    return f"{_format_interval(value)} hours"


def _format_interval(value: Interval) -> str:
    low, high = _format_number(value.low), _format_number(value.high)
    return low if low == high else f"{low} to {high}"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
