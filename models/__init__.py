"""Networks, losses and training phases, one file a paper, to be read beside it.

Models know nothing of data, Ray or MLflow: tensors come in, tensors go out, and weights come as local paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.base import Model

# A line a model: where its class is, imported (with torch) when it is wanted, and whether it takes edges.
_MODELS = {
    "context_encoder": ("models.context_encoder:ContextEncoder", False),
    "edge_connect": ("models.edge_connect:EdgeConnect", True),
}


def list_models() -> list[str]:
    """The names `build_model` knows."""
    return sorted(_MODELS)


def takes_edges(name: str) -> bool:
    """Whether a model trains on edges; known without loading torch. ValueError as `model_type`."""
    return _entry(name)[1]


def model_type(name: str) -> type[Model]:
    """A model's class. ValueError, naming the nearest known one: an unknown name."""
    module, _, kind = _entry(name)[0].partition(":")
    return getattr(importlib.import_module(module), kind)


def model_options(name: str) -> type:
    """The frozen dataclass of a model's options, with their defaults (the paper's). ValueError: unknown name."""
    return model_type(name).Options


def build_model(name: str, **options: Any) -> Model:
    """Build a model with freshly drawn weights: the same torch seed and options give the same bits.

    ValueError: an unknown name or option (naming the nearest known one), or a value out of range.
    """
    kind = model_options(name)
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, known)}")
    return model_type(name)(kind(**options))


def _entry(name: str) -> tuple[str, bool]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, list_models())}")
    return _MODELS[name]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}"
