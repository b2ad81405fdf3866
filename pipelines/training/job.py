"""The arguments of a training worker. Cheap to import: Ray Train's controller imports it, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.storage import Storage
from pipelines.contracts import DataLoading, FolderKey, ProgressCallback, TrainConfig
from pipelines.tracking_address import Tracking


@dataclass(frozen=True)
class WorkerCompute:
    """Micro-batch size and threads of one worker."""

    micro_batch_size: int | None = None
    """photographs per forward pass; None: the worker's whole batch"""
    torch_threads: int = 1


@dataclass(frozen=True)
class TrainFolders:
    """Paths in the storage of the files that outlive the workers of a training run."""

    checkpoints: FolderKey
    """written by Ray Train"""
    best: FolderKey
    """a copy of the checkpoint with the best validation score, which Ray Train would delete"""
    error_file: str
    """message of an error that a retry cannot fix, written by the worker that met it"""

    @staticmethod
    def within(persistent_folder: FolderKey, run_name: str) -> TrainFolders:
        """The folders of the training run `run_name` in a step's persistent folder."""
        return TrainFolders(
            f"{persistent_folder}/{run_name}", f"{persistent_folder}/best", f"{persistent_folder}/fatal"
        )


@dataclass(frozen=True)
class TrainJob:
    """All that a training worker needs; picklable, without credentials."""

    config: TrainConfig
    storage: Storage
    shards: FolderKey
    folders: TrainFolders
    edges: dict[float, FolderKey] = field(default_factory=dict)
    """sigma -> folder of its edge tars"""
    max_unreadable: int = 0
    loading: DataLoading = field(default_factory=DataLoading)
    compute: WorkerCompute = field(default_factory=WorkerCompute)
    resume_from: FolderKey | None = None
    """Folder of the state at the end of an earlier part of the schedule; None: start at step 0."""
    run_id: str = ""
    """MLflow run of the step, or ''"""
    tracking: Tracking | None = None
    progress: ProgressCallback | None = field(default=None, compare=False)

    def out_of_memory_advice(self, workers: int | Sequence[int]) -> str:
        """What to change when a worker's photographs do not fit in memory."""
        return out_of_memory_advice(
            self.config.train.batch, self.config.size, self.compute.micro_batch_size, workers
        )


def out_of_memory_advice(
    batch_size: int, size: int, micro_batch_size: int | None, workers: int | Sequence[int]
) -> str:
    """What to change when a worker's photographs do not fit in memory. `workers`: a number, or [min, max]."""
    # with the fewest workers, each holds the most photographs
    workers = workers if isinstance(workers, int) else workers[0]
    photos_per_pass = min(-(-batch_size // workers), micro_batch_size or batch_size)
    half = max(1, photos_per_pass // 2)
    remedy = (
        f"set scaling.micro_batch_size = {half} (accumulates gradients, same batch)"
        if photos_per_pass > 1
        else "lower data.size or the model's width"
    )
    return (
        f"a worker ran out of memory with {photos_per_pass} photographs of {size} px at once (train.batch = {batch_size} "
        f"over {workers} worker{'s' if workers > 1 else ''}): {remedy}; or more workers, or a smaller train.batch"
    )
