"""Checks of `evaluate.features` before a run, and of the metrics that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.check_data import too_few_for_inception
from pipelines.check_recipe import check_metric, check_recipe
from pipelines.recipe import Recipe
from pipelines.recipe.load import RecipeError, parse_recipe
from pipelines.sweeps.workflow import check_sweep
from support.metric_weights import write_alexnet


def make_recipe(features: dict[str, Any] | None, metric: str = "psnr_rgb_hole", **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "a",
            "data": {"size": 64},
            "model": {"name": "context_encoder_region", "size": 64},
            "evaluate": {"features": features, "metric": metric, "distance": None},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    write_alexnet(path)
    return str(path)


def test_weights_are_loaded_before_the_run(alexnet: str, tmp_path: Path) -> None:
    check_recipe(make_recipe({"alexnet": alexnet}, "lpips_alex"))
    with pytest.raises(
        RecipeError, match=r"^evaluate: features\.vgg16: no weights file .*v\.pth: the published one is"
    ):
        check_recipe(make_recipe({"vgg16": str(tmp_path / "v.pth")}))
    with pytest.raises(RecipeError, match=r"^evaluate: features\.inception: .* not the Inception v3 of FID$"):
        check_recipe(make_recipe({"inception": alexnet}))
    address = "https://127.0.0.1:9/v.pth#sha256=" + "0" * 64
    check_recipe(make_recipe({"vgg16": address}), allow_downloads=False)  # checked when it is there


def test_a_metric_needs_the_weights_of_its_network(alexnet: str) -> None:
    for metric, network, title in (("lpips_vgg", "vgg16", "VGG-16"), ("lpips_alex", "alexnet", "AlexNet")):
        with pytest.raises(
            RecipeError,
            match=rf"{metric} needs the weights of {title}: name their file in evaluate\.features\.{network}$",
        ):
            check_recipe(make_recipe(None, metric))
    with pytest.raises(
        RecipeError, match=r"^evaluate\.metric: no 'fid' among "
    ):  # not per photograph: it decides nothing
        check_recipe(make_recipe({"alexnet": alexnet}, "fid"))
    with pytest.raises(RecipeError, match=r"^sweep\.metrics: fid needs the weights of Inception"):
        check_metric("sweep.metrics", "fid", 64, ("fid",))
    check_metric("sweep.metrics", "lpips_alex", 64, (), make_recipe({"alexnet": alexnet}).evaluate.features)


def test_a_sweep_ranks_by_lpips_if_there_are_weights(alexnet: str) -> None:
    sweep = {"fields": {"train.lr_scale": {"grid": [1, 2]}}, "metrics": ["lpips_alex"]}
    check_sweep(make_recipe({"alexnet": alexnet}, sweep=sweep), fetch=False)
    with pytest.raises(RecipeError, match=r"^sweep\.metrics: lpips_alex needs the weights of AlexNet"):
        check_sweep(make_recipe(None, sweep=sweep), fetch=False)


def test_a_run_says_beforehand_which_scores_have_too_few_photographs() -> None:
    config = make_recipe({"inception": "i.pth"}).evaluate
    assert too_few_for_inception(config, 84) == {
        "fid": "84 photographs are scored, and it takes 2049",
        "kid_inception": "84 photographs are scored, and it takes 100",
        "p_ids_percent": "84 photographs are scored, and it takes 1025",
        "u_ids_percent": "84 photographs are scored, and it takes 1025",
    }
    assert list(too_few_for_inception(config, 5000)) == [
        "fid",
        "p_ids_percent",
        "u_ids_percent",
    ]  # max_photos: 1000
    assert too_few_for_inception(config.model_copy(update={"max_photos": None}), 2049) == {}
    assert too_few_for_inception(make_recipe(None).evaluate, 1) == {}
