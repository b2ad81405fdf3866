"""Sizes by hand: the arithmetic of `inpaint plan --size`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from data_prep.canny import write_edge_shard
from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, write_slice
from data_prep.sources import open_source
from data_prep.storage import open_storage
from pipelines.reading import load_recipe
from pipelines.training.learner import make_schedule
from pipelines.training.sizing import (
    EDGE_BYTES,
    GPU_FLOPS,
    JPEG_BYTES,
    LOADED,
    OVERHEAD,
    PUBLISHED,
    Range,
    _flops,
    _gb,
    _model,
    _number,
    _plain,
    lines,
    storage,
    training,
)


def test_storage_is_pixels_times_bytes() -> None:
    recipe = load_recipe("edge_connect")  # squares of 256 pixels
    found = storage(recipe, 1_000_000)
    assert found["photographs_gb"].low == pytest.approx(65.536 * JPEG_BYTES[0] + 0.9)
    assert found["edges_gb"].high == pytest.approx(65.536 * EDGE_BYTES[1] + 0.9)
    assert found["shards"] == 3000
    whole = storage(load_recipe("deepfill_v2"), 1_000_000)
    assert whole["photographs_gb"].low - 0.9 == pytest.approx(4 / 3 * 65.536 * JPEG_BYTES[0])


def test_what_shards_and_edges_take_lies_in_the_range(tmp_path: Path) -> None:
    """The bundled photographs at 256 px, sharded and their edges computed as a run does."""
    recipe = load_recipe("edge_connect", ["data.source=bundled"])
    source = open_source("bundled", tile=256)
    options = ShardOptions(size=256, crop="square", val=0, test=0)
    shards = open_storage(tmp_path / "shards")
    manifest = assemble([write_slice(source, source.names(), 0, shards, options)], options, "bundled", shards)
    sigmas = {sigma: open_storage(tmp_path / f"sigma-{sigma}") for sigma in (0.5, 5.0)}
    for entry in manifest["shards"]:
        write_edge_shard(shards, entry, sigmas)
    expected = storage(recipe, manifest["splits"]["train"])
    (tmp_path / "shards/manifest.json").unlink()  # a list of names, which does not count
    for folder, kind in (
        ("shards", "photographs_gb"),
        ("sigma-0.5", "edges_gb"),
        ("sigma-5.0", "edges_gb"),
    ):
        found = sum(file.stat().st_size for file in (tmp_path / folder).rglob("*") if file.is_file()) / 1e9
        assert expected[kind].low < found < expected[kind].high, folder


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


def test_hours_are_operations_and_overhead() -> None:
    recipe = load_recipe(
        "context_encoder", ["scaling.workers=2"]
    )  # 116,000 steps of 64, crops of 128 from 350 pixels
    model, _ = _model(recipe, "context_encoder")
    found = training(recipe, "context_encoder", 1_000_000)
    work = 116_000 * 64 * _flops(model, model.phases[0], 128)
    low, high = (
        work / GPU_FLOPS[1] + 116_000 * OVERHEAD[0],
        work / GPU_FLOPS[0] + 116_000 * OVERHEAD[1],
    )
    assert (found["gpu_hours"].low, found["gpu_hours"].high) == pytest.approx((low / 3600, high / 3600))
    decoded = 350 * 350 * 4 / 3 / 256**2  # whole photographs, of which the crop is a part
    assert found["loading_cores"].high == pytest.approx(116_000 * 64 / low * decoded / LOADED[0])
    assert f"{low / 7200:.2g} to {high / 7200:.2g} hours on 2" in lines(recipe, 1_000_000)[-1]


def test_a_generator_that_learns_every_fifth_step_counts_a_fifth() -> None:
    recipe = load_recipe("deepfill_v1")
    model, _ = _model(recipe, "deepfill_v1")
    (phase,) = model.phases
    assert phase.critic_steps == 5
    every, never = (
        _flops(model, dataclasses.replace(phase, critic_steps=steps), 256) for steps in (1, 10**12)
    )
    assert never < every
    assert _flops(model, phase, 256) == pytest.approx(never + (every - never) / 5)


def test_what_is_published_is_set_beside_the_estimate() -> None:
    """Five steps of the critics a batch, 0.3 to 0.4 batches a second, for 120 hours; ours are 5,000,000."""
    recipe = load_recipe("deepfill_v1")
    found = training(recipe, "deepfill_v1", 1_000_000)
    line = lines(recipe, 1_000_000)[-1]
    steps = (5 * 0.3 * 120 * 3600, 5 * 0.4 * 120 * 3600)
    assert f"120 hours of a GTX 1080 Ti for {steps[0]:,.0f} to {steps[1]:,.0f} steps" in line
    hours = (120 * 5e6 / steps[1], 120 * 5e6 / steps[0])
    assert f"so {hours[0]:,.0f} to {hours[1]:,.0f} hours for these" in line
    rates = [found["operations"] / hour / 3600e12 for hour in reversed(hours)]
    assert f": {rates[0]:.2g} to {rates[1]:.2g} TFLOP/s" in line
    assert rates[0] * 1e12 < GPU_FLOPS[0] < 2 * rates[0] * 1e12  # newer GPUs begin where that one ended
    assert "published" not in "\n".join(lines(load_recipe("deepfill_v1-small"), 1_000_000))


PAGE = (Path(__file__).parents[3] / "infra/SIZING.md").read_text()
PAPERS = ("context_encoder", "context_encoder_region", "glcic", "partial_conv", "deepfill_v1", "deepfill_v2")
PAPERS += ("edge_connect",)
SETS = (8_026_628, 1_281_167, 14_197_122)


@pytest.mark.parametrize("name", PAPERS)
def test_the_page_says_what_the_command_says(name: str) -> None:
    recipe = load_recipe(name)
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in PAGE.splitlines() if f"| {name} " in row
    ]
    stored, trained = rows
    side = recipe.data.size + recipe.data.margin
    assert stored[1] == f"{side} px" + (", squares" if recipe.data.crop == "square" else "")
    assert stored[2:] == [_gb(storage(recipe, count)["photographs_gb"]) for count in SETS]
    found = training(recipe, name, SETS[0])
    assert trained[1].split()[0] == f"{found['steps']:,}"
    assert trained[2] == _plain(found["gpu_hours"])
    if name in PUBLISHED:
        assert f"{_number(PUBLISHED[name].hours)} of {PUBLISHED[name].gpu}" in trained[3]
    else:
        assert not trained[3]


def test_the_pages_minutes_are_the_commands_hours() -> None:
    hours: Range = storage(load_recipe("edge_connect"), SETS[0])["shard_core_hours"]
    assert f"{hours.low * 60 / 64:.0f} to {hours.high * 60 / 64:.0f} minutes" in PAGE
