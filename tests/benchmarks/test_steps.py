"""A training step of every small recipe on one thread: contiguous tensors against channels_last. `make bench` prints the
table."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from models import build_model
from models.base import Schedule, make_schedule
from pipelines.recipe.load import load_recipe, shipped_recipes
from pipelines.training.learner import Learner
from pipelines.training.loop import tune_malloc

ROUNDS = 3


def make_batch(size: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros((count, 1, size, size), np.float32)
    mask[:, :, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    edge = (rng.random((count, 1, size, size)) < 0.1).astype(np.float32)
    return {"image": rng.random((count, 3, size, size), np.float32), "mask": mask, "edge": edge}


def seconds_per_step(learner: Learner, start: int, cycle: int, batch: dict[str, np.ndarray]) -> float:
    """Mean seconds per step of one cycle: its critic steps, the last of which is also a generator step."""
    start_time = time.perf_counter()
    for step in range(start, start + cycle):
        learner.step(step, batch)
    return (time.perf_counter() - start_time) / cycle


def make_learner(name: str, channels_last: bool) -> tuple[Learner, int, int]:
    recipe = load_recipe(name)
    (key,) = list(recipe.models)[:1]
    torch.manual_seed(0)
    section, train = recipe.models[key], recipe.train_for(key)
    model = build_model(section.name, **section.options)
    schedule: Schedule = make_schedule(model, train.steps)
    learner = Learner(model, schedule, 0, ema_decay=train.ema_decay, channels_last=channels_last)
    return learner, recipe.data.size, train.batch


@pytest.mark.benchmark
def test_steps_contiguous_and_channels_last(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    rows = []
    for name in [name for name in shipped_recipes() if name.endswith("-small")]:
        contiguous, size, count = make_learner(name, False)
        channels_last, _, _ = make_learner(name, True)
        batch = make_batch(size, count)
        for phase, start, _ in contiguous.schedule.phase_spans:
            cycle = phase.critic_steps
            a, b = (
                min([seconds_per_step(learner, start, cycle, batch) for _ in range(ROUNDS)][1:])
                for learner in (contiguous, channels_last)
            )
            rows.append(f"{name:<30} {phase.name:<14} {a * 1e3:8.0f} {b * 1e3:8.0f} {a / b:6.2f}")
    with capsys.disabled():
        head = f"{'recipe':<30} {'phase':<14} {'ms':>8} {'last ms':>8} {'ratio':>6}"
        print(
            "\nA training step on one thread (ratio above 1: channels_last is faster)", head, *rows, sep="\n"
        )
    assert rows
