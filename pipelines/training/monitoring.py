"""What rank 0 logs: mean losses, training curves, sample images, progress."""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress

import torch

from pipelines.contracts import ProgressCallback
from pipelines.durable.task import announce
from pipelines.tracking.runs import CurvePoint, CurvePublisher
from pipelines.training.curve_warnings import curve_warnings
from pipelines.training.learner import Learner
from pipelines.training.validation_set import ValidationSet

VALIDATION_METRIC = "val/psnr_rgb_hole"
CHECKSUM_MODULUS = 2**48  # the values of curves are floats, exact up to 2**53
FINISH_TIMEOUT = 10.0  # seconds to publish the last points when training ends,
FAILURE_TIMEOUT = 2.0  # and when it fails: a new worker is waiting


class LossMeter:
    """Mean loss terms between two log points, and the time spent on steps and on waiting for data."""

    def __init__(self) -> None:
        self._interval_start = time.perf_counter()
        self._last_step_end: float | None = None
        self._startup_seconds: float | None = None  # until the first batch; reported once
        self._reset()

    def _reset(self) -> None:
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._wait_seconds, self._steps, self._checksum = 0.0, 0, 0

    def batch_ready(self) -> None:
        """Call when a batch has arrived. Time before the first batch counts as start-up, not as waiting for data."""
        now = time.perf_counter()
        if self._last_step_end is None:
            self._startup_seconds, self._interval_start = now - self._interval_start, now
        else:
            self._wait_seconds += now - self._last_step_end

    def step_done(self) -> None:
        self._last_step_end = time.perf_counter()

    def add(self, terms: Mapping[str, torch.Tensor], samples: Iterable[tuple[int, str]] = ()) -> None:
        """Add the loss terms of a step, and the (epoch, key) of its photographs."""
        self._steps += 1
        self._checksum += sample_checksum(samples)
        for key, value in terms.items():
            self._terms.setdefault(key, []).append(value)

    def means(self, learner: Learner, **counts: int) -> dict[str, float]:
        """Means over the steps since the last call and over the ranks; seconds are those of this rank.

        `counts` are summed over the ranks. `data/samples_sum` is a checksum of the photographs: if two training runs
        on the same data have the same curve of it, they trained on the same photographs between the same steps,
        whatever their numbers of ranks.
        """
        names = sorted(self._terms)
        local_means = torch.stack([torch.stack(self._terms[name]).mean() for name in names])
        values = learner.all_reduce_mean(local_means).tolist()
        elapsed = time.perf_counter() - self._interval_start
        timing: dict[str, float] = {}
        if self._startup_seconds is not None:
            timing |= {"seconds_to_start": self._startup_seconds, "workers": float(learner.world_size)}
        timing |= {
            "seconds_per_step": elapsed / self._steps,
            "data_wait": self._wait_seconds / max(elapsed, 1e-9),
        }
        data = {f"data/{name}": float(learner.all_reduce_sum(count)) for name, count in counts.items()}
        data["data/samples_sum"] = float(learner.all_reduce_sum(self._checksum) % CHECKSUM_MODULUS)
        self._interval_start, self._startup_seconds = time.perf_counter(), None
        self._reset()
        return {f"loss/{name}": value for name, value in zip(names, values, strict=True)} | data | timing


def sample_checksum(samples: Iterable[tuple[int, str]]) -> int:
    """A checksum of (epoch, key) pairs in any order; the curves hold it modulo CHECKSUM_MODULUS."""
    return sum(zlib.crc32(f"{epoch} {key}".encode()) for epoch, key in samples)


def best_step(points: list[CurvePoint]) -> int:
    """First step with the best validation score; 0 if there is no score but NaN."""
    scores = [
        (values[VALIDATION_METRIC], -step)
        for step, values in points
        if not math.isnan(values.get(VALIDATION_METRIC, math.nan))
    ]
    return -max(scores)[1] if scores else 0


