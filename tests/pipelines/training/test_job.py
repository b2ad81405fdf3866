"""A worker's last words: what would only come again is said once, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from data_prep.storage import open_storage
from pipelines.durable.attempt import failure, root_cause
from pipelines.training.job import TrainJob, out_of_memory, train_worker


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        storage=open_storage(tmp_path),
        model="context_encoder",
        options={"size": 32, "width": 5000},  # terabytes of weights, which torch's allocator refuses
        shards="shards",
        edges={},
        data={"size": 32, "torch_threads": 1, "at_once": None},
        masks={"center": {}},
        edge_source="none",
        sigmas=(),
        train={"batch": 9, "tf32": False},
        seed=0,
        fatal="fatal",
    )


def test_too_little_memory_names_the_batch_and_what_to_change(job: TrainJob) -> None:
    trainer = TorchTrainer(
        train_worker, train_loop_config={"job": job}, scaling_config=ScalingConfig(num_workers=0)
    )
    with pytest.raises(Exception, match="can't allocate memory"):
        trainer.fit()
    assert job.storage.read("fatal").decode() == (
        "a worker ran out of memory with 9 photographs of 32 px at once (train.batch = 9 over 1 worker): set "
        "scaling.at_once = 4: the same batch, in parts; or more workers, or a smaller train.batch"
    )


def test_the_mend_fits_what_a_worker_holds() -> None:
    assert "with 5 photographs of 32 px" in out_of_memory(9, 32, None, 2)
    assert "set scaling.at_once = 1" in out_of_memory(9, 32, 3, 2)
    assert "lower data.size or the model's width" in out_of_memory(9, 32, 1, 2)


def test_what_ray_says_of_a_worker_it_ended_is_found_under_its_wrappings() -> None:
    ended = OutOfMemoryError("3 worker(s) were killed due to the node running low on memory")
    lost = WorkerHealthCheckFailedError("A worker health check failed.", ended)
    error = WorkerGroupError("Training failed due to worker errors", {1: lost})
    assert root_cause(error) is ended
    assert failure(error)["error"] == "its process was ended, as the machine ran out of memory"
