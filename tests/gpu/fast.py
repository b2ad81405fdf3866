"""How fast is training? Photographs per second and memory of the papers' recipes, and where the time of a step goes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.stream import BatchStream
from gpu.kit import (
    MODELS,
    ModelSetup,
    Part,
    Settings,
    free_memory,
    make_batch,
    peak_gib,
    random_crop,
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


def _learner(model: ModelSetup, phase_name: str, settings: Settings, **options: Any) -> Learner:
    """A learner that stays in one phase."""
    network = model.build(settings.device)
    phase = network.phase(phase_name)
    return Learner(network, Schedule(((phase, 0, 10**9),)), 0, device=settings.device, **options)


def _longest_phases(model: ModelSetup, count: int = 1) -> list[str]:
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
        for phase in _longest_phases(model, 2 if name == "edge_connect" else 1):
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
            learner = _learner(model, phase, settings, **options)
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
        (phase,) = _longest_phases(model)
        if settings.seconds_left < 45:
            part.notes.append(f"too little time for {name}")
            continue
        for is_compiled in (False, True):
            free_memory(settings.device)
            start = time.perf_counter()
            with tf32(True):
                learner = _learner(
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


class _Timer:
    """Adds up the time of kinds of work, on the GPU's own clock where there is one."""

    def __init__(self, settings: Settings) -> None:
        self.on_gpu = settings.on_gpu
        self.spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = self._now()
            result = function(*arguments, **options)
            self.spans.append((kind, start, self._now()))
            return result

        return timed

    def milliseconds(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for kind, start, end in self.spans:
            elapsed = start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)
            sums[kind] = sums.get(kind, 0.0) + elapsed
        return sums


@contextmanager
def _timed(learner: Learner, timer: _Timer) -> Iterator[None]:
    """Within it the parts of each step of this learner are timed."""
    model: Any = learner.model
    methods = (
        (learner, "_to_device", "batch to the device"),
        (learner, "_generate", "forward"),
        (model, "discriminator_losses", "forward"),
        (model, "generator_losses", "forward"),
    )
    for owner, name, kind in methods:
        setattr(owner, name, timer.wrap(kind, getattr(owner, name)))
    backward = torch.Tensor.backward
    torch.Tensor.backward = timer.wrap("backward", backward)  # type: ignore[method-assign]
    for optimizer in learner.optimizers.values():
        optimizer.step = timer.wrap("optimizer", optimizer.step)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        for owner, name, _ in methods:
            delattr(owner, name)


def split(settings: Settings) -> Part:
    """Where the time of a step goes, with batches from the stream."""
    part = Part()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("edge_connect", "deepfill_v2"):
            model = setup(name, settings, small=False)
            stream = _stream(model, Path(folder, name), settings)
            phase = _longest_phases(model)[0]
            learner = _learner(model, phase, settings, channels_last=True)
            steps = 4 if settings.toy else 20
            timer, waiting, start = _Timer(settings), 0.0, 0.0
            with tf32(True):
                batches = stream.iter_batches(0, steps + WARM_UP_STEPS)
                for step in range(steps + WARM_UP_STEPS):
                    before = time.perf_counter()
                    batch = next(batches).as_dict()
                    if step == WARM_UP_STEPS:
                        synchronize(settings.device)
                        start, before = time.perf_counter(), time.perf_counter()
                    if step < WARM_UP_STEPS:
                        learner.step(step, batch)
                        continue
                    waiting += time.perf_counter() - before
                    with _timed(learner, timer):
                        learner.step(step, batch)
                synchronize(settings.device)
            total = (time.perf_counter() - start) / steps
            sums = {f"{kind}, ms": value / steps for kind, value in timer.milliseconds().items()}
            part.rows.append(
                {
                    "model": name,
                    "phase": phase,
                    "step, ms": 1000 * total,
                    **sums,
                    "waiting for data, ms": 1000 * waiting / steps,
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
        phase = _longest_phases(model)[0]
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
        learner = _learner(model, phase, settings)
        for step in range(2):
            learner.step(step, batch)
    except torch.OutOfMemoryError:
        return float("nan")
    return peak_gib(settings.device)


def _stream(model: ModelSetup, folder: Path, settings: Settings, threads: int = 0) -> BatchStream:
    """A stream over shards of crops of the photographs."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(16 if settings.toy else 256):
        cv2.imwrite(str(photos / f"{number}.jpg"), random_crop(model.size, rng)[..., ::-1])
    source, shards = open_source(str(photos)), open_storage(folder / "shards")
    options = ShardOptions(size=model.size, val=0, test=0)
    partitions, _ = plan_shards(source, shards, options, 64)
    results = [write_partition(source, partition, shards, options) for partition in partitions]
    manifest = merge_partitions(results, options, source.uri, shards)
    edges = shards.subfolder("edges/sigma-2")
    entries = [write_edge_tars(shards, entry, {2.0: edges})[2.0] for entry in manifest.shards]
    write_edge_manifest(entries, 2.0, manifest.digest, edges)
    return BatchStream(
        shards,
        "train",
        size=model.size,
        batch_size=model.batch,
        masks=model.masks,
        edges={2.0: edges},
        edge_source="full",
        threads=threads or min(8, os.cpu_count() or 1),
    )


def stream(settings: Settings) -> Part:
    """Photographs per second of the stream alone, by threads, on this machine's cores."""
    part = Part()
    model = setup("edge_connect", settings, small=False)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1,) if settings.toy else sorted({1, 4, cores}):
            batches = _stream(model, Path(folder, str(threads)), settings, threads)
            count = 2 if settings.toy else 64
            start = time.perf_counter()
            for _ in batches.iter_batches(0, count):
                pass
            elapsed = time.perf_counter() - start
            part.rows.append(
                {
                    "size": model.size,
                    "threads": threads,
                    "cores": cores,
                    "photographs/s": count * model.batch / elapsed,
                }
            )
    return part


def minute(settings: Settings) -> Part:
    """A minute of edge_connect at the paper's width: do its losses fall?"""
    part = Part()
    model = setup("edge_connect", settings, small=False)
    seconds = 1.0 if settings.toy else min(60.0, max(10.0, settings.seconds_left - 5))
    with tempfile.TemporaryDirectory() as folder, tf32(True):
        batches = _stream(model, Path(folder), settings)
        learner = _learner(model, "inpaint_canny", settings, bfloat16=settings.on_gpu, channels_last=True)
        values: list[float] = []
        start = time.perf_counter()
        for step, batch in enumerate(batches.iter_batches(0, 10**6)):
            values.append(float(learner.step(step, batch.as_dict())["l1"]))
            if time.perf_counter() - start > seconds and len(values) >= 8:
                break
        elapsed = time.perf_counter() - start
    quarter = max(1, len(values) // 4)
    first, last = float(np.mean(values[:quarter])), float(np.mean(values[-quarter:]))
    part.rows.append(
        {
            "steps": len(values),
            "photographs/s": len(values) * model.batch / elapsed,
            "l1, first quarter": first,
            "l1, last quarter": last,
        }
    )
    if not settings.toy:
        part.check(last < first, f"l1 does not fall in {seconds:.0f} s: {first:.4f} to {last:.4f}")
    return part