class TrainMonitor:
    """What rank 0 logs: training curves, MLflow, sample images, progress.

    MLflow gets the points of a checkpoint when the checkpoint is committed: it never shows points that a crash takes
    back, and it has all that remain.
    """

    def __init__(
        self,
        learner: Learner,
        points: list[CurvePoint],
        validation: ValidationSet,
        publisher: CurvePublisher | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.learner, self.points, self.validation = learner, points, validation
        self.publisher, self.progress = publisher, progress
        self._published = -1  # the last step that was sent to MLflow
        self._commit: Future[None] | None = None
        self._picture: tuple[str, bytes] | None = None
        self._score = math.nan
        self._announced: set[tuple[str, str]] = set()  # (metric, phase) of the warnings so far

    def record(self, step: int, means: dict[str, float]) -> None:
        """Add a point to the curves."""
        self.points.append((step, means))

    def validate(self, step: int) -> None:
        """Validate, and draw completions of a few validation photographs. Call `record` for this step before."""
        last_step, values = self.points[-1]
        if last_step != step:
            raise ValueError(f"validation at step {step}, but the last recorded step is {last_step}")
        self._score, picture = self.validation.evaluate(self.learner)
        values[VALIDATION_METRIC] = self._score
        scores = self.validation.edge_scores(self.learner)
        values.update({f"val/{name}": score for name, score in scores.items()})
        self._announce_warnings()
        self._picture = (f"samples/step-{step:08d}.png", picture)

    def _announce_warnings(self) -> None:
        """Tell the person who follows the run what the curves say, each finding once."""
        spans = [(phase.name, start, end) for phase, start, end in self.learner.schedule.phase_spans]
        for warning in curve_warnings(self.points, spans):
            if (warning.metric, warning.phase) not in self._announced:
                announce(self.progress, f"warning: {warning.text} (see docs/troubleshooting.md)")
                self._announced.add((warning.metric, warning.phase))

    @property
    def best_step(self) -> int:
        """The step with the best validation score so far."""
        return best_step(self.points)

    def publish_on_commit(
        self, step: int, is_committed: Callable[[int], bool], keep_best: Callable[[int], None]
    ) -> None:
        """In a thread, once the checkpoint of `step` is committed: keep it if it is the best so far, publish its points.

        `is_committed` waits until all checkpoints are committed, and returns whether this one is among them.
        """
        is_best, picture = self.best_step == step, self._picture

        def publish() -> None:
            if is_committed(step):
                if is_best:
                    keep_best(step)
                self._publish(step, picture)

        self.wait_until_published()
        self._commit = _in_background(publish)

    def wait_until_published(self, timeout: float | None = None) -> None:
        """Wait for the thread of `publish_on_commit`; raises its error, or TimeoutError after `timeout` seconds."""
        if self._commit:
            self._commit.result(timeout)
            self._commit = None

    def _publish(self, step: int, picture: tuple[str, bytes] | None) -> None:
        points = [
            (point_step, dict(values))
            for point_step, values in self.points
            if self._published < point_step <= step
        ]
        self._published = step
        if self.publisher:
            self.publisher.publish(points, picture)

    def report_progress(self, step: int, total: int) -> None:
        if self.progress:
            phase = self.learner.phase.name if self.learner.phase else ""
            score = "" if math.isnan(self._score) else f", {self._score:.2f} dB in held-out holes"
            self.progress(step, total, phase + score)

    def __enter__(self) -> TrainMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publish what is committed in time; the other points are logged from the last checkpoint, or on resuming."""
        timeout = FINISH_TIMEOUT if kind is None else FAILURE_TIMEOUT
        with suppress(Exception):  # must not mask the error that ended the training
            self.wait_until_published(timeout)
        if self.publisher:
            self.publisher.close(timeout)


def _in_background(work: Callable[[], None]) -> Future[None]:
    """Run in a daemon thread: the commit that it waits for may never come, and the process must be able to end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="commit", daemon=True).start()
    return future
