"""Training with batches from the stream: where the time of a step goes, the stream alone, and a minute of training."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.stream import BatchStream
from gpu.fast import WARM_UP_STEPS, longest_phases, make_learner
from gpu.kit import ModelSetup, Part, Settings, random_crop, setup, synchronize, tf32
from pipelines.training.learner import Learner


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
        for optimizer in learner.optimizers.values():
            del optimizer.step


def split(settings: Settings) -> Part:
    """Where the time of a step goes, with batches from the stream."""
    part = Part()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("edge_connect", "deepfill_v2"):
            model = setup(name, settings, small=False)
            stream = _stream(model, Path(folder, name), settings)
            phase = longest_phases(model)[0]
            learner = make_learner(model, phase, settings, channels_last=True)
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
        learner = make_learner(model, "inpaint_canny", settings, bfloat16=settings.on_gpu, channels_last=True)
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
