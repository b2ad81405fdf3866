"""Contracts of the steps: for each kind, JSON round trips of config, inputs and outputs, type hints, and the key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

import pytest
from mlflow import MlflowClient

from data_prep.records import from_json, to_json
from data_prep.storage import open_storage
from pipelines.contracts import (
    BaselinesOutputs,
    EdgesOutputs,
    EvaluateOutputs,
    RegisterOutputs,
    RunSettings,
    ScoreOutputs,
    ShardOutputs,
    StepKind,
    SweepOutputs,
    TrainOutputs,
)
from pipelines.durable.steps import Step, StepContext, StepId, StepManifest, step_key
from pipelines.durable.workflow import RunResults, Workflow
from pipelines.pipeline import build_workflow
from pipelines.recipe import Recipe
from pipelines.recipe.load import parse_recipe
from pipelines.sweeps.trial import score_step, truncated_training
from pipelines.sweeps.workflow import build_sweep
from pipelines.tracking.runs import Tracking

NAN = float("nan")
FILES = ("work/k/a1/one.tar", "work/k/a1/ü.json")
TRAINED = TrainOutputs(FILES, "work/k/a1", "run", 400, None, {"2": "abc"})
OUTPUTS: dict[StepKind, Any] = {
    StepKind.SHARD: ShardOutputs(FILES, "work/k/stable", "abc", {"train": 8, "val": 1, "test": 1}, 2),
    StepKind.EDGES: EdgesOutputs(FILES, "work/k/stable", 2.0, "abc"),
    StepKind.TRAIN: TRAINED,
    StepKind.BEGIN: replace(TRAINED, resume_state="work/k/a1"),
    StepKind.EVALUATE: EvaluateOutputs(FILES, "work/k/a1", {"edge_connect": 21.5, "glcic": float("inf")}),
    StepKind.REGISTER: RegisterOutputs("edge_connect", "3", True, "first version"),
    StepKind.BASELINES: BaselinesOutputs(FILES, "work/k/a1", FILES[0], {"telea": {"fd": 0.5}}, 24, ""),
    StepKind.SCORE: ScoreOutputs(FILES, "work/k/a1", {"psnr_rgb_hole": 22.0}),
    StepKind.SWEEP: SweepOutputs(*(FILES, "a", "b", "c"), {"edges.sigma": [1, 2.5]}, {"fd": 0.5}, "run"),
}


RECIPE = {
    "name": "every-kind",
    "data": {"size": 64, "partition_size": 96},
    "train": {"checkpoint_every": 200},
    "models": {
        "context_encoder": {"size": 64, "width": 0.25, "train": {"steps": {"train": 1000}}},
        "edge_connect": {"width": 0.125, "train": {"batch": 4, "steps": {"edge": 400, "inpaint": 3200}}},
    },
}


def recipe_workflow() -> Workflow:
    return build_workflow(parse_recipe(RECIPE), Tracking("http://mlflow", "e"), listing_digest="listed")


def sweep_workflow(recipe: Recipe) -> Workflow:
    return build_sweep(recipe, Tracking("http://mlflow", "e"), listing_digest="listed")


def steps() -> dict[StepKind, Step]:
    """One step of every kind."""
    by_kind = {StepKind(step.id.kind): step for step in recipe_workflow().steps}
    sweep = {"model": "edge_connect", "fields": {"model.lambda_adv2": [0.1, 1], "seed": [0, 1]}}
    recipe = parse_recipe({**RECIPE, "sweep": sweep})
    by_kind |= {StepKind(step.id.kind): step for step in sweep_workflow(recipe).steps}
    last = by_kind[StepKind.BEGIN]
    last = replace(
        truncated_training(last, StepId(StepKind.TRAIN, "edge_connect-9"), 9), inputs={**last.inputs}
    )
    by_kind[StepKind.SCORE] = score_step(recipe, last.id, RunSettings())
    return by_kind


STEPS = steps()


def make_manifest(step: Step, key: str) -> StepManifest:
    value = to_json(OUTPUTS[StepKind(step.id.kind)])
    return StepManifest(step.name, key, step.version, step.config_json, {}, value, (), "", 1.0, 1)


def manifests(step: Step) -> dict[StepId, StepManifest]:
    """Manifests of the steps that a step needs."""
    by_id = {}
    for id in step.needs:
        value = to_json(OUTPUTS[StepKind(id.kind)])
        by_id[id] = StepManifest(id.name, f"0123-{id.name}", 1, {}, {}, value, (), "", 1.0, 1)
    return by_id


def test_there_is_a_step_of_every_kind() -> None:
    assert STEPS.keys() == OUTPUTS.keys() == set(StepKind)


@pytest.mark.parametrize("kind", StepKind)
def test_config_inputs_and_outputs_survive_json(kind: StepKind) -> None:
    step = STEPS[kind]
    for value in (step.config, step.read_inputs(manifests(step)), OUTPUTS[kind]):
        text = json.dumps(to_json(value))
        assert from_json(type(value), json.loads(text), "it") == value
    assert isinstance(OUTPUTS[kind], step.outputs_type)
    assert step.read_outputs(to_json(OUTPUTS[kind])) == OUTPUTS[kind]


def test_nan_and_infinite_scores_survive_json() -> None:
    scores = replace(OUTPUTS[StepKind.SCORE], scores={"a": NAN, "b": float("inf")})
    decoded = from_json(ScoreOutputs, json.loads(json.dumps(to_json(scores))), "it").scores
    assert repr(decoded) == "{'a': nan, 'b': inf}"


@pytest.mark.parametrize("kind", StepKind)
def test_a_wrong_field_is_an_error_that_names_the_step_and_the_field(kind: StepKind) -> None:
    step = STEPS[kind]
    value = to_json(OUTPUTS[kind])
    for changed, message in (
        ({**value, "colour": 1}, "colour is not known here"),
        (
            {name: x for name, x in value.items() if name not in REQUIRED[kind]},
            f"{REQUIRED[kind]} is missing",
        ),
        ({**value, "files": "one"}, "files is 'one', should be a list"),
    ):
        with pytest.raises(ValueError) as error:
            step.read_outputs(changed)
        assert str(error.value).startswith(f"step {step.name}, outputs, {message}")
        assert "\n" not in str(error.value)


REQUIRED = {
    kind: next(f.name for f in dataclasses.fields(value) if f.default is dataclasses.MISSING)
    for kind, value in OUTPUTS.items()
}


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        (StepKind.SHARD, "size", "64", "size is '64', should be a whole number"),
        (StepKind.SHARD, "size", 64.5, "size is 64.5, should be a whole number"),
        (StepKind.EDGES, "sigma", None, "sigma is None, should be a number"),
        (StepKind.TRAIN, "train.batch", "4", "train.batch is '4', should be a whole number"),
        (StepKind.TRAIN, "train.epochs", 4, "train.epochs is not known here"),
        (StepKind.TRAIN, "edge_source", "half", "edge_source"),
        (StepKind.EVALUATE, "seed", "1", "seed is '1', should be a whole number"),
        (StepKind.EVALUATE, "distance.crop", 1, "distance.crop"),
        (
            StepKind.REGISTER,
            "evaluate.max_photos",
            "9",
            "evaluate.max_photos is '9', should be a whole number",
        ),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_field(
    kind: StepKind, path: str, value: Any, message: str
) -> None:
    step = STEPS[kind]
    data = step.config_json
    node, *names = data, *path.split(".")
    for name in names[:-1]:
        node = node[name]
    node[names[-1]] = value
    with pytest.raises(ValueError) as error:
        from_json(type(step.config), data, f"step {step.name}, config")
    assert str(error.value).startswith(f"step {step.name}, config, {message}")
    assert "\n" not in str(error.value)


def test_inputs_are_checked_when_a_step_reads_them() -> None:
    step = STEPS[StepKind.EVALUATE]
    needed = manifests(step)
    train = next(id for id in step.needs if id.kind == StepKind.TRAIN)
    del needed[train].value["weights"]
    with pytest.raises(
        ValueError, match=rf"^step evaluate, inputs, trained.{train.subject}.weights is missing"
    ):
        step.read_inputs(needed)


@pytest.mark.parametrize("kind", StepKind)
def test_a_functions_type_hints_match_its_step(kind: StepKind) -> None:
    step = STEPS[kind]
    hints = get_type_hints(resolve_name(step.function), localns={"MlflowClient": MlflowClient})
    context = hints["ctx"]
    assert context.__origin__ is StepContext
    assert get_args(context) == (type(step.config), step.inputs_type, type(step.settings))
    assert hints["return"] is step.outputs_type
    if step.still_valid:
        hints = get_type_hints(
            resolve_name(step.still_valid),
            localns={"RunSettings": RunSettings, "RegisterOutputs": RegisterOutputs},
        )
        assert [hints[name] for name in ("outputs", "key", "settings", "return")] == [
            step.outputs_type,
            str,
            RunSettings,
            bool,
        ]


def test_results_by_kind_and_subject() -> None:
    one, two = StepId(StepKind.TRAIN, "one"), StepId(StepKind.TRAIN, "a-two")
    shards = OUTPUTS[StepKind.SHARD]
    results = RunResults({StepId(StepKind.SHARD): shards, two: TRAINED, one: TRAINED})
    assert list(results.of_kind(StepKind.TRAIN, TrainOutputs)) == ["a-two", "one"]
    assert results.of(StepId("shard"), ShardOutputs) is shards
    with pytest.raises(TypeError, match="step train-one: its outputs are TrainOutputs, not ShardOutputs"):
        results.of(one, ShardOutputs)


@pytest.mark.parametrize("last_kind", [StepKind.SHARD, StepKind.TRAIN, StepKind.EVALUATE])
def test_a_workflow_ends_after_the_last_kind(last_kind: StepKind) -> None:
    """A model's key may be the name of a kind."""
    recipe = parse_recipe(RECIPE)
    models = {"register": recipe.models["edge_connect"], "edges": recipe.models["context_encoder"]}
    workflow = build_workflow(
        recipe.model_copy(update={"models": models}), None, last_kind, listing_digest="listed"
    )
    kinds = [step.id.kind for step in workflow.steps]
    assert kinds[-1] == last_kind
    assert kinds.count(StepKind.TRAIN) == (2 if last_kind != StepKind.SHARD else 0)


