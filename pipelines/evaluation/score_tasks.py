"""Scores the batches of a large evaluation in Ray tasks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from data_prep.storage import Storage
from pipelines.contracts import ProgressCallback
from pipelines.evaluation.batches import BatchScores, EvalBatch, ScoringConfig, score_batch, single_threaded
from pipelines.evaluation.evaluate import SCORED_NOTE, run_sequentially
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.evaluation.model_methods import model_method
from pipelines.ray_tasks import run_tasks
from pipelines.weights import as_local_folder, load_weights

STARTUP_SECONDS = 4.0  # for a new process to import torch and load the models: 3 s measured, plus a margin


@dataclass(frozen=True)
class CheckpointRef:
    """A reference to a trained model that can be sent to a task: where its weights are."""

    storage: Storage
    weights: str

    def load(self) -> InpaintingMethod:
        """Raises the errors of `load_weights`, and StorageError."""
        with as_local_folder(self.storage, self.weights) as folder:
            return model_method(*load_weights(folder))


MethodSpecs = tuple[tuple[str, InpaintingMethod | CheckpointRef], ...]
"""(name, classical method or reference to a model); hashable, plain data."""


@functools.lru_cache(maxsize=1)
def load_methods(specs: MethodSpecs) -> dict[str, InpaintingMethod]:
    """The methods with their models loaded. Cached: a process scores many batches with them."""
    return {name: method.load() if isinstance(method, CheckpointRef) else method for name, method in specs}


@dataclass(frozen=True)
class RayBatchRunner:
    """Scores batches in Ray tasks if that saves time; the result has the same bits as that of `run_sequentially`.

    Times the first batch in this process. Uses Ray tasks for the rest only if that saves more than `startup_seconds`.
    """

    specs: MethodSpecs
    startup_seconds: float = STARTUP_SECONDS

    def __call__(
        self,
        methods: Mapping[str, InpaintingMethod],
        batches: Sequence[EvalBatch],
        config: ScoringConfig,
        progress: ProgressCallback,
    ) -> list[BatchScores]:
        first, *sizes = [len(batch.images) for batch in batches]
        with single_threaded():
            results, start = run_sequentially(methods, batches, config, progress), time.monotonic()
            scored = [next(results)]
            if not self._saves_time(time.monotonic() - start, len(sizes)):
                return [*scored, *results]
        shared, remaining = (self.specs, config), batches[1:]
        by_number = dict(
            run_tasks(_score_task, shared, remaining, sizes, progress, SCORED_NOTE, first + sum(sizes))
        )
        return [*scored, *(by_number[number] for number in range(len(remaining)))]

    def _saves_time(self, seconds: float, count: int) -> bool:
        """Whether tasks save more time than they need to start, for `count` batches of `seconds` each.

        A cluster without CPUs is taken for one that grows when tasks wait.
        """
        parallel = int(ray.cluster_resources().get("CPU", 0)) or count
        rounds = math.ceil(count / max(parallel, 1))
        return seconds * (count - rounds) > self.startup_seconds


@ray.remote(num_cpus=1)
def _score_task(shared: tuple[MethodSpecs, ScoringConfig], batch: EvalBatch) -> BatchScores:
    specs, config = shared
    with single_threaded():
        return score_batch(load_methods(specs), batch, config)
