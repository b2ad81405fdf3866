"""Recipes from YAML files and overrides, checked, with errors that name the nearest known field."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.recipe import Domain, ModelSection, Recipe

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run; one line that names the field at fault and the mend."""


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that a command line names, with its --set, --storage and --tracking applied."""
    named = [f"{key}={getattr(args, key)}" for key in ("storage", "tracking") if getattr(args, key, None)]
    return load_recipe(args.recipe, [*args.set, *named])


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file and apply `key.sub=value` overrides.

    Raises RecipeError in one line that names the file or field at fault and the nearest known one.
    """
    path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
        if not path.is_file():
            near = nearest(name, shipped_recipes())
            raise RecipeError(
                f"no recipe {name!r}: neither a file nor one of {', '.join(shipped_recipes())}{near}"
            )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is no recipe: expected fields such as `data:` and `models:`")
    raw.setdefault("name", path.stem)
    for override in overrides:
        _override(raw, override)
    _refuse_passwords(raw)
    return parse_recipe(raw, str(path))


def _refuse_passwords(node: Any, path: str = "") -> None:
    """A recipe is kept with the run, in its report and with every model that it makes."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            _refuse_passwords(str(key), path)  # a mask folder is a key
            _refuse_passwords(value, f"{path}.{key}".strip("."))
    elif isinstance(node, list):
        for value in node:
            _refuse_passwords(value, path)
    elif isinstance(node, str) and names_a_user(node):
        raise RecipeError(
            f"{path or 'recipe'} has a user's name or password in it, which would be kept with the run: give the plain "
            "address, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or the AWS variables in the environment, "
            "or all of it as MLFLOW_TRACKING_URI"
        )


def names_a_user(address: str) -> bool:
    """Whether an address has a user's name or password in it."""
    return re.search(r"://[^/]*@", address) is not None


def parse_recipe(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate fields already read. Raises RecipeError like `load_recipe`."""
    try:
        return Recipe.model_validate(dict(raw))
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first_line(error)}") from None


def check_recipe(recipe: Recipe) -> None:
    """Check what only the models, masks and metrics know: names, options, phases, weights of feature stacks.

    Imports torch. Raises RecipeError in one line, before anything has run.
    """
    from data_prep.masks import open_masks
    from pipelines.evaluation.distances import pooled_features
    from pipelines.evaluation.evaluate import EvaluationSpec
    from pipelines.evaluation.metrics import DEFINITIONS

    for key in recipe.models:
        check_model(recipe, key)
    for kind in recipe.evaluate.masks:
        _check("evaluate.masks", open_masks, kind)
    if recipe.evaluate.metric not in DEFINITIONS:
        near = nearest(recipe.evaluate.metric, list(DEFINITIONS))
        raise RecipeError(
            f"evaluate.metric: no {recipe.evaluate.metric!r} among {', '.join(DEFINITIONS)}{near}"
        )
    spec = EvaluationSpec.of(recipe.evaluate.model_dump(mode="json"))
    if spec.distance is not None:
        _check("evaluate.distance", pooled_features, spec.distance)


def check_model(recipe: Recipe, key: str) -> None:
    """The part of `check_recipe` that is about one model and how it is trained."""
    import torch

    from data_prep.masks import open_masks
    from models import build_model
    from pipelines.resources import local_options

    section = recipe.models[key]
    with torch.device("meta"):
        options = _check(f"models.{key}", local_options, section.options)
        model = _check(f"models.{key}", build_model, section.name, **options)
    for option, value in vars(model.options).items():
        if option.startswith("lambda_") and (value or 0) < 0:
            raise RecipeError(f"models.{key}.{option} = {value:g}: a weight is not negative")
    trained = getattr(model.options, "size", recipe.data.size)
    if trained != recipe.data.size or recipe.data.size % model.multiple:
        wanted = f"{trained}" if trained != recipe.data.size else f"a multiple of {model.multiple}"
        raise RecipeError(
            f"data.size = {recipe.data.size}: models.{key} ({section.name}) trains on {wanted} pixels"
        )
    if model.takes_edges and not model.needs_edges and recipe.edges_of(key).source != "full":
        raise RecipeError(
            f"edges.source = {recipe.edges_of(key).source}: models.{key} learns to follow the edges inside the hole, "
            "which only full has"
        )
    phases = [phase.name for phase in model.phases]
    steps = recipe.train_of(key).steps
    for name in steps:
        if name not in phases:
            near = nearest(name, phases)
            raise RecipeError(f"train.steps.{name}: {section.name} has the phases {', '.join(phases)}{near}")
    for phase in model.phases:
        if steps.get(phase.name, phase.steps):
            _check(f"models.{key}", model.prepare, phase)
    _check("masks", open_masks, recipe.masks_of(key))


def _check(field: str, attempt: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return attempt(*arguments, **options)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"{field}: {error}") from None


def _override(raw: dict[str, Any], text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {text!r}: expected key.sub=value, for example --set train.batch=32")
    keys, node = path.split("."), raw
    if keys[0] == "model" and "model" not in raw:
        models = raw.get("models") or {}
        if len(models) != 1:
            raise RecipeError(
                f"--set {path}: the recipe has {len(models)} models, say models.NAME.{'.'.join(keys[1:])}"
            )
        keys[:1] = ["models", next(iter(models))]
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if isinstance(child, list):
            raise RecipeError(f"--set {path}: {key} is a list; give the whole list, as in --set {key}=[1,2]")
        if not isinstance(child, dict):
            child = node[key] = {}
        node = child
    try:
        node[keys[-1]] = _number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise RecipeError(f"--set {path}: {value!r} is not a YAML value") from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _first_line(error: ValidationError) -> str:
    """The first problem of a validation, as one line: field, what is wrong, nearest known field."""
    # what is misspelt is also missing: say the first rather than the second
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        return f"unknown field {path}{nearest(str(problem['loc'][-1]), known) or ': known are ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], Mapping) else f" (given: {problem['input']!r})"
    return f"{path}: {message}{given}" if path else message


def _fields_at(location: Sequence[Any]) -> list[str]:
    node: Any = Recipe
    for part in location:
        if node is Recipe and part == "models":
            node = None
        elif node is None:
            node = ModelSection
        else:
            kinds = [node.model_fields[part].annotation] if part in node.model_fields else []
            kinds += [kind for outer in kinds for kind in getattr(outer, "__args__", ())]
            other = node if node is Domain else ModelSection  # after Domain comes a field's path
            node = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), other)
    return list(node.model_fields) if node is not None else []


def nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