def test_the_order_of_masks_in_a_recipe_does_not_matter() -> None:
    """They are sampled in the order of their names, so the training is the same."""
    step = STEPS[StepKind.TRAIN]
    masks: Mapping[str, Any] = {"half": 1.0, "block": {"weight": 2.0, "n": [3.0, 1.0]}}
    first = replace(step, config=replace(step.config, masks=dict(masks)))
    second = replace(step, config=replace(step.config, masks=dict(reversed(masks.items()))))
    assert list(first.config.masks) == list(second.config.masks) == ["block", "half"]


def test_settings_do_not_enter_the_key() -> None:
    workflow = recipe_workflow()
    other = workflow.with_settings(parent_run_id="run", tracking=None, recipe_yaml="name: x")
    assert other.steps[0].settings.parent_run_id == "run"
    for step, same in zip(workflow.steps, other.steps, strict=True):
        assert step_key(step, manifests(step)) == step_key(same, manifests(step))


# If a key changes, finished steps run again: say so in CHANGELOG.md.
GOLDEN = {
    StepKind.SHARD: "ecdf4987eb552aa0-shard",
    StepKind.EDGES: "7681f6a5bc6914b2-edges-sigma-2",
    StepKind.TRAIN: "e4fb84e5885c293e-train-edge_connect",
    StepKind.EVALUATE: "e7d37d4ccfa44683-evaluate",
    StepKind.REGISTER: "6b56da2a4f42afa6-register-edge_connect",
    StepKind.BASELINES: "80066275c9875313-baselines",
    StepKind.BEGIN: "9566506fee2b076e-begin-edge_connect-1",
    StepKind.SCORE: "450b6f8ea26da41d-score",
    StepKind.SWEEP: "6f2939b87f78e583-sweep",
}


@pytest.mark.parametrize("kind", StepKind)
def test_the_key_of_each_kind_has_not_changed(kind: StepKind) -> None:
    step = STEPS[kind]
    assert step_key(step, manifests(step)) == GOLDEN[kind]


def test_a_run_with_all_manifests_is_finished(tmp_path: Any) -> None:
    storage = open_storage(tmp_path)
    workflow = replace(recipe_workflow(), storage=storage)
    workflow = replace(workflow, steps=[replace(step, still_valid="") for step in workflow.steps])
    for step in workflow.steps:
        key = workflow.keys()[step.id]
        text = json.dumps(to_json(make_manifest(step, key)))
        storage.write(f"manifests/{key}.json", text.encode())
    results = workflow.finished_outputs()
    assert results is not None
    assert [results[step.id] for step in workflow.steps] == [
        OUTPUTS[StepKind(step.id.kind)] for step in workflow.steps
    ]
