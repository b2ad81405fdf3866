"""How fast is training? Photographs per second, memory and batch sizes of the papers' recipes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu.kit import (
    MODELS,
    ModelSetup,
    Part,
    Settings,
    free_memory,
    make_batch,
    peak_gib,
    setup,
    synchronize,
    tf32,
)
from models.base import Schedule
from pipelines.training.learner import Learner

MODES = {
    "float32": {},
    "TF32": {"tf32": True},
    "bfloat16": {"bfloat16": True},
    "float32, channels_last": {"channels_last": True},
    "TF32, channels_last": {"tf32": True, "channels_last": True},
    "bfloat16, channels_last": {"bfloat16": True, "channels_last": True},
}
PEAK_TERAFLOPS = {
    # dense, per second: float32, TF32, bfloat16 (data sheets of the vendor)
    "H200": (67, 495, 989),
    "H100": (67, 495, 989),
    "A100": (19.5, 156, 312),
    "L4": (30, 60, 121),
    "T4": (8.1, 8.1, 8.1),
}
WARM_UP_STEPS = 3


def make_learner(model: ModelSetup, phase_name: str, settings: Settings, **options: Any) -> Learner:
    """A learner that stays in one phase."""
    network = model.build(settings.device)
    phase = network.phase(phase_name)
    return Learner(network, Schedule(((phase, 0, 10**9),)), 0, device=settings.device, **options)


def longest_phases(model: ModelSetup, count: int = 1) -> list[str]:
    """The phases in which a recipe spends most of its steps."""
    steps = {phase.name: model.steps.get(phase.name, phase.steps) for phase in model.phases}
    longest = sorted(steps, key=lambda name: -steps[name])[:count]
    return [name for name in steps if name in longest]


def _seconds_per_step(
    learner: Learner, batch: Mapping[str, Any], settings: Settings, seconds: float = 1.2
) -> float:
    cycle = max(phase.critic_steps for phase, _, _ in learner.schedule.phase_spans)
    warm_up = cycle * -(-WARM_UP_STEPS // cycle)
    for step in range(warm_up):
        learner.step(step, batch)
    synchronize(settings.device)
    steps, start = 0, time.perf_counter()
    while True:
        for _ in range(cycle):
            learner.step(warm_up + steps, batch)
            steps += 1
        synchronize(settings.device)
        elapsed = time.perf_counter() - start
        if elapsed >= (0.01 if settings.toy else seconds):
            return elapsed / steps


def speed(settings: Settings) -> Part:
    """Photographs per second and peak memory of each model at the paper's size and batch."""
    part = Part()
    modes = list(MODES.items())[1::4] if settings.toy else MODES.items()
    for name in MODELS[1:2] if settings.toy else MODELS:
        model = setup(name, settings, small=False)
        batch = make_batch(model, model.batch)
        for phase in longest_phases(model, 2 if name == "edge_connect" else 1):
            for mode, options in modes:
                if settings.seconds_left < 0:
                    part.notes.append(f"out of time before {name}, phase {phase}, {mode}")
                    return part
                part.rows.append(_speed_row(model, phase, mode, options, batch, settings))
    return part


def _speed_row(
    model: ModelSetup,
    phase: str,
    mode: str,
    options: Mapping[str, bool],
    batch: Mapping[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": model.name,
        "phase": phase,
        "size": model.size,
        "batch": model.batch,
        "mode": mode,
    }
    options = dict(options)
    free_memory(settings.device)
    try:
        with tf32(options.pop("tf32", False)):
            learner = make_learner(model, phase, settings, **options)
            seconds = _seconds_per_step(learner, batch, settings)
            teraflops = _teraflops(learner, batch)
    except torch.OutOfMemoryError:
        return {**row, "photographs/s": "out of memory"}
    peaks = next((p for key, p in PEAK_TERAFLOPS.items() if key in _device_name(settings)), None)
    used = peaks[("float32", "TF32", "bfloat16").index(mode.split(",")[0])] if peaks else None
    return {
        **row,
        "photographs/s": model.batch / seconds,
        "ms/step": 1000 * seconds,
        "peak memory, GiB": peak_gib(settings.device),
        "TFLOP/step": teraflops,
        "share of the peak": teraflops / seconds / used if used else "",
    }


def _device_name(settings: Settings) -> str:
    return torch.cuda.get_device_name(settings.device) if settings.on_gpu else "CPU"


def _teraflops(learner: Learner, batch: Mapping[str, Any]) -> float:
    """Of the convolutions and matrix products of a step, averaged over a cycle of critic steps."""
    cycle = max(phase.critic_steps for phase, _, _ in learner.schedule.phase_spans)
    with FlopCounterMode(display=False) as counter:
        for step in range(cycle):
            learner.step(step, batch)
    return counter.get_total_flops() / cycle / 1e12


def compiled(settings: Settings) -> Part:
    """torch.compile for two models: seconds to compile, and the speed after it."""
    part = Part()
    if settings.toy:
        part.notes.append("compiling takes longer than all else: left out")
        return part
    for name in ("deepfill_v2", "context_encoder"):
        model = setup(name, settings, small=False)
        batch = make_batch(model, model.batch)
        (phase,) = longest_phases(model)
        if settings.seconds_left < 45:
            part.notes.append(f"too little time for {name}")
            continue
        for is_compiled in (False, True):
            free_memory(settings.device)
            start = time.perf_counter()
            with tf32(True):
                learner = make_learner(
                    model, phase, settings, bfloat16=True, channels_last=True, compiled=is_compiled
                )
                learner.step(0, batch)
                synchronize(settings.device)
                first = time.perf_counter() - start
                seconds = _seconds_per_step(learner, batch, settings)
            part.rows.append(
                {
                    "model": name,
                    "compiled": "yes" if is_compiled else "no",
                    "first step, s": first,
                    "photographs/s": model.batch / seconds,
                    "peak memory, GiB": peak_gib(settings.device),
                }
            )
    return part


def batch_sizes(settings: Settings) -> Part:
    """Memory at two batches gives the largest batch; one run confirms nine tenths of it."""
    part = Part()
    if not settings.on_gpu:
        part.notes.append("needs a GPU")
        return part
    total = torch.cuda.get_device_properties(settings.device).total_memory / 2**30
    for name in ("edge_connect", "deepfill_v2", "partial_conv"):
        if settings.seconds_left < 10:
            part.notes.append(f"out of time before {name}")
            break
        model = setup(name, settings, small=False)
        phase = longest_phases(model)[0]
        small, large = model.batch, 2 * model.batch
        at_small, at_large = (_peak(model, phase, count, settings) for count in (small, large))
        per_photo = (at_large - at_small) / (large - small)
        largest = int((total - (at_small - per_photo * small)) / per_photo)
        tried = int(0.9 * largest)
        peak = _peak(model, phase, tried, settings)
        part.rows.append(
            {
                "model": name,
                "size": model.size,
                "GiB per photograph": per_photo,
                "largest batch": largest,
                "tried": tried,
                "its peak, GiB": peak,
            }
        )
        part.check(peak == peak, f"{name}: a batch of {tried} does not fit, though two points predict it")
    return part


def _peak(model: ModelSetup, phase: str, count: int, settings: Settings) -> float:
    """GiB of two steps with a batch; NaN: it does not fit."""
    few = make_batch(model, 8)
    batch = {key: np.resize(value, (count, *value.shape[1:])) for key, value in few.items()}
    free_memory(settings.device)
    try:
        learner = make_learner(model, phase, settings)
        for step in range(2):
            learner.step(step, batch)
    except torch.OutOfMemoryError:
        return float("nan")
    return peak_gib(settings.device)
