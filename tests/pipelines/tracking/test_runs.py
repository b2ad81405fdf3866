"""MLflow runs in a real SQLite file: runs are found again, points are logged once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from mlflow.entities import Metric

from data_prep.storage import open_storage
from pipelines.cli.summary import suggested_commands
from pipelines.durable.workflow import Workflow
from pipelines.recipe.load import parse_recipe
from pipelines.tracking import runs
from pipelines.tracking.runs import Tracking, TrackingError, resolve_tracking


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return resolve_tracking(None, "inpaint", str(tmp_path_factory.mktemp("runs")))


def points(first: int, last: int, factor: float = 1.0) -> list[runs.CurvePoint]:
    return [(step, {"loss/a": step * factor, "loss/b": -step * factor}) for step in range(first, last, 10)]


def history(tracking: Tracking, run: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracking.client().get_metric_history(run, key)]


def test_a_run_is_found_by_its_key_and_its_parent(tracking: Tracking) -> None:
    parent = runs.open_run(tracking, "key-1", "demo")
    assert runs.open_run(tracking, "key-1", "demo") == parent
    child = runs.open_run(tracking, "step-1", "shard", parent_run_id=parent)
    assert runs.open_run(tracking, "step-1", "shard", parent_run_id=parent) == child
    other = runs.open_run(tracking, "key-2", "other")
    assert runs.open_run(tracking, "step-1", "shard", parent_run_id=other) not in (child, parent)
    assert tracking.client().get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_a_run_records_how_it_ended(tracking: Tracking) -> None:
    run = runs.open_run(tracking, "ends", "x")
    with pytest.raises(RuntimeError), runs.finish_run_on_exit(tracking, run):
        raise RuntimeError("no\nreason")
    failed = tracking.client().get_run(run)
    assert (failed.info.status, failed.data.tags["inpaint.error"]) == ("FAILED", "no reason")
    assert runs.open_run(tracking, "ends", "x") == run
    assert tracking.client().get_run(run).info.status == "RUNNING"
    with runs.finish_run_on_exit(tracking, run):
        pass
    assert tracking.client().get_run(run).info.status == "FINISHED"


def test_runs_carry_user_source_and_the_commit_of_the_code_that_runs(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, commit = tracking.client(), "mlflow.source.git.commit"

    def tags_of(run: str) -> dict[str, str]:
        return dict(client.get_run(run).data.tags)

    monkeypatch.setattr(runs, "git_tags", lambda: {commit: "aaa", "mlflow.source.git.dirty": "false"})
    source = {"mlflow.user": "ann", "mlflow.source.name": "inpaint run x", "mlflow.source.type": "JOB"}
    parent = runs.open_run(tracking, "tagged", "x", tags=source)
    child = runs.open_run(tracking, "tagged-step", "shard", parent_run_id=parent)
    for run in (parent, child):
        assert tags_of(run).items() >= {**source, commit: "aaa"}.items()
    monkeypatch.setattr(runs, "git_tags", lambda: {commit: "bbb", "mlflow.source.git.dirty": "true"})
    assert runs.open_run(tracking, "tagged-step", "shard", parent_run_id=parent) == child
    assert (tags_of(child)[commit], tags_of(child)["mlflow.source.git.dirty"]) == ("bbb", "true")
    monkeypatch.setattr(runs, "git_tags", dict)  # continued by code whose commit is unknown
    runs.open_run(tracking, "tagged-step", "shard", parent_run_id=parent)
    assert commit not in tags_of(child)
    assert tags_of(child)["mlflow.user"] == "ann"


def test_nothing_stays_running_under_an_ended_run(tracking: Tracking) -> None:
    client = tracking.client()
    parent = runs.open_run(tracking, "family", "demo")
    done = runs.open_run(tracking, "family-shard", "shard", parent_run_id=parent)
    with runs.finish_run_on_exit(tracking, done):
        pass
    other = runs.open_run(tracking, "no-relative", "other")
    sweep = runs.open_run(tracking, "family-sweep", "sweep", parent_run_id=parent)
    trial = runs.open_run(tracking, "family-trial", "sigma=2", parent_run_id=sweep)
    with pytest.raises(KeyboardInterrupt), runs.finish_run_on_exit(tracking, parent):
        raise KeyboardInterrupt

    def statuses() -> list[str]:
        return [client.get_run(run).info.status for run in (parent, done, sweep, trial, other)]

    assert statuses() == ["KILLED", "FINISHED", "KILLED", "KILLED", "RUNNING"]
    assert "parent" in client.get_run(trial).data.tags["inpaint.error"]

    # the same command continues: the same runs, without the errors of before
    assert runs.open_run(tracking, "family", "demo") == parent
    assert runs.open_run(tracking, "family-sweep", "sweep", parent_run_id=parent) == sweep
    assert statuses() == ["RUNNING", "FINISHED", "RUNNING", "KILLED", "RUNNING"]
    assert "inpaint.error" not in client.get_run(sweep).data.tags
    with runs.finish_run_on_exit(tracking, parent), runs.finish_run_on_exit(tracking, sweep):
        pass
    assert statuses() == ["FINISHED", "FINISHED", "FINISHED", "KILLED", "RUNNING"]
    client.set_terminated(other)


def test_names_that_mlflow_would_refuse_are_replaced(tracking: Tracking) -> None:
    client, run = tracking.client(), runs.open_run(tracking, "names", "train")
    names = {"masks./data/masks (v2)/": 1, "löcher+a/psnr": 2, "x" * 300: 3, "train.steps.edge": 4}
    runs.log_params(client, run, names)
    runs.log_params(client, run, names)
    runs.log_metrics(client, run, names)
    data = client.get_run(run).data
    assert len(data.params) == len(data.metrics) == 4
    assert data.params["masks./data/masks _v2_"] == "1"
    assert data.metrics["löcher_a/psnr"] == 2
    assert data.params["train.steps.edge"] == "4"


def test_repeated_points_are_logged_once(tracking: Tracking) -> None:
    client, run = tracking.client(), runs.open_run(tracking, "curves", "train")
    assert runs.log_curves(client, run, points(10, 60)) == 5
    assert runs.log_curves(client, run, points(10, 60)) == 0  # repeated
    assert (
        runs.log_curves(client, run, points(40, 100, 1.001)) == 4
    )  # resumed, with slightly different values
    assert [step for step, _ in history(tracking, run, "loss/a")] == list(range(10, 100, 10))
    assert dict(history(tracking, run, "loss/b"))[50] == -50


VALIDATION = "val/psnr_rgb_hole"


def with_validation(first: int, last: int, *, every: int) -> list[runs.CurvePoint]:
    """Curves with a validation score at some steps, and the number of workers at the first."""
    curve = points(first, last)
    for step, values in curve:
        values |= {VALIDATION: step / 10} if step % every == 0 else {}
        values |= {"workers": 2.0} if step == first else {}
    return curve


def test_a_metric_may_be_added_to_a_logged_step(tracking: Tracking) -> None:
    client, run = tracking.client(), runs.open_run(tracking, "added", "train")
    assert runs.log_curves(client, run, points(10, 60)) == 5
    assert runs.log_curves(client, run, [(40, {VALIDATION: 4.0})]) == 1
    assert runs.log_curves(client, run, with_validation(10, 60, every=20)) == 2  # at 10 and 20
    assert runs.log_curves(client, run, with_validation(10, 60, every=20)) == 0
    assert sorted(history(tracking, run, VALIDATION)) == [(20, 2.0), (40, 4.0)]
    assert history(tracking, run, "workers") == [(10, 2.0)]
    assert [step for step, _ in history(tracking, run, "loss/a")] == [10, 20, 30, 40, 50]
    assert client.get_run(run).data.metrics[VALIDATION] == 4.0


@pytest.mark.parametrize("logged", [[20], [20, 60], [60]])
def test_points_that_an_earlier_release_left_out_are_added_once(
    logged: list[int], tracking: Tracking
) -> None:
    client, run = tracking.client(), runs.open_run(tracking, f"earlier-{logged}", "train")
    start = client.get_run(run).info.start_time
    for step, values in with_validation(10, 90, every=20):
        stored = {key: value for key, value in values.items() if key != VALIDATION or step in logged}
        client.log_batch(
            run, [Metric(key, value, start + step * 1000, step) for key, value in stored.items()]
        )
    curve = with_validation(10, 110, every=20)
    assert runs.log_curves(client, run, curve[-2:]) == 2  # of resumed training: they are new
    assert runs.log_curves(client, run, curve) == 4 - len(logged)
    assert runs.log_curves(client, run, curve) == 0
    assert sorted(history(tracking, run, VALIDATION)) == [(step, step / 10) for step in (20, 40, 60, 80, 100)]
    assert [step for step, _ in history(tracking, run, "loss/a")] == list(range(10, 110, 10))


def test_nan_and_infinity_are_logged_once(tracking: Tracking) -> None:
    client, run = tracking.client(), runs.open_run(tracking, "nan", "train")
    curve = [(10, {VALIDATION: math.nan, "loss/a": math.inf}), (20, {VALIDATION: 1.0, "loss/a": -math.inf})]
    assert runs.log_curves(client, run, json.loads(json.dumps(curve))) == 2
    assert runs.log_curves(client, run, curve) == 0
    (first, nan), second = history(tracking, run, VALIDATION)
    assert (first, math.isnan(nan), second) == (10, True, (20, 1.0))
    assert history(tracking, run, "loss/a") == [(10, 1.7976931348623157e308), (20, -1.7976931348623157e308)]


def test_logging_needs_no_more_requests_in_a_long_run(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run = tracking.client(), runs.open_run(tracking, "long", "train")
    curve = [(step, {f"loss/{i}": step / 7 for i in range(20)}) for step in range(1, 201)]
    runs.log_curves(client, run, curve[:180])
    requests: list[str] = []
    for name in ("get_run", "get_metric_history", "log_batch", "set_tag"):
        call = getattr(client, name)
        monkeypatch.setattr(
            client, name, lambda *a, name=name, call=call, **k: (requests.append(name), call(*a, **k))[1]
        )
    assert runs.log_curves(client, run, curve[180:]) == 20
    assert requests == ["get_run", "log_batch", "set_tag"]
    requests.clear()
    assert runs.log_curves(client, run, curve) == 0  # as at the end of a training
    assert requests == ["get_run"]


def test_a_kill_between_requests_logs_nothing_twice(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run = tracking.client(), runs.open_run(tracking, "between", "train")
    runs.log_curves(client, run, points(10, 30))
    with monkeypatch.context() as patch:
        patch.setattr(client, "set_tag", lambda *_: next(iter(())))
        with pytest.raises(StopIteration):
            runs.log_curves(client, run, points(30, 60))
    assert runs.log_curves(client, run, points(10, 80, 1.001)) == 2
    assert runs.log_curves(client, run, points(10, 80)) == 0
    assert [step for step, _ in history(tracking, run, "loss/a")] == list(range(10, 80, 10))


def test_requests_do_not_split_steps(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    client, run = tracking.client(), runs.open_run(tracking, "many", "train")
    requests: list[list[int]] = []
    log_batch = client.log_batch
    monkeypatch.setattr(
        client,
        "log_batch",
        lambda run, metrics: (requests.append([m.step for m in metrics]), log_batch(run, metrics)),
    )
    steps = [(step, {f"loss/{i}": float(i) for i in range(7)}) for step in range(1, 331)]
    assert runs.log_curves(client, run, steps) == 330
    assert len(requests) == 3
    assert all(len(request) <= 1000 and len(request) % 7 == 0 for request in requests)
    assert len(history(tracking, run, "loss/3")) == 330


def test_the_publisher_retries_an_unreachable_server(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.open_run(tracking, "published", "train")
    failures = iter([ConnectionError("down"), ConnectionError("down")])
    log_curves = runs.log_curves

    def flaky(*args: object) -> int:
        for error in failures:
            raise error
        return log_curves(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "log_curves", flaky)
    monkeypatch.setattr(runs, "RETRY_SECONDS", 0.01)
    publisher = runs.CurvePublisher(tracking, run)
    publisher.publish(points(10, 30))
    publisher.publish(points(30, 50), ("samples/step-1.png", b"\x89PNG"))
    publisher.close(timeout=60)
    assert [step for step, _ in history(tracking, run, "loss/a")] == [10, 20, 30, 40]
    assert [file.path for file in tracking.client().list_artifacts(run, "samples")] == ["samples/step-1.png"]


def test_resolve_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking(None, "e", str(tmp_path)).uri == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        resolve_tracking(None, "e", "s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_tracking(None, "e", "s3://bucket/runs").uri == "http://127.0.0.1:5000"
    assert resolve_tracking("http://other", "e", "s3://bucket/runs").uri == "http://other"


def test_an_unreachable_server_is_a_one_line_error_without_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as error:
        runs.ensure_experiment(Tracking("http://me:secret@127.0.0.1:9", "e"))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert "127.0.0.1:9" in str(error.value)


def test_suggested_commands_contain_no_password(tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "x", "models": {"context_encoder": {}}, "storage": str(tmp_path)})
    workflow = Workflow("x", [], open_storage(tmp_path))
    tracking = Tracking("https://me:planted-9@mlflow.example", "e")
    commands = suggested_commands(recipe, workflow, "context_encoder", tracking)
    assert any("--tracking-uri https://mlflow.example" in command for command in commands)
    assert "planted-9" not in " ".join(commands)
    assert f"studio --open --storage {tmp_path}" in commands[0]
