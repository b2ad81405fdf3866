"""Eight photographs, a batch of them, and the alternating training step of docs/papers.md 0.3."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import skimage.feature
import torch
from torch import Tensor

from models.base import RANDOMS_PER_SAMPLE, Model, Phase


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photos() -> Tensor:
    """Eight 32x32 photographs [8,3,32,32] in [0,1]."""
    tiles = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = getattr(skimage.data, name)()[..., :3]
        for top, left in ((0, 0), (40, 128)):
            tile = image[top : top + 256, left : left + 256].reshape(32, 8, 32, 8, 3).mean((1, 3))
            tiles.append(tile / 255)
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float().contiguous()


@pytest.fixture(scope="session")
def batch(photos: Tensor) -> dict[str, Any]:
    """The photographs, with holes in their centres and their true edges."""
    mask = torch.zeros(8, 1, 32, 32)
    mask[:, :, 8:24, 8:24] = 1
    gray = photos.permute(0, 2, 3, 1).numpy() @ np.array([0.2125, 0.7154, 0.0721], np.float32)
    edges = np.stack([skimage.feature.canny(g, sigma=1.0) for g in gray])
    uniform = torch.rand(8, RANDOMS_PER_SAMPLE, generator=torch.Generator().manual_seed(0))
    return {
        "image": photos,
        "mask": mask,
        "edge": torch.from_numpy(edges)[:, None].float(),
        "uniform": uniform,
    }


class Trainer:
    """The optimisers and the training step of one phase."""

    def __init__(self, model: Model, phase: Phase, lr: float | None = None) -> None:
        model.set_phase(phase)
        self.model, self.phase, self.steps = model, phase, 0

        def build_optimizer(names: tuple[str, ...]) -> Any:
            def trained_parameters(name: str) -> list[Tensor]:
                return [p for p in model.networks[name].parameters() if p.requires_grad]

            groups = [{"params": trained_parameters(n), "lr": lr or phase.lr[n]} for n in names]
            if not groups:
                return None
            if phase.optimizer == "adadelta" and lr is None:
                return torch.optim.Adadelta(groups)
            return torch.optim.Adam(groups, betas=phase.betas)

        self.generators = build_optimizer(phase.generators)
        self.discriminators = build_optimizer(phase.discriminators)

    def step_discriminators(self, batch: dict[str, Any], out: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = self.model.discriminator_losses(batch, out, self.phase)
        self._descend(self.discriminators, losses)
        return losses

    def step_generators(self, batch: dict[str, Any], out: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in self.phase.discriminators:
            self.model.networks[name].requires_grad_(False)
        losses = self.model.generator_losses(batch, out, self.phase)
        self._descend(self.generators, losses)
        for name in self.phase.discriminators:
            self.model.networks[name].requires_grad_(True)
        return losses

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.steps += 1
        trains_generators = bool(self.phase.generators) and self.steps % self.phase.critic_steps == 0
        with torch.set_grad_enabled(trains_generators):
            out = self.model.generate(batch, self.phase)
        losses = self.step_discriminators(batch, out) if self.phase.discriminators else {}
        return {**losses, **(self.step_generators(batch, out) if trains_generators else {})}

    def _descend(self, optimizer: Any, losses: dict[str, Tensor]) -> None:
        weights = self.model.weights(self.phase)
        optimizer.zero_grad()
        torch.stack([weights[name] * value for name, value in losses.items()]).sum().backward()
        optimizer.step()


@pytest.fixture(scope="session")
def training() -> SimpleNamespace:
    """`training.Trainer`, as test modules cannot import this file."""
    return SimpleNamespace(Trainer=Trainer)
