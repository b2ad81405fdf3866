"""The MLflow runs of a sweep's trials: each has the curves of one training run, copied segments included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune

from data_prep.storage import Storage, open_storage
from pipelines.contracts import RunSettings, TrainOutputs
from pipelines.durable.steps import StepId
from pipelines.durable.task import ProgressReporter
from pipelines.durable.workflow import RunResults
from pipelines.recipe.load import parse_recipe
from pipelines.sweeps import results
from pipelines.sweeps.results import Segment
from pipelines.sweeps.trial import VALIDATION_METRIC, SweepContext, TrialRunner, run_trial
from pipelines.sweeps.trial_store import RUNNING, StoredTrial, TrialReport, TrialStore
from pipelines.sweeps.tuner import TrialCallback
from pipelines.tracking import runs
from pipelines.tracking.runs import CurvePoint, Tracking

FIELD = "model.lambda_adv"
FAKE_ACTOR = SimpleNamespace(report=SimpleNamespace(remote=lambda *_: None))


class FakeRunner(TrialRunner):
    """A trial without training: its curve contains the value of each segment."""

    def run_steps(self, segments: Any, *further_steps: Any) -> RunResults:
        points: list[CurvePoint] = []
        begin = 0
        for until, values in segments:
            for step in range(begin + 10, until + 1, 10):
                points.append((step, {"loss/a": step * values[FIELD]}))
            points[-1][1][VALIDATION_METRIC] = 20 + values[FIELD]
            begin = until
        weights = f"work/{self.name}-{begin}"
        self.context.storage.write(f"{weights}/curves.json", json.dumps({"points": points}).encode())
        outputs = TrainOutputs((), weights, "", begin, None, {})
        return RunResults({step.id: outputs for step in self.build_steps(segments)})


@pytest.fixture
def tracking(tmp_path: Path) -> Tracking:
    return runs.resolve_tracking(None, "inpaint", str(tmp_path))


@pytest.fixture
def context(tmp_path: Path, tracking: Tracking) -> SweepContext:
    model = {"name": "context_encoder", "size": 32, "width": 0.1, "overlap": 0}
    sweep: dict[str, Any] = {"fields": {FIELD: {"uniform": [0.0, 1.0]}}, "search": "random"}
    sweep |= {"scheduler": "pbt", "report_every": 20, "budget": {"trials": 2}}
    recipe = parse_recipe({"name": "test", "data": {"size": 32}, "model": model, "sweep": sweep})
    run = runs.open_run(tracking, "sweep", "sweep")
    progress = ProgressReporter(FAKE_ACTOR, StepId("sweep"))
    settings = RunSettings(tracking=tracking, parent_run_id=run)
    return SweepContext("key", recipe, open_storage(tmp_path), {}, "trials", settings, 0, 60, progress)


class Population:
    """Runs trials as Ray Tune does, each from given segments."""

    def __init__(self, context: SweepContext, values: list[float]) -> None:
        self.context, self.store = context, TrialStore(context.storage, "trials", 60)
        for number, value in enumerate(values):
            first = {FIELD: value}
            self.store.write(StoredTrial(results.TrialRecord(number, first, RUNNING), first))
        assert context.tracking
        self.callback = TrialCallback(self.store, context, len(values), context.tracking.client())

    def train(
        self, number: int, until: int, value: float, segments: list[Segment] | None = None
    ) -> list[Segment]:
        """Train one segment; returns the trial's segments."""
        trial = FakeRunner(self.context, number, {FIELD: value})
        earlier = trial.saved_segments() if segments is None else segments
        with trial.mlflow_run(earlier):
            segments = [*earlier, (until, trial.values)]
            result = trial.train_segment(segments)
        report = TrialReport(
            until,
            1.0,
            trial.run_id,
            validation_psnr=result.validation_psnr,
            segments=segments,
            copied_segments=trial.copied_segments,
            curve=result.curve,
            weights=result.weights,
        )
        self.callback.on_trial_result(0, [], f"trial-{number:04d}", report.to_result())
        return trial.saved_segments()

    def trial(self, number: int) -> results.TrialRecord:
        return self.store.by_number[number].record


