"""Names of release 0.1.0 that are other names now: in recipes and commands an error names the new one, and the options
of models in the registry are translated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RECIPE_FIELDS = {
    "tracking": "tracking_uri",
    "data.shard_photos": "partition_size",
    "data.shard_mb": "max_shard_mb",
    "data.max_rejects": "max_reject_fraction",
    "data.max_bad": "max_unreadable_fraction",
    "edges.source": "mode",
    "edges.stored": "precompute",
    "train.ema": "ema_decay",
    "train.keep": "keep_checkpoints",
    "scaling.at_once": "micro_batch_size",
    "scaling.resize_every": "resize_interval_s",
    "evaluate.count": "max_photos",
    "evaluate.samples": "grid_rows",
    "evaluate.distance.crops": "crops_per_photo",
    "sweep.every": "report_every",
    "sweep.reduction": "reduction_factor",
    "sweep.at_once": "max_concurrent_trials",
}
"""Path of a field in a recipe -> its last part now. `edges` and `train` are also sections of a model."""

MODEL_OPTIONS = {
    "context_encoder": {"fill": "fill_color"},
    "context_encoder_region": {"fill": "fill_color"},
    "edge_connect": {"edges": "edge_input", "lr_drop": "lr_drop_at", "drop_d1": "joint_without_d1"},
    "glcic": {"judged": "discriminator_input", "mean_colour": "mean_color", "optimiser": "optimizer"},
    "partial_conv": {"image_range": "normalization", "tv": "tv_region"},
}
"""Model -> its options: the old name -> the new one."""

MASK_OPTIONS = {"least": "min_area", "most": "max_area", "share": "weight"}
"""Option of a kind of masks: the old name -> the new one."""

COMMAND_OPTIONS = {
    "plan": {"--size": "--photos"},
    "shard": {
        "--shard-photos": "--partition-size",
        "--shard-mb": "--max-shard-mb",
        "--max-rejects": "--max-reject-fraction",
    },
    "evaluate": {"--count": "--max-photos", "--samples": "--grid-rows"},
    "compare": {"--count": "--max-photos", "--samples": "--grid-rows"},
    "fill": {"--max-side": "--max-tile-size"},
    "import": {"--name": "--register-as"},
}
"""Command -> its options: the old name -> the new one. An old name that begins the new one is still taken."""

_VALUES = {"data.crop": {"keep": "none"}}


def model_options(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a stored model by the names of today."""
    return {MODEL_OPTIONS.get(model, {}).get(name, name): value for name, value in options.items()}


def renamed_field(recipe: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field of a recipe, as YAML has it, that has another name now; None: there is none."""
    models = recipe.get("models") or {}
    if isinstance(single := recipe.get("model"), Mapping):
        models = {"": single}
    for path, old, new in _old_names(recipe, models if isinstance(models, Mapping) else {}):
        return f"{path}: {old} is called {new} now"
    return None


def renamed_option(command: str, arguments: Sequence[str]) -> str | None:
    """Which of the arguments that a command does not know is an option with another name now; None: none is."""
    for argument in arguments:
        old = argument.partition("=")[0]
        if new := COMMAND_OPTIONS.get(command, {}).get(old):
            return f"{old} is called {new} now"
    return None


def _old_names(recipe: Mapping[str, Any], models: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(path, old name, new name)"""
    for path, new in RECIPE_FIELDS.items():
        *sections, old = path.split(".")
        if old in _section(recipe, sections):
            yield path, old, new
    for path, values in _VALUES.items():
        *sections, field = path.split(".")
        value = _section(recipe, sections).get(field)
        if isinstance(value, str) and value in values:
            yield path, value, values[value]
    for path in _section(recipe, ["sweep", "fields"]):
        if path in RECIPE_FIELDS:
            yield f"sweep.fields.{path}", path.split(".")[-1], RECIPE_FIELDS[path]
    yield from _old_mask_options("masks", recipe.get("masks"))
    for key, model in models.items():
        if not isinstance(model, Mapping):
            continue
        where = f"models.{key}" if key else "model"
        options = MODEL_OPTIONS.get(model.get("name", key), {})
        for old, new in options.items():
            if old in model and (old != "edges" or isinstance(model[old], str)):  # `edges` is a section too
                yield f"{where}.{old}", old, new
        for path, new in RECIPE_FIELDS.items():
            *sections, old = path.split(".")
            if sections in (["edges"], ["train"]) and old in _section(model, sections):
                yield f"{where}.{path}", old, new
        yield from _old_mask_options(f"{where}.masks", model.get("masks"))


def _old_mask_options(where: str, masks: Any) -> Iterator[tuple[str, str, str]]:
    for kind, options in masks.items() if isinstance(masks, Mapping) else ():
        for old, new in MASK_OPTIONS.items():
            if isinstance(options, Mapping) and old in options:
                yield f"{where}.{kind}.{old}", old, new


def _section(recipe: Mapping[str, Any], sections: list[str]) -> Mapping[str, Any]:
    node: Any = recipe
    for name in sections:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}
