"""A training step of every model at its small recipe, on one thread: contiguous tensors beside channels_last, and where
the time goes. `make bench` prints the tables."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from models import build_model
from pipelines.reading import load_recipe, shipped_recipes
from pipelines.training.learner import Learner, Schedule, make_schedule
from pipelines.training.train import keep_memory

ROUNDS = 3


def batch_of(size: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros((count, 1, size, size), np.float32)
    mask[:, :, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    edge = (rng.random((count, 1, size, size)) < 0.1).astype(np.float32)
    return {"image": rng.random((count, 3, size, size), np.float32), "mask": mask, "edge": edge}


def seconds(learner: Learner, start: int, cycle: int, batch: dict[str, np.ndarray]) -> float:
    """Mean seconds of the steps of one cycle (critic steps, and the generators' with the last of them)."""
    began = time.perf_counter()
    for step in range(start, start + cycle):
        learner.step(step, batch)
    return (time.perf_counter() - began) / cycle


def make(name: str, channels_last: bool) -> tuple[Learner, int, int]:
    recipe = load_recipe(name)
    (key,) = list(recipe.models)[:1]
    torch.manual_seed(0)
    section, train = recipe.models[key], recipe.train_of(key)
    model = build_model(section.name, **section.options)
    schedule: Schedule = make_schedule(model, train.steps)
    learner = Learner(model, schedule, 0, ema_decay=train.ema, channels_last=channels_last)
    return learner, recipe.data.size, train.batch


@pytest.mark.benchmark
def test_steps_contiguous_and_channels_last(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    keep_memory()
    rows = []
    for name in [name for name in shipped_recipes() if name.endswith("-small")]:
        plain, size, count = make(name, False)
        last, _, _ = make(name, True)
        batch = batch_of(size, count)
        for phase, start, _ in plain.schedule.parts:
            cycle = phase.critic_steps
            ours, theirs = (
                min([seconds(learner, start, cycle, batch) for _ in range(ROUNDS)][1:])
                for learner in (plain, last)
            )
            row = f"{name:<30} {phase.name:<14} {ours * 1e3:8.0f} {theirs * 1e3:8.0f} {ours / theirs:6.2f}"
            rows.append(row)
    with capsys.disabled():
        head = f"{'recipe':<30} {'phase':<14} {'ms':>8} {'last ms':>8} {'ratio':>6}"
        print("\nA training step on one thread (ratio above 1: channels_last wins)", head, *rows, sep="\n")
    assert rows
