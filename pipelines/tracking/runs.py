"""MLflow: one parent run per recipe, one child run per step, and training curves that are logged exactly once."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.uris import (
    file_url,
    is_s3_uri,
    normalize_storage_uri,
    normalize_tracking_uri,
    path_from_sqlite_url,
    quote_for_shell,
    sqlite_url,
)
from pipelines.errors import error_text
from pipelines.private import mlflow_tables as tables
from pipelines.private.mlflow_tables import ARTIFACTS_FOLDER
from pipelines.provenance import git_tags, source_tags
from pipelines.tracking.descendants import ERROR_TAG, PARENT_TAG, end_descendants
from pipelines.tracking.metric_names import valid_name
from pipelines.tracking.moved_storage import relocate_if_moved
from pipelines.tracking.server import TrackingError, check_server, explain_mlflow_error
from pipelines.tracking_address import Tracking as Tracking

# Otherwise imported where it is used: MLflow takes two seconds, and most processes only pass addresses on.
if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from pipelines.contracts import RegisterOutputs, RunSettings

KEY_TAG = "inpaint.key"  # tag of a run by which it is found again
SOURCE_TAGS = ("mlflow.user", "mlflow.source.name", "mlflow.source.type")  # of a run, and of its children
GIT_TAGS = ("mlflow.source.git.commit", "mlflow.source.git.dirty")  # of the process that opened the run
INTERRUPTIONS = ("KeyboardInterrupt", "SystemExit", "TaskCancelledError")  # Ray turns SIGTERM into SystemExit
POINT_COUNTS_TAG = "inpaint.curves"  # tag of a run: JSON, metric -> number of its points
MAX_METRICS_PER_REQUEST, MAX_PARAM_CHARS = 1000, 6000  # MLflow's limits
RETRY_SECONDS = 2.0  # before CurvePublisher retries an unreachable server

CurvePoint = tuple[int, dict[str, float]]  # step, metric -> value


def ensure_experiment(tracking: Tracking) -> str:
    """Create the database and the experiment if they do not exist; returns the experiment's id.

    The driver calls this before it starts anything in parallel: if several processes open a new SQLite database at the
    same time, its migration fails. Raises TrackingError in one line.
    """
    check_server(tracking.uri)
    relocate_if_moved(tracking.uri, for_writing=True)
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if path := path_from_sqlite_url(tracking.uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            tables.use_write_ahead_log(path)
        client = tracking.client()
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            return client.create_experiment(tracking.experiment, artifact_location=tracking.artifacts)
    except (MlflowException, SQLAlchemyError, CommandError, tables.Error, OSError) as error:
        raise TrackingError(explain_mlflow_error(error, tracking.uri)) from None
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {tracking.experiment} was deleted in MLflow: restore it (MLFLOW_TRACKING_URI="
            f"{quote_for_shell(tracking.uri)} mlflow experiments restore -x {experiment.experiment_id}), or name another: "
            "experiment: NAME"
        )
    return experiment.experiment_id


def resolve_tracking(uri: str | None, experiment: str, storage: str) -> Tracking:
    """The recipe's tracking URI, else MLFLOW_TRACKING_URI, else a SQLite file in the storage's folder.

    Raises TrackingError if the storage is a bucket and no URI is set: the nodes of a cluster share no file. AddressError:
    not a valid URI.
    """
    setting = "tracking_uri" if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip() or None
    if uri is None:
        storage = normalize_storage_uri(storage)
        if is_s3_uri(storage):
            raise TrackingError(
                f"storage {storage} is a bucket, so its runs need an MLflow server: set tracking_uri: http://... in the "
                "recipe, or MLFLOW_TRACKING_URI"
            )
        return _sqlite_tracking(Path(storage).resolve() / "mlflow.db", experiment)
    uri = normalize_tracking_uri(uri, setting)
    path = path_from_sqlite_url(uri)
    return Tracking(uri, experiment) if path is None else _sqlite_tracking(path, experiment, uri)


def _sqlite_tracking(database: Path, experiment: str, uri: str | None = None) -> Tracking:
    return Tracking(uri or sqlite_url(database), experiment, file_url(database.parent / ARTIFACTS_FOLDER))


def open_run(
    tracking: Tracking,
    key: str,
    name: str,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Find the run tagged with `key`, or create it, and set it to RUNNING; returns its id.

    A run without `tags` of its own has its parent's user and source. A resumed run has the commit of the code that
    resumes it.
    """
    experiment_id = ensure_experiment(tracking)  # first: its errors explain what is wrong
    client = tracking.client()
    run_tags = {KEY_TAG: key} | ({PARENT_TAG: parent_run_id} if parent_run_id else {})
    query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in run_tags.items())
    matches = client.search_runs([experiment_id], query, max_results=1)
    if matches:
        run_id = matches[0].info.run_id
        stored, new = matches[0].data.tags, git_tags() | dict(tags or {})
        for tag in stored.keys() & {*GIT_TAGS, ERROR_TAG} - new.keys():
            client.delete_tag(run_id, tag)
        if changed := {tag: value for tag, value in new.items() if stored.get(tag) != value}:
            log_tags(client, run_id, changed)
        client.update_run(run_id, status="RUNNING")
        return run_id
    inherited = client.get_run(parent_run_id).data.tags if parent_run_id else source_tags("inpaint")
    run_tags |= (
        {tag: inherited[tag] for tag in SOURCE_TAGS if tag in inherited} | git_tags() | dict(tags or {})
    )
    return client.create_run(experiment_id, run_name=name, tags=run_tags).info.run_id


