"""The chain itself:

    photographs --shard--> tars --edges(sigma)--> edge tars
        --train(model) x N--> weights --evaluate--> scores --register--> versions

Each arrow is a durable step; what a step does is in its folder's step.py, how it survives in durable/.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_prep.slices import Listing
from data_prep.sources import open_source
from data_prep.storage import open_storage
from models import takes_edges
from pipelines.durable.steps import Step, StepContext, Workflow
from pipelines.recipe import Recipe
from pipelines.tracking import Tracking, shown
from pipelines.training.job import out_of_memory

UNTIL = ("shard", "edges", "train", "evaluate", "register")


def build_workflow(
    recipe: Recipe,
    tracking: Tracking | None = None,
    until: str = "register",
    sweep: Mapping[str, str] | None = None,
) -> Workflow:
    """The steps of a recipe, none of which has run yet; `until` ends the chain early, `sweep` is where its values are
    from (for the version's record).

    Raises ValueError in one line when the source holds no photographs.
    """
    local = {
        "tracking": None if tracking is None else vars(tracking),
        "scaling": recipe.scaling.model_dump(),
        "recipe": recipe.to_yaml(),
        "sweep": sweep,
    }
    steps = [shard_step(recipe)]
    sigmas = {key: edge_sigmas(recipe, key) for key in recipe.models}
    for sigma in sorted(set(sum(sigmas.values(), ()))):
        steps.append(edges_step(sigma))
    for key in recipe.models:
        steps.append(train_step(recipe, key, sigmas[key]))
    trained = tuple(f"train-{key}" for key in recipe.models)
    steps.append(
        Step(
            "evaluate",
            Later("evaluation.step", "evaluate"),
            recipe.evaluate.model_dump(mode="json"),
            needs=("shard", *trained),
        )
    )
    for key, section in recipe.models.items():
        if section.register_as != "none":
            config = {
                "register_as": section.register_as or section.name,
                "recipe": recipe.name,
                "metric": recipe.evaluate.metric,
                "evaluate": recipe.evaluate.model_dump(mode="json"),
                "registry": shown(tracking.uri) if tracking else "",
            }
            needs = ("shard", f"train-{key}", "evaluate")
            steps.append(
                Step(
                    f"register-{key}",
                    Later("registry.step", "register"),
                    config,
                    needs,
                    outside="pipelines.tracking:still_registered",
                )
            )
    wanted = UNTIL[: UNTIL.index(until) + 1]
    kept = [step for step in steps if step.name.startswith(wanted)]
    return Workflow(
        recipe.name,
        [replace(step, local={**local, **step.local}) for step in kept],
        open_storage(recipe.storage),
    )


def with_parent(workflow: Workflow, parent: str) -> Workflow:
    """The same steps, whose MLflow runs are children of the run `parent`."""
    steps = [replace(step, local={**step.local, "parent": parent}) for step in workflow.steps]
    return replace(workflow, steps=steps)


def shard_step(recipe: Recipe) -> Step:
    source = open_source(recipe.data.source, recipe.data.size, recipe.data.root)
    config = {**sharding(recipe), "source": source.uri, "listing": Listing(source).digest}
    return Step("shard", Later("data.step", "shard"), config, version=2)


def sharding(recipe: Recipe) -> dict[str, Any]:
    """The fields that make the shards what they are."""
    keys = [
        "source",
        "root",
        "size",
        "margin",
        "crop",
        "format",
        "quality",
        "val",
        "test",
        "shard_photos",
        "shard_mb",
        "max_rejects",
    ]
    return {key: getattr(recipe.data, key) for key in keys}


def train_step(recipe: Recipe, key: str, sigmas: tuple[float, ...]) -> Step:
    section, train, edges = recipe.models[key], recipe.train_of(key), recipe.edges_of(key)
    config = {
        "model": section.name,
        "options": section.options,
        "seed": recipe.seed_of(key),
        "size": recipe.data.size,
        "flip": recipe.data.flip,
        "streams": recipe.data.streams,
        "masks": recipe.masks_of(key),
        "edge_source": edge_source(recipe, key),
        "sigma": list(edges.sigma),
        "train": train.model_dump(mode="json", exclude={"keep"}),
    }
    needs = ("shard", *(edges_name(sigma) for sigma in sigmas))
    return Step(
        f"train-{key}",
        Later("training.step", "train"),
        config,
        needs,
        local={
            "keep": train.keep,
            **{name: getattr(recipe.data, name) for name in ("threads", "max_bad", "cache_gb", "cache_dir")},
        },
        memory=out_of_memory(train.batch, recipe.data.size, recipe.scaling.at_once, recipe.scaling.workers),
    )


def uses_edges(recipe: Recipe, key: str) -> bool:
    section = recipe.models[key]
    return takes_edges(section.name, section.options) and recipe.edges_of(key).source != "none"


def edge_sigmas(recipe: Recipe, key: str) -> tuple[float, ...]:
    """The sigmas whose edge tars a training reads; masked edges depend on the mask and are made on the fly."""
    return recipe.edges_of(key).sigma if edge_source(recipe, key) == "full" else ()


def edge_source(recipe: Recipe, key: str) -> str:
    """As the stream names it: full edges that are not stored are live."""
    edges = recipe.edges_of(key)
    if not uses_edges(recipe, key):
        return "none"
    return "live" if edges.source == "full" and not edges.stored else edges.source


def edges_step(sigma: float) -> Step:
    return Step(edges_name(sigma), Later("data.step", "edges"), {"sigma": sigma}, needs=("shard",), version=2)


def edges_name(sigma: float) -> str:
    return f"edges-sigma-{sigma:g}"


@dataclass(frozen=True)
class Later:
    """A step's function, imported when it runs: to find everything finished, neither Ray nor torch is loaded."""

    module: str
    name: str

    def __call__(self, context: StepContext) -> dict[str, Any]:
        return getattr(importlib.import_module(f"pipelines.{self.module}"), self.name)(context)
