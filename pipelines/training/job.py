"""What Ray Train carries to its workers. Light to import: its controller has to, and needs no torch models for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    checkpoints: str = ""  # folders of the storage: where Ray Train keeps them,
    best: str = ""  # and where the one with the best look at held-out photographs stays


def train_worker(config: dict[str, Any]) -> None:
    """What every rank runs, unless an earlier worker group met an error that would only come again."""
    from pipelines.durable.attempt import FINAL, failure
    from pipelines.training.train import learn

    job: TrainJob = config["job"]
    if job.storage.exists(job.fatal):
        return
    try:
        learn(job)
    except FINAL as error:
        job.storage.create(job.fatal, failure(error)["error"].encode())
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            import ray.train

            workers = ray.train.get_context().get_world_size()
            train, data = job.train, job.data
            words = out_of_memory(train["batch"], data["size"], data["at_once"], workers)
            job.storage.create(job.fatal, words.encode())
        raise


NO_MEMORY = ("out of memory", "can't allocate memory")  # CUDA's words, and those of torch's allocator on CPUs


def out_of_memory(batch: int, size: int, at_once: int | None, workers: int | Sequence[int]) -> str:
    """What to do when a worker's photographs do not fit; of [least, most] workers the least hold the most."""
    workers = workers if isinstance(workers, int) else workers[0]
    held = min(-(-batch // workers), at_once or batch)
    half = max(1, held // 2)
    mend = (
        f"set scaling.at_once = {half}: the same batch, in parts"
        if held > 1
        else "lower data.size or the model's width"
    )
    return (
        f"a worker ran out of memory with {held} photographs of {size} px at once (train.batch = {batch} "
        f"over {workers} worker{'s' if workers > 1 else ''}): {mend}; or more workers, or a smaller train.batch"
    )
