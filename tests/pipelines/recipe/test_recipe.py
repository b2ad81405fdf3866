"""Recipes: accepted and rejected fields, and the error messages; every shipped recipe loads."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from pipelines.check_recipe import check_recipe
from pipelines.pipeline import train_config
from pipelines.recipe import Recipe
from pipelines.recipe.load import SHIPPED_RECIPES, RecipeError, load_recipe, parse_recipe, shipped_recipes

SMALL = {"name": "small", "data": {"size": 128}, "models": {"context_encoder": {}}}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_its_models_know_its_options(name: str) -> None:
    recipe = load_recipe(name)
    text = (SHIPPED_RECIPES / f"{name}.yaml").read_text()
    if weights := re.search(r"https://download\.pytorch\.org/models/(vgg1[69]-\w+\.pth)", text):
        with pytest.raises(
            RecipeError, match=f"no weights file {weights[1]}"
        ):  # only the download is missing
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
        ({"scaling": {"workers": [3, 2]}}, ["workers = [3, 2]", "[min, max]"]),
        ({"scaling": {"workers": 0}}, ["scaling.workers"]),
        ({"train": {"batch": 15}}, ["train.batch", "data.streams"]),
        ({"train": {"checkpoint_every": 30, "log_every": 20}}, ["checkpoint_every", "log_every"]),
        ({"edges": {"sigma": -1}}, ["edges.sigma", "greater than or equal to 0"]),
        ({"edges": {"sigma": []}}, ["edges", "at least one sigma"]),
    ],
)
def test_a_wrong_field_is_named_in_one_line_with_a_remedy(change: dict, words: list[str]) -> None:
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
            {"models": {"deepfill_v2": {"guided": True}}, "edges": {"mode": "masked"}},
            ["edges.mode = masked", "models.deepfill_v2", "full"],
        ),
        (
            {"models": {"edge_connect": {"edge_input": "cany"}}},
            ["models.edge_connect: edge_connect edge_input 'cany' is none of generated, canny, none"],
        ),
        ({"models": {"glcic": {"edge_input": "canny"}}}, ["models.glcic: glcic has no option 'edge_input'"]),
        ({"masks": {"brush": {"max_widht": 3}}}, ["max_widht", "max_width"]),
        ({"models": {"context_encoder": {"lambda_adv": "much"}}}, ["lambda_adv", "a number", "much"]),
        ({"models": {"context_encoder": {"lambda_adv": float("inf")}}}, ["lambda_adv", "finite"]),
        ({"models": {"context_encoder": {"train": {"steps": {"train": 0}}}}}, ["train.steps", "no phase"]),
        (
            {
                "data": {"size": 32},
                "models": {"context_encoder": {"size": 32}},
                "evaluate": {"metric": "ssim_uniform51_grey"},
            },
            ["evaluate.metric", "32 px", "too small for ssim_uniform51_grey"],
        ),
    ],
)
def test_names_of_models_masks_and_metrics_are_checked_before_a_run(change: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        check_recipe(parse_recipe({**SMALL, **change}))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=5"], "--set train.stepz=5: unknown field train.stepz; did you mean steps?"),
        (["train={stepz: 5}"], "--set train={stepz: 5}: unknown field train.stepz; did you mean steps?"),
        (["seed=1", "data.val=0,2"], "--set data.val=0,2: data.val: .*did you mean 0.2?"),
        (["data.test=10%"], "--set data.test=10%: data.test: .*did you mean 0.1?"),
        (["data.crop=sqare"], "--set data.crop=sqare: .*did you mean square?"),
        (["evaluate.masks=center"], "--set evaluate.masks=center: .*did you mean [center]?"),
        (
            ["data.val=0.6", "seed=2", "data.test=0.6"],
            "--set data.val=0.6 --set data.test=0.6: data.val + data.test",
        ),
        (
            ["train.checkpoint_every=30", "train.batch=8"],
            "--set train.checkpoint_every=30: train.checkpoint_every = 30",
        ),
        (["models.context_encoder.register_as=2024"], ".*quotes make it text: '2024'"),
        (["seed=-1"], "--set seed=-1: seed"),
        (["train.batch=[1"], "--set train.batch: '[1' is not a YAML value: line 1, column 3"),
    ],
)
def test_an_error_names_the_wrong_override(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", overrides)
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    assert re.match(pattern, str(error.value)), str(error.value)
    assert "demo.yaml" not in str(error.value)


def test_an_error_names_the_wrong_file(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("models: {context_encoder: {}}\ntrain: {stepz: 3}\n")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))}: unknown field train\.stepz"):
        load_recipe(str(path), ["train.batch=8"])
    path.write_text("data:\n\tsize: 64\n")
    with pytest.raises(RecipeError, match=r"line 2, column 1: .*indent with spaces") as error:
        load_recipe(str(path))
    assert "<unicode string>" not in str(error.value)


def test_storage_and_tracking_uri_are_text_even_if_yaml_reads_them_otherwise() -> None:
    for text in ("1e3", "a: b", "#x", "[x", "null"):
        assert load_recipe("demo", [], {"storage": text}).storage == text
    with pytest.raises(RecipeError, match="tracking_uri has a user's name"):
        load_recipe("demo", [], {"tracking_uri": "http://me:secret@host"})


def test_files_may_have_numbers_in_scientific_notation(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("models: {context_encoder: {lambda_adv: 1e-3, lambda_rec: '1e3'}}\n")
    options = load_recipe(str(path)).models["context_encoder"].options
    assert options == {"lambda_adv": 1e-3, "lambda_rec": "1e3"}  # quotes make text
    assert load_recipe("demo", ["experiment='1e3'"]).experiment == "1e3"


def test_overrides_set_nested_fields_and_numbers_in_scientific_notation() -> None:
    recipe = load_recipe(
        "demo",
        [
            "models.context_encoder.train.batch=32",
            "models.context_encoder.lambda_adv=1e-3",
            "data.source=/photos",
            "edges.sigma=[1,2]",
        ],
    )
    assert recipe.train_for("context_encoder").batch == 32
    assert recipe.models["context_encoder"].options["lambda_adv"] == 1e-3
    assert recipe.data.source == "/photos"
    assert recipe.edges.sigma == (1.0, 2.0)


def test_model_means_the_only_model_of_a_recipe(tmp_path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("model: {name: edge_connect, lambda_s: 100}\n")
    assert load_recipe(str(path), ["model.lambda_s=50"]).models["edge_connect"].options == {"lambda_s": 50}
    with pytest.raises(RecipeError, match="2 models"):
        load_recipe("demo", ["model.lambda_s=50"])


@pytest.mark.parametrize(
    ("name", "words"),
    [("dema", "did you mean demo"), ("missing.yaml", "neither a file nor one of")],
)
def test_the_error_for_a_missing_recipe_lists_the_shipped_ones(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(name)


def test_a_file_that_is_not_a_recipe(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(str(path))
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="is not a recipe"):
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
def test_neither_yaml_files_nor_values_run_code(tag: str, tmp_path) -> None:
    from pipelines.importing.import_checkpoint import parse_settings

    created = tmp_path / "sprung"
    value = tag.format(created)
    path = tmp_path / "r.yaml"
    path.write_text(f"models: {{context_encoder: {{}}}}\nname: {value}\n")
    for load in (
        lambda: load_recipe(str(path)),
        lambda: load_recipe("demo", [f"name={value}"]),
        lambda: parse_settings([f"width={value}"]),
    ):
        with pytest.raises(ValueError, match="YAML") as error:
            load()
        assert "\n" not in str(error.value)
    assert not created.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("tracking_uri=https://me:planted-9@mlflow.example", "tracking_uri"),
        ("tracking_uri=postgresql://me:planted-9@host/db", "tracking_uri"),
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
def test_a_password_in_an_address_is_rejected_and_not_repeated(override: str, field: str) -> None:
    with pytest.raises(
        RecipeError, match=f"^{re.escape(field)}.* has a user's name or password in it"
    ) as error:
        load_recipe("demo", [override])
    assert "planted-9" not in str(error.value)
    assert "\n" not in str(error.value)


def test_storage_and_tracking_uri_do_not_change_the_digest() -> None:
    base = parse_recipe(SMALL)
    assert parse_recipe({**SMALL, "storage": "s3://b/p", "tracking_uri": "http://x"}).digest == base.digest
    assert parse_recipe({**SMALL, "seed": 1}).digest != base.digest


def test_a_recipe_can_choose_the_attention_norm() -> None:
    recipe = load_recipe("deepfill_v1-small", ["model.attention_norm=smooth"])
    check_recipe(recipe)
    assert train_config(recipe, "deepfill_v1").options["attention_norm"] == "smooth"
    with pytest.raises(RecipeError, match="attention_norm 'smoth' is neither 'smooth' nor 'released'"):
        check_recipe(load_recipe("deepfill_v1-small", ["model.attention_norm=smoth"]))


def test_a_model_can_have_its_own_seed_masks_and_train_fields() -> None:
    section = {"seed": 3, "masks": "box", "train": {"batch": 8}}
    recipe = parse_recipe({**SMALL, "train": {"ema_decay": 0.5}, "models": {"context_encoder": section}})
    assert (recipe.seed_for("context_encoder"), recipe.masks_for("context_encoder")) == (3, {"box": 1})
    assert recipe.train_for("context_encoder").model_dump() == recipe.train.model_dump() | {"batch": 8}
    assert isinstance(recipe, Recipe)


def test_loading_a_recipe_imports_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys, pipelines.recipe.load, pipelines.__main__\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'cv2') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
