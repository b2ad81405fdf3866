"""Permanent errors of a training worker are reported once, in one line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from data_prep.storage import open_storage
from pipelines import recipe
from pipelines.contracts import TrainConfig, TrainSchedule
from pipelines.durable.task import root_cause, to_attempt_error
from pipelines.training.job import TrainFolders, TrainJob, out_of_memory_advice
from pipelines.training.worker import train_worker


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    train = recipe.Train(batch=9)
    config = TrainConfig(
        model="context_encoder",
        options={"size": 32, "width": 5000},  # terabytes of weights, which torch's allocator refuses
        seed=0,
        size=32,
        flip=True,
        streams=1,
        masks={"center": {}},
        edge_source="none",
        sigma=(),
        train=TrainSchedule(**{f.name: getattr(train, f.name) for f in fields(TrainSchedule)}),
    )
    return TrainJob(config, open_storage(tmp_path), "shards", TrainFolders("checkpoints", "best", "fatal"))


def test_too_little_memory_names_the_batch_and_what_to_change(job: TrainJob) -> None:
    trainer = TorchTrainer(
        train_worker, train_loop_config={"job": job}, scaling_config=ScalingConfig(num_workers=0)
    )
    with pytest.raises(Exception, match="can't allocate memory"):
        trainer.fit()
    assert job.storage.read("fatal").decode() == (
        "a worker ran out of memory with 9 photographs of 32 px at once (train.batch = 9 over 1 worker): set "
        "scaling.micro_batch_size = 4 (accumulates gradients, same batch); or more workers, or a smaller train.batch"
    )


def test_the_advice_depends_on_the_photographs_per_worker() -> None:
    assert "with 5 photographs of 32 px" in out_of_memory_advice(9, 32, None, 2)
    assert "set scaling.micro_batch_size = 1" in out_of_memory_advice(9, 32, 3, 2)
    assert "lower data.size or the model's width" in out_of_memory_advice(9, 32, 1, 2)


def test_rays_out_of_memory_error_is_found_inside_its_wrappers() -> None:
    ended = OutOfMemoryError("3 worker(s) were killed due to the node running low on memory")
    lost = WorkerHealthCheckFailedError("A worker health check failed.", ended)
    error = WorkerGroupError("Training failed due to worker errors", {1: lost})
    assert root_cause(error) is ended
    assert to_attempt_error(error).message == "its process was killed: the machine ran out of memory"
