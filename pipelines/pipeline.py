"""Builds the workflow of a recipe:

    photographs --shard--> tars --edges(sigma)--> edge tars
        --train(model) x N--> weights --evaluate--> scores --register--> versions

Each arrow is a durable step, implemented in step.py of its package; durable/ runs and resumes it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Literal

from data_prep.partitions import SourceListing
from data_prep.sources import open_source
from data_prep.storage import open_storage
from models import takes_edges
from pipelines.check_data import SplitCheck
from pipelines.contracts import (
    STEP_ORDER,
    DataLoading,
    EdgesConfig,
    EdgesInputs,
    EdgesOutputs,
    EvaluateInputs,
    EvaluateOutputs,
    RegisterConfig,
    RegisterInputs,
    RegisterOutputs,
    RunSettings,
    ShardConfig,
    ShardOutputs,
    StepKind,
    SweepOrigin,
    TrainConfig,
    TrainInputs,
    TrainOutputs,
    TrainSchedule,
)
from pipelines.durable.steps import Step, StepId
from pipelines.durable.workflow import Workflow
from pipelines.errors import doing
from pipelines.recipe import Recipe
from pipelines.tracking.moved_storage import original_registry_uri
from pipelines.tracking_address import Tracking
from pipelines.training.job import out_of_memory_advice

SHARD_ID, EVALUATE_ID = StepId(StepKind.SHARD), StepId(StepKind.EVALUATE)
"""The kinds of which a workflow has one step."""


def build_workflow(
    recipe: Recipe,
    tracking: Tracking | None = None,
    last_kind: StepKind = StepKind.REGISTER,
    sweep_origin: SweepOrigin | None = None,
    listing_digest: str | None = None,
) -> Workflow:
    """The workflow of a recipe, up to the steps of `last_kind`.

    `sweep_origin`: the sweep that found the recipe's values, for the records of versions. `listing_digest`: of the
    source's photographs; without it the source is listed. Raises ValueError in one line if the source has no photographs,
    or a split that is needed cannot have any.
    """
    kinds = STEP_ORDER[: STEP_ORDER.index(last_kind) + 1]
    settings = RunSettings(
        tracking=tracking, recipe_yaml=recipe.to_yaml(), sweep_origin=sweep_origin, scaling=recipe.scaling
    )
    sigmas = {sigma for key in recipe.models for sigma in edge_sigmas(recipe, key)}
    steps = [shard_step(recipe, settings, StepKind.EVALUATE in kinds, listing_digest=listing_digest)]
    steps += [edges_step(sigma, settings) for sigma in sorted(sigmas)]
    steps += [train_step(recipe, key, settings) for key in recipe.models]
    steps.append(evaluate_step(recipe, settings))
    for key, section in recipe.models.items():
        if section.register_as != "none":
            steps.append(register_step(recipe, key, settings))
    return Workflow(
        recipe.name, [step for step in steps if step.id.kind in kinds], open_storage(recipe.storage)
    )


def shard_step(
    recipe: Recipe,
    settings: RunSettings,
    for_evaluation: bool,
    for_sweep: bool = False,
    listing_digest: str | None = None,
) -> Step:
    """`for_evaluation`, `for_sweep`: what there must be enough photographs for, see SplitCheck. With a `listing_digest`
    the source is not listed."""
    source = open_source(recipe.data.source, recipe.data.size, recipe.data.root)
    check = SplitCheck(recipe, source.uri, for_evaluation, for_sweep)
    if listing_digest is None:
        check.check_split_fractions()
        with doing(f"listing the photographs of {source.uri}"):
            listing = SourceListing(source)
        listing_digest = listing.digest
        settings = replace(settings, left_out=listing.left_out.entries())
    config = shard_config(recipe, source.uri, listing_digest)
    return Step(
        SHARD_ID,
        "pipelines.data.step:shard",
        config,
        outputs_type=ShardOutputs,
        settings=settings,
        version=3,
        check=check,
    )


def shard_config(recipe: Recipe, source: str = "", listing_digest: str = "") -> ShardConfig:
    """The fields that determine the shards. `source`: its normalised address; default: as in the recipe."""
    values = {f.name: getattr(recipe.data, f.name) for f in fields(ShardConfig) if f.name != "listing_digest"}
    return ShardConfig(**{**values, "source": source or recipe.data.source}, listing_digest=listing_digest)


def edges_step(sigma: float, settings: RunSettings) -> Step:
    return Step(
        edges_id(sigma),
        "pipelines.data.step:edges",
        EdgesConfig(sigma),
        {"shards": SHARD_ID},
        EdgesInputs,
        EdgesOutputs,
        settings,
        version=3,
    )


def edges_id(sigma: float) -> StepId:
    return StepId(StepKind.EDGES, f"sigma-{sigma:g}")


def train_config(recipe: Recipe, key: str) -> TrainConfig:
    section, train = recipe.models[key], recipe.train_for(key)
    return TrainConfig(
        model=section.name,
        options=section.options,
        seed=recipe.seed_for(key),
        size=recipe.data.size,
        flip=recipe.data.flip,
        streams=recipe.data.streams,
        masks=recipe.masks_for(key),
        edge_source=edge_source(recipe, key),
        sigma=recipe.edges_for(key).sigma,
        train=TrainSchedule(**{f.name: getattr(train, f.name) for f in fields(TrainSchedule)}),
    )


def train_step(recipe: Recipe, key: str, settings: RunSettings) -> Step:
    data, train = recipe.data, recipe.train_for(key)
    return Step(
        StepId(StepKind.TRAIN, key),
        "pipelines.training.step:train",
        train_config(recipe, key),
        {"shards": SHARD_ID, "edges": tuple(map(edges_id, edge_sigmas(recipe, key)))},
        TrainInputs,
        TrainOutputs,
        replace(
            settings,
            loading=DataLoading(data.threads, data.cache_gb, data.cache_dir, data.max_unreadable_fraction),
            keep_checkpoints=train.keep_checkpoints,
        ),
        version=3,
        memory_hint=out_of_memory_advice(
            train.batch, data.size, recipe.scaling.micro_batch_size, recipe.scaling.workers
        ),
    )


def evaluate_step(recipe: Recipe, settings: RunSettings) -> Step:
    return Step(
        EVALUATE_ID,
        "pipelines.evaluation.step:evaluate",
        recipe.evaluate,
        {"shards": SHARD_ID, "trained": {key: StepId(StepKind.TRAIN, key) for key in recipe.models}},
        EvaluateInputs,
        EvaluateOutputs,
        settings,
        version=2,
    )


def register_step(recipe: Recipe, key: str, settings: RunSettings) -> Step:
    section = recipe.models[key]
    config = RegisterConfig(
        model_key=key,
        register_as=section.register_as or section.name,
        recipe_name=recipe.name,
        evaluate=recipe.evaluate,
        registry_uri=original_registry_uri(settings.tracking.uri) if settings.tracking else "",
    )
    return Step(
        StepId(StepKind.REGISTER, key),
        "pipelines.registry.step:register",
        config,
        {"shards": SHARD_ID, "trained": StepId(StepKind.TRAIN, key), "evaluation": EVALUATE_ID},
        RegisterInputs,
        RegisterOutputs,
        settings,
        version=2,
        still_valid="pipelines.tracking.runs:version_exists",
    )


def uses_edges(recipe: Recipe, key: str) -> bool:
    section = recipe.models[key]
    return takes_edges(section.name, section.options) and recipe.edges_for(key).mode != "none"


def edge_sigmas(recipe: Recipe, key: str) -> tuple[float, ...]:
    """The sigmas whose edge tars training reads. Masked edges depend on the mask and are computed on the fly."""
    return recipe.edges_for(key).sigma if edge_source(recipe, key) == "full" else ()


def edge_source(recipe: Recipe, key: str) -> Literal["full", "live", "masked", "none"]:
    """The edge source of BatchStream: full edges that are not precomputed are "live"."""
    edges = recipe.edges_for(key)
    if not uses_edges(recipe, key):
        return "none"
    return "live" if edges.mode == "full" and not edges.precompute else edges.mode
