"""What rank 0 keeps beside a training: the means of the losses, their journal, pictures, progress."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping

import torch

from pipelines.tracking import Point, Publisher
from pipelines.training.learner import Learner
from pipelines.training.validate import Validation

LOOK = "val/psnr_rgb_hole"
SUM = 2**48  # a curve's numbers are floats


class Meter:
    """Means of the loss terms between two log points, and where the time went."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._mark: float | None = None  # when the step before ended
        self._start: float | None = None  # seconds until the first batch, told once
        self._reset()

    def _reset(self) -> None:
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._waited, self._steps, self._seen = 0.0, 0, 0

    def waited(self) -> None:
        """A batch is there; before the first one it was the start, not the data, that took its time."""
        now = time.perf_counter()
        if self._mark is None:
            self._start, self._since = now - self._since, now
        else:
            self._waited += now - self._mark

    def stepped(self) -> None:
        self._mark = time.perf_counter()

    def add(self, terms: Mapping[str, torch.Tensor], samples: Iterable[tuple[int, str]] = ()) -> None:
        """A step's terms, and the (epoch, key) of its photographs."""
        self._steps += 1
        self._seen += samples_sum(samples)
        for key, value in terms.items():
            self._terms.setdefault(key, []).append(value)

    def means(self, learner: Learner, **counts: int) -> dict[str, float]:
        """Over the steps since the last call and over the ranks; seconds are this rank's own. Counts of the data are
        summed over the ranks. `data/samples_sum` tells which photographs were seen: two trainings of the same data
        with the same curve of it have seen the same ones between the same steps, whatever their numbers of ranks."""
        names = sorted(self._terms)
        values = learner.mean(torch.stack([torch.stack(self._terms[name]).mean() for name in names])).tolist()
        elapsed = time.perf_counter() - self._since
        seconds: dict[str, float] = {}
        if self._start is not None:
            seconds |= {"seconds_to_start": self._start, "workers": float(learner.world)}
        seconds |= {"seconds_per_step": elapsed / self._steps, "data_wait": self._waited / max(elapsed, 1e-9)}
        data = {f"data/{name}": float(learner.total(count)) for name, count in counts.items()}
        data["data/samples_sum"] = float(learner.total(self._seen) % SUM)
        self._since, self._start = time.perf_counter(), None
        self._reset()
        return {f"loss/{name}": value for name, value in zip(names, values, strict=True)} | data | seconds


def samples_sum(samples: Iterable[tuple[int, str]]) -> int:
    """A sum that tells sets of (epoch, key) apart, in any order; its remainder by SUM is what curves hold."""
    return sum(zlib.crc32(f"{epoch} {key}".encode()) for epoch, key in samples)


def best_step(journal: list[Point]) -> int:
    """The first of the steps with the highest look at held-out photographs; 0 when there was none."""
    looks = [(values[LOOK], -step) for step, values in journal if LOOK in values]
    return -max(looks)[1] if looks else 0


class Bookkeeper:
    """Rank 0's clerk: the journal of the curves, MLflow, sample pictures, progress."""

    def __init__(
        self,
        learner: Learner,
        journal: list[Point],
        validation: Validation,
        publisher: Publisher | None,
        progress: Callable[[float, float, str], None] | None,
    ) -> None:
        self.learner, self.journal, self.validation = learner, journal, validation
        self.publisher, self.progress = publisher, progress
        self._published = (
            0  # after a crash the last segment may not have been sent: MLflow's last step decides
        )
        self.looked = 0  # the step of the newest look
        self._picture: tuple[str, bytes] | None = None
        self._score = float("nan")

    def note(self, done: int, means: dict[str, float]) -> None:
        self.journal.append((done, means))

    def look(self, done: int) -> None:
        """Validate, and draw what the model makes of a few held-out photographs."""
        self._score, picture = self.validation.look(self.learner)
        self.journal[-1][1][LOOK] = self._score
        self._picture = (f"samples/step-{done:08d}.png", picture)
        self.looked = done

    @property
    def best(self) -> int:
        """The step with the best look at held-out photographs so far."""
        return best_step(self.journal)

    def publish(self) -> None:
        """Send what the checkpoint now holds, and nothing that a crash could take back."""
        if self.publisher:
            self.publisher.publish(self.journal[self._published :], self._picture)
        self._published = len(self.journal)

    def show(self, done: int, total: int) -> None:
        if self.progress:
            phase = self.learner.phase.name if self.learner.phase else ""
            score = "" if self._score != self._score else f", {self._score:.2f} dB in held-out holes"
            self.progress(done, total, phase + score)

    def close(self) -> None:
        if self.publisher:
            self.publisher.close()
