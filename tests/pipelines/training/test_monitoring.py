"""What training publishes before and after a checkpoint is committed; Ray Train and the model are fakes."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train

from data_prep.storage import open_storage
from pipelines.tracking import runs
from pipelines.tracking.runs import CurvePoint, CurvePublisher
from pipelines.training import loop, monitoring
from pipelines.training.job import TrainFolders, TrainJob
from pipelines.training.monitoring import VALIDATION_METRIC, TrainMonitor, best_step

SCORES = {10: 9.0, 20: 12.0, 30: 11.0, 40: 13.0}


class RecordingPublisher:
    """A publisher that sends nothing."""

    def __init__(self) -> None:
        self.points: list[CurvePoint] = []
        self.pictures: list[str] = []

    def publish(self, points: list[CurvePoint], picture: tuple[str, bytes] | None = None) -> None:
        self.points += points
        self.pictures += [picture[0]] if picture else []

    def close(self, timeout: float = 10.0) -> None:
        pass


def make_monitor(publisher: Any, points: list[CurvePoint] | None = None) -> TrainMonitor:
    learner: Any = SimpleNamespace(phase=None, schedule=SimpleNamespace(phase_spans=()))
    validation: Any = SimpleNamespace(edge_scores=lambda _: {})
    monitor = TrainMonitor(learner, points or [], validation, publisher, None)
    validation.evaluate = lambda _: (SCORES[monitor.points[-1][0]], b"\x89PNG")
    return monitor


def train_to(monitor: TrainMonitor, step: int) -> None:
    """Record two points, and validate at the second."""
    monitor.record(step - 5, {"loss/a": 1.0 / step})
    monitor.record(step, {"loss/a": 2.0 / step})
    monitor.validate(step)


def expected(*validated_steps: int) -> list[CurvePoint]:
    return [
        point
        for step in validated_steps
        for point in (
            (step - 5, {"loss/a": 1.0 / step}),
            (step, {"loss/a": 2.0 / step, VALIDATION_METRIC: SCORES[step]}),
        )
    ]


def test_nothing_is_published_before_its_checkpoint_is_committed() -> None:
    publisher, commit, best_steps = RecordingPublisher(), threading.Event(), list[int]()
    monitor = make_monitor(publisher)
    train_to(monitor, 10)
    monitor.publish_on_commit(10, lambda _: commit.wait(60), best_steps.append)
    monitor.record(15, {"loss/a": 1.0 / 20})  # training continues meanwhile
    assert (publisher.points, publisher.pictures, best_steps) == ([], [], [])
    commit.set()
    monitor.wait_until_published()
    assert publisher.points == expected(10)
    assert (publisher.pictures, best_steps) == (["samples/step-00000010.png"], [10])
    monitor.record(20, {"loss/a": 2.0 / 20})
    monitor.validate(20)
    assert publisher.points == expected(10)
    monitor.publish_on_commit(20, lambda _: True, best_steps.append)
    monitor.wait_until_published()
    assert publisher.points == expected(10, 20)


def test_points_of_a_lost_checkpoint_are_published_with_the_next() -> None:
    publisher, best_steps = RecordingPublisher(), list[int]()
    monitor = make_monitor(publisher)
    for step, committed, published in ((10, True, (10,)), (20, False, (10,)), (30, True, (10, 20, 30))):
        train_to(monitor, step)
        monitor.publish_on_commit(step, lambda _, committed=committed: committed, best_steps.append)
        monitor.wait_until_published()
        assert publisher.points == expected(*published)
    assert best_steps == [10]  # 20 was better, and is lost; 30 is no better than that


def test_a_resumed_training_publishes_what_its_checkpoint_holds() -> None:
    publisher, best_steps = RecordingPublisher(), list[int]()
    monitor = make_monitor(publisher, expected(10, 20))
    monitor.publish_on_commit(20, lambda _: True, best_steps.append)
    monitor.wait_until_published()
    assert (publisher.points, best_steps) == (expected(10, 20), [20])
    train_to(monitor, 30)
    monitor.publish_on_commit(30, lambda _: True, best_steps.append)
    monitor.wait_until_published()
    assert (publisher.points, best_steps) == (expected(10, 20, 30), [20])


def test_an_error_of_the_commit_thread_fails_the_training() -> None:
    monitor = make_monitor(None)
    train_to(monitor, 10)

    def full(step: int) -> None:
        raise OSError("the disk is full")

    monitor.publish_on_commit(10, lambda _: True, full)
    with pytest.raises(OSError, match="full"):
        monitor.wait_until_published()


def test_a_failed_training_does_not_wait_for_the_commit_and_keeps_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitoring, "FAILURE_TIMEOUT", 0.01)
    publisher, never = RecordingPublisher(), threading.Event()
    monitor = make_monitor(publisher)

    def fail() -> None:
        with monitor:
            train_to(monitor, 10)
            monitor.publish_on_commit(10, lambda _: never.wait(600), lambda _: None)
            raise ValueError("the loss is not finite")

    with pytest.raises(ValueError, match="not finite"):
        fail()
    assert publisher.points == []


def test_validation_needs_a_recorded_step() -> None:
    monitor = make_monitor(None)
    monitor.record(5, {})
    with pytest.raises(ValueError, match="validation at step 10, but the last recorded step is 5"):
        monitor.validate(10)


def test_the_best_step_ignores_nan() -> None:
    assert (
        best_step(
            [
                (10, {VALIDATION_METRIC: math.nan}),
                (20, {VALIDATION_METRIC: 9.0}),
                (30, {VALIDATION_METRIC: math.nan}),
                (40, {VALIDATION_METRIC: 9.0}),
            ]
        )
        == 20
    )
    assert best_step([(10, {VALIDATION_METRIC: math.nan}), (20, {})]) == 0


def test_edge_scores_are_in_the_curves_and_findings_are_announced_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(monitoring, "announce", lambda progress, text: told.append(text))
    monitor = make_monitor(None)
    monitor.learner.schedule = SimpleNamespace(phase_spans=((SimpleNamespace(name="edge"), 0, 100),))
    monitor.validation.evaluate = lambda _: (9.0, b"")
    monitor.validation.edge_scores = lambda _: {"edge_f1_1px": 0.0, "edge_recall": 0.0}
    for step in range(10, 110, 10):
        monitor.record(step, {"loss/D1": 0.001, "loss/FM": 0.1})
        monitor.validate(step)
    assert monitor.points[0][1] == {
        "loss/D1": 0.001,
        "loss/FM": 0.1,
        VALIDATION_METRIC: 9.0,
        "val/edge_f1_1px": 0.0,
        "val/edge_recall": 0.0,
    }
    assert len(told) == 2
    assert told[0].startswith(
        "warning: phase edge: the generated edges stand still: F1 within one pixel 0.000 at step 50"
    )
    assert told[1].startswith(
        "warning: phase edge: the discriminator has won: the loss D1 is at most 0.001 from step 10"
    )


class RayTrain:
    """The part of Ray Train that `save_checkpoint` uses; reports are committed when `commit` is called."""

    def __init__(self, storage: Path, patch: pytest.MonkeyPatch) -> None:
        self.storage, self.committed, self.waiting = storage, list[int](), list[int]()
        self.changed = threading.Condition()
        self.lost: set[int] = set()
        patch.setattr(ray.train, "report", self.report)
        patch.setattr(ray.train, "get_all_reported_checkpoints", self.all)

    def report(self, metrics: dict[str, int], checkpoint: Any, checkpoint_dir_name: str, **_: Any) -> None:
        if metrics["step"] in self.lost:
            return
        Path(checkpoint.path).rename(self.storage / checkpoint_dir_name)
        self.waiting.append(metrics["step"])

    def commit(self) -> None:
        with self.changed:
            self.committed += self.waiting
            self.waiting.clear()
            self.changed.notify_all()

    def all(self, _: Any) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: not self.waiting, 60)
            return [SimpleNamespace(metrics={"step": step}) for step in self.committed]


def test_mlflow_has_the_points_of_the_committed_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `save_checkpoint` and a real database, also after a report that Ray dropped."""
    (tmp_path / "checkpoints").mkdir()
    fake = RayTrain(tmp_path / "checkpoints", monkeypatch)
    place = runs.resolve_tracking(None, "inpaint", str(tmp_path))
    run, client = runs.open_run(place, "key", "train"), place.client()
    config: Any = None  # not used by `save_checkpoint`
    folders = TrainFolders("checkpoints", "best", "fatal")
    job = TrainJob(config, open_storage(tmp_path), "shards", folders)
    learner: Any = SimpleNamespace(state=lambda done: {"step": done})

    def logged() -> list[CurvePoint]:
        points: dict[int, dict[str, float]] = {}
        for key in ("loss/a", VALIDATION_METRIC):
            for metric in client.get_metric_history(run, key):
                assert key not in points.setdefault(metric.step, {})
                points[metric.step][key] = metric.value
        return sorted(points.items())

    with make_monitor(CurvePublisher(place, run)) as monitor:
        train_to(monitor, 10)
        loop.save_checkpoint(job, learner, 10, monitor, is_last=False)
        assert logged() == []
        fake.commit()
        train_to(monitor, 20)
    assert logged() == expected(10)

    fake.lost = {20}
    with make_monitor(CurvePublisher(place, run), expected(10)) as monitor:
        train_to(monitor, 20)
        loop.save_checkpoint(job, learner, 20, monitor, is_last=True)
    assert logged() == expected(10)
    assert (
        not (tmp_path / "best/state.pt").exists()
        or loop.read_resume_state(job.storage.subfolder("best"))[0]["step"] == 10
    )

    fake.lost = set()
    with make_monitor(CurvePublisher(place, run), expected(10)) as monitor:
        train_to(monitor, 20)
        loop.save_checkpoint(job, learner, 20, monitor, is_last=False)
        fake.commit()
        train_to(monitor, 30)
        loop.save_checkpoint(job, learner, 30, monitor, is_last=False)
        fake.commit()
    assert logged() == expected(10, 20, 30)
    assert loop.read_resume_state(job.storage.subfolder("best")) == ({"step": 20}, expected(10, 20))
