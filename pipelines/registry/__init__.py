"""The MLflow model registry: list, search, promote, roll back and load models.

    from pipelines import registry
    model = registry.load_model("models:/edge_connect@champion")
    frame = registry.search("edge_connect", where=["psnr > 18"])

The history of each alias is stored in tags of the registered model (aliases.py). Modules are imported when a name of
theirs is first used, and torch or a version's files only by the functions that need them: look-ups stay fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from models.base import Model
    from pipelines.registry.aliases import (
        ConcurrentPromotion,
        alias_state,
        history,
        promote,
        rejections,
        rollback,
    )
    from pipelines.registry.client import RegistryError, delete, list_models
    from pipelines.registry.describe import ModelDetails, VersionDetails
    from pipelines.registry.loaded_model import LoadedModel
    from pipelines.registry.searching import best, search

    Overtaken, place = ConcurrentPromotion, alias_state

__all__ = [
    "ConcurrentPromotion",
    "LoadedModel",
    "Overtaken",
    "RegistryError",
    "alias_state",
    "best",
    "delete",
    "history",
    "list_models",
    "load_model",
    "place",
    "promote",
    "register",
    "rejections",
    "rollback",
    "search",
    "show",
]

_MODULES = {
    "aliases": ("ConcurrentPromotion", "alias_state", "history", "promote", "rejections", "rollback"),
    "client": ("RegistryError", "delete", "list_models"),
    "loaded_model": ("LoadedModel",),
    "searching": ("best", "search"),
}
_OLD_NAMES = {"Overtaken": "ConcurrentPromotion", "place": "alias_state"}  # of release 0.1.0
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used."""
    current = _OLD_NAMES.get(name, name)
    if current not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[current]}"), current)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_model(uri: str | Path, *, tracking_uri: str | None = None, device: str = "cpu") -> LoadedModel:
    """Load a checkpoint folder (model.safetensors and model.json), NAME@ALIAS, NAME/VERSION, or NAME: its champion, else
    its newest version.

    An existing folder comes before a registered model of the same name; models:/NAME is always the registered one.
    Loading unpickles nothing and runs no code that comes with a model. RegistryError: no such folder, name, alias or
    version (the message lists the existing ones), a server that does not answer, a damaged checkpoint.
    """
    from pipelines.registry import load

    return load.load_model(uri, tracking_uri=tracking_uri, device=device)


def register(
    model: Model,
    *,
    name: str,
    run_id: str,
    step_key: str,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    example: np.ndarray | None = None,
    tracking_uri: str | None = None,
) -> str:
    """Register the model once per `step_key` and set the alias `candidate` on it; returns the version.

    Arguments and errors: see registration.register.
    """
    from pipelines.registry import registration

    return registration.register(
        model,
        name=name,
        run_id=run_id,
        step_key=step_key,
        tags=tags,
        metrics=metrics,
        metadata=metadata,
        example=example,
        tracking_uri=tracking_uri,
    )


def show(uri: str, tracking_uri: str | None = None) -> VersionDetails | ModelDetails:
    """Details of a version (NAME@ALIAS, NAME/VERSION), or of a model and all its versions (NAME); models:/ is optional.

    RegistryError: no such model, alias or version.
    """
    from pipelines.registry import describe

    return describe.show(uri, tracking_uri)
