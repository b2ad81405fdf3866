"""Fills the photographs of a large folder in Ray tasks."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from pipelines.cluster.session import ray_session
from pipelines.evaluation.batches import single_threaded
from pipelines.inference.fill_folder import FillOutcome, FillSettings, fill_here, fill_job, model_digest
from pipelines.inference.folder_plan import FillJob
from pipelines.ray_tasks import run_tasks
from pipelines.registry.load import load_model

if TYPE_CHECKING:
    from pipelines.registry.loaded_model import LoadedModel

STARTUP_SECONDS = 20.0  # until Ray runs and its processes have loaded the model: measured on two busy cores


@dataclass(frozen=True)
class ModelSource:
    """Where tasks load the model from; hashable, plain data."""

    uri: str
    """models:/NAME/VERSION, or the absolute path of a checkpoint folder."""
    tracking_uri: str

    @staticmethod
    def of(model: LoadedModel, name: str, tracking_uri: str) -> ModelSource:
        """The source of a model that was loaded by `name`; an alias that moves meanwhile does not change it."""
        is_folder = model.version is None
        uri = str(Path(name).resolve()) if is_folder else f"models:/{model.name}/{model.version}"
        return ModelSource(uri, tracking_uri)


@functools.lru_cache(maxsize=1)
def load_source(source: ModelSource) -> tuple[LoadedModel, str]:
    """The model and its digest. Cached: a process fills many photographs with it. Errors: see `load_model`."""
    model = load_model(source.uri, tracking_uri=source.tracking_uri)
    return model, model_digest(model)


@dataclass(frozen=True)
class RayFillRunner:
    """Fills photographs in Ray tasks, with the same bits as `fill_here`.

    `workers`: how many at a time. None: times the first photograph in this process, and uses as many tasks as there are
    CPUs if that saves more than `startup_seconds`. Joins the cluster at RAY_ADDRESS, whose nodes must see the same
    folders, or starts Ray on this machine.
    """

    source: ModelSource
    workers: int | None = None
    startup_seconds: float = STARTUP_SECONDS

    def __call__(
        self, model: LoadedModel, settings: FillSettings, jobs: Sequence[FillJob]
    ) -> Iterator[FillOutcome]:
        if self.workers is None:
            start = time.monotonic()
            yield from fill_here(model, settings, jobs[:1])
            jobs = jobs[1:]
            if not _saves_time(time.monotonic() - start, len(jobs), self.startup_seconds):
                yield from fill_here(model, settings, jobs)
                return

        def crashed(number: int, error: Exception) -> FillOutcome:
            if not isinstance(error, WorkerCrashedError | OutOfMemoryError):
                raise error
            return FillOutcome(jobs[number].name, error="its process died: killed, crashed, or out of memory")

        with ray_session():
            results = run_tasks(
                _fill_task,
                (self.source, settings),
                [_absolute(job) for job in jobs],
                [1] * len(jobs),
                lambda *_: None,
                "photographs",
                max_running=self.workers,
                on_error=crashed,
            )
            for number, outcome in results:
                yield _with_own_paths(outcome, jobs[number])


def _saves_time(seconds: float, count: int, startup_seconds: float) -> bool:
    """Whether tasks save more time than they need to start, for `count` photographs of `seconds` each.

    A cluster that is joined is taken to have a CPU for each photograph.
    """
    parallel = count if os.environ.get("RAY_ADDRESS") else len(os.sched_getaffinity(0))
    rounds = math.ceil(count / max(parallel, 1))
    return seconds * (count - rounds) > startup_seconds


def _absolute(job: FillJob) -> FillJob:
    """The job with paths that do not depend on a process's working folder."""
    return replace(job, photo=job.photo.absolute(), mask=job.mask.absolute(), out=job.out.absolute())


def _with_own_paths(outcome: FillOutcome, job: FillJob) -> FillOutcome:
    """The outcome of the absolute job, whose error names the files as `job` does."""
    error = outcome.error
    for path in (job.photo, job.mask, job.out):
        error = error.replace(str(path.absolute()), str(path))
    return replace(outcome, error=error)


@ray.remote(num_cpus=1, max_retries=1)  # a photograph that is too large ends its process again
def _fill_task(shared: tuple[ModelSource, FillSettings], job: FillJob) -> FillOutcome:
    source, settings = shared
    model, digest = load_source(source)
    if digest != settings.model_digest:
        raise ValueError(f"{source.uri} has changed since this command began: run it again")
    with single_threaded():
        return fill_job(model, settings, job)
