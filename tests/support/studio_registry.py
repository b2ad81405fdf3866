"""A real registry for the studio's tests: versions that the register step created, with outputs that look like something.

encoder   context_encoder: version 1 champion first, 2 champion after a comparison, 3 rejected and candidate
edges     edge_connect: version 1 champion, 2 candidate; with a script in its description and in a tag
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mlflow import MlflowClient

from data_prep.masks import open_masks
from data_prep.sources import bundled_photo
from models import build_model
from models.base import Model
from pipelines.evaluation.methods import Baseline
from pipelines.recipe import EvaluationConfig
from pipelines.tracking import runs as tracking
from support.mlflow_stores import PipelineOutputs, copied, copied_exports

SIZE = 64
SCRIPT = "<script>window.injected = true</script><img src=x onerror='window.injected = true'>"
"""Sets a flag if a page runs it."""
CURVES = {"loss/l1": 0.2, "val/psnr_rgb_hole": 18.0}
"""curve -> its first value"""


@dataclass(frozen=True)
class StudioRegistry:
    """A registry with its artifacts in a folder. Several processes may read it; a test that writes takes a copy."""

    database: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.database}"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, registry_uri=self.uri)

    def copy(self, folder: Path) -> StudioRegistry:
        """Another database with the same artifacts."""
        return StudioRegistry(copied(self.database, folder / "mlflow.db"))

    @staticmethod
    def create(folder: Path, template: Path | None = None) -> StudioRegistry:
        """About 30 s on one core. `template`: an empty MLflow database, which takes seconds to create."""
        made, photos = PipelineOutputs.create(folder, template, SIZE), training_photos(24)
        torch.manual_seed(0)
        encoder = build_model("context_encoder", size=SIZE, width=0.125)
        # far apart, so that the comparison of both is significant
        early, late = trained(encoder, photos, "center", 3), trained(encoder, photos, "center", 80)
        edges = build_model("edge_connect", width=0.0625, residual_blocks=1)
        versions = [
            ("encoder", early, "center", (0.25, 0.25)),
            ("encoder", late, "center", (0.25, 0.25)),
            ("encoder", early, "center", (0.25, 0.25)),
            ("edges", trained(edges, photos, "box_and_brush", 10), "box_and_brush", (0.02, 0.3)),
            ("edges", trained(edges, photos, "box_and_brush", 60), "box_and_brush", (0.02, 0.3)),
        ]
        methods = {name: Baseline(name) for name in ("telea", "mean_colour")}
        with copied_exports(folder / "exports"):
            for seed, (name, model, masks, holes) in enumerate(versions):
                config = EvaluationConfig(
                    masks=(masks,), max_photos=16, sigma=1.5, distance=None, grid_rows=2
                )
                made.register(model, seed, name, config, holes, methods)
                log_curves(made)
        registry = StudioRegistry(folder / "mlflow.db")
        registry.client.update_registered_model("edges", f"Brush holes. {SCRIPT}")
        registry.client.set_model_version_tag("edges", "2", "note", SCRIPT)
        return registry


def log_curves(made: PipelineOutputs) -> None:
    """Curves of the run that was registered last."""
    client, run = made.tracking.client(), made.run_ids[-1]
    for step in range(0, 400, 50):
        metrics = {name: first * (0.6 + 0.4 * 0.9 ** (step / 50)) for name, first in CURVES.items()}
        tracking.log_metrics(client, run, metrics, step)


def training_photos(count: int) -> torch.Tensor:
    """Crops of bundled photographs, halved twice: float32 [count,3,SIZE,SIZE] in [0,1]."""
    rng = np.random.default_rng(0)
    photos = [
        cv2.resize(bundled_photo(name), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        for name in ("astronaut", "coffee", "chelsea")
    ]
    crops = []
    for index in range(count):
        photo = photos[index % len(photos)]
        y, x = (rng.integers(0, side - SIZE + 1) for side in photo.shape[:2])
        crops.append(photo[y : y + SIZE, x : x + SIZE])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def trained(model: Model, photos: torch.Tensor, masks: str, steps: int) -> Model:
    """A copy of the model, whose completion learned the photographs' colours in a few steps of l1: seconds."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    completion = model._build_completion().train()
    source = open_masks(masks)
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
    for step in range(steps):
        image = photos[torch.arange(8 * step, 8 * step + 8) % len(photos)]
        mask = torch.from_numpy(np.stack([source.sample(SIZE, SIZE, rng) for _ in range(8)])).float()[:, None]
        filled = completion(torch.cat([image, mask, torch.zeros_like(mask)], dim=1))
        loss = ((filled - image).abs() * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
