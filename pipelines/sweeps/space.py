"""The space that a sweep searches: its settings, its constraints, the recipe of a trial, what its trials share."""

from __future__ import annotations

import ast
import itertools
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.reading import RecipeError, check_model, check_recipe, nearest, parse_recipe
from pipelines.recipe import Domain, Recipe, Sweep
from pipelines.sweeps.result import SEED, in_words

if TYPE_CHECKING:
    from models.base import Model, Phase

Values = dict[str, Any]
Link = tuple[int, Values]
"""A part of a training: it ends at this step, and ran with these values."""
PATIENCE = 1000  # draws without a new setting after which there is none

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


def sweep_of(recipe: Recipe) -> Sweep:
    """The recipe's sweep block; RecipeError when it has none."""
    if recipe.sweep is None:
        raise RecipeError(
            f"recipe {recipe.name} has no sweep block: add one, for example  "
            "sweep: {fields: {model.lambda_adv: [0.001, 0.01]}}"
        )
    return recipe.sweep


def swept_model(recipe: Recipe) -> str:
    """The key of the model whose trainings the sweep varies."""
    key = sweep_of(recipe).model
    if key is None and len(recipe.models) == 1:
        return next(iter(recipe.models))
    if key not in recipe.models:
        known = ", ".join(recipe.models)
        asked = "name one of" if key is None else f"{key!r} is none of"
        raise RecipeError(f"sweep.model: {asked} the recipe's models: {known}")
    return key


def trial_recipe(recipe: Recipe, values: Values) -> Recipe:
    """What one trial runs: the swept model alone, with these values. RecipeError naming the field at fault."""
    sweep, key = sweep_of(recipe), swept_model(recipe)
    raw = _only(recipe, key)
    own = raw["models"][key].setdefault("train", {})
    raw["models"][key]["train"] = {**own, **sweep.train}
    raw["models"][key]["register_as"] = "none"
    raw["evaluate"] = {**raw.get("evaluate", {}), "split": sweep.split}
    return _with(raw, key, values)


def best_recipe(recipe: Recipe, values: Values) -> Recipe:
    """The recipe with a sweep's best values in it and no sweep, for a training in full."""
    raw = _only(recipe, swept_model(recipe))
    raw["name"] = f"{recipe.name}-best"
    return _with(raw, swept_model(recipe), {path: v for path, v in values.items() if path != SEED})


def settings(recipe: Recipe) -> Iterator[Values]:
    """The settings of a grid or of random draws, each once, that keep the constraints; seeds vary slowest in a grid.

    Draws are a pure function of the recipe's seed and have no end unless the values are few.
    """
    sweep = sweep_of(recipe)
    seeds = sweep.fields.get(SEED, Domain(grid=(None,))).values
    others = {path: domain for path, domain in sweep.fields.items() if path != SEED}
    if sweep.search == "grid":
        combinations = itertools.product(seeds, *(domain.values for domain in others.values()))
        for seed, *chosen in combinations:
            values = dict(zip(others, chosen, strict=True)) | ({} if seed is None else {SEED: seed})
            if keeps(recipe, values):
                yield values
        return
    rng, seen, misses = np.random.default_rng(recipe.seed), set(), 0
    while misses < PATIENCE:
        drawn = {path: draw(domain, rng) for path, domain in others.items()}
        text = json.dumps(drawn)
        misses += 1
        if text not in seen and keeps(recipe, drawn):
            seen.add(text)
            misses = 0
            for seed in seeds:
                yield drawn | ({} if seed is None else {SEED: seed})


def draw(domain: Domain, rng: np.random.Generator) -> Any:
    if domain.range is None:
        return domain.values[int(rng.integers(len(domain.values)))]
    low, high = domain.range
    if domain.loguniform:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(rng.uniform(low, high))


def keeps(recipe: Recipe, values: Values) -> bool:
    """Whether a setting keeps all constraints of the sweep."""
    return all(_holds(text, recipe, values) for text in sweep_of(recipe).constraints)


def check_sweep(recipe: Recipe) -> None:
    """Try every value (of ranges both ends) in its field. RecipeError in one line, before anything has run."""
    from pipelines.evaluation.metrics import DEFINITIONS
    from pipelines.workflow import sharding, train_step

    sweep, key = sweep_of(recipe), swept_model(recipe)
    for metric in sweep.metrics:
        known = [*DEFINITIONS, *(("fd", "kid") if recipe.evaluate.distance else ())]
        if metric not in known:
            raise RecipeError(
                f"sweep.metrics: no {metric!r} among {', '.join(known)}{nearest(metric, known)}"
            )
    first = {path: _probes(domain)[0] for path, domain in sweep.fields.items()}
    for text in sweep.constraints:
        _holds(text, recipe, first)
    if sweep.search == "grid" and next(settings(recipe), None) is None:
        raise RecipeError("sweep.constraints leave no setting of the grid")
    if sweep.search == "optuna" and len(sweep.fields.get(SEED, Domain(grid=(0,))).values) > 1:
        raise RecipeError("sweep.fields.seed: optuna takes one seed; repeat its best settings in a grid")
    for path, domain in sweep.fields.items():
        found = []
        for value in _probes(domain):
            try:
                trial = trial_recipe(recipe, first | {path: value})
                if sharding(trial) != sharding(recipe):
                    raise RecipeError("all trials share their shards: give each its own recipe")
                check_model(trial, key)
            except RecipeError as error:
                raise RecipeError(f"sweep.fields.{path} = {value!r}: {error}") from None
            found.append(train_step(trial, key, ()).config)
        if len(found) > 1 and all(config == found[0] for config in found):
            raise RecipeError(f"sweep.fields.{path}: its values make no difference to the training of {key}")
    check_recipe(trial_recipe(recipe, first))


