"""MLflow: one parent run a recipe, a child run a step, curves that are logged once whatever dies in between."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import in_a_line

if (
    TYPE_CHECKING
):  # imported where it is used: MLflow takes two seconds, and most processes only pass addresses on
    from mlflow import MlflowClient
    from mlflow.entities import Metric

KEY = "inpaint.key"  # the tag that makes finding a run again a lookup
BATCH = 1000  # MLflow's own limit of points a request
PAUSE = 2.0  # seconds before a server that was away is asked again

Point = tuple[int, dict[str, float]]  # step, values


class TrackingError(RuntimeError):
    """MLflow cannot be used; one line that says where and how to mend it."""


@dataclass(frozen=True)
class Tracking:
    """Where runs are tracked. Travels to Ray tasks: holds addresses, never credentials (MLflow reads those itself)."""

    uri: str
    experiment: str
    artifacts: str | None = None

    def client(self) -> MlflowClient:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints what it raises anyway
        return MlflowClient(self.uri, registry_uri=self.uri)

    def prepare(self) -> str:
        """Create the database and the experiment; returns the experiment's id.

        Called by the driver before anything runs side by side: several processes that open a fresh SQLite
        database at once die in its migration. Raises TrackingError in one line.
        """
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self.uri.startswith("sqlite:///"):
                path = Path(self.uri.removeprefix("sqlite:///"))
                path.parent.mkdir(parents=True, exist_ok=True)
                with sqlite3.connect(path) as database:
                    database.execute("pragma journal_mode=WAL")
            client = self.client()
            found = client.get_experiment_by_name(self.experiment)
            if found is not None:
                return found.experiment_id
            return client.create_experiment(self.experiment, artifact_location=self.artifacts)
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
            if "disk is full" in str(error):
                raise TrackingError(
                    f"MLflow's database {shown(self.uri)} cannot be written: the disk is full; free some space, or "
                    "choose another storage"
                ) from None
            place = shown(self.uri)
            raise TrackingError(
                f"MLflow at {place} does not answer ({in_a_line(error).replace(self.uri, place)[:300]}); "
                "start it, or set MLFLOW_TRACKING_URI"
            ) from None


def be_patient() -> None:
    """Have this process wait minutes for a server that is away: work of hours must not be lost to a restart."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "7"
    os.environ.setdefault("INPAINT_S3_PATIENCE", "60")


def tracking_for(uri: str | None, experiment: str, storage: str) -> Tracking:
    """The recipe's address, else MLFLOW_TRACKING_URI, else a SQLite file beside a folder storage.

    Raises TrackingError when the storage is a bucket and no server is named: a cluster's nodes share no file.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if uri is None:
        if "://" in storage:
            raise TrackingError(
                f"storage {storage} is a bucket, so its runs need an MLflow server: set tracking: http://... in the "
                "recipe, or MLFLOW_TRACKING_URI"
            )
        root = Path(storage).resolve()
        return Tracking(f"sqlite:///{root / 'mlflow.db'}", experiment, (root / "mlflow-artifacts").as_uri())
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).resolve()
        return Tracking(f"sqlite:///{path}", experiment, (path.parent / "mlflow-artifacts").as_uri())
    return Tracking(uri, experiment)


def open_run(
    tracking: Tracking, key: str, name: str, parent: str | None = None, tags: Mapping[str, str] | None = None
) -> str:
    """The id of the run tagged with `key`: found again after a crash, created otherwise, and set running."""
    experiment = tracking.prepare()  # first: it says in its own words what is wrong
    client = tracking.client()
    wanted = f"tags.`{KEY}` = '{key}'" + (f" and tags.`mlflow.parentRunId` = '{parent}'" if parent else "")
    found = client.search_runs([experiment], wanted, max_results=1)
    if found:
        run = found[0].info.run_id
        client.update_run(run, status="RUNNING")
        return run
    own = {KEY: key, **({"mlflow.parentRunId": parent} if parent else {}), **(tags or {})}
    return client.create_run(experiment, run_name=name, tags=own).info.run_id


@contextmanager
def running(tracking: Tracking, run: str) -> Iterator[MlflowClient]:
    """Ends the run as FINISHED, or FAILED when the block raises."""
    client = tracking.client()
    try:
        yield client
    except BaseException as error:
        with suppress(Exception):  # a server that is away, or a full disk, must not hide what happened
            client.set_tag(run, "inpaint.error", in_a_line(error)[:500])
            client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, "FINISHED")


def log_params(client: MlflowClient, run: str, params: Mapping[str, object]) -> None:
    """Parameters as text; logging the same again is no error."""
    from mlflow.entities import Param

    values = [Param(key, str(value)[:6000]) for key, value in params.items()]
    for start in range(0, len(values), 100):
        client.log_batch(run, params=values[start : start + 100])


def log_values(client: MlflowClient, run: str, values: Mapping[str, float], step: int = 0) -> None:
    """Scores of a step, logged once: at the run's own start time, so that a repetition is the same point."""
    from mlflow.entities import Metric

    stamp = client.get_run(run).info.start_time
    metrics = [Metric(key, float(value), stamp + step, step) for key, value in values.items()]
    client.log_batch(run, metrics=metrics)


