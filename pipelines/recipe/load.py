"""Load recipes from YAML files with overrides, and check them; errors name the nearest known field."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.errors import error_text
from pipelines.names import did_you_mean
from pipelines.recipe import Domain, ModelConfig, Recipe
from pipelines.renamed import renamed_field
from pipelines.shipped_recipes import SHIPPED_RECIPES, shipped_recipes

MAX_OVERRIDE_CHARS = 100  # of an override, in an error


class _RecipeLoader(yaml.SafeLoader):
    """Plain values only. 1e-3 is a number, as in YAML 1.2; YAML 1.1 reads it as text."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """Parse YAML. Raises yaml.YAMLError; runs no code, whatever tags the text has."""
    return yaml.load(text, _RecipeLoader)  # a SafeLoader


class RecipeError(ValueError):
    """The recipe is wrong. The message is one line that names the field and how to fix it."""


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """The recipe that a command line names, with its --set, --storage and --tracking-uri applied."""
    fields = {key: getattr(args, key) for key in ("storage", "tracking_uri") if getattr(args, key, None)}
    return load_recipe(args.recipe, args.set, fields)


def recipe_path(name: str) -> Path | None:
    """The file of a shipped recipe, or the file with this path; None if there is neither."""
    for path in (SHIPPED_RECIPES / f"{name}.yaml", Path(name)):
        with suppress(OSError, ValueError):  # raised if the name cannot be a file name
            if path.is_file():
                return path
    return None


def load_recipe(name: str, overrides: Sequence[str] = (), fields: Mapping[str, str] | None = None) -> Recipe:
    """Load a shipped recipe or a YAML file; apply `key.sub=value` overrides, then `fields`, whose values are plain text.

    Raises RecipeError, one line that names the wrong file, override or field, and the nearest known one.
    """
    path = recipe_path(name)
    if path is None:
        near = did_you_mean(name, shipped_recipes())
        raise RecipeError(
            f"no recipe {name!r}: neither a file nor one of {', '.join(shipped_recipes())}{near}"
        )
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {_yaml_problem(error)}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error_text(error)}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a recipe: expected fields such as `data:` and `models:`")
    raw.setdefault("name", path.stem)
    changes = [(f"--set {text}", partial(_apply_override, text=text)) for text in overrides]
    for field, value in (fields or {}).items():
        changes.append(
            (f"--{field.replace('_', '-')} {value}", partial(_set_field, keys=[field], value=value))
        )
    changed = _apply_changes(raw, [change for _, change in changes])
    _reject_credentials(changed)
    problem = _first_problem(changed)
    if problem is None:
        return Recipe.model_validate(changed)
    # an override is at fault if the problem changes or disappears without it; if there is none, the file is
    wrong = [
        option
        for number, (option, _) in enumerate(changes)
        if _problem_without(raw, [change for _, change in changes], number) != problem
    ]
    options = " ".join(
        option if len(option) <= MAX_OVERRIDE_CHARS else f"{option[:MAX_OVERRIDE_CHARS]}..."
        for option in wrong
    )
    raise RecipeError(f"{options or path}: {problem}")


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Line, column and problem in one line, without the parser's name for the text."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return error_text(error)
    tab = "; indent with spaces" if "'\\t'" in problem else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{tab}"


Change = Callable[[dict[str, Any]], None]
"""Changes the fields of a recipe in place."""


def _apply_changes(raw: Mapping[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    """A copy of the recipe's fields with these changes."""
    copied: dict[str, Any] = copy.deepcopy(dict(raw))
    for change in changes:
        change(copied)
    return copied


def _first_problem(raw: Mapping[str, Any]) -> str | None:
    """The first problem of a recipe's fields; None if they are valid."""
    if renamed := renamed_field(raw):
        return renamed
    try:
        Recipe.model_validate(dict(raw))
    except ValidationError as error:
        return _first_line(error)
    return None


def _problem_without(raw: Mapping[str, Any], changes: Sequence[Change], number: int) -> str | None:
    """The first problem without one of the changes; '' if the other changes cannot be applied without it."""
    try:
        return _first_problem(_apply_changes(raw, [*changes[:number], *changes[number + 1 :]]))
    except RecipeError:
        return ""


