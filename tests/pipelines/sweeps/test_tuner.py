"""The scheduler and the callback of a sweep, and how many trials fit on a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from data_prep.storage import open_storage
from pipelines.contracts import RunSettings
from pipelines.durable.steps import StepEvent, StepId
from pipelines.durable.task import ProgressActor, ProgressReporter
from pipelines.recipe import Scaling
from pipelines.recipe.load import parse_recipe
from pipelines.sweeps.results import FAILED, FINISHED, STOPPED, TrialRecord
from pipelines.sweeps.trial import SweepContext
from pipelines.sweeps.trial_store import RUNNING, StoredTrial, TrialStore
from pipelines.sweeps.tuner import TrialCallback, make_scheduler, trials_that_fit, value_changes

FIELD = "model.lambda_adv"


class FakeActor:
    """The progress actor, in this process."""

    def __init__(self) -> None:
        self.reports: list[tuple[Any, ...]] = []
        self.report = SimpleNamespace(remote=lambda *report: self.reports.append(report))


@pytest.fixture
def actor() -> FakeActor:
    return FakeActor()


@pytest.fixture
def context(tmp_path: Path, actor: FakeActor) -> SweepContext:
    model = {"name": "context_encoder", "size": 32, "width": 0.1, "overlap": 0}
    sweep = {"fields": {FIELD: [0.1, 0.2]}, "scheduler": "asha", "report_every": 10}
    recipe = parse_recipe({"name": "test", "data": {"size": 32}, "model": model, "sweep": sweep})
    storage = open_storage(str(tmp_path))
    progress = ProgressReporter(actor, StepId("sweep"))
    return SweepContext("key", recipe, storage, {}, "trials", RunSettings(), 100, 200, progress)


@pytest.fixture
def store(context: SweepContext) -> TrialStore:
    store = TrialStore(context.storage, "trials", 100)
    for number in range(3):
        store.write(StoredTrial(TrialRecord(number, {FIELD: 0.1 * number}, RUNNING)))
    return store


def test_asha_compares_with_scores_reported_before_an_interruption(
    context: SweepContext, store: TrialStore
) -> None:
    """Three earlier trials had 20, 21 and 22 dB at the first report: of six, the best two continue."""
    for number in range(3):
        store.write(StoredTrial(TrialRecord(number, {}, STOPPED), reported_scores=[(110, 20.0 + number)]))

    def decision(scheduler: TrialScheduler, name: str, score: float) -> str:
        trial: Any = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        return scheduler.on_trial_result(None, trial, {"trained_steps": 10, "validation_psnr": score})  # type: ignore[arg-type]

    scheduler = make_scheduler(context, store)
    assert decision(scheduler, "worse", 20.5) == TrialScheduler.STOP
    assert decision(scheduler, "better", 23.0) == TrialScheduler.CONTINUE
    fresh = make_scheduler(context, TrialStore(context.storage, "nothing", 100))
    assert decision(fresh, "first", 20.5) == TrialScheduler.CONTINUE


def test_the_store_has_the_reports_and_the_final_state_of_each_trial(
    context: SweepContext, store: TrialStore
) -> None:
    callback = TrialCallback(store, context, 3, None)

    def report(number: int, **result: Any) -> Any:
        trial = FakeTrial(number)
        callback.on_trial_result(0, [], trial, {"run_id": "", **result})
        return trial

    first_report = {"segments": [(110, {FIELD: 0.1})], "validation_psnr": 19.0, "curve": [(110, 19.0)]}
    report(1, steps=110, seconds=5.0, **first_report)
    last_report = {
        "segments": [(110, {FIELD: 0.1}), (200, {FIELD: 0.3})],
        "validation_psnr": 21.0,
        "scores": {"psnr_rgb_hole": 22.0},
    }
    report(1, steps=200, seconds=9.0, **last_report)
    report(2, steps=100, seconds=3.0, failure_reason="the loss is not finite")
    callback.on_trial_complete(0, [], report(0, steps=110, seconds=4.0, **first_report))

    reopened = TrialStore(context.storage, "trials", 100)
    states = [(trial.state, trial.reason, trial.steps, trial.seconds) for trial in reopened.records]
    assert states == [
        (STOPPED, "fell behind after 110 steps at 19.00 dB", 110, 4.0),
        (FINISHED, "", 200, 9.0),
        (FAILED, "the loss is not finite", 100, 3.0),
    ]
    assert reopened.records[1].values == {FIELD: 0.3}
    assert reopened.records[1].changes == [(100, {FIELD: 0.1}), (110, {FIELD: 0.3})]
    assert reopened.by_number[1].reported_scores == [(110, 19.0), (200, 21.0)]


def test_a_trial_whose_process_died_fails_with_the_reason(context: SweepContext, store: TrialStore) -> None:
    callback = TrialCallback(store, context, 3, None)
    trial = FakeTrial(0)
    trial.error = MemoryError("the machine ran out of memory")
    callback.on_trial_error(0, [], trial)
    assert store.records[0].state == FAILED
    assert "out of memory" in store.records[0].reason
    assert "3 times" in store.records[0].reason


def test_value_changes_between_segments() -> None:
    a, b = {FIELD: 1.0}, {FIELD: 2.0}
    assert value_changes([(10, a), (20, a)], 0) == []
    assert value_changes([(10, a), (20, b), (30, b), (40, a)], 5) == [(5, a), (10, b), (30, a)]


def test_the_number_of_concurrent_trials_depends_on_the_clusters_resources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def count(workers: int, cpus: float, gpus: float) -> int:
        return trials_that_fit(Scaling(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus))

    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 32.0, "GPU": 4.0})
    assert (count(1, 1, 0), count(2, 1, 0), count(2, 4, 1), count(1, 1, 0.5), count(8, 1, 1)) == (
        32,
        16,
        2,
        8,
        1,
    )


def test_progress_of_a_trial_is_reported_next_to_the_steps(actor: FakeActor) -> None:
    progress_actor = ProgressActor()
    sweep = StepId("sweep")
    progress = ProgressReporter(SimpleNamespace(report=SimpleNamespace(remote=progress_actor.report)), sweep)
    first_report = progress.child("trial 1")
    for report in ((progress, (1, 4, "best")), (first_report, (1, 1, "20 dB", FINISHED))):
        report[0](*report[1])
        report[0].timer.join()
    assert progress_actor.read() == [
        StepEvent(sweep, "running", 1, 4, "best"),
        StepEvent(sweep, FINISHED, 1, 1, "20 dB", "trial 1"),
    ]


class FakeTrial:
    """A Ray Tune trial with the attributes that the callback uses."""

    def __init__(self, number: int) -> None:
        self.number, self.error = number, Exception()

    def __str__(self) -> str:
        return f"trial-{self.number:04d}"

    def get_error(self) -> Exception:
        return self.error
