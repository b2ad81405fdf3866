"""The steps of a sweep:

    tars, edge tars per sigma, baselines, shared training phases --sweep--> trials --> best recipe

trial.py runs one trial, searcher.py and tuner.py choose and schedule them with Ray Tune, step.py writes the result.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from data_prep.storage import open_storage
from pipelines.check_recipe import check_metric, check_model_config, check_recipe
from pipelines.contracts import (
    BaselinesInputs,
    BaselinesOutputs,
    RunSettings,
    StepKind,
    SweepConfig,
    SweepInputs,
    SweepOutputs,
)
from pipelines.durable.steps import Step, StepId
from pipelines.durable.workflow import Workflow
from pipelines.evaluation.metrics import DISTANCE_METRICS, INCEPTION_METRICS
from pipelines.pipeline import SHARD_ID, edge_sigmas, edges_step, shard_config, shard_step, train_config
from pipelines.recipe import Domain, Recipe
from pipelines.recipe.load import RecipeError
from pipelines.sweeps.results import SEED
from pipelines.sweeps.space import (
    MAX_REPEATED_DRAWS,
    best_recipe,
    boundary_values,
    constraint_holds,
    first_values,
    iter_settings,
    shared_steps,
    sweep_section,
    swept_model,
    trial_recipe,
)
from pipelines.sweeps.trial import BASELINES, shared_training_step, trial_seed
from pipelines.tracking_address import Tracking

SWEEP = StepId(StepKind.SWEEP)
EXECUTION_FIELDS = {"storage", "tracking_uri", "experiment", "scaling"}
"""Fields of a recipe that do not affect the result."""


def build_sweep(
    recipe: Recipe,
    tracking: Tracking | None = None,
    listing_digest: str | None = None,
    evaluates: bool = True,
) -> Workflow:
    """The steps of a sweep: the shared inputs of its trials, then the sweep itself. Imports torch; raises RecipeError.

    With a `listing_digest` the source is not listed. evaluates: whether the best recipe will be evaluated afterwards,
    on the split in the recipe's evaluate.split.
    """
    sweep = sweep_section(recipe)
    check_field_values(recipe)
    settings = RunSettings(
        tracking=tracking,
        recipe_yaml=recipe.to_yaml(),
        scaling=recipe.scaling,
        max_concurrent_trials=sweep.max_concurrent_trials,
    )
    shard = shard_step(recipe, settings, evaluates, for_sweep=True, listing_digest=listing_digest)
    sigmas = sorted(
        {sigma for values in _listed_values(recipe) for sigma in _required_sigmas(recipe, values)}
    )
    edges = [edges_step(sigma, settings) for sigma in sigmas]
    baselines = Step(
        BASELINES,
        "pipelines.evaluation.step:baselines",
        trial_recipe(recipe, {}).evaluate,
        {"shards": SHARD_ID},
        BaselinesInputs,
        BaselinesOutputs,
        settings,
        version=2,
    )
    start_step, shared_trainings = shared_steps(recipe), {}
    if start_step:
        seeds = sweep.fields[SEED].values if SEED in sweep.fields else (None,)
        first = first_values(recipe)
        for seed in seeds:
            values = first if seed is None else first | {SEED: seed}
            step = shared_training_step(recipe, values, start_step, settings)
            shared_trainings[trial_seed(recipe, values)] = step
    body = recipe.model_dump(mode="json", exclude_defaults=True, exclude=EXECUTION_FIELDS)
    body["sweep"].pop("max_concurrent_trials", None)
    sweep_step = Step(
        SWEEP,
        "pipelines.sweeps.step:sweep",
        SweepConfig(body, start_step),
        {
            "shards": SHARD_ID,
            "edges": tuple(step.id for step in edges),
            "baselines": BASELINES,
            "shared_training": {seed: step.id for seed, step in shared_trainings.items()},
        },
        SweepInputs,
        SweepOutputs,
        settings,
        version=2,
    )
    return Workflow(
        f"{recipe.name}-sweep",
        [shard, *edges, baselines, *shared_trainings.values(), sweep_step],
        open_storage(recipe.storage),
    )


def check_field_values(recipe: Recipe) -> dict[str, list[tuple[Any, Recipe]]]:
    """Check each value (ranges: both ends) of each field, without building a model. RecipeError in one line.

    Returns field path -> [(value, recipe of a trial with it)].
    """
    return {
        path: [(value, _recipe_with_value(recipe, path, value)) for value in boundary_values(domain)]
        for path, domain in sweep_section(recipe).fields.items()
    }


def _recipe_with_value(recipe: Recipe, path: str, value: Any) -> Recipe:
    """The recipe of a trial with this value of one field and the first values of the others."""
    try:
        trial = trial_recipe(recipe, first_values(recipe) | {path: value})
        if shard_config(trial) != shard_config(recipe):
            raise RecipeError("all trials use the same shards: write one recipe per value instead")
    except RecipeError as error:
        raise RecipeError(f"sweep.fields.{path} = {value!r}: {error}") from None
    return trial


def check_sweep(recipe: Recipe, fetch: bool = True) -> None:
    """Check the recipes of the trials and of the final training, the sweep's metrics and constraints, and that each
    field's values make a difference. RecipeError in one line, before anything has run."""
    sweep, key = sweep_section(recipe), swept_model(recipe)
    set_metrics = (*(DISTANCE_METRICS if recipe.evaluate.distance else ()), *INCEPTION_METRICS)
    for metric in sweep.metrics:
        if metric in DISTANCE_METRICS and not recipe.evaluate.distance:
            raise RecipeError(
                f"sweep.metrics: there is no {metric} without evaluate.distance, which is null: give one, "
                "or leave the metric out"
            )
        check_metric("sweep.metrics", metric, recipe.data.size, set_metrics, recipe.evaluate.features)
    recipes = check_field_values(recipe)
    first = first_values(recipe)
    for text in sweep.constraints:
        constraint_holds(text, recipe, first)
    if sweep.search != "optuna" and next(iter_settings(recipe), None) is None:
        source = "the grid" if sweep.search == "grid" else f"{MAX_REPEATED_DRAWS} draws"
        raise RecipeError(f"sweep.constraints leave no setting of {source}: {'; '.join(sweep.constraints)}")
    if sweep.search == "optuna":
        if len(sweep.fields.get(SEED, Domain(grid=(0,))).values) > 1:
            raise RecipeError("sweep.fields.seed: optuna takes one seed; repeat its best settings in a grid")
        if find_spec("optuna") is None:
            raise RecipeError(
                "sweep.search: optuna is not installed here: pip install optuna, or search: random"
            )
    for path, trials in recipes.items():
        configs = []
        for value, trial in trials:
            try:
                check_model_config(trial, key, fetch)
            except RecipeError as error:
                raise RecipeError(f"sweep.fields.{path} = {value!r}: {error}") from None
            configs.append(train_config(trial, key))
        if len(configs) > 1 and all(config == configs[0] for config in configs):
            raise RecipeError(f"sweep.fields.{path}: its values make no difference to the training of {key}")
    check_recipe(trial_recipe(recipe, first), fetch)
    check_recipe(best_recipe(recipe, first), fetch)


def _listed_values(recipe: Recipe) -> list[dict[str, Any]]:
    """Partial settings that together contain each listed value of each field."""
    settings: list[dict[str, Any]] = [{}]
    for path, domain in sweep_section(recipe).fields.items():
        settings += [{path: value} for value in domain.values]
    return settings


def _required_sigmas(recipe: Recipe, values: dict[str, Any]) -> tuple[float, ...]:
    """The sigmas for which a setting needs edges; if sigma is swept, the recipe's own value is not needed."""
    swept = [path for path in sweep_section(recipe).fields if path.endswith("edges.sigma")]
    if swept and not set(swept) & set(values):
        return ()
    return edge_sigmas(trial_recipe(recipe, values), swept_model(recipe))
