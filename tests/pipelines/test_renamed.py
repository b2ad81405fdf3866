"""Names of release 0.1.0: an error names the new one, and stored options are translated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from data_prep.mask_shapes import MASK_GENERATORS
from models import options_class as options_of
from pipelines.cli.main import build_parser, main
from pipelines.recipe import Recipe
from pipelines.recipe.load import RecipeError, load_recipe, parse_recipe
from pipelines.renamed import COMMAND_OPTIONS, MASK_OPTIONS, MODEL_OPTIONS, RECIPE_FIELDS, model_options


@pytest.mark.parametrize("path", RECIPE_FIELDS)
def test_an_old_field_is_refused_by_the_name_that_it_has_now(path: str) -> None:
    new = RECIPE_FIELDS[path]
    with pytest.raises(RecipeError, match=rf"^--set {path}=1: {path}: .* is called {new} now$"):
        load_recipe("demo", [f"{path}=1"])
    *sections, old = path.split(".")
    schema: dict[str, Any] = Recipe.model_json_schema()
    node = schema
    for section in sections:
        node = _resolved(node["properties"][section], schema)
    assert new in node["properties"]
    assert old not in node["properties"]


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    (reference,) = [part["$ref"] for part in node.get("anyOf", [node]) if "$ref" in part]
    return schema["$defs"][reference.split("/")[-1]]


@pytest.mark.parametrize(
    ("model", "old"), [(m, old) for m, options in MODEL_OPTIONS.items() for old in options]
)
def test_an_old_option_of_a_model_is_refused_in_a_recipe_and_translated_in_a_record(
    model: str, old: str
) -> None:
    new = MODEL_OPTIONS[model][old]
    with pytest.raises(RecipeError, match=rf"models.{model}.{old}: {old} is called {new} now$"):
        parse_recipe({"name": "x", "models": {model: {old: "some value"}}})
    with pytest.raises(RecipeError, match=rf"model.{old}: {old} is called {new} now$"):
        parse_recipe({"name": "x", "model": {"name": model, old: "some value"}})
    assert model_options(model, {old: 1, "width": 0.5}) == {new: 1, "width": 0.5}
    known = {field.name for field in dataclasses.fields(options_of(model))}
    assert new in known
    assert old not in known


def test_old_options_of_masks_values_and_fields_of_sweeps() -> None:
    masks = {"region": {"least": 0.1}, "block": 1}
    for recipe, words in (
        ({"masks": masks}, "masks.region.least: least is called min_area now"),
        (
            {"models": {"glcic": {"masks": masks}}},
            "models.glcic.masks.region.least: least is called min_area now",
        ),
        (
            {"models": {"glcic": {"train": {"ema": 0.9}}}},
            "models.glcic.train.ema: ema is called ema_decay now",
        ),
        ({"data": {"crop": "keep"}}, "data.crop: keep is called none now"),
        ({"sweep": {"fields": {"train.ema": [0.9]}}}, "sweep.fields.train.ema: ema is called ema_decay now"),
    ):
        with pytest.raises(RecipeError, match=words):
            parse_recipe({"name": "x", "models": {"glcic": {}}, **recipe})
    region = MASK_GENERATORS["region"].__code__.co_varnames
    assert all(new in region for old, new in MASK_OPTIONS.items() if old != "share")


@pytest.mark.parametrize(
    ("command", "old"), [(command, old) for command, options in COMMAND_OPTIONS.items() for old in options]
)
def test_an_old_option_of_a_command_is_refused_by_the_name_that_it_has_now(
    command: str, old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "plan": ["plan", "demo"],
        "shard": ["shard", "photos", "out"],
        "evaluate": ["evaluate", "m", "--images", "p", "--masks", "center", "--out", "o"],
        "compare": ["models", "compare", "a", "b"],
        "fill": ["fill", "m", "p", "h", "--out", "o"],
        "import": ["import", "glcic", "f"],
    }[command]
    with pytest.raises(SystemExit) as status:
        main([*words, old, "5"])
    assert status.value.code == 2
    new = COMMAND_OPTIONS[command][old]
    name = " ".join(words[: 2 if command == "compare" else 1])
    assert capsys.readouterr().err == f"inpaint {name}: {old} is called {new} now\n"
    build_parser().parse_args([*words, new, "0.5" if "fraction" in new else "5"])


def test_an_option_that_never_was_is_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "demo", "--sise", "5"])
    assert capsys.readouterr().err.startswith("inpaint plan: there is no option --sise")
