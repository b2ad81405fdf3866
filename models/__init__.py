"""Networks, losses and training phases, one file a paper, to be read beside it.

Models know nothing of data, Ray or MLflow: tensors come in, tensors go out, and weights come as local paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.base import Model

Options = Mapping[str, Any]


def _never(options: Options) -> bool:
    return False


# A line a model: where its class is, imported (with torch) when it is wanted, and whether its options take edges.
_MODELS: dict[str, tuple[str, Callable[[Options], bool]]] = {
    "context_encoder": ("models.context_encoder:ContextEncoder", _never),
    "context_encoder_region": ("models.context_encoder_region:ContextEncoderRegion", _never),
    "glcic": ("models.glcic:GLCIC", _never),
    "partial_conv": ("models.partial_conv:PartialConv", _never),
    "deepfill_v1": ("models.deepfill_v1:DeepFillV1", _never),
    "deepfill_v2": ("models.deepfill_v2:DeepFillV2", lambda options: bool(options.get("guided"))),
    "edge_connect": ("models.edge_connect:EdgeConnect", lambda options: options.get("edges") != "none"),
}


def list_models() -> list[str]:
    """The names `build_model` knows."""
    return sorted(_MODELS)


def takes_edges(name: str, options: Options) -> bool:
    """Whether a model with these options trains on edges; known without loading torch. ValueError as `model_type`."""
    return _entry(name)[1](options)


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


def _entry(name: str) -> tuple[str, Callable[[Options], bool]]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, list_models())}")
    return _MODELS[name]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}"
