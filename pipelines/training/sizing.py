"""What a recipe takes at a given number of photographs: shards, bytes, steps, hours. Arithmetic, with its error said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.recipe import Recipe

JPEG_BYTES = (0.45, 1.0)
"""bytes a pixel of a stored photograph (JPEG, quality 95, colour not subsampled): measured 0.55 on 447 facades and 0.56 on
the bundled photographs at 256 px, 0.68 at 128"""
PNG_BYTES = (1.3, 2.6)
EDGE_BYTES = (0.008, 0.075)
"""bytes a pixel of an edge map, measured at 256 px: sigma 5 and sigma 0.5"""
MEMBER_BYTES = 900
"""of each sample beside its own: the tar's header and padding, its row in the index; measured 895"""
SHARD_PIXELS = (12e6, 30e6)
"""pixels of the original that one core decodes, resizes and stores a second"""
CANNY_PIXELS = (25e6, 45e6)
"""pixels of stored photographs that one core turns into edge maps a second"""
LOADED = (700.0, 1500.0)
"""photographs of 256 x 256 pixels that one core serves to training a second, with masks and stored edges"""
ORIGINAL = 640 * 480
"""pixels of an original, where nothing is known of them"""
GPU_FLOPS = (5e12, 30e12)
"""of float32 work that one data-centre GPU of 2020 or later gets done a second in networks like these. DeepFill v1's authors
had 3.5e12 to 4.6e12 of a GTX 1080 Ti (`PUBLISHED`), a third of its plain float32 peak; a third is 6.5e12 of an A100's and
10e12 of an A10G's. The upper end, a fifth of an A100's TensorFloat-32 peak, is a guess"""
OVERHEAD = (0.005, 0.05)
"""seconds a step that are no arithmetic: starting kernels, optimisers, losses read back; a guess"""
FEATURES = 1.6
"""factor on a step for frozen VGG features, where their weights are not here to be counted"""


@dataclass(frozen=True)
class Range:
    """From the least to the most that is likely."""

    low: float
    high: float

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Published:
    """How long a model's authors trained it, at this batch and size: hours of one GPU, and the recipe's steps that they
    were for, where that is said."""

    hours: float
    gpu: str
    source: str
    batch: int
    size: int
    steps: Range | None = None


_DAY = 24.0
PUBLISHED = {
    "glcic": Published(
        2 * 30 * _DAY * 4, "a K80", "two months on four, Iizuka et al. 2017", 96, 256, Range(5e5, 5e5)
    ),
    "partial_conv": Published(10 * _DAY, "a V100", "ten days, Liu et al. 2018", 6, 512),
    "deepfill_v1": Published(  # 0.3 to 0.4 batches a second, in each of which the critics learn five times
        5 * _DAY,
        "a GTX 1080 Ti",
        "five days, github.com/JiahuiYu/generative_inpainting/issues 53 and 237",
        16,
        256,
        Range(0.3, 0.4) * (5 * 5 * _DAY * 3600),
    ),
    "edge_connect": Published(
        14 * _DAY,
        "a Titan Xp or V",
        "more than two weeks, github.com/knazeri/edge-connect/issues/22",
        8,
        256,
    ),
}
"""to set beside the estimate; what could not be found again is not here"""


def storage(recipe: Recipe, photographs: int) -> dict[str, Any]:
    """Shards, their bytes and those of a sigma's edges, and core hours to make them, for landscape photographs 4:3."""
    data = recipe.data
    side = data.size + data.margin
    pixels = side * side * (1 if data.crop == "square" else 4 / 3)
    bytes_a_pixel = Range(*(PNG_BYTES if data.format == "png" else JPEG_BYTES))
    around = photographs * MEMBER_BYTES / 1e9
    seconds = Range(photographs * ORIGINAL / SHARD_PIXELS[1], photographs * ORIGINAL / SHARD_PIXELS[0])
    canny = Range(photographs * pixels / CANNY_PIXELS[1], photographs * pixels / CANNY_PIXELS[0])
    return {
        "shards": sum(
            math.ceil(photographs / data.shard_photos) for share in (1, data.val, data.test) if share
        ),
        "photographs_gb": bytes_a_pixel * (photographs * pixels / 1e9) + Range(around, around),
        "edges_gb": Range(*EDGE_BYTES) * (photographs * pixels / 1e9) + Range(around, around),
        "shard_core_hours": seconds * (1 / 3600),
        "edges_core_hours": canny * (1 / 3600),
    }