def _reject_credentials(node: Any, path: str = "") -> None:
    """Raise RecipeError for a user name or password: recipes are stored with runs, reports and models."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            _reject_credentials(str(key), path)  # a mask folder is a key
            _reject_credentials(value, f"{path}.{key}".strip("."))
    elif isinstance(node, list):
        for value in node:
            _reject_credentials(value, path)
    elif isinstance(node, str) and has_credentials(node):
        raise RecipeError(
            f"{path or 'recipe'} has a user's name or password in it, which would be stored with the run: give the plain "
            "address, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or the AWS variables in the environment, "
            "or the whole address as MLFLOW_TRACKING_URI"
        )


def has_credentials(address: str) -> bool:
    """Whether an address contains a user name or a password."""
    return re.search(r"://[^/]*@", address) is not None


def parse_recipe(raw: Mapping[str, Any], label: str = "recipe") -> Recipe:
    """Validate the fields of a recipe. Raises RecipeError like `load_recipe`."""
    if renamed := renamed_field(raw):
        raise RecipeError(f"{label}: {renamed}")
    try:
        return Recipe.model_validate(dict(raw))
    except ValidationError as error:
        raise RecipeError(f"{label}: {_first_line(error)}") from None


def _apply_override(raw: dict[str, Any], text: str) -> None:
    """Set the field of an override `key.sub=value`, in place. Raises RecipeError."""
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {text!r}: expected key.sub=value, for example --set train.batch=32")
    keys, node = path.split("."), raw
    if keys[0] == "model" and "model" not in raw:
        models = raw.get("models") or {}
        if len(models) != 1:
            raise RecipeError(
                f"--set {path}: the recipe has {len(models)} models: use models.NAME.{'.'.join(keys[1:])}"
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
        node[keys[-1]] = read_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {path}: {value!r} is not a YAML value: {_yaml_problem(error)}") from None


def _set_field(raw: dict[str, Any], keys: Sequence[str], value: str) -> None:
    raw[keys[0]] = value


def _first_line(error: ValidationError) -> str:
    """The first validation error in one line: field, problem, nearest known field."""
    # a misspelt field is also a missing field: report the misspelling
    problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_fields(problem["loc"][:-1])
        return f"unknown field {path}{did_you_mean(str(problem['loc'][-1]), known) or ': known are ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    kind, value = problem["type"], problem["input"]
    message = TYPE_MESSAGES.get(kind) or problem["msg"].removeprefix("Value error, ")
    names_value = kind == "value_error" and isinstance(value, str)  # our own messages do
    suffix = "" if names_value or isinstance(value, Mapping) else f" (given: {value!r}{_suggestion(problem)})"
    return f"{path}: {message}{suffix}" if path else message


TYPE_MESSAGES = {
    "tuple_type": "should be a list, as in [a, b]",
    "dict_type": "should be fields with values, as in {a: 1}",
    "model_type": "should be fields with values, as in {a: 1}",
    "string_type": "should be text",
}
"""pydantic's error types -> messages without Python's terms."""


def _suggestion(problem: Any) -> str:
    """The value that the user probably meant, for a value of a wrong type or an unknown choice; '' if unclear."""
    kind, value = problem["type"], problem["input"]
    if kind == "literal_error":
        return did_you_mean(str(value), re.findall(r"'([^']+)'", problem["msg"]))
    if kind in ("float_parsing", "int_parsing") and isinstance(value, str):
        if re.fullmatch(r"[-+]?\d*,\d+", value):
            return f"; did you mean {value.replace(',', '.')}?"
        if percent := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value):
            return f"; did you mean {float(percent[1]) / 100:g}?"
    if kind == "tuple_type" and isinstance(value, str | int | float):
        return f"; did you mean [{value}]?"
    if kind == "string_type" and isinstance(value, int | float | bool):
        return f"; quotes make it text: '{value}'"
    return ""


def _known_fields(location: Sequence[Any]) -> list[str]:
    """The fields of the section at this path of keys."""
    node: Any = Recipe
    for part in location:
        if node is Recipe and part == "models":
            node = None
        elif node is None:
            node = ModelConfig
        else:
            kinds = [node.model_fields[part].annotation] if part in node.model_fields else []
            kinds += [kind for outer in kinds for kind in getattr(outer, "__args__", ())]
            other = node if node is Domain else ModelConfig  # below a Domain there is the path of a field
            node = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), other)
    return list(node.model_fields) if node is not None else []
