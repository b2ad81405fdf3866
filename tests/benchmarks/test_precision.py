"""A training step on one thread as `train.precision: auto` runs it here, against float32 in the faster of both layouts.

`make bench` prints the table. The steps are interleaved, so other load on the machine hits both alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model, model_class
from models.base import Precision, make_schedule
from models.features import VGG_CHANNELS, VGG_CONVS_PER_LEVEL
from pipelines.recipe.load import load_recipe, shipped_recipes
from pipelines.training.learner import Learner
from pipelines.training.loop import tune_malloc
from pipelines.training.precision import hardware_kind

ROUNDS = 4
KIND = hardware_kind(torch.device("cpu"))
SMALL = tuple(name for name in shipped_recipes() if name.endswith("-small"))
# (recipe, pixels, photographs) -> largest ratio of a phase
LARGEST_RATIOS: dict[tuple[str, int, int], float] = {
    ("edge_connect", 128, 2): 0.58,
    ("deepfill_v2", 128, 2): 0.60,
    **{(f"{name}-small", 128, 8): 0.80 for name in ("edge_connect", "deepfill_v2")},
    **{(f"{name}-small", 64, 8): 0.90 for name in ("edge_connect", "deepfill_v2")},
}
SLOWER = 1.05  # no model is slower than float32, up to noise


def make_batch(size: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros((count, size, size), np.uint8)
    mask[:, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    edge = rng.random((count, size, size)) < 0.1
    return {"image": rng.integers(0, 256, (count, size, size, 3), np.uint8), "mask": mask, "edge": edge}


def random_vgg19(path: Path) -> Path:
    """A weights file of VGG-19 with random weights: the time of a step does not depend on them."""
    state: dict[str, torch.Tensor] = {}
    index, c_in = 0, 3
    for c_out, count in zip(VGG_CHANNELS, VGG_CONVS_PER_LEVEL["vgg19"], strict=True):
        for _ in range(count):
            conv = nn.Conv2d(c_in, c_out, 3)
            state |= {f"features.{index}.weight": conv.weight.data, f"features.{index}.bias": conv.bias.data}  # type: ignore[union-attr]
            index, c_in = index + 2, c_out
        index += 1
    torch.save(state, path)
    return path


def make_learner(name: str, options: Mapping[str, Any], precision: Precision) -> Learner:
    torch.manual_seed(0)
    model = build_model(name, **options)
    schedule = make_schedule(model, {phase.name: 1000 for phase in model.phases})
    return Learner(
        model,
        schedule,
        0,
        ema_decay=0.995,
        bfloat16=precision.bfloat16,
        channels_last=precision.channels_last,
    )


def measure(name: str, options: Mapping[str, Any], size: int, count: int) -> dict[str, list[float]]:
    """Phase -> seconds per step in float32, float32 channels_last, and as `auto`."""
    precisions = (
        Precision(),
        Precision(channels_last=True),
        model_class(name).precisions.get(KIND, Precision()),
    )
    learners = [make_learner(name, options, precision) for precision in precisions]
    batch, result = make_batch(size, count), {}
    for phase, start, _ in learners[0].schedule.phase_spans:
        seconds: list[list[float]] = [[] for _ in learners]
        for number in range(ROUNDS + 1):
            for learner, times in zip(learners, seconds, strict=True):
                begin = time.perf_counter()
                for step in range(phase.critic_steps):
                    learner.step(start + number * phase.critic_steps + step, batch)
                times.append((time.perf_counter() - begin) / phase.critic_steps)
        result[phase.name] = [median(times[1:]) for times in seconds]
    return result


CASES = [
    *((name, size, 8) for name in SMALL for size in (64, 128)),
    ("edge_connect", 128, 2),
    ("deepfill_v2", 128, 2),
]


@pytest.mark.benchmark
@pytest.mark.skipif(KIND == "cpu", reason="this CPU has no bfloat16 instructions: auto is float32")
@pytest.mark.parametrize(("recipe_name", "size", "count"), CASES)
def test_auto_is_faster_than_float32(
    recipe_name: str, size: int, count: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    section = next(iter(load_recipe(recipe_name).models.values()))
    options = dict(section.options)
    if recipe_name == "edge_connect":
        options["features"] = {"name": "vgg19", "weights": str(random_vgg19(tmp_path / "vgg19.pth"))}
    if "size" in options:
        options["size"] = size
    rows, failures = [], []
    for phase, (plain, last, auto) in measure(section.name, options, size, count).items():
        ratio, best_ratio = auto / plain, auto / min(plain, last)
        milliseconds = " | ".join(f"{1000 * seconds:.0f}" for seconds in (plain, last, auto))
        rows.append(f"| {recipe_name} | {size} | {phase} | {milliseconds} | {ratio:.2f} | {best_ratio:.2f} |")
        if ratio > LARGEST_RATIOS.get((recipe_name, size, count), SLOWER) or best_ratio > SLOWER:
            failures.append(rows[-1])
    with capsys.disabled():
        if (recipe_name, size, count) == CASES[0]:
            print(
                f"\nA training step on one thread, milliseconds, {KIND}; auto over float32, and over its faster layout"
            )
            print("| recipe | px | phase | float32 | channels_last | auto | ratio | ratio |")
        print("", *rows, sep="\n")
    assert not failures, "\n".join(failures)
