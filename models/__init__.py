"""Networks, losses and training phases: one file per paper, to be read beside it.

Models know nothing of data, Ray or MLflow: they take and return tensors, and load weights from local paths. Everything
about a model is in its file; to add one, write the file, add a line to `_MODELS` below, and write recipes. A model of
another package is an entry point of the group `inpaint.models` (`my_model = "my_package.my_model:MyModel"`), or is
passed to `register`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.base import Model

OptionValues = Mapping[str, Any]

MODELS_ENV_VAR = "INPAINT_MODELS"
"""Environment variable with the registered models, comma-separated NAME=MODULE:CLASS: child processes inherit it."""
ENTRY_POINT_GROUP = "inpaint.models"


@dataclasses.dataclass(frozen=True)
class _ModelEntry:
    class_path: str
    """`module:Class`, imported (with torch) on first use."""
    takes_edges: Callable[[OptionValues], bool] | None = None
    """The model's `takes_edges` as a function of its options, without loading torch; None: build the model and ask it."""


def _no_edges(options: OptionValues) -> bool:
    return False


_MODELS = {
    "context_encoder": _ModelEntry("models.context_encoder:ContextEncoder", _no_edges),
    "context_encoder_region": _ModelEntry("models.context_encoder_region:ContextEncoderRegion", _no_edges),
    "glcic": _ModelEntry("models.glcic:GLCIC", _no_edges),
    "partial_conv": _ModelEntry("models.partial_conv:PartialConv", _no_edges),
    "deepfill_v1": _ModelEntry("models.deepfill_v1:DeepFillV1", _no_edges),
    "deepfill_v2": _ModelEntry("models.deepfill_v2:DeepFillV2", lambda options: bool(options.get("guided"))),
    "edge_connect": _ModelEntry(
        "models.edge_connect:EdgeConnect", lambda options: options.get("edge_input") != "none"
    ),
}


def list_models() -> list[str]:
    """The names that `build_model` accepts: this package's models, registered ones, and those of installed packages."""
    return sorted({*_MODELS, *_registered_models(), *_installed_models()})


def register(name: str, class_path: str) -> None:
    """Register the class `class_path`, "module:Class", as the model `name`, or replace a registered one.

    This process knows it, and so do all processes started afterwards, Ray's workers too; they must be able to import
    the module. ValueError: the name of a model of this package, an invalid name, or a class that other processes
    cannot import.
    """
    if name in _MODELS:
        raise ValueError(f"the model name {name!r} is taken: register yours under another name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is not a model name: use letters, digits and _.- only")
    module, _, attribute = class_path.partition(":")
    if not all(map(str.isidentifier, [*module.split("."), *attribute.split(".")])) or module == "__main__":
        raise ValueError(
            f"model {name!r} at {class_path!r}: give module:Class, of a module that workers can import too"
        )
    _write_registered({**_registered_models(), name: class_path})


def unregister(name: str) -> None:
    """Undo `register`; processes that already run may still know the model."""
    _write_registered({other: path for other, path in _registered_models().items() if other != name})


def takes_edges(name: str, options: OptionValues) -> bool:
    """Whether a model with these options trains on edges. Needs no torch for this package's models.

    ValueError as `build_model`.
    """
    predicate = _entry(name).takes_edges
    return meta_model(name, options).takes_edges if predicate is None else predicate(options)


def model_class(name: str) -> type[Model]:
    """A model's class. ValueError: an unknown name (naming the nearest known one), or a class that cannot be imported,
    is not a `Model` or has another name."""
    from models.base import Model

    class_path = _entry(name).class_path
    try:
        cls = pkgutil.resolve_name(class_path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {name!r} cannot be imported from {class_path}: {error}") from error
    if not isinstance(cls, type) or not issubclass(cls, Model):
        raise ValueError(f"model {name!r}: {class_path} is not a subclass of models.base.Model")
    if cls.name != name:
        raise ValueError(
            f"model {name!r}: the `name` of {class_path} is {cls.name!r}: the two must be the same"
        )
    return cls


def paper(name: str) -> str:
    """Title, authors and venue of a model's paper: the first paragraph of its file, read without importing it; '' if
    there is no such model or text."""
    try:
        spec = find_spec(_entry(name).class_path.partition(":")[0])
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        text = ast.get_docstring(ast.parse(source)) or ""
    except (ValueError, ImportError, OSError, SyntaxError):
        return ""
    return " ".join(text.partition("\n\n")[0].split())


def options_class(name: str) -> type:
    """The frozen dataclass of a model's options, with the paper's values as defaults. ValueError as `model_class`."""
    return model_class(name).Options


def build_model(name: str, **options: Any) -> Model:
    """Build a model with random weights: the same torch seed and options give the same bits.

    ValueError: an unknown name or option (naming the nearest known one), or a value out of range.
    """
    options_type = options_class(name)
    known = [field.name for field in dataclasses.fields(options_type)]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{_suggestion(option, known)}")
    return model_class(name)(options_type(**options))


def meta_model(name: str, options: OptionValues) -> Model:
    """The model on torch's meta device, for its attributes and shapes. Cached by options: do not change it.

    ValueError as `build_model`.
    """
    return _cached_meta_model(_entry(name).class_path, name, json.dumps(options, sort_keys=True))


@lru_cache(maxsize=16)
def _cached_meta_model(class_path: str, name: str, options: str) -> Model:
    """`class_path` is part of the cache key: a name can be registered again with another class."""
    import torch

    with torch.device("meta"):
        return build_model(name, **json.loads(options))


def _entry(name: str) -> _ModelEntry:
    if name in _MODELS:
        return _MODELS[name]
    class_path = _registered_models().get(name) or _installed_models().get(name)
    if class_path is None:
        raise ValueError(f"unknown model {name!r}{_suggestion(name, list_models())}")
    return _ModelEntry(class_path)


def _registered_models() -> dict[str, str]:
    """Name -> module:Class, from the environment variable."""
    text = os.environ.get(MODELS_ENV_VAR, "")
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    if invalid := [name for name, _, class_path in pairs if ":" not in class_path]:
        raise ValueError(f"{MODELS_ENV_VAR}: {invalid[0]!r} is not of the form NAME=MODULE:CLASS")
    return {name.strip(): class_path.strip() for name, _, class_path in pairs}


def _write_registered(models: Mapping[str, str]) -> None:
    os.environ[MODELS_ENV_VAR] = ",".join(f"{name}={class_path}" for name, class_path in models.items())


@cache
def _installed_models() -> dict[str, str]:
    """Name -> module:Class, from the entry points of installed packages."""
    from importlib.metadata import entry_points  # as slow to import as the rest of this module together

    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _suggestion(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean {nearest[0]!r}?" if nearest else f": known are {', '.join(known)}"