@contextmanager
def finish_run_on_exit(tracking: Tracking, run_id: str) -> Iterator[MlflowClient]:
    """End the run as FINISHED, as FAILED if the block raises, or as KILLED if it is interrupted. Yields a client.

    Its descendants that are still RUNNING, because their processes died or were cancelled, end as KILLED.
    """
    client = tracking.client()
    try:
        yield client
    except BaseException as error:
        status = "KILLED" if type(error).__name__ in INTERRUPTIONS else "FAILED"
        with suppress(Exception):  # an unreachable server or a full disk must not hide the error
            client.set_tag(run_id, ERROR_TAG, error_text(error)[:500])
            client.set_terminated(run_id, status)
            end_descendants(client, run_id)
        raise
    client.set_terminated(run_id, "FINISHED")
    with suppress(Exception):  # the work is done
        end_descendants(client, run_id)


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, object]) -> None:
    """Log parameters as text. May be repeated with the same values."""
    from mlflow.entities import Param

    texts = {valid_name(key): str(value)[:MAX_PARAM_CHARS] for key, value in params.items()}
    values = [Param(key, text) for key, text in texts.items()]
    for start in range(0, len(values), 100):
        client.log_batch(run_id, params=values[start : start + 100])


def log_metrics(client: MlflowClient, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
    """Log scores. Their timestamps depend on the run's start only, so that a repeated call logs the same points."""
    from mlflow.entities import Metric

    start_time = client.get_run(run_id).info.start_time
    metrics = [
        Metric(valid_name(key), float(value), start_time + step, step) for key, value in values.items()
    ]
    client.log_batch(run_id, metrics=metrics)


def log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, object]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def log_curves(client: MlflowClient, run_id: str, points: Iterable[CurvePoint]) -> int:
    """Log the values that the run does not have yet; returns the number of steps with new values.

    Each metric is compared by itself: it may have values at some steps only, or be added to steps whose other metrics are
    logged already. Logged values stay, so training that is repeated with slightly different values (another number of
    workers) logs no step twice. Timestamps are the run's start plus one second per step, so that a request can be
    repeated if its response was lost.

    A metric's history is read from the server only if a point before its last one may be missing.
    """
    from mlflow.entities import Metric

    curves: dict[str, dict[int, float]] = {}
    for step, values in points:
        for key, value in values.items():
            curves.setdefault(key, {})[step] = float(value)
    if not curves:
        return 0
    run = client.get_run(run_id)
    last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    counts = _parse_counts(run.data.tags.get(POINT_COUNTS_TAG))
    metrics = []
    for key, curve in curves.items():
        logged = {step for step in curve if step <= last_steps.get(key, -1)}
        if key not in last_steps:
            counts[key] = 0
        elif logged and counts.get(key) != len(logged):
            logged = {metric.step for metric in client.get_metric_history(run_id, key)}
            counts[key] = len(logged)
        new = sorted(curve.keys() - logged)
        metrics += [Metric(key, curve[step], run.info.start_time + step * 1000, step) for step in new]
        if key in counts:  # unknown in a run of an earlier release until its history is read
            counts[key] += len(new)
    metrics.sort(key=lambda metric: metric.step)
    steps = {metric.step for metric in metrics}
    while metrics:
        size = len(metrics) if len(metrics) <= MAX_METRICS_PER_REQUEST else _request_size(metrics)
        client.log_batch(run_id, metrics=metrics[:size])
        metrics = metrics[size:]
    # Set the counts last: if they are too low the history is read again, if too high missing points go unnoticed.
    if counts != _parse_counts(run.data.tags.get(POINT_COUNTS_TAG)):
        client.set_tag(run_id, POINT_COUNTS_TAG, json.dumps(counts, sort_keys=True))
    return len(steps)


