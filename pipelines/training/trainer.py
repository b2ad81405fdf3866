"""Ray Train's trainer, with what a training here has no use for left out: its start is most of a short trial."""

from __future__ import annotations

import os
from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.cluster.session import PRIVATE


class Trainer(DataParallelTrainer):
    """Starts fewer processes than a TorchTrainer: each of its helpers is an actor, and seconds of a core to start.

    No worker asks for a Ray dataset; and where the whole Ray ends with its driver, nothing outlives it to clean up.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if PRIVATE.items() <= os.environ.items():
            unused += (PlacementGroupCleanerCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]
