"""Recipes: what is accepted, what is refused and in which words; every shipped one loads."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from pipelines.reading import SHIPPED, RecipeError, check_recipe, load_recipe, parse_recipe, shipped_recipes
from pipelines.recipe import Recipe

SMALL = {"name": "small", "data": {"size": 128}, "models": {"context_encoder": {}}}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_its_models_know_its_options(name: str) -> None:
    recipe = load_recipe(name)
    text = (SHIPPED / f"{name}.yaml").read_text()
    if needed := re.search(r"https://download\.pytorch\.org/models/(vgg1[69]-\w+\.pth)", text):
        with pytest.raises(RecipeError, match=f"no weights file {needed[1]}"):  # a download, and nothing else
            check_recipe(recipe)
    else:
        check_recipe(recipe)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"sizee": 3}}, ["data.sizee", "did you mean size"]),
        ({"trian": {}}, ["trian", "did you mean train"]),
        ({"models": {"context_encoder": {"train": {"batchs": 2}}}}, ["train.batchs", "did you mean batch"]),
        ({"train": {"batch": "many"}}, ["train.batch", "integer", "many"]),
        ({"train": {"batch": 0}}, ["train.batch", "greater than 0"]),
        ({"models": {}}, ["models is empty"]),
        ({"data": {"val": 0.6, "test": 0.4}}, ["data.val + data.test"]),
        ({"scaling": {"workers": 99}}, ["train.batch", "scaling.workers = 99", "photograph for each"]),
        ({"scaling": {"workers": [1, 99]}}, ["train.batch", "scaling.workers = 99"]),
        ({"scaling": {"workers": [3, 2]}}, ["workers = [3, 2]", "[least, most]"]),
        ({"scaling": {"workers": 0}}, ["scaling.workers"]),
        ({"train": {"batch": 15}}, ["train.batch", "data.streams"]),
        ({"train": {"checkpoint_every": 30, "log_every": 20}}, ["checkpoint_every", "log_every"]),
        ({"edges": {"sigma": -1}}, ["edges.sigma", "greater than or equal to 0"]),
        ({"edges": {"sigma": []}}, ["edges", "at least one sigma"]),
        ({"models": {"edge_connect": {"edges": "cany"}}}, ["models.edge_connect.edges", "cany"]),
    ],
)
def test_a_wrong_field_is_named_in_one_line_with_the_mend(change: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe({**SMALL, **change})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": {"context_encodr": {}}}, ["models.context_encodr", "context_encoder"]),
        ({"models": {"context_encoder": {"lambda_adw": 1}}}, ["lambda_adw", "lambda_adv"]),
        (
            {"models": {"context_encoder": {"train": {"steps": {"trane": 1}}}}},
            ["train.steps.trane", "did you mean train"],
        ),
        ({"evaluate": {"metric": "psnr_rgb_hol"}}, ["evaluate.metric", "psnr_rgb_hole"]),
        ({"masks": "centre"}, ["centre", "center"]),
        ({"data": {"size": 64}}, ["data.size = 64", "models.context_encoder", "128"]),
        (
            {"data": {"size": 100}, "models": {"deepfill_v2": {}}},
            ["data.size = 100", "models.deepfill_v2", "multiple of 8"],
        ),
        (
            {"models": {"deepfill_v2": {"guided": True}}, "edges": {"source": "masked"}},
            ["edges.source = masked", "models.deepfill_v2", "full"],
        ),
        ({"masks": {"brush": {"max_widht": 3}}}, ["max_widht", "max_width"]),
    ],
)
def test_names_that_only_the_models_know_are_checked_before_anything_runs(
    change: dict, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        check_recipe(parse_recipe({**SMALL, **change}))
    for word in words:
        assert word in str(error.value)


def test_overrides_reach_every_depth_and_read_numbers_as_people_write_them() -> None:
    recipe = load_recipe(
        "demo",
        [
            "models.context_encoder.train.batch=32",
            "models.context_encoder.lambda_adv=1e-3",
            "data.source=/photos",
            "edges.sigma=[1,2]",
        ],
    )
    assert recipe.train_of("context_encoder").batch == 32
    assert recipe.models["context_encoder"].options["lambda_adv"] == 1e-3
    assert recipe.data.source == "/photos"
    assert recipe.edges.sigma == (1.0, 2.0)


def test_model_is_short_for_the_only_model_of_a_recipe(tmp_path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("model: {name: edge_connect, lambda_s: 100}\n")
    assert load_recipe(str(path), ["model.lambda_s=50"]).models["edge_connect"].options == {"lambda_s": 50}
    with pytest.raises(RecipeError, match="2 models"):
        load_recipe("demo", ["model.lambda_s=50"])


@pytest.mark.parametrize(
    ("name", "words"),
    [("dema", "did you mean demo"), ("missing.yaml", "neither a file nor one of")],
)
def test_a_missing_recipe_is_told_with_those_there_are(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(name)


def test_a_file_that_is_no_recipe(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(str(path))
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(str(path))
    path.write_text("!!python/object/apply:os.system ['true']\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(str(path))


TAGS = (
    "!!python/object/apply:os.makedirs [{}]",
    "!!python/object/new:os.makedirs [{}]",
    "!!python/name:os.makedirs",
    "!!python/module:antigravity",
)


@pytest.mark.parametrize("tag", TAGS)
def test_no_yaml_runs_code_and_no_value_does(tag: str, tmp_path) -> None:
    from pipelines.registry.importing import parse_settings

    sprung = tmp_path / "sprung"
    value = tag.format(sprung)
    path = tmp_path / "r.yaml"
    path.write_text(f"models: {{context_encoder: {{}}}}\nname: {value}\n")
    for attempt in (
        lambda: load_recipe(str(path)),
        lambda: load_recipe("demo", [f"name={value}"]),
        lambda: parse_settings([f"width={value}"]),
    ):
        with pytest.raises(ValueError, match="YAML") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert not sprung.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("tracking=https://me:planted-9@mlflow.example", "tracking"),
        ("tracking=postgresql://me:planted-9@host/db", "tracking"),
        ("storage=s3://me:planted-9@bucket/runs", "storage"),
        ("data.source=https://me:planted-9@photos", "data.source"),
        ("evaluate.masks=[center, 's3://me:planted-9@masks']", "evaluate.masks"),
        ("masks={'s3://me:planted-9@masks': 1}", "masks"),
        (
            "models.edge_connect.features={weights: 'https://me:planted-9@vgg.pt'}",
            "models.edge_connect.features",
        ),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(override: str, field: str) -> None:
    with pytest.raises(
        RecipeError, match=f"^{re.escape(field)}.* has a user's name or password in it"
    ) as error:
        load_recipe("demo", [override])
    assert "planted-9" not in str(error.value)
    assert "\n" not in str(error.value)


def test_where_a_run_is_kept_does_not_change_what_it_is() -> None:
    base = parse_recipe(SMALL)
    assert parse_recipe({**SMALL, "storage": "s3://b/p", "tracking": "http://x"}).digest == base.digest
    assert parse_recipe({**SMALL, "seed": 1}).digest != base.digest


def test_a_model_may_have_its_own_seed_masks_and_part_of_the_training() -> None:
    own = {"seed": 3, "masks": "box", "train": {"batch": 8}}
    recipe = parse_recipe({**SMALL, "train": {"ema": 0.5}, "models": {"context_encoder": own}})
    assert (recipe.seed_of("context_encoder"), recipe.masks_of("context_encoder")) == (3, {"box": 1})
    assert recipe.train_of("context_encoder").model_dump() == recipe.train.model_dump() | {"batch": 8}
    assert isinstance(recipe, Recipe)


def test_reading_a_recipe_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys, pipelines.reading, pipelines.__main__\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'cv2') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
