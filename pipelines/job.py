"""What Ray Train carries to its workers. Light to import: its controller has to, and needs no torch models for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_prep.storage import Storage
from pipelines.tracking import Tracking


@dataclass(frozen=True)
class TrainJob:
    """All that a training worker needs; picklable, and free of credentials."""

    storage: Storage
    model: str
    options: dict[str, Any]
    shards: str
    edges: dict[float, str]
    data: dict[str, Any]  # size, flip, streams, threads
    masks: dict[str, Any]
    edge_source: str
    sigmas: tuple[float, ...]
    train: dict[str, Any]  # the recipe's section
    seed: int
    until: int | None = None
    """End after this step of the schedule; None: at its end."""
    start: str = ""
    """The state.pt and journal.json of an earlier part of the schedule are in this folder of the storage."""
    run: str = ""  # MLflow's child run
    tracking: Tracking | None = None
    progress: Callable[[float, float, str], None] | None = field(default=None, compare=False)
    fatal: str = ""  # where a worker says why going on is useless


def train_worker(config: dict[str, Any]) -> None:
    """What every rank runs, unless an earlier worker group met an error that would only come again."""
    from pipelines.attempt import FINAL, failure
    from pipelines.train import learn

    job: TrainJob = config["job"]
    if job.storage.exists(job.fatal):
        return
    try:
        learn(job)
    except FINAL as error:
        job.storage.create(job.fatal, failure(error)["error"].encode())
        raise
