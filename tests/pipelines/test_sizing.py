"""Sizes by hand: the arithmetic of `inpaint plan --size`."""

from __future__ import annotations

import pytest
import torch

from pipelines.learner import make_schedule
from pipelines.reading import load_recipe
from pipelines.sizing import EDGE_BYTES, JPEG_BYTES, _flops, _model, lines, storage, training


def test_storage_is_pixels_times_bytes() -> None:
    recipe = load_recipe("edge_connect")  # squares of 256 pixels
    found = storage(recipe, 1_000_000)
    assert found["photographs_gb"].low == pytest.approx(1e6 * 65536 * JPEG_BYTES[0] / 1e9)
    assert found["edges_gb"].high == pytest.approx(1e6 * 65536 * EDGE_BYTES[1] / 1e9)
    assert found["shards"] == 3000
    whole = storage(load_recipe("deepfill_v2"), 1_000_000)
    assert whole["photographs_gb"].low == pytest.approx(4 / 3 * found["photographs_gb"].low)


def test_operations_are_those_of_the_layers() -> None:
    """The context encoder's counted operations at least those of its generator's layers, forward, backward and once more."""
    recipe = load_recipe("context_encoder")
    model, counted = _model(recipe, "context_encoder")
    assert counted
    multiplications = 0

    def count(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal multiplications
        places = output if isinstance(module, torch.nn.Conv2d) else inputs[0]
        multiplications += module.weight.numel() * places.shape[2] * places.shape[3]

    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    hooks = [
        m.register_forward_hook(count) for m in model.networks["generator"].modules() if isinstance(m, kinds)
    ]
    with torch.device("meta"):
        batch = {"image": torch.rand(2, 3, 128, 128), "mask": torch.zeros(2, 1, 128, 128), "edge": None}
        model.generate(
            batch | {"mask_mean": torch.tensor(0.25), "uniform": torch.rand(2, 4)}, model.phases[0]
        )
    for hook in hooks:
        hook.remove()
    total = _flops(model, model.phases[0], 128)
    assert 3 * 2 * multiplications * 0.8 < total < 3 * 2 * multiplications * 4


def test_training_follows_the_schedule() -> None:
    recipe = load_recipe("edge_connect")
    found = training(recipe, "edge_connect", 8_000_000)
    model, _ = _model(recipe, "edge_connect")
    assert found["steps"] == make_schedule(model, recipe.train_of("edge_connect").steps).total == 1_000_000
    assert found["epochs"] == pytest.approx(1e6 * 8 / (8e6 * (1 - recipe.data.val - recipe.data.test)))
    assert 0 < found["gpu_hours"].low < found["gpu_hours"].high
    assert "VGG's share is a guess" in "\n".join(lines(recipe, 8_000_000))