def shared_steps(recipe: Recipe) -> int:
    """The length of the beginning of a training that is the same in every trial of one seed, in steps; 0: none.

    The swept weights enter a phase by its loss alone, so phases whose weights are equal in all trials are trained
    once: EdgeConnect's G1 in a sweep of G2's weights.
    """
    sweep, key = sweep_of(recipe), swept_model(recipe)
    swept = {path: domain for path, domain in sweep.fields.items() if path != SEED}
    if not swept or any(".lambda_" not in path for path in swept):
        return 0
    first = {path: _probes(domain)[0] for path, domain in swept.items()}
    trials = [
        trial_recipe(recipe, first | {p: value}) for p, domain in swept.items() for value in _probes(domain)
    ]
    models = [_built(trial, key) for trial in trials]
    lengths = trials[0].train_of(key).steps

    def told(model: Model, phase: Phase) -> Any:
        return phase, model.weights(phase)

    shared, total = 0, 0
    same = True
    for phases in zip(*(model.phases for model in models), strict=True):
        length = lengths.get(phases[0].name, phases[0].steps)
        ways = [told(model, phase) for model, phase in zip(models, phases, strict=True)]
        same = same and all(way == ways[0] for way in ways)
        total += length
        shared += length if same else 0
    return shared if shared < total else 0


def total_steps(trial: Recipe) -> int:
    """The steps of a trial's whole schedule."""
    from pipelines.training.learner import make_schedule

    (key,) = trial.models
    return make_schedule(_built(trial, key), trial.train_of(key).steps).total


def milestones(sweep: Sweep, start: int, total: int) -> list[int]:
    """The steps at which the scheduler looks at a trial that begins at `start`; the last is `total`."""
    if sweep.scheduler == "none" or not sweep.every:
        return [total]
    if sweep.scheduler == "asha":
        apart = [sweep.every * sweep.reduction**k for k in range(total.bit_length())]
    else:
        apart = list(range(sweep.every, total, sweep.every))
    return [*(start + step for step in apart if start + step < total), total]


def _built(trial: Recipe, key: str) -> Model:
    return _model(trial.models[key].name, trial.models[key].options)


def _model(name: str, options: Values) -> Model:
    """Without memory for its weights: what it says of itself is all that is asked."""
    import torch

    from models import build_model
    from pipelines.resources import local_options

    with torch.device("meta"):
        return build_model(name, **local_options(options))


def _only(recipe: Recipe, key: str) -> dict[str, Any]:
    """The recipe as YAML would have it, with one model and no sweep."""
    raw = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"sweep"})
    section = recipe.models[key].model_dump(mode="json", exclude_unset=True)
    return {**raw, "models": {key: section}}


def _with(raw: dict[str, Any], key: str, values: Values) -> Recipe:
    for path, value in values.items():
        keys = _full(path, key).split(".")
        node = raw
        for name in keys[:-1]:
            child = node.get(name)
            if not isinstance(child, dict):
                child = node[name] = {}
            node = child
        node[keys[-1]] = value
    return parse_recipe(raw, in_words(values) or "recipe")


def _full(path: str, key: str) -> str:
    """`model.lambda_adv` and `seed` are the swept model's."""
    if path == SEED:
        return f"models.{key}.seed"
    return f"models.{key}.{path.removeprefix('model.')}" if path.startswith("model.") else path


def _probes(domain: Domain) -> tuple[Any, ...]:
    return domain.range or domain.values


def _holds(text: str, recipe: Recipe, values: Values) -> bool:
    try:
        return bool(_value(ast.parse(text, mode="eval").body, recipe, values))
    except (SyntaxError, TypeError, ArithmeticError) as error:
        raise RecipeError(f"sweep.constraints: {text!r}: {error}") from None


def _value(node: ast.expr, recipe: Recipe, values: Values) -> Any:
    """Numbers, fields, arithmetic, comparisons, and, or, not: nothing else is evaluated."""

    def inner(part: ast.expr) -> Any:
        return _value(part, recipe, values)

    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node.value
        case ast.Name() | ast.Attribute():
            return _field(ast.unparse(node), recipe, values)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](inner(node.left), inner(node.right))
        case ast.UnaryOp(op=ast.Not()):
            return not inner(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            return -inner(node.operand)
        case ast.BoolOp():
            return (all if isinstance(node.op, ast.And) else any)(map(inner, node.values))
        case ast.Compare() if all(type(op) in _OPERATORS for op in node.ops):
            sides = [inner(side) for side in (node.left, *node.comparators)]
            pairs = zip(node.ops, itertools.pairwise(sides), strict=True)
            return all(_OPERATORS[type(op)](*pair) for op, pair in pairs)
    raise TypeError(f"{ast.unparse(node)} is neither a number, a field, arithmetic nor a comparison")


def _field(path: str, recipe: Recipe, values: Values) -> Any:
    if path in values:
        return values[path]
    key = swept_model(recipe)
    section = recipe.models[key]
    node: Any = recipe.model_dump(mode="json")
    node["models"][key] = _defaults(section.name, json.dumps(section.options)) | node["models"][key]
    for name in _full(path, key).split("."):
        if not isinstance(node, Mapping) or name not in node:
            known = [*values, *(f"model.{option}" for option in node)] if isinstance(node, Mapping) else []
            raise RecipeError(f"sweep.constraints: there is no field {path}{nearest(path, known)}")
        node = node[name]
    return node


@cache
def _defaults(name: str, options: str) -> Values:
    """A model's options, those too that the recipe leaves to it."""
    return dict(vars(_model(name, json.loads(options)).options))
