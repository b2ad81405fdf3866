"""MLflow stores for tests, with small models in them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, write_partition_tars
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from models.base import Model
from pipelines import registry
from pipelines.contracts import (
    EvaluateOutputs,
    RegisterConfig,
    RegisterInputs,
    RegisterOutputs,
    RunSettings,
    ShardOutputs,
    StepKind,
    SweepOrigin,
    TrainOutputs,
)
from pipelines.durable.steps import StepContext, StepId
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import InpaintingMethod
from pipelines.evaluation.model_methods import model_method
from pipelines.evaluation.photographs import split_photographs
from pipelines.provenance import PROVENANCE_TAG
from pipelines.recipe import EvaluationConfig
from pipelines.registry import registration
from pipelines.registry.describe import VersionRow
from pipelines.registry.step import register
from pipelines.tracking import runs as tracking
from pipelines.tracking.runs import Tracking
from pipelines.weights import CheckpointInfo, save_weights

SIGMA = 1.5


def copied(database: Path, to: Path) -> Path:
    """A copy of a SQLite database, including its write-ahead log."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
    return to


@contextmanager
def copied_exports(folder: Path) -> Iterator[None]:
    """Inside the block, models with the same weights are exported once, which takes seconds; further exports are copies,
    kept in `folder`."""
    export = registration.export_model

    def export_or_copy(model: Model, target: Path, *rest: Any) -> None:
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values()))
        kept = folder / digest.hexdigest()
        if not kept.exists():
            export(model, kept, *rest)
        shutil.copytree(kept, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "export_model", export_or_copy)
        yield


class Killed(BaseException):
    """Simulates kill -9: no handler catches it, so the code that follows does not run."""


@dataclass
class MlflowStore:
    """A new MLflow store with one run."""

    uri: str
    client: MlflowClient
    run_id: str

    @staticmethod
    def create(folder: Path, template: Path | None = None) -> MlflowStore:
        if template:  # creating a database takes MLflow seconds
            shutil.copy(template, folder / "mlflow.db")
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        client = MlflowClient(uri, registry_uri=uri)
        experiment = client.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
        return MlflowStore(uri, client, client.create_run(experiment).info.run_id)

    def register(self, model: Model, name: str, step_key: str = "key", **metadata: Any) -> str:
        metadata = {"size": 32, "sigma": SIGMA, "recipe": "name: test\nseed: 0\n", **metadata}
        return registry.register(
            model,
            name=name,
            run_id=self.run_id,
            step_key=step_key,
            tags={"recipe": "test"},
            metrics={"psnr": 20.5},
            metadata=metadata,
            tracking_uri=self.uri,
        )

    def add_empty_versions(self, name: str, count: int) -> None:
        """Register `count` versions without files."""
        self.client.create_registered_model(name)
        for _ in range(count):
            self.client.create_model_version(name, "file:///nowhere", self.run_id)

    def versions(self, name: str) -> tuple[VersionRow, ...]:
        return registry.show(name, self.uri).versions


def champion_version(uri: str | None = None, name: str = "encoder") -> str | None:
    """The version with the alias `champion`, by MLflow's own client. `uri` None: the current tracking URI."""
    version = MlflowClient(uri, registry_uri=uri).get_registered_model(name).aliases.get("champion")
    return None if version is None else str(version)  # an int from a database, a string from a server