def logged_points(tracking: Tracking, run_id: str) -> list[tuple[int, str, float]]:
    client, points = tracking.client(), []
    for key in client.get_run(run_id).data.metrics:
        points += [(metric.step, key, metric.value) for metric in client.get_metric_history(run_id, key)]
    return sorted(points)


def curve_points(storage: Storage, trial: results.TrialRecord) -> list[tuple[int, str, float]]:
    points = json.loads(storage.read(f"{trial.weights}/curves.json"))["points"]
    return sorted((step, key, value) for step, values in points for key, value in values.items())


def logged_values(points: list[tuple[int, str, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, key, value in points if key.startswith("value/")]


@pytest.mark.slow
def test_a_trial_that_continues_from_another_gets_a_new_mlflow_run(
    context: SweepContext, tracking: Tracking
) -> None:
    population = Population(context, [0.1, 0.9])
    population.train(0, 20, 0.1)
    best = population.train(1, 20, 0.9)
    before = population.trial(0).run
    population.train(0, 40, 0.8, best)
    population.train(1, 40, 0.9)
    population.train(0, 60, 0.8)  # its process was restarted
    population.train(1, 60, 0.9)
    population.callback.end_replaced_runs()

    client = tracking.client()
    first, second = population.trial(0), population.trial(1)
    assert len({before, first.run, second.run}) == 3
    for trial in (first, second):
        points = logged_points(tracking, trial.run)
        assert [point for point in points if not point[1].startswith("value/")] == curve_points(
            context.storage, trial
        )
    assert logged_values(logged_points(tracking, first.run)) == [(20, 0.9), (40, 0.8), (60, 0.8)]
    assert client.get_run(first.run).data.params == {FIELD: "0.9"}  # the values of its first segment
    assert client.get_run(first.run).data.tags["inpaint.trial"] == "0"
    assert client.get_run(first.run).info.status == "RUNNING"  # until Ray Tune ends the trial

    replaced = client.get_run(before)
    assert (replaced.info.status, replaced.data.tags["inpaint.state"]) == ("KILLED", "replaced")
    assert [step for step, _, _ in logged_points(tracking, before) if step > 20] == []


@pytest.mark.slow
def test_a_resumed_sweep_finds_the_mlflow_run_of_a_copied_training(
    context: SweepContext, tracking: Tracking
) -> None:
    population = Population(context, [0.1, 0.9])
    population.train(0, 20, 0.1)
    population.train(0, 40, 0.8, population.train(1, 20, 0.9))
    run = population.trial(0).run

    resumed = Population(context, [])
    resumed.train(0, 60, 0.8)
    assert resumed.trial(0).run == run
    assert resumed.store.by_number[0].copied_segments == 1
    points = [point for point in logged_points(tracking, run) if not point[1].startswith("value/")]
    assert points == curve_points(context.storage, resumed.trial(0))


def test_restarting_a_finished_trial_changes_no_mlflow_run(
    context: SweepContext, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    population = Population(context, [0.1, 0.9])
    for number, value in enumerate((0.1, 0.9)):
        population.train(number, 60, value)
        tracking.client().set_terminated(population.trial(number).run)
    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_name=lambda: "trial-0000"))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    before = [(run.info.run_id, run.info.status) for run in tracking.client().search_runs(["1"])]
    run_trial({"values": {FIELD: 0.8}}, context)
    assert [(run.info.run_id, run.info.status) for run in tracking.client().search_runs(["1"])] == before
    assert len(before) == 3


def test_only_population_based_training_replaces_runs(context: SweepContext, tracking: Tracking) -> None:
    raw: Mapping[str, Any] = context.recipe.model_dump(mode="json", exclude_defaults=True)
    sweep = {"fields": {FIELD: [0.1, 0.2]}, "scheduler": "asha", "report_every": 20}
    population = Population(replace(context, recipe=parse_recipe({**raw, "sweep": sweep})), [0.1, 0.2])
    for until in (20, 60):
        population.train(0, until, 0.1)
    population.callback.end_replaced_runs()
    run = population.trial(0).run
    assert logged_points(tracking, run) == curve_points(context.storage, population.trial(0))
    assert tracking.client().get_run(run).info.status == "RUNNING"
