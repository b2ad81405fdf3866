"""Ends the runs below a run that has ended: their processes died, or were cancelled before they could."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
ERROR_TAG = "inpaint.error"  # why a run ended without success


def end_descendants(client: MlflowClient, run_id: str) -> None:
    """End the RUNNING children of a run, and theirs, as KILLED. `open_run` continues them later."""
    experiment = client.get_run(run_id).info.experiment_id
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=10_000)
    ended = [run_id]
    for parent in ended:
        for run in running:
            if run.data.tags.get(PARENT_TAG) == parent:
                ended.append(run.info.run_id)
                client.set_tag(run.info.run_id, ERROR_TAG, "still running when its parent run ended")
                client.set_terminated(run.info.run_id, "KILLED")