def training(recipe: Recipe, key: str, photographs: int) -> dict[str, Any]:
    """Steps, epochs, operations, GPU hours and loading cores of one model. The GPU hours come from counted floating-point
    operations, a rate and a guessed overhead: a factor of six to ten between their ends, and neither is a promise."""
    from pipelines.training.learner import make_schedule

    model, counted = _model(recipe, key)
    train = recipe.train_of(key)
    batch = train.batch
    schedule = make_schedule(model, train.steps)
    flops, steps = 0.0, schedule.total
    for phase, start, end in schedule.parts:
        flops += (end - start) * batch * _flops(model, phase, recipe.data.size)
    hours = Range(flops / GPU_FLOPS[1] / 3600, flops / GPU_FLOPS[0] / 3600)
    if not counted:
        hours = Range(hours.low, hours.high * FEATURES)
    hours += Range(*OVERHEAD) * (steps / 3600)
    share = 1 - recipe.data.val - recipe.data.test
    rate = (
        Range(steps * batch / 3600 / hours.high, steps * batch / 3600 / hours.low)
        if hours.low
        else Range(0, 0)
    )
    stored = recipe.data.size + recipe.data.margin  # what is decoded; the crop comes after
    scale = stored * stored * (1 if recipe.data.crop == "square" else 4 / 3) / 256**2
    return {
        "steps": steps,
        "epochs": steps * batch / (photographs * share),
        "operations": flops,
        "gpu_hours": hours,
        "loading_cores": Range(rate.low * scale / LOADED[1], rate.high * scale / LOADED[0]),
        "counted": counted,
    }


def published(recipe: Recipe, key: str, steps: int, operations: float) -> str | None:
    """What the model's authors say of a training like this, and what that makes of its steps; None: nothing is known."""
    known = PUBLISHED.get(recipe.models[key].name)
    if known is None or (known.batch, known.size) != (recipe.train_of(key).batch, recipe.data.size):
        return None
    told = f"{known.hours:,.0f} hours of {known.gpu}"
    if known.steps is None:
        return f"{told} ({known.source}; their steps are not said)"
    hours = Range(known.hours * steps / known.steps.high, known.hours * steps / known.steps.low)
    rate = Range(operations / hours.high / 3600e12, operations / hours.low / 3600e12)
    counts = " to ".join(dict.fromkeys(f"{count:,.0f}" for count in (known.steps.low, known.steps.high)))
    scaled = "" if known.steps == Range(steps, steps) else f", so {_hours(hours)} for these"
    return f"{told} for {counts} steps{scaled}: {_plain(rate)} TFLOP/s ({known.source})"


def _model(recipe: Recipe, key: str) -> tuple[Any, bool]:
    """The model without memory for its weights; without frozen features (False) where their weights are not here.

    Built first and emptied then: spectral norm's start takes seconds on tensors without memory.
    """
    from models import build_model

    section = recipe.models[key]
    options: Mapping[str, Any] = section.options
    model = build_model(section.name, **options).to("meta")
    try:
        _flops(model, model.phases[-1], recipe.data.size)
        return model, True
    except FileNotFoundError:
        none = dict.fromkeys(_of_features(section.name), 0)
        return build_model(section.name, **{**options, **none}).to("meta"), False


def _of_features(name: str) -> tuple[str, ...]:
    """The loss weights that ask for frozen features."""
    return {
        "edge_connect": ("lambda_p", "lambda_s"),
        "partial_conv": ("lambda_perceptual", "lambda_style"),
    }.get(name, ())


def _flops(model: Any, phase: Any, size: int) -> float:
    """Floating-point operations of one photograph's share of a step, forward and backward, counted by torch on tensors
    without memory, as the mean of `critic_steps` steps: the generators learn in one of them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if (formula := flop_registry.get(func._overloadpacket)) is not None:
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
        always = counter.total
        if phase.generators:
            for name in phase.discriminators:  # as in training: only their inputs' gradients are wanted
                model.networks[name].requires_grad_(False)
            sum(model.generator_losses(batch, out, phase).values()).backward()
    return float(always + (counter.total - always) / phase.critic_steps) / count


def lines(recipe: Recipe, photographs: int) -> list[str]:
    """The table of `inpaint plan RECIPE --size PHOTOGRAPHS`."""
    found = storage(recipe, photographs)
    told = [
        f"{photographs:,} photographs of {recipe.data.size} + {recipe.data.margin} pixels "
        f"({recipe.data.format}); ranges are from the least to the most that is likely",
        f"  shards          {found['shards']:,}, {_gb(found['photographs_gb'])}, "
        f"{_hours(found['shard_core_hours'])} of one core to make",
        f"  edges, a sigma  {_gb(found['edges_gb'])}, {_hours(found['edges_core_hours'])} of one core to make",
    ]
    for key in recipe.models:
        train = training(recipe, key, photographs)
        guess = "" if train["counted"] else "; VGG's share is a guess"
        most = recipe.scaling.most_workers
        shared = train["gpu_hours"] * (1 / most)
        workers = f" ({_hours(shared)} on {most})" if most > 1 else ""
        told.append(
            f"  {key:<15} {train['steps']:,} steps, {train['epochs']:.1f} epochs, {_hours(train['gpu_hours'])} of one GPU"
            f"{workers}, {_plain(train['loading_cores'])} cores to load for it{guess}"
        )
        if beside := published(recipe, key, train["steps"], train["operations"]):
            told.append(f"    published     {beside}")
    return told


def _gb(value: Range) -> str:
    return f"{_plain(value)} GB"


def _hours(value: Range) -> str:
    return f"{_plain(value)} hours"


def _plain(value: Range) -> str:
    low, high = _number(value.low), _number(value.high)
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
