"""The search space of a sweep: settings, constraints, the recipe of a trial, the steps that trials share."""

from __future__ import annotations

import ast
import itertools
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.names import did_you_mean
from pipelines.recipe import Domain, Recipe, Sweep
from pipelines.recipe.load import RecipeError, parse_recipe
from pipelines.sweeps.results import SEED, FieldValues, format_values

if TYPE_CHECKING:
    from models.base import Model, Phase

MAX_REPEATED_DRAWS = 1000  # draws in a row without a new setting, after which sampling ends

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.USub: operator.neg,
    ast.Pow: operator.pow,
}


def sweep_section(recipe: Recipe) -> Sweep:
    """The recipe's section `sweep`; RecipeError if it has none."""
    if recipe.sweep is None:
        raise RecipeError(
            f"recipe {recipe.name} has no sweep block: add one, for example  "
            "sweep: {fields: {model.lambda_adv: [0.001, 0.01]}}"
        )
    return recipe.sweep


def swept_model(recipe: Recipe) -> str:
    """The key of the swept model. RecipeError if sweep.model names none of the recipe's models."""
    key = sweep_section(recipe).model
    if key is None and len(recipe.models) == 1:
        return next(iter(recipe.models))
    if key not in recipe.models:
        names = ", ".join(recipe.models)
        problem = "name one of" if key is None else f"{key!r} is none of"
        raise RecipeError(f"sweep.model: {problem} the recipe's models: {names}")
    return key


def trial_recipe(recipe: Recipe, values: FieldValues) -> Recipe:
    """The recipe of one trial: the swept model only, with these values. RecipeError that names the invalid field."""
    sweep, key = sweep_section(recipe), swept_model(recipe)
    raw = _single_model(recipe, key)
    train_section = raw["models"][key].setdefault("train", {})
    raw["models"][key]["train"] = {**train_section, **sweep.train}
    raw["models"][key]["register_as"] = "none"
    raw["evaluate"] = {**raw.get("evaluate", {}), "split": sweep.split}
    return _with_values(raw, key, values)


def best_recipe(recipe: Recipe, values: FieldValues) -> Recipe:
    """The recipe without its sweep and with the best values, for the full training."""
    raw = _single_model(recipe, swept_model(recipe))
    raw["name"] = f"{recipe.name}-best"
    return _with_values(raw, swept_model(recipe), {path: v for path, v in values.items() if path != SEED})


def iter_settings(recipe: Recipe) -> Iterator[FieldValues]:
    """The settings of a grid or of random draws that satisfy the constraints, each once; in a grid seeds vary slowest.

    Draws depend on the recipe's seed only. They end after MAX_REPEATED_DRAWS draws without a new setting.
    """
    sweep = sweep_section(recipe)
    seeds = sweep.fields.get(SEED, Domain(grid=(None,))).values
    domains = {path: domain for path, domain in sweep.fields.items() if path != SEED}
    if sweep.search == "grid":
        combinations = itertools.product(seeds, *(domain.values for domain in domains.values()))
        for seed, *chosen in combinations:
            values = dict(zip(domains, chosen, strict=True)) | ({} if seed is None else {SEED: seed})
            if satisfies_constraints(recipe, values):
                yield values
        return
    rng, drawn_before, repeated = np.random.default_rng(recipe.seed), set(), 0
    while repeated < MAX_REPEATED_DRAWS:
        values = {path: sample_value(domain, rng) for path, domain in domains.items()}
        key = json.dumps(values)
        repeated += 1
        if key not in drawn_before and satisfies_constraints(recipe, values):
            drawn_before.add(key)
            repeated = 0
            for seed in seeds:
                yield values | ({} if seed is None else {SEED: seed})


def sample_value(domain: Domain, rng: np.random.Generator) -> Any:
    if domain.bounds is None:
        return domain.values[int(rng.integers(len(domain.values)))]
    low, high = domain.bounds
    if domain.loguniform:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(rng.uniform(low, high))


def satisfies_constraints(recipe: Recipe, values: FieldValues) -> bool:
    """Whether a setting satisfies all constraints of the sweep."""
    return all(constraint_holds(text, recipe, values) for text in sweep_section(recipe).constraints)


def first_values(recipe: Recipe) -> FieldValues:
    """The first value of each field; the lower end of a range."""
    return {path: boundary_values(domain)[0] for path, domain in sweep_section(recipe).fields.items()}


def boundary_recipes(recipe: Recipe, path_part: str) -> Iterator[Recipe]:
    """A trial's recipe, and one per value of each field whose path contains `path_part` (ranges: both ends)."""
    first = first_values(recipe)
    yield trial_recipe(recipe, first)
    for path, domain in sweep_section(recipe).fields.items():
        if path_part in path:
            yield from (trial_recipe(recipe, first | {path: value}) for value in boundary_values(domain)[1:])


