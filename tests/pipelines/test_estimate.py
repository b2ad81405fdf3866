"""The estimates of `inpaint plan --photos N`, compared with calculations by hand and with measurements."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from data_prep.edge_maps import write_edge_tars
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, write_partition_tars
from data_prep.sources import open_source
from data_prep.storage import open_storage
from models import list_models, model_class
from models.base import make_schedule
from pipelines.estimate import (
    EDGE_BYTES_PER_PIXEL,
    GPU_FLOPS_PER_SECOND,
    JPEG_BYTES_PER_PIXEL,
    LOADER_PHOTOS_PER_SECOND,
    STEP_OVERHEAD_SECONDS,
    Interval,
    _flops_per_photo,
    _format_interval,
    _format_number,
    _gb,
    _meta_model,
    estimate_data,
    estimate_training,
    format_estimate,
)
from pipelines.recipe.load import load_recipe


def test_storage_is_pixels_times_bytes() -> None:
    recipe = load_recipe("edge_connect")  # squares of 256 pixels
    estimate = estimate_data(recipe, 1_000_000)
    assert estimate.photographs_gb.low == pytest.approx(65.536 * JPEG_BYTES_PER_PIXEL[0] + 0.9)
    assert estimate.edges_gb.high == pytest.approx(65.536 * EDGE_BYTES_PER_PIXEL[1] + 0.9)
    assert estimate.shards == 3000
    whole = estimate_data(load_recipe("deepfill_v2"), 1_000_000)
    assert whole.photographs_gb.low - 0.9 == pytest.approx(4 / 3 * 65.536 * JPEG_BYTES_PER_PIXEL[0])


def test_sizes_of_shards_and_edges_are_within_the_estimate(tmp_path: Path) -> None:
    """With the bundled photographs at 256 px, sharded as in a run."""
    recipe = load_recipe("edge_connect", ["data.source=bundled"])
    source = open_source("bundled", tile_size=256)
    options = ShardOptions(size=256, crop="square", val=0, test=0)
    shards = open_storage(tmp_path / "shards")
    manifest = merge_partitions(
        [write_partition_tars(source, source.names(), 0, shards, options)], options, "bundled", shards
    )
    sigmas = {sigma: open_storage(tmp_path / f"sigma-{sigma}") for sigma in (0.5, 5.0)}
    for entry in manifest.shards:
        write_edge_tars(shards, entry, sigmas)
    expected = estimate_data(recipe, manifest.splits["train"])
    (tmp_path / "shards/manifest.json").unlink()  # a list of names, which does not count
    for folder, gigabytes in (
        ("shards", expected.photographs_gb),
        ("sigma-0.5", expected.edges_gb),
        ("sigma-5.0", expected.edges_gb),
    ):
        size_gb = sum(file.stat().st_size for file in (tmp_path / folder).rglob("*") if file.is_file()) / 1e9
        assert gigabytes.low < size_gb < gigabytes.high, folder


def test_counted_flops_match_the_layers() -> None:
    """The context encoder's counted operations at least those of its generator's layers, forward, backward and once more."""
    recipe = load_recipe("context_encoder")
    model, counted = _meta_model(recipe, "context_encoder")
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
    total = _flops_per_photo(model, model.phases[0], 128)
    assert 3 * 2 * multiplications * 0.8 < total < 3 * 2 * multiplications * 4


@pytest.mark.slow
def test_training_follows_the_schedule() -> None:
    recipe = load_recipe("edge_connect")
    estimate = estimate_training(recipe, "edge_connect", 8_000_000)
    model, _ = _meta_model(recipe, "edge_connect")
    assert (
        estimate.steps
        == make_schedule(model, recipe.train_for("edge_connect").steps).total_steps
        == 1_000_000
    )
    assert estimate.epochs == pytest.approx(1e6 * 8 / (8e6 * (1 - recipe.data.val - recipe.data.test)))
    assert 0 < estimate.gpu_hours.low < estimate.gpu_hours.high
    assert "VGG's share is a guess" in "\n".join(format_estimate(recipe, 8_000_000))


@pytest.mark.slow
def test_gpu_hours_are_flops_and_overhead() -> None:
    recipe = load_recipe(
        "context_encoder", ["scaling.workers=2"]
    )  # 116,000 steps of 64, crops of 128 from 350 pixels
    model, _ = _meta_model(recipe, "context_encoder")
    estimate = estimate_training(recipe, "context_encoder", 1_000_000)
    work = 116_000 * 64 * _flops_per_photo(model, model.phases[0], 128)
    low, high = (
        work / GPU_FLOPS_PER_SECOND[1] + 116_000 * STEP_OVERHEAD_SECONDS[0],
        work / GPU_FLOPS_PER_SECOND[0] + 116_000 * STEP_OVERHEAD_SECONDS[1],
    )
    assert (estimate.gpu_hours.low, estimate.gpu_hours.high) == pytest.approx((low / 3600, high / 3600))
    decoded = 350 * 350 * 4 / 3 / 256**2  # whole photographs, of which the crop is a part
    assert estimate.loading_cores.high == pytest.approx(
        116_000 * 64 / low * decoded / LOADER_PHOTOS_PER_SECOND[0]
    )
    assert f"{low / 7200:.2g} to {high / 7200:.2g} hours on 2" in format_estimate(recipe, 1_000_000)[-1]


@pytest.mark.slow
def test_a_generator_trained_every_fifth_step_counts_a_fifth() -> None:
    recipe = load_recipe("deepfill_v1")
    model, _ = _meta_model(recipe, "deepfill_v1")
    (phase,) = model.phases
    assert phase.critic_steps == 5
    every, never = (
        _flops_per_photo(model, dataclasses.replace(phase, critic_steps=steps), 256) for steps in (1, 10**12)
    )
    assert never < every
    assert _flops_per_photo(model, phase, 256) == pytest.approx(never + (every - never) / 5)


@pytest.mark.slow
def test_published_training_is_shown_beside_the_estimate() -> None:
    """Five steps of the critics a batch, 0.3 to 0.4 batches a second, for 120 hours; ours are 5,000,000."""
    recipe = load_recipe("deepfill_v1")
    estimate = estimate_training(recipe, "deepfill_v1", 1_000_000)
    line = format_estimate(recipe, 1_000_000)[-1]
    steps = (5 * 0.3 * 120 * 3600, 5 * 0.4 * 120 * 3600)
    assert f"120 hours of a GTX 1080 Ti for {steps[0]:,.0f} to {steps[1]:,.0f} steps" in line
    hours = (120 * 5e6 / steps[1], 120 * 5e6 / steps[0])
    assert f"so {hours[0]:,.0f} to {hours[1]:,.0f} hours for these" in line
    rates = [estimate.flops / hour / 3600e12 for hour in reversed(hours)]
    assert f": {rates[0]:.2g} to {rates[1]:.2g} TFLOP/s" in line
    assert (
        rates[0] * 1e12 < GPU_FLOPS_PER_SECOND[0] < 2 * rates[0] * 1e12
    )  # newer GPUs begin where that one ended
    assert "published" not in "\n".join(format_estimate(load_recipe("deepfill_v1-small"), 1_000_000))


SIZING_PAGE = (Path(__file__).parents[2] / "infra/SIZING.md").read_text()
PHOTO_COUNTS = (8_026_628, 1_281_167, 14_197_122)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_sizing_md_agrees_with_the_command(name: str) -> None:
    recipe = load_recipe(name)
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in SIZING_PAGE.splitlines()
        if f"| {name} " in row
    ]
    stored, trained = rows
    side = recipe.data.size + recipe.data.margin
    assert stored[1] == f"{side} px" + (", squares" if recipe.data.crop == "square" else "")
    assert stored[2:] == [_gb(estimate_data(recipe, count).photographs_gb) for count in PHOTO_COUNTS]
    estimate = estimate_training(recipe, name, PHOTO_COUNTS[0])
    assert trained[1].split()[0] == f"{estimate.steps:,}"
    assert trained[2] == _format_interval(estimate.gpu_hours)
    if published := model_class(name).published_training:
        assert f"{_format_number(published.device_hours)} of {published.device}" in trained[3]
    else:
        assert not trained[3]


def test_sizing_mds_minutes_agree_with_the_command() -> None:
    hours: Interval = estimate_data(load_recipe("edge_connect"), PHOTO_COUNTS[0]).shard_core_hours
    assert f"{hours.low * 60 / 64:.0f} to {hours.high * 60 / 64:.0f} minutes" in SIZING_PAGE
