"""MLflow with a real SQLite file: runs are found again, points are logged once."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.storage import open_storage
from pipelines import tracking
from pipelines.cli.outcome import next_commands
from pipelines.durable.steps import Workflow
from pipelines.reading import parse_recipe
from pipelines.tracking import Tracking, TrackingError, tracking_for


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return tracking_for(None, "inpaint", str(tmp_path_factory.mktemp("runs")))


def points(first: int, last: int, factor: float = 1.0) -> list[tracking.Point]:
    return [(step, {"loss/a": step * factor, "loss/b": -step * factor}) for step in range(first, last, 10)]


def history(place: Tracking, run: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in place.client().get_metric_history(run, key)]


def test_a_run_is_found_again_by_its_key_and_its_children_belong_to_it(place: Tracking) -> None:
    parent = tracking.open_run(place, "key-1", "demo")
    assert tracking.open_run(place, "key-1", "demo") == parent
    child = tracking.open_run(place, "step-1", "shard", parent=parent)
    assert tracking.open_run(place, "step-1", "shard", parent=parent) == child
    other = tracking.open_run(place, "key-2", "other")
    assert tracking.open_run(place, "step-1", "shard", parent=other) not in (child, parent)
    assert place.client().get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_how_a_run_ended_is_kept(place: Tracking) -> None:
    run = tracking.open_run(place, "ends", "x")
    with pytest.raises(RuntimeError), tracking.running(place, run):
        raise RuntimeError("no\nreason")
    found = place.client().get_run(run)
    assert (found.info.status, found.data.tags["inpaint.error"]) == ("FAILED", "no reason")
    assert tracking.open_run(place, "ends", "x") == run
    assert place.client().get_run(run).info.status == "RUNNING"
    with tracking.running(place, run):
        pass
    assert place.client().get_run(run).info.status == "FINISHED"


def test_no_step_is_logged_twice_whatever_is_repeated(place: Tracking) -> None:
    client, run = place.client(), tracking.open_run(place, "curves", "train")
    assert tracking.log_curves(client, run, points(10, 60)) == 5
    assert tracking.log_curves(client, run, points(10, 60)) == 0  # the same again
    assert tracking.log_curves(client, run, points(40, 100, 1.001)) == 4  # resumed, with other last digits
    assert [step for step, _ in history(place, run, "loss/a")] == list(range(10, 100, 10))
    assert dict(history(place, run, "loss/b"))[50] == -50


def test_many_points_go_in_requests_that_cut_no_step_in_two(
    place: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run = place.client(), tracking.open_run(place, "many", "train")
    requests: list[list[int]] = []
    log_batch = client.log_batch
    monkeypatch.setattr(
        client,
        "log_batch",
        lambda run, metrics: (requests.append([m.step for m in metrics]), log_batch(run, metrics)),
    )
    steps = [(step, {f"loss/{i}": float(i) for i in range(7)}) for step in range(1, 331)]
    assert tracking.log_curves(client, run, steps) == 330
    assert len(requests) == 3
    assert all(len(request) <= 1000 and len(request) % 7 == 0 for request in requests)
    assert len(history(place, run, "loss/3")) == 330


def test_the_publisher_sends_in_the_background_and_survives_a_server_that_is_away(
    place: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracking.open_run(place, "published", "train")
    failures = iter([ConnectionError("away"), ConnectionError("away")])
    log_curves = tracking.log_curves

    def flaky(*args: object) -> int:
        for error in failures:
            raise error
        return log_curves(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tracking, "log_curves", flaky)
    monkeypatch.setattr(tracking, "PAUSE", 0.01)
    publisher = tracking.Publisher(place, run)
    publisher.publish(points(10, 30))
    publisher.publish(points(30, 50), ("samples/step-1.png", b"\x89PNG"))
    publisher.close(timeout=60)
    assert [step for step, _ in history(place, run, "loss/a")] == [10, 20, 30, 40]
    assert [file.path for file in place.client().list_artifacts(run, "samples")] == ["samples/step-1.png"]


def test_where_runs_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_for(None, "e", str(tmp_path)).uri == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        tracking_for(None, "e", "s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_for(None, "e", "s3://bucket/runs").uri == "http://127.0.0.1:5000"
    assert tracking_for("http://other", "e", "s3://bucket/runs").uri == "http://other"


def test_a_server_that_is_not_there_is_one_line_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as error:
        Tracking("http://me:secret@127.0.0.1:9", "e").prepare()
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert "127.0.0.1:9" in str(error.value)


def test_what_is_suggested_next_holds_no_password(tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "x", "models": {"context_encoder": {}}, "storage": str(tmp_path)})
    workflow = Workflow("x", [], open_storage(tmp_path))
    place = Tracking("https://me:planted-9@mlflow.example", "e")
    said = next_commands(recipe, workflow, [{"name": "context_encoder", "version": "1"}], place)
    assert any("--tracking https://mlflow.example" in command for command in said)
    assert "planted-9" not in " ".join(said)