def shared_steps(recipe: Recipe) -> int:
    """The number of first training steps that are identical in all trials of one seed; 0 if there are none.

    A swept loss weight affects a phase only through the phase's loss. Phases whose weights are equal in all trials are
    therefore trained once: EdgeConnect's G1 in a sweep of G2's weights.
    """
    sweep, key = sweep_section(recipe), swept_model(recipe)
    swept = {path: domain for path, domain in sweep.fields.items() if path != SEED}
    if not swept or any(".lambda_" not in path for path in swept):
        return 0
    first = {path: boundary_values(domain)[0] for path, domain in swept.items()}
    trials = [
        trial_recipe(recipe, first | {p: value})
        for p, domain in swept.items()
        for value in boundary_values(domain)
    ]
    models = [_trial_model(trial, key) for trial in trials]
    lengths = trials[0].train_for(key).steps

    def phase_weights(model: Model, phase: Phase) -> Any:
        return phase, model.weights(phase)

    shared, total = 0, 0
    all_equal = True
    for phases in zip(*(model.phases for model in models), strict=True):
        steps = lengths.get(phases[0].name, phases[0].steps)
        weights = [phase_weights(model, phase) for model, phase in zip(models, phases, strict=True)]
        all_equal = all_equal and all(other == weights[0] for other in weights)
        total += steps
        shared += steps if all_equal else 0
    return shared if shared < total else 0


def total_steps(trial: Recipe) -> int:
    """The steps of a trial's whole schedule, all phases together."""
    from models.base import make_schedule

    (key,) = trial.models
    return make_schedule(_trial_model(trial, key), trial.train_for(key).steps).total_steps


def report_steps(sweep: Sweep, start: int, total: int) -> list[int]:
    """The steps at which a trial that begins at `start` reports to the scheduler; the last is `total`."""
    if sweep.scheduler == "none" or not sweep.report_every:
        return [total]
    if sweep.scheduler == "asha":
        intervals = [sweep.report_every * sweep.reduction_factor**k for k in range(total.bit_length())]
    else:
        intervals = list(range(sweep.report_every, total, sweep.report_every))
    return [*(start + step for step in intervals if start + step < total), total]


def _trial_model(trial: Recipe, key: str) -> Model:
    return _meta_model(trial.models[key].name, trial.models[key].options)


def _meta_model(name: str, options: FieldValues) -> Model:
    from models import meta_model
    from pipelines.downloads import with_local_weights

    return meta_model(name, with_local_weights(options))


def _single_model(recipe: Recipe, key: str) -> dict[str, Any]:
    """The recipe as plain YAML data, with one model and no sweep."""
    raw = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"sweep"})
    section = recipe.models[key].model_dump(mode="json", exclude_unset=True)
    return {**raw, "models": {key: section}}


def _with_values(raw: dict[str, Any], key: str, values: FieldValues) -> Recipe:
    for path, value in values.items():
        keys = _full_path(path, key).split(".")
        node = raw
        for name in keys[:-1]:
            child = node.get(name)
            if not isinstance(child, dict):
                child = node[name] = {}
            node = child
        node[keys[-1]] = value
    return parse_recipe(raw, format_values(values) or "recipe")


def _full_path(path: str, key: str) -> str:
    """The path from the recipe's root: `model.lambda_adv` and `seed` are fields of the swept model."""
    if path == SEED:
        return f"models.{key}.seed"
    return f"models.{key}.{path.removeprefix('model.')}" if path.startswith("model.") else path


def boundary_values(domain: Domain) -> tuple[Any, ...]:
    """The listed values of a field, or both ends of its range."""
    return domain.bounds or domain.values


def constraint_holds(text: str, recipe: Recipe, values: FieldValues) -> bool:
    """Whether these values satisfy a constraint. RecipeError if the constraint is invalid."""
    try:
        return bool(_evaluate(ast.parse(text, mode="eval").body, recipe, values))
    except (SyntaxError, TypeError, ArithmeticError) as error:
        raise RecipeError(f"sweep.constraints: {text!r}: {error}") from None


def _evaluate(node: ast.expr, recipe: Recipe, values: FieldValues) -> Any:
    """Evaluate numbers, fields, arithmetic, comparisons, `and`, `or` and `not`; TypeError for anything else."""

    def evaluate(part: ast.expr) -> Any:
        return _evaluate(part, recipe, values)

    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node.value
        case ast.Name() | ast.Attribute():
            return _field_value(ast.unparse(node), recipe, values)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
        case ast.UnaryOp(op=ast.Not()):
            return not evaluate(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            return -evaluate(node.operand)
        case ast.BoolOp():
            return (all if isinstance(node.op, ast.And) else any)(map(evaluate, node.values))
        case ast.Compare() if all(type(op) in _OPERATORS for op in node.ops):
            operands = [evaluate(side) for side in (node.left, *node.comparators)]
            pairs = zip(node.ops, itertools.pairwise(operands), strict=True)
            return all(_OPERATORS[type(op)](*pair) for op, pair in pairs)
    raise TypeError(f"{ast.unparse(node)} is neither a number, a field, arithmetic nor a comparison")


def _field_value(path: str, recipe: Recipe, values: FieldValues) -> Any:
    if path in values:
        return values[path]
    key = swept_model(recipe)
    section = recipe.models[key]
    node: Any = recipe.model_dump(mode="json")
    node["models"][key] = _option_values(section.name, json.dumps(section.options)) | node["models"][key]
    for name in _full_path(path, key).split("."):
        if not isinstance(node, Mapping) or name not in node:
            known = [*values, *(f"model.{option}" for option in node)] if isinstance(node, Mapping) else []
            raise RecipeError(f"sweep.constraints: there is no field {path}{did_you_mean(path, known)}")
        node = node[name]
    return node


@cache
def _option_values(name: str, options: str) -> FieldValues:
    """All options of a model, with the defaults of those that the recipe does not set."""
    return dict(vars(_meta_model(name, json.loads(options)).options))
