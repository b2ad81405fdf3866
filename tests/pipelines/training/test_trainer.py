"""The processes that a training starts: those it has a use for."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.cluster.session import PRIVATE
from pipelines.training.rendezvous import Rendezvous
from pipelines.training.trainer import AtCheckpoints, Trainer


@pytest.mark.parametrize("private", [True, False])
def test_helpers_that_nobody_asks_are_not_started(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in PRIVATE.items():
        monkeypatch.setenv(key, value if private else "")
    trainer = Trainer(
        lambda: None, backend_config=Rendezvous("gloo"), scaling_config=ScalingConfig(num_workers=1)
    )
    names = {type(each).__name__ for each in trainer._create_default_callbacks()}
    assert "DatasetsCallback" not in names
    assert ("PlacementGroupCleanerCallback" in names) == (not private)
    assert {"BackendSetupCallback", "AcceleratorSetupCallback"} <= names


@pytest.mark.parametrize(("workers", "asked"), [((1, 2), [AtCheckpoints]), (2, [])])
def test_only_an_elastic_training_has_its_own_policy(
    workers: Any, asked: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        DataParallelTrainer, "_initialize_and_run_controller", lambda self, **options: given.update(options)
    )
    trainer = Trainer(
        lambda: None, backend_config=Rendezvous("gloo"), scaling_config=ScalingConfig(num_workers=workers)
    )
    trainer._initialize_and_run_controller()
    assert [type(policy) for policy in given.values()] == asked


def test_what_the_controller_reads_needs_no_torch() -> None:
    modules = ", ".join(f"pipelines.training.{name}" for name in ("rendezvous", "job", "trainer"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class Elastic(AtCheckpoints):
    """Without a cluster: it has room for as many workers as it is told."""

    def __init__(self, room: int) -> None:
        super().__init__(
            ScalingConfig(
                num_workers=(1, 4), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=1
            )  # type: ignore[arg-type, call-arg]
        )
        self.room, self.requests = room, 0

    def _get_reserved_resources(self) -> Any:
        return {"node": {"CPU": self.room}}

    def _maybe_send_resource_request(self) -> None:
        self.requests += 1

    def look(self, *reported: bool) -> Any:
        """As the controller does after each poll of its workers, some of which have reported."""
        report = _TrainingReport(checkpoint=None, metrics={}, validation=False)
        statuses = {
            rank: WorkerStatus(running=True, training_report=report if sent else None)
            for rank, sent in enumerate(reported)
        }
        state: Any = SimpleNamespace(start_time=float("-inf"), num_workers=len(reported))
        return self.make_decision_for_running_worker_group(state, WorkerGroupPollStatus(statuses))


@pytest.mark.parametrize("room", [1, 3])
def test_an_elastic_training_changes_its_workers_right_after_a_checkpoint_of_all_ranks(room: int) -> None:
    policy = Elastic(room)
    looks = [policy.look(False, False), policy.look(True, False), policy.look(False, False)]
    assert looks == [NoopDecision()] * 3
    assert policy.requests == 3  # what is not asked for any more is given to others
    assert policy.look(False, True) == ResizeDecision(num_workers=room, resources_per_worker={"CPU": 1})


def test_what_a_lost_worker_had_not_reported_is_forgotten() -> None:
    policy = Elastic(2)
    assert policy.look(True, False) == NoopDecision()
    assert policy.make_decision_for_non_running_worker_group() == ResizeDecision(2, {"CPU": 1})
    policy.room = 1
    assert policy.look(False, True) == NoopDecision()
    assert policy.look(True, False) == ResizeDecision(1, {"CPU": 1})
