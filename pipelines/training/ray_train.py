"""Ray Train's trainer with a faster start, and resizing only at checkpoints."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, cast

from pipelines.cluster.session import SINGLE_NODE_ENV_VARS
from pipelines.private.ray_train import (
    DataParallelTrainer,
    DatasetsCallback,
    ElasticScalingPolicy,
    NoopDecision,
    PlacementGroupCleanerCallback,
    ScalingConfig,
    ScalingDecision,
    WorkerGroupPollStatus,
    WorkerGroupState,
)


class FastStartTrainer(DataParallelTrainer):
    """Starts fewer processes than TorchTrainer: each of its helpers is an actor that takes seconds of a core to start.

    Workers use no Ray datasets; and if Ray ends with its driver, nothing is left to clean up. Elastic training changes
    its number of workers at checkpoints.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if SINGLE_NODE_ENV_VARS.items() <= os.environ.items():
            unused += (PlacementGroupCleanerCallback,)
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)
        ]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        scaling = cast(ScalingConfig, self.scaling_config)
        if scaling.elasticity_enabled:
            options["scaling_policy"] = ResizeAtCheckpoints(scaling)
        return super()._initialize_and_run_controller(**options)


class ResizeAtCheckpoints(ElasticScalingPolicy):
    """Ray's elastic policy, which ends the workers to resize, consulted only right after a checkpoint of all ranks.

    So no work is lost when resources become free or a node is about to leave: for a leaving node, Ray notifies the
    workers, and they write a checkpoint first.
    """

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        # per rank; a checkpoint is complete when all ranks have reported it
        self._reports: Counter[int] = Counter()
        self._handled = 0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._reports, self._handled = Counter(), 0
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        for rank, status in worker_group_status.worker_statuses.items():
            self._reports[rank] += status.training_report is not None
        complete = min(self._reports.values(), default=0)
        if complete == self._handled:
            self._maybe_send_resource_request()  # otherwise Ray assumes that this training is gone
            return NoopDecision()
        self._handled = complete
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