def log_tags(client: MlflowClient, run: str, tags: Mapping[str, object]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def log_curves(client: MlflowClient, run: str, points: Iterable[Point]) -> int:
    """Log the points that lie behind the last one the server has; returns how many were new.

    A step's time stamp is the run's start plus one second a step, so that repeating a request that was cut off
    half-way adds nothing, and steps up to the last one logged are left out, so that nothing is logged twice
    even when a resumed training computes other last digits (another number of ranks).
    """
    from mlflow.entities import Metric

    points = list(points)
    if not points:
        return 0
    last = _last_step(client, run, points)
    start = client.get_run(run).info.start_time
    new = [(step, values) for step, values in points if step > last]
    metrics = [
        Metric(key, float(value), start + step * 1000, step)
        for step, values in new
        for key, value in values.items()
    ]
    while metrics:
        cut = len(metrics) if len(metrics) <= BATCH else _whole_steps(metrics)
        client.log_batch(run, metrics=metrics[:cut])
        metrics = metrics[cut:]
    return len(new)


def log_dataset(client: MlflowClient, run: str, source: str, manifest: Mapping[str, Any]) -> None:
    """The shards as a dataset of the run: name, digest and source are what MLflow shows as lineage."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = json.dumps({"splits": manifest["splits"], "options": manifest["options"]})
    dataset = Dataset(
        name=Path(source).name or source,
        digest=manifest["digest"][:36],
        source_type="inpaint shards",
        source=json.dumps({"uri": source}),
        profile=profile,
    )
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def log_picture(client: MlflowClient, run: str, name: str, png: bytes) -> None:
    """A PNG as the artifact `name`; the same name again replaces it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_bytes(png)
        client.log_artifact(run, str(path), str(Path(name).parent) if "/" in name else None)


def log_text(client: MlflowClient, run: str, name: str, text: str) -> None:
    client.log_text(run, text, name)


def still_registered(value: Mapping[str, Any], key: str, local: Mapping[str, Any]) -> bool:
    """Whether the version that a finished register step made is still there: versions can be deleted by hand."""
    tracking = Tracking(**local["tracking"])
    if tracking.uri.startswith("sqlite:///"):
        with suppress(sqlite3.Error):
            return _in_file(tracking.uri.removeprefix("sqlite:///"), value["name"], value["version"], key)
    from mlflow.exceptions import MlflowException

    try:
        return (
            tracking.client().get_model_version(value["name"], value["version"]).tags.get("step_key") == key
        )
    except MlflowException:
        return False


def _in_file(path: str, name: str, version: str, key: str) -> bool:
    """The same, asked of MLflow's tables: to load MLflow for it would take longer than all else of a finished run."""
    query = (
        "select 1 from model_versions v join model_version_tags t on v.name = t.name and v.version = t.version "
        "where v.name = ? and v.version = ? and v.current_stage != 'Deleted_Internal' "
        "and t.key = 'step_key' and t.value = ?"
    )
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(query, (name, int(version), key)).fetchone() is not None


def _last_step(client: MlflowClient, run: str, points: list[Point]) -> int:
    known = set(client.get_run(run).data.metrics)
    logged = known.intersection(*[points[0][1]]) if points[0][1] else set()
    if not logged:
        return -1
    return max(metric.step for metric in client.get_metric_history(run, sorted(logged)[0]))


def _whole_steps(metrics: list[Metric]) -> int:
    """The longest prefix within MLflow's limit that does not cut a step in two."""
    cut = BATCH
    while cut > 1 and metrics[cut].step == metrics[cut - 1].step:
        cut -= 1
    return cut


class Publisher:
    """Sends points and pictures from a thread, so that training never waits for MLflow.

    Nothing depends on it: the journal of all points lies in the checkpoint, and the step logs what is missing
    from there when training has ended. While the server is away, points wait and are sent again.
    """

    def __init__(self, tracking: Tracking, run: str) -> None:
        self._tracking, self._run = tracking, run
        self._points: list[Point] = []
        self._picture: tuple[str, bytes] | None = None
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._send, name="mlflow-publisher", daemon=True)
        self._thread.start()

    def publish(self, points: Iterable[Point], picture: tuple[str, bytes] | None = None) -> None:
        """Points to log, and the latest picture as (name, PNG); of pictures that pile up only the last is sent."""
        with self._wake:
            self._points.extend(points)
            self._picture = picture or self._picture
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
                self._wake.wait_for(lambda: self._points or self._picture or self._closed)
                points, picture, closed = list(self._points), self._picture, self._closed
            try:
                log_curves(client, self._run, points)
                if picture:
                    log_picture(client, self._run, *picture)
                with self._wake:
                    del self._points[: len(points)]
                    self._picture = None if self._picture is picture else self._picture
            except Exception as error:  # a server that is away must not end a training
                logging.getLogger(__name__).warning("MLflow is away, curves wait: %s", in_a_line(error))
                time.sleep(PAUSE)
                continue
            if closed:
                return


def shown(uri: str) -> str:
    """An address without the password that may stand in it."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else uri
