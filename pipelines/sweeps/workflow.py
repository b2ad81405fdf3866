"""Sweeps: trials of one recipe with other loss weights or another sigma, in durable steps.

    tars, edge tars of every sigma, baselines, what all trainings begin with --sweep--> trials --> the best recipe

What a trial does is in trial.py, how Ray Tune chooses is in tuning.py, what is written at the end is in step.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data_prep.storage import open_storage
from pipelines.durable.steps import Step, Workflow
from pipelines.recipe import Recipe
from pipelines.sweeps.result import SEED
from pipelines.sweeps.space import shared_steps, sweep_of, swept_model, trial_recipe
from pipelines.sweeps.trial import begin_step
from pipelines.tracking import Tracking
from pipelines.workflow import Later, edge_sigmas, edges_step, shard_step

ELSEWHERE = {"storage", "tracking", "experiment", "scaling"}  # of a recipe: where it runs, not what comes out


def build_sweep(recipe: Recipe, place: Tracking | None = None) -> Workflow:
    """The steps of a sweep: what its trials share, then the sweep itself. Imports torch; raises RecipeError."""
    sweep = sweep_of(recipe)
    shard = shard_step(recipe)
    sigmas = sorted({sigma for values in _corners(recipe) for sigma in _sigmas(recipe, values)})
    steps = [shard]
    steps += [edges_step(sigma) for sigma in sigmas]
    evaluation = trial_recipe(recipe, {}).evaluate.model_dump(mode="json")
    steps.append(Step("baselines", Later("sweeps.trial", "baselines"), evaluation, needs=("shard",)))
    start = shared_steps(recipe)
    if start:
        seeds = sweep.fields[SEED].values if SEED in sweep.fields else (None,)
        first = {
            path: domain.range[0] if domain.range else domain.values[0]
            for path, domain in sweep.fields.items()
        }
        steps += [begin_step(recipe, first if s is None else first | {SEED: s}, start) for s in seeds]
    body = recipe.model_dump(mode="json", exclude_defaults=True, exclude=ELSEWHERE)
    body["sweep"].pop("at_once", None)
    config = {"recipe": body, "start": start}
    steps.append(
        Step("sweep", Later("sweeps.step", "search"), config, needs=tuple(step.name for step in steps))
    )
    local = {
        "tracking": None if place is None else vars(place),
        "scaling": recipe.scaling.model_dump(),
        "at_once": sweep.at_once,
        "recipe": recipe.to_yaml(),
    }
    return Workflow(
        f"{recipe.name}-sweep",
        [replace(step, local={**local, **step.local}) for step in steps],
        open_storage(recipe.storage),
    )


def _corners(recipe: Recipe) -> list[dict[str, Any]]:
    """Settings that together hold every listed value of every field."""
    found: list[dict[str, Any]] = [{}]
    for path, domain in sweep_of(recipe).fields.items():
        found += [{path: value} for value in domain.values]
    return found


def _sigmas(recipe: Recipe, values: dict[str, Any]) -> tuple[float, ...]:
    """The sigmas that a setting needs edges of; of a swept sigma the recipe's own is not one."""
    swept = [path for path in sweep_of(recipe).fields if path.endswith("edges.sigma")]
    if swept and not set(swept) & set(values):
        return ()
    return edge_sigmas(trial_recipe(recipe, values), swept_model(recipe))
