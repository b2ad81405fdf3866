"""Ray Train's trainer, as short a start and as little lost as a training here allows."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, cast

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.cluster.session import PRIVATE


class Trainer(DataParallelTrainer):
    """Starts fewer processes than a TorchTrainer: each of its helpers is an actor, and seconds of a core to start.

    No worker asks for a Ray dataset; and where the whole Ray ends with its driver, nothing outlives it to clean up.
    An elastic training changes its number of workers at checkpoints.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if PRIVATE.items() <= os.environ.items():
            unused += (PlacementGroupCleanerCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        scaling = cast(ScalingConfig, self.scaling_config)
        if scaling.elasticity_enabled:
            options["scaling_policy"] = AtCheckpoints(scaling)
        return super()._initialize_and_run_controller(**options)


class AtCheckpoints(ElasticScalingPolicy):
    """Ray's elastic policy, which ends the workers wherever they are, asked only where a checkpoint has just come.

    So neither more room nor a node that is about to leave costs the work since the last checkpoint: the node's end is
    announced to the workers, who leave one.
    """

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._reports: Counter[int] = Counter()  # of each rank; one is whole when all ranks have sent it
        self._seen = 0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._reports, self._seen = Counter(), 0
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        for rank, status in worker_group_status.worker_statuses.items():
            self._reports[rank] += status.training_report is not None
        whole = min(self._reports.values(), default=0)
        if whole == self._seen:
            self._maybe_send_resource_request()  # or Ray takes this training for gone
            return NoopDecision()
        self._seen = whole
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
