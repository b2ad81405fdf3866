"""What rank 0 keeps beside a training: the means of the losses, their journal, pictures, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from pipelines.learner import Learner
from pipelines.tracking import Point, Publisher
from pipelines.validate import Validation


class Meter:
    """Means of the loss terms between two log points, and where the time went."""

    def __init__(self) -> None:
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._mark, self._waited, self._steps, self._since = time.perf_counter(), 0.0, 0, time.perf_counter()

    def waited(self) -> None:
        self._waited += time.perf_counter() - self._mark

    def stepped(self) -> None:
        self._mark = time.perf_counter()

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        self._steps += 1
        for key, value in terms.items():
            self._terms.setdefault(key, []).append(value)

    def means(self, learner: Learner, **counts: int) -> dict[str, float]:
        """Over the steps since the last call and over the ranks; seconds are this rank's own. Counts of the data are
        summed over the ranks."""
        names = sorted(self._terms)
        values = learner.mean(torch.stack([torch.stack(self._terms[name]).mean() for name in names])).tolist()
        elapsed = time.perf_counter() - self._since
        seconds = {"seconds_per_step": elapsed / self._steps, "data_wait": self._waited / max(elapsed, 1e-9)}
        totals = (
            learner.mean(torch.tensor(list(counts.values()), device=learner.device).float()) * learner.world
        )
        data = {f"data/{name}": value for name, value in zip(counts, totals.tolist(), strict=True)}
        self.__init__()  # type: ignore[misc]
        return {f"loss/{name}": value for name, value in zip(names, values, strict=True)} | data | seconds


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
        self._picture: tuple[str, bytes] | None = None
        self._score = float("nan")

    def note(self, done: int, means: dict[str, float]) -> None:
        self.journal.append((done, means))

    def look(self, done: int) -> None:
        """Validate, and draw what the model makes of a few held-out photographs."""
        self._score, picture = self.validation.look(self.learner)
        self.journal[-1][1]["val/psnr_rgb_hole"] = self._score
        self._picture = (f"samples/step-{done:08d}.png", picture)

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
