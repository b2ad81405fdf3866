"""Slices of an evaluation given to Ray tasks, where there are enough of them."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import torch

from data_prep.storage import Storage
from pipelines.data.fanout import run_tasks
from pipelines.evaluation.completers import completer
from pipelines.evaluation.evaluate import SCORED, Progress, in_turn
from pipelines.evaluation.slices import Completer, Slice, SliceScores, Terms, score_slice
from pipelines.training.weights import load_weights, local_folder

START = 4.0  # seconds until new processes have imported torch and loaded the models: 3 s, and some doubt


@dataclass(frozen=True)
class StoredModel:
    """A trained model that can travel: where its weights are."""

    storage: Storage
    weights: str

    def load(self) -> Completer:
        """Raises what `load_weights` raises, and StorageError."""
        with local_folder(self.storage, self.weights) as folder:
            return completer(*load_weights(folder))


Methods = tuple[tuple[str, Completer | StoredModel], ...]
"""(name, a classical method or a stored model); hashable and plain data."""


@functools.lru_cache(maxsize=1)
def opened(methods: Methods) -> dict[str, Completer]:
    """The methods with their models loaded: once a process, which scores many slices with them."""
    return {name: method.load() if isinstance(method, StoredModel) else method for name, method in methods}


@dataclass(frozen=True)
class OverTasks:
    """The slices of an evaluation of `methods` over the cluster: to the bit what `in_turn` makes of them.

    The first slice is scored in this process, and tells how long the others take. They follow it here unless as many
    at a time as the cluster has CPUs are done earlier by more than `start` seconds, in which tasks' processes start.
    """

    methods: Methods
    start: float = START

    def __call__(
        self, completers: Mapping[str, Completer], pieces: Sequence[Slice], terms: Terms, progress: Progress
    ) -> list[SliceScores]:
        first, *sizes = [len(piece.images) for piece in pieces]
        with one_thread():
            here, began = in_turn(completers, pieces, terms, progress), time.monotonic()
            parts = [next(here)]
            if not self._pays(time.monotonic() - began, len(sizes)):
                return [*parts, *here]
        shared, rest = (self.methods, terms), pieces[1:]
        found = dict(run_tasks(_score, shared, rest, sizes, progress, SCORED, first + sum(sizes)))
        return [*parts, *(found[number] for number in range(len(rest)))]

    def _pays(self, seconds: float, count: int) -> bool:
        """Whether tasks are worth it for `count` slices of so many seconds each.

        A cluster without any CPU is one that grows when tasks wait.
        """
        at_once = int(ray.cluster_resources().get("CPU", 0)) or count
        rounds = math.ceil(count / max(at_once, 1))
        return seconds * (count - rounds) > self.start


@ray.remote(num_cpus=1)
def _score(shared: tuple[Methods, Terms], piece: Slice) -> SliceScores:
    methods, terms = shared
    with one_thread():
        return score_slice(opened(methods), piece, terms)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, wherever slices are scored: the order of its sums, and so their last bits, depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
