"""A registry with many versions, for the benchmarks of look-ups."""

from __future__ import annotations

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric

from data_prep.masks import HOLE_AREA_BANDS
from models import build_model
from pipelines import registry
from pipelines.evaluation.metrics import METRIC_DEFINITIONS
from pipelines.registry.client import registry_client
from pipelines.registry.searching import SCORES_TAG, scores_json

VERSIONS = 500


def create_versions(uri: str, count: int = VERSIONS) -> None:
    """Five models with `count` versions in total; each version has scores for two mask kinds in every band."""
    rng = np.random.default_rng(0)
    MlflowClient(uri).search_experiments()  # creates the tables of a new file
    with registry_client(uri) as client:
        experiment = client.create_experiment("benchmark")
        names = ["facades", *(f"model-{number}" for number in range(4))]
        columns = [
            f"{masks}/{band}/{name}"
            for masks in ("center", "brush")
            for band in HOLE_AREA_BANDS
            for name in METRIC_DEFINITIONS
        ]
        columns += [
            f"{masks}/{name}" for masks in ("center", "brush") for name in (*METRIC_DEFINITIONS, "fd", "kid")
        ]
        for name in names:
            client.create_registered_model(name)
        for number in range(count):
            name = names[0] if number % 2 else names[number % 5]
            run = client.create_run(experiment).info
            model = client.create_logged_model(experiment, name, run.run_id).model_id
            scores = dict(zip(columns, rng.uniform(16, 20, len(columns)).tolist(), strict=True))
            metrics = [Metric(key, value, run.start_time, 0, model) for key, value in scores.items()]
            client.log_batch(run.run_id, metrics=metrics)
            tags = {"step_key": str(number), "model": "context_encoder", "sigma": "2", "size": "64"}
            tags |= {
                "inpaint.protocol": f"{number % 3}: 84 photographs of 64x64",
                SCORES_TAG: scores_json(scores),
            }
            client.create_model_version(name, f"models:/{model}", run.run_id, tags=tags, model_id=model)


def champion(uri: str, artifacts: str | None) -> None:
    """Register a version with files; it becomes champion after two versions without files."""
    with registry_client(uri) as client:
        experiment = client.create_experiment(uri, artifact_location=artifacts)
        run = client.create_run(experiment).info.run_id
    small = build_model("context_encoder", size=32, width=0.0625)
    version = registry.register(small, name="facades", run_id=run, step_key=uri, tracking_uri=uri)
    for number in ("1", "2", version):
        registry.promote("facades", number, tracking_uri=uri)