def photograph(height: int = 66, width: int = 91) -> tuple[np.ndarray, np.ndarray]:
    """A photograph uint8 [H,W,3] and a mask uint8 [H,W] whose hole both models can fill."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    squares = (x // 8 + y // 8) % 2 * 100
    image = (np.stack([x + squares, y + squares, squares], axis=2) + noise).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[20:41, 33:60] = 1
    return image, mask


def network_input(image: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """float32 [1,5,H,W] of a photograph and its mask, without edges."""
    x = np.zeros((1, 5, *mask.shape), np.float32)
    x[0, :3], x[0, 3] = np.where(mask[..., None], 0, image).transpose(2, 0, 1) / 255, mask
    return torch.from_numpy(x)


EVALUATION = EvaluationConfig(max_photos=40, sigma=SIGMA, distance=None, grid_rows=2)
NO_BASELINES: Mapping[str, InpaintingMethod] = MappingProxyType({})
PROVENANCE = {
    "code": {"commit": "0123456789abcdef0123", "dirty": "true"},
    "packages": {"python": "3.11.0", "torch": "2.13.0"},
    "ray": {"job": "01000000", "submission": "raysubmit_1", "nodes": 2, "cpus": 4.0, "gpus": 0},
}


@dataclass
class PipelineOutputs:
    """A storage with shards, edges, trained models and evaluations, as the steps write them, and a registry."""

    storage: Storage
    tracking: Tracking
    shards: ShardOutputs
    edges_digest: str
    size: int = 32
    """Of its photographs, pixels."""
    run_ids: list[str] = field(default_factory=list)
    register_outputs: list[RegisterOutputs] = field(default_factory=list)

    @staticmethod
    def create(folder: Path, template: Path | None = None, size: int = 32) -> PipelineOutputs:
        """`template`: an empty MLflow database, whose creation takes seconds. `size`: of the photographs."""
        if template:
            shutil.copy(template, folder / "mlflow.db")
        storage = open_storage(folder)
        shards, edges = storage.subfolder("work/s/a1"), storage.subfolder("work/e/a1")
        source, options = (
            open_source("bundled", tile_size=size),
            ShardOptions(size=size, format="png", val=0, test=0.5),
        )
        manifest = merge_partitions(
            [write_partition_tars(source, source.names()[::9][:60], 0, shards, options)], options, "x", shards
        )
        tars = [write_edge_tars(shards, entry, {SIGMA: edges})[SIGMA] for entry in manifest.shards]
        write_edge_manifest(tars, SIGMA, manifest.digest, edges)
        tracking_config = Tracking(
            f"sqlite:///{folder / 'mlflow.db'}", "chain", (folder / "artifacts").as_uri()
        )
        shard_outputs = ShardOutputs((), "work/s/a1", manifest.digest, manifest.splits, 0)
        return PipelineOutputs(
            storage,
            tracking_config,
            shard_outputs,
            hashlib.sha256(edges.read("edges.json")).hexdigest(),
            size,
        )

    def register(
        self,
        model: Model,
        seed: int,
        name: str = "encoder",
        config: EvaluationConfig = EVALUATION,
        hole_range: tuple[float, float] = (0.25, 0.25),
        methods: Mapping[str, InpaintingMethod] = NO_BASELINES,
    ) -> RegisterOutputs:
        """Run the register step for a model trained with this seed on masks of the evaluation's kind. Returns its
        outputs. `methods` are scored beside the model."""
        work = f"work/t{seed}/a1"
        info = CheckpointInfo(
            model.name,
            vars(model.options),
            size=self.size,
            sigma=SIGMA,
            steps=100,
            seed=seed,
            masks=dict.fromkeys(config.masks, 1.0),
            hole_range=hole_range,
        )
        folder = Path(self.storage.local_path(work) or "")
        folder.mkdir(parents=True)
        save_weights(folder, model, {}, info)
        run = tracking.open_run(self.tracking, f"t{seed}", "train-one")
        self.run_ids.append(run)
        tracking.log_tags(self.tracking.client(), run, {PROVENANCE_TAG: json.dumps(PROVENANCE)})
        photos = split_photographs(self.storage.subfolder("work/s/a1"), "test")
        evaluation = evaluate({"one": model_method(model, info), **methods}, photos, config)
        evaluation.save(self.storage.subfolder(f"work/v{seed}/a1").write)
        trained = TrainOutputs((), work, run, 100, None, {f"{SIGMA:g}": self.edges_digest})
        context = StepContext(
            id=StepId(StepKind.REGISTER, "one"),
            key=f"r{seed}",
            attempt=1,
            config=RegisterConfig("one", name, "small", config, ""),
            inputs=RegisterInputs(self.shards, trained, EvaluateOutputs((), f"work/v{seed}/a1", {})),
            settings=RunSettings(
                tracking=self.tracking,
                recipe_yaml=f"name: small\nseed: {seed}\n",
                sweep_origin=SweepOrigin("seeds", "abc", f"seed {seed}"),
            ),
            storage=self.storage,
            attempt_folder=f"work/r{seed}/a1",
            persistent_folder=f"work/r{seed}/stable",
            progress=lambda *_: None,
        )
        return register(context)
