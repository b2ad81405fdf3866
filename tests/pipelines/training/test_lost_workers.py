"""What is announced of lost training workers. tests/cluster/test_faults.py kills some."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from data_prep.storage import open_storage
from pipelines.durable.steps import StepEvent, StepId
from pipelines.durable.task import ProgressActor, ProgressReporter
from pipelines.training import lost_workers
from pipelines.training.job import TrainFolders
from pipelines.training.lost_workers import AnnounceLostWorkers, announce_resume, describe_loss

GLOO = RuntimeError(
    "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.3]:33186. This is typically caused by ..."
)


def died(address: str, reason: str = "The actor is dead because its worker process has died.") -> Exception:
    """The error of a worker whose process or node has died, as Ray 2.60 writes it."""
    context = SimpleNamespace(
        class_name="RayTrainWorker",
        actor_id=bytes(16),
        pid=123,
        name="",
        ray_namespace="",
        node_ip_address=address,
        error_message=reason,
        never_started=False,
        node_death_info=None,
    )
    error: RayActorError = ActorDiedError.__new__(ActorDiedError)
    lines = [ActorDiedError.BASE_ERROR_MSG, f"\tpid: {context.pid}", f"\tip: {address}", reason]
    RayActorError.__init__(error, "0" * 32, "\n".join(lines), False, False)
    return WorkerHealthCheckFailedError("A worker health check failed.", error)


NODE_DIED = "The actor died because its node has died. Node Id: 12ab"


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        ({1: died("10.0.0.3")}, "a worker was lost (rank 1: its process on 10.0.0.3 died)"),
        ({0: GLOO, 1: died("10.0.0.3", NODE_DIED)}, "a worker was lost (rank 1: its node 10.0.0.3 died)"),
        (
            {0: died("10.0.0.3", NODE_DIED), 2: died("10.0.0.3", NODE_DIED)},
            "2 workers were lost (ranks 0, 2: its node 10.0.0.3 died)",
        ),
        ({2: GLOO, 0: GLOO}, "a worker was lost (rank 0 has no connection to it)"),
        (
            {1: OSError(28, "No space left on device")},
            "a worker failed (rank 1: the disk is full; free some space or choose another folder)",
        ),
    ],
)
def test_a_loss_is_described_in_one_line(errors: dict[int, Exception], text: str) -> None:
    assert describe_loss(errors) == text


@pytest.fixture
def mailbox() -> ProgressActor:
    return ProgressActor()


@pytest.fixture
def callback(tmp_path: Path, mailbox: ProgressActor) -> AnnounceLostWorkers:
    actor = SimpleNamespace(report=SimpleNamespace(remote=mailbox.report))
    job: Any = SimpleNamespace(
        storage=open_storage(tmp_path),
        folders=TrainFolders.within("stable", "run"),
        progress=ProgressReporter(actor, StepId("train", "one")),
    )
    return AnnounceLostWorkers(job)


def test_a_loss_is_announced_once_while_the_controller_polls_it(
    callback: AnnounceLostWorkers, mailbox: ProgressActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(lost_workers.time, "monotonic", lambda: now)
    for seconds in (0, 1, 60):
        now += seconds
        callback.after_exception(None, {1: died("10.0.0.3")})
    announce_resume(callback.job.progress, 1200, 1)
    texts = ["a worker was lost (rank 1: its process on 10.0.0.3 died)"] * 2
    texts.append("resuming from step 1200 with 1 worker")
    assert mailbox.read() == [StepEvent(StepId("train", "one"), "note", note=text) for text in texts]
    assert mailbox.read() == []


def test_an_error_that_fails_the_training_is_left_to_the_step(
    callback: AnnounceLostWorkers, mailbox: ProgressActor
) -> None:
    callback.job.storage.write(callback.job.folders.error_file, b"the loss is not finite")
    callback.after_exception(None, {1: GLOO})
    assert mailbox.read() == []


def test_in_the_controller_polls_are_not_listed_as_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(RayTrainWorker.poll_status, "__ray_enable_task_events__", raising=False)
    pickle.loads(pickle.dumps(AnnounceLostWorkers(None)))  # type: ignore[arg-type]
    assert RayTrainWorker.poll_status.__ray_enable_task_events__ is False
