"""MLflow stores for tests, with small models in them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, write_slice
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from models.base import Model
from pipelines import registry, tracking
from pipelines.durable.steps import StepContext
from pipelines.evaluation.completers import completer, photographs
from pipelines.evaluation.evaluate import EvaluationSpec, evaluate
from pipelines.provenance import TAG
from pipelines.registry.step import register
from pipelines.tracking import Tracking
from pipelines.training.weights import save_weights

SIGMA = 1.5


class Killed(BaseException):
    """Nobody catches it: what follows does not happen, as after kill -9."""


@dataclass
class Store:
    """An MLflow store of its own, with a run."""

    uri: str
    client: MlflowClient
    run: str

    @staticmethod
    def make(folder: Path, template: Path | None = None) -> Store:
        if template:  # MLflow takes seconds to make a database
            shutil.copy(template, folder / "mlflow.db")
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        client = MlflowClient(uri, registry_uri=uri)
        experiment = client.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
        return Store(uri, client, client.create_run(experiment).info.run_id)

    def register(self, model: Model, name: str, step_key: str = "key", **metadata: Any) -> str:
        metadata = {"size": 32, "sigma": SIGMA, "recipe": "name: test\nseed: 0\n", **metadata}
        return registry.register(
            model,
            name=name,
            run_id=self.run,
            step_key=step_key,
            tags={"recipe": "test"},
            metrics={"psnr": 20.5},
            metadata=metadata,
            tracking_uri=self.uri,
        )

    def numbers(self, name: str, count: int) -> None:
        """That many versions which are only numbers, without files."""
        self.client.create_registered_model(name)
        for _ in range(count):
            self.client.create_model_version(name, "file:///nowhere", self.run)

    def versions(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = registry.show(name, self.uri)["versions"]
        return rows


def champion(uri: str | None = None, name: str = "encoder") -> str | None:
    """The version that has the alias, as MLflow's own client says (None: MLflow's current address)."""
    version = MlflowClient(uri, registry_uri=uri).get_registered_model(name).aliases.get("champion")
    return None if version is None else str(version)  # a number from a database, text from a server


def photograph(height: int = 66, width: int = 91) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H,W,3], and a mask uint8 [H,W] that both models can fill."""
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


MADE_BY = {
    "code": {"commit": "0123456789abcdef0123", "dirty": "true"},
    "packages": {"python": "3.11.0", "torch": "2.13.0"},
    "ray": {"job": "01000000", "submission": "raysubmit_1", "nodes": 2, "cpus": 4.0, "gpus": 0},
}


@dataclass
class Chain:
    """A storage with shards, edges, trainings and evaluations, as steps leave them, and the registry beside it."""

    storage: Storage
    place: Tracking
    manifests: dict[str, dict[str, Any]]
    runs: list[str] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def make(folder: Path, template: Path) -> Chain:
        shutil.copy(template, folder / "mlflow.db")
        storage = open_storage(folder)
        shards, edges = storage.sub("work/s/a1"), storage.sub("work/e/a1")
        source, options = (
            open_source("bundled", tile=32),
            ShardOptions(size=32, format="png", val=0, test=0.5),
        )
        manifest = assemble(
            [write_slice(source, source.names()[::9][:60], 0, shards, options)], options, "x", shards
        )
        tars = [write_edge_shard(shards, entry, {SIGMA: edges})[SIGMA] for entry in manifest["shards"]]
        assemble_edges(tars, SIGMA, manifest["digest"], edges)
        value = {"edges": "work/e/a1", "sigma": SIGMA}
        storage.write("manifests/e-edges-sigma-1.5.json", json.dumps({"value": value}).encode())
        place = Tracking(f"sqlite:///{folder / 'mlflow.db'}", "chain", (folder / "artifacts").as_uri())
        return Chain(
            storage, place, {"shard": {"value": {"shards": "work/s/a1", "digest": manifest["digest"]}}}
        )

    def register(self, model: Model, seed: int, name: str = "encoder") -> dict[str, Any]:
        """What the step gives back for a model that was trained with this seed."""
        work, about = f"work/t{seed}/a1", {"name": model.name, "options": vars(model.options), "size": 32}
        about |= {
            "sigma": SIGMA,
            "steps": 100,
            "seed": seed,
            "masks": {"center": 1.0},
            "hole_range": [0.25, 0.25],
        }
        folder = Path(self.storage.path(work) or "")
        folder.mkdir(parents=True)
        save_weights(folder, model, {}, about)
        run = tracking.open_run(self.place, f"t{seed}", "train-one")
        self.runs.append(run)
        tracking.log_tags(self.place.client(), run, {TAG: json.dumps(MADE_BY)})
        config = {"masks": ["center"], "seed": 0, "count": 40, "sigma": SIGMA, "distance": None, "samples": 2}
        photos = photographs(self.storage.sub("work/s/a1"), "test")
        found = evaluate({"one": completer(model, about)}, photos, EvaluationSpec.of(config))
        found.save(self.storage.sub(f"work/v{seed}/a1").write)
        inputs = {"shard": "s-shard", "edges-sigma-1.5": "e-edges-sigma-1.5"}
        context = StepContext(
            key=f"r{seed}",
            name="register-one",
            attempt=1,
            config={
                "register_as": name,
                "recipe": "small",
                "metric": "psnr_rgb_hole",
                "evaluate": {**config, "split": "test"},
            },
            local={
                "tracking": vars(self.place),
                "recipe": f"name: small\nseed: {seed}\n",
                "sweep": {"name": "seeds", "run": "abc", "values": f"seed {seed}"},
            },
            storage=self.storage,
            manifests={
                **self.manifests,
                "train-one": {"value": {"weights": work, "run": run, "steps": 100}, "inputs": inputs},
                "evaluate": {"value": {"evaluation": f"work/v{seed}/a1"}},
            },
            work=f"work/r{seed}/a1",
            stable=f"work/r{seed}/stable",
            progress=lambda *_: None,
        )
        return register(context)
