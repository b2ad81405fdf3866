"""Private APIs of Ray Train 2.60 for its driver and controller; importing them does not import torch."""

from __future__ import annotations

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

__all__ = [
    "DataParallelTrainer",
    "DatasetsCallback",
    "ElasticScalingPolicy",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "ScalingConfig",
    "ScalingDecision",
    "WorkerGroupPollStatus",
    "WorkerGroupState",
    "hide_internal_calls",
]

PRIVATE_APIS: dict[str, tuple[str, str]] = {
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer": (
        "the base class of TorchTrainer, which leaves the choice of backend and callbacks to the subclass",
        "only TorchTrainer is left: each start takes a second longer, and its process group is on all networks",
    ),
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._create_default_callbacks": (
        "the list of callbacks, from which unneeded ones are removed",
        "each training run starts two more actors (seconds of a core), and waits 12 s for a dashboard at its end",
    ),
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller": (
        "accepts a scaling policy; no public API does",
        "elastic training is resized in the middle of a step and loses the work since its last checkpoint",
    ),
    "ray.train.v2.api.config.ScalingConfig": (
        "the class behind ray.train.ScalingConfig, which type checkers take for another class",
        "type checking only",
    ),
    "ray.train.v2._internal.callbacks.datasets.DatasetsCallback": (
        "removed, as no worker uses a Ray dataset",
        "one more actor per training run",
    ),
    "ray.train.v2._internal.callbacks.placement_group_callback.PlacementGroupCleanerCallback": (
        "removed if Ray ends with its driver, as nothing is left to clean up",
        "one more actor per training run, and 12 s at its end in which it looks for a dashboard",
    ),
    "ray.train.v2._internal.execution.scaling_policy.ElasticScalingPolicy": (
        "the base class of the policy that resizes at checkpoints",
        "elastic training loses the work since its last checkpoint at every resize",
    ),
    "ray.train.v2._internal.execution.scaling_policy.ElasticScalingPolicy._maybe_send_resource_request": (
        "tells Ray that the training still runs",
        "Ray gives the reserved resources to others",
    ),
    "ray.train.v2._internal.execution.scaling_policy.NoopDecision": ("the policy's answers", "no policy"),
    "ray.train.v2._internal.execution.scaling_policy.ScalingDecision": ("the policy's answers", "no policy"),
    "ray.train.v2._internal.execution.worker_group.WorkerGroupPollStatus": (
        "which ranks have reported: a checkpoint is complete when all have",
        "no policy",
    ),
    "ray.train.v2._internal.execution.worker_group.WorkerGroupState": ("the policy's argument", "no policy"),
    "ray.train.v2._internal.execution.worker_group.worker.RayTrainWorker.poll_status": (
        "the controller's question to each worker, several times a second; marked as no task to list",
        "Ray's dashboard lists tens of thousands of poll_status tasks an hour, and none of the others",
    ),
    "ray.train.v2._internal.execution.checkpoint.sync_actor.SynchronizationActor._default_options": (
        "the options of the actor that each worker calls at every log point; marked as no tasks to list",
        "as without poll_status",
    ),
}


def hide_internal_calls() -> None:
    """In a controller, before it starts workers: do not list Ray Train's own calls among the tasks in Ray's dashboard."""
    ray.method(enable_task_events=False)(RayTrainWorker.poll_status)
    SynchronizationActor._default_options["enable_task_events"] = False  # type: ignore[attr-defined]