def _parse_counts(tag: str | None) -> dict[str, int]:
    """Metric -> number of its points; empty if unknown."""
    with suppress(ValueError):
        counts = json.loads(tag or "{}")
        if isinstance(counts, dict):
            return counts
    return {}


def log_image(client: MlflowClient, run_id: str, name: str, png: bytes) -> None:
    """Log a PNG as the artifact `name`, replacing an earlier one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_bytes(png)
        client.log_artifact(run_id, str(path), str(Path(name).parent) if "/" in name else None)


def log_text(client: MlflowClient, run_id: str, name: str, text: str) -> None:
    client.log_text(run_id, text, name)


def version_exists(outputs: RegisterOutputs, key: str, settings: RunSettings) -> bool:
    """Whether the version that a register step created still exists: a user may have deleted it."""
    tracking = settings.tracking
    if tracking is None:
        return True
    if path := path_from_sqlite_url(tracking.uri):
        # Without MLflow: its import would take longer than the rest of a finished run.
        with suppress(tables.Error):
            return tables.has_version(path, outputs.name, outputs.version, key)
    from mlflow.exceptions import MlflowException

    try:
        check_server(tracking.uri)
        version = tracking.client().get_model_version(outputs.name, outputs.version)
    except TrackingError:
        return True  # a finished run needs no server; whatever needs one reports that it is unreachable
    except MlflowException as error:
        return error.error_code != "RESOURCE_DOES_NOT_EXIST"
    return version.tags.get("step_key") == key


def _request_size(metrics: list[Metric]) -> int:
    """Length of the longest prefix within MLflow's limit that does not split a step."""
    size = MAX_METRICS_PER_REQUEST
    while size > 1 and metrics[size].step == metrics[size - 1].step:
        size -= 1
    return size


class CurvePublisher:
    """Sends curve points and images from a thread, so that training never waits for MLflow.

    A courtesy for viewers: the checkpoint holds all points, and at the end of training the step logs those that are
    missing. While the server is unreachable, points are queued and retried.
    """

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self._tracking, self._run_id = tracking, run_id
        self._points: list[CurvePoint] = []
        self._image: tuple[str, bytes] | None = None
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._send, name="mlflow-publisher", daemon=True)
        self._thread.start()

    def publish(self, points: Iterable[CurvePoint], image: tuple[str, bytes] | None = None) -> None:
        """Queue points, and an image as (name, PNG). Only the latest queued image is sent."""
        with self._wake:
            self._points.extend(points)
            self._image = image or self._image
            self._wake.notify()

    def close(self, timeout: float = 10.0) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)

    def _send(self) -> None:
        client = self._tracking.client()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._points or self._image or self._closed)
                points, image, closed = list(self._points), self._image, self._closed
            try:
                log_curves(client, self._run_id, points)
                if image:
                    log_image(client, self._run_id, *image)
                with self._wake:
                    del self._points[: len(points)]
                    self._image = None if self._image is image else self._image
            except Exception as error:  # an unreachable server must not stop training
                logging.getLogger(__name__).warning(
                    "MLflow is unreachable, curves are queued: %s", error_text(error)
                )
                time.sleep(RETRY_SECONDS)
                continue
            if closed:
                return
