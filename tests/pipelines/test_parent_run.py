"""The MLflow run of a recipe: parameters, dataset, final scores and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.storage import open_storage
from pipelines.contracts import EvaluateOutputs, StepKind, SweepOutputs
from pipelines.durable.steps import StepId
from pipelines.durable.workflow import RunResults
from pipelines.parent_run import log_report, log_results, open_parent_run
from pipelines.pipeline import EVALUATE_ID, SHARD_ID
from pipelines.recipe import Recipe
from pipelines.recipe.load import parse_recipe
from pipelines.registry import show
from pipelines.tracking import runs
from pipelines.tracking_address import Tracking
from support.mlflow_stores import PipelineOutputs


@pytest.fixture
def tracking(chain: PipelineOutputs, registry_of_chain: str) -> Tracking:
    return replace(chain.tracking, uri=registry_of_chain)


def recipe_of(*models: str, **fields: object) -> Recipe:
    body = {
        "name": "small",
        "models": {key: {"name": "context_encoder", "lambda_adv": 0.5} for key in models},
    }
    return parse_recipe(body | fields)


def test_the_parent_has_the_recipe_as_parameters(chain: PipelineOutputs, tracking: Tracking) -> None:
    recipe = recipe_of("one", train={"batch": 4}, masks={"/data/masks (v2)": 1.0})
    parent = open_parent_run(recipe, tracking, "run")
    assert open_parent_run(recipe, tracking, "run") == parent, "repeated"
    run = tracking.client().get_run(parent.run_id)
    expected = {"name": "small", "train.batch": "4", "models.one.lambda_adv": "0.5", "data.size": "256"}
    assert run.data.params.items() >= expected.items()
    assert run.data.params["masks./data/masks _v2_"] == "1.0"
    assert run.data.tags["mlflow.source.name"] == "inpaint run small"
    assert run.data.tags["mlflow.user"]
    assert not [key for key in run.data.params if key.startswith(("storage", "scaling", "tracking_uri"))]
    assert parent.address == tracking.uri, "a database has no pages"


def test_the_parent_has_the_scores_of_the_versions(chain: PipelineOutputs, tracking: Tracking) -> None:
    recipe = recipe_of("one")
    parent = open_parent_run(recipe, tracking, "run")
    results = RunResults({SHARD_ID: chain.shards, EVALUATE_ID: EvaluateOutputs((), "work/v1/a1", {})})
    for _ in range(2):
        log_results(parent, recipe, chain.storage, results)
    log_report(parent, "<p>report</p>", "Worse than Telea.\n\n| method | PSNR |\n|:--|--:|\n| one | 12.2 |")
    client = tracking.client()
    run = client.get_run(parent.run_id)
    expected = show("models:/encoder/2", tracking.uri).metrics
    assert {key: float(f"{value:.6g}") for key, value in run.data.metrics.items()} == expected
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == chain.shards.digest[:36]
    assert [file.path for file in client.list_artifacts(parent.run_id)] == ["report.html"]
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("Worse than Telea.\n\n| method&nbsp;")


def test_scores_of_several_models_have_their_keys(
    chain: PipelineOutputs, tracking: Tracking, tmp_path: Path
) -> None:
    record = json.loads(chain.storage.read("work/v1/a1/evaluation.json"))
    record["methods"].append("two")
    for methods in record["values"].values():
        methods["two"] = methods["one"]
    storage = open_storage(tmp_path / "both")
    storage.write("work/v/a1/evaluation.json", json.dumps(record | {"samples": []}).encode())
    recipe = recipe_of("one", "two")
    parent = open_parent_run(recipe, tracking, "run")
    results = RunResults({EVALUATE_ID: EvaluateOutputs((), "work/v/a1", {})})
    log_results(parent, recipe, storage, results)
    metrics = tracking.client().get_run(parent.run_id).data.metrics
    assert metrics["one/center/psnr_rgb_hole"] == metrics["two/center/psnr_rgb_hole"]
    assert "center/psnr_rgb_hole" not in metrics


def test_the_parent_of_a_sweep_has_its_best_setting(chain: PipelineOutputs, tracking: Tracking) -> None:
    recipe = recipe_of("swept")
    parent = open_parent_run(recipe, tracking, "sweep")
    best, scores = {"edges.sigma": 2.0}, {"psnr_rgb_hole": 18.5}
    outputs = SweepOutputs((), "sweep.json", "sweep.html", "best.yaml", best, scores, "")  # type: ignore[arg-type]
    log_results(parent, recipe, chain.storage, RunResults({StepId(StepKind.SWEEP): outputs}))
    run = tracking.client().get_run(parent.run_id)
    assert run.data.metrics == {"best/psnr_rgb_hole": 18.5}
    assert run.data.tags["inpaint.best"] == "edges.sigma 2.0"
    with runs.finish_run_on_exit(tracking, parent.run_id):
        pass
