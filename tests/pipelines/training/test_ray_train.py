"""The trainer starts only the processes that it needs, and resizes only at checkpoints."""

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

from pipelines.cluster.session import SINGLE_NODE_ENV_VARS
from pipelines.training.process_group import ProcessGroupConfig
from pipelines.training.ray_train import FastStartTrainer, ResizeAtCheckpoints


@pytest.mark.parametrize("private", [True, False])
def test_unused_helper_actors_are_not_started(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SINGLE_NODE_ENV_VARS.items():
        monkeypatch.setenv(key, value if private else "")
    trainer = FastStartTrainer(
        lambda: None, backend_config=ProcessGroupConfig("gloo"), scaling_config=ScalingConfig(num_workers=1)
    )
    names = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert "DatasetsCallback" not in names
    assert ("PlacementGroupCleanerCallback" in names) == (not private)
    assert {"BackendSetupCallback", "AcceleratorSetupCallback"} <= names


@pytest.mark.parametrize(("workers", "policies"), [((1, 2), [ResizeAtCheckpoints]), (2, [])])
def test_only_elastic_training_has_its_own_scaling_policy(
    workers: Any, policies: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(
        DataParallelTrainer, "_initialize_and_run_controller", lambda self, **options: passed.update(options)
    )
    trainer = FastStartTrainer(
        lambda: None,
        backend_config=ProcessGroupConfig("gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
    )
    trainer._initialize_and_run_controller()
    assert [type(policy) for policy in passed.values()] == policies


@pytest.mark.slow
def test_the_modules_of_the_controller_do_not_import_torch() -> None:
    modules = ", ".join(f"pipelines.training.{name}" for name in ("process_group", "job", "ray_train"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class Elastic(ResizeAtCheckpoints):
    """Without a cluster; `free_slots` is the number of workers for which there are resources."""

    def __init__(self, free_slots: int) -> None:
        super().__init__(
            ScalingConfig(
                num_workers=(1, 4), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=1
            )  # type: ignore[arg-type, call-arg]
        )
        self.free_slots, self.requests = free_slots, 0

    def _get_reserved_resources(self) -> Any:
        return {"node": {"CPU": self.free_slots}}

    def _maybe_send_resource_request(self) -> None:
        self.requests += 1

    def poll(self, *reported: bool) -> Any:
        """Decide as the controller does after a poll of its workers, some of which have reported."""
        report = _TrainingReport(checkpoint=None, metrics={}, validation=False)
        statuses = {
            rank: WorkerStatus(running=True, training_report=report if sent else None)
            for rank, sent in enumerate(reported)
        }
        state: Any = SimpleNamespace(start_time=float("-inf"), num_workers=len(reported))
        return self.make_decision_for_running_worker_group(state, WorkerGroupPollStatus(statuses))


@pytest.mark.parametrize("free_slots", [1, 3])
def test_elastic_training_resizes_right_after_a_checkpoint_of_all_ranks(free_slots: int) -> None:
    policy = Elastic(free_slots)
    decisions = [policy.poll(False, False), policy.poll(True, False), policy.poll(False, False)]
    assert decisions == [NoopDecision()] * 3
    assert policy.requests == 3  # without new requests, Ray gives the resources to others
    assert policy.poll(False, True) == ResizeDecision(num_workers=free_slots, resources_per_worker={"CPU": 1})


def test_reports_of_a_lost_worker_group_are_forgotten() -> None:
    policy = Elastic(2)
    assert policy.poll(True, False) == NoopDecision()
    assert policy.make_decision_for_non_running_worker_group() == ResizeDecision(2, {"CPU": 1})
    policy.free_slots = 1
    assert policy.poll(False, True) == NoopDecision()
    assert policy.poll(True, False) == ResizeDecision(1, {"CPU": 1})
