"""Compares the metrics in MLflow with the training curves and checkpoints in a storage."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from data_prep.storage import Storage, open_storage

MAX_FLOAT = 1.7976931348623157e308  # how MLflow stores infinity

Curves = list[tuple[str, int, str]]  # metric, step, value


def check_curves(storage: str | Path, database: Path | None = None) -> int:
    """Asserts that the MLflow run of each finished training holds the points of its curves.json, each once, with the
    last one as latest value. Returns the number of finished training runs.

    A run without curves.json belongs to an unfinished training: it must hold the points of a committed checkpoint.
    """
    files, database = open_storage(storage), database or Path(storage) / "mlflow.db"
    logged, latest = _read_metrics(database), _read_metrics(database, "latest_metrics")
    expected = _finished_curves(files)
    assert expected, f"no finished training in {storage}"
    for run, points in expected.items():
        _compare(logged.pop(run, []), latest.get(run, []), _sorted_points(points), f"MLflow's run {run}")
    committed = [_sorted_points(points) for points in _checkpoint_curves(files)]
    for run, points in logged.items():
        if any(metric.startswith("loss/") for metric, _, _ in points):
            assert points in committed, f"MLflow's run {run} does not match any committed checkpoint"
    return len(expected)


def check_not_ahead_of_checkpoints(storage: str | Path, database: Path | None = None) -> int:
    """Asserts, during training or after a kill, that MLflow holds only points that are in a checkpoint.

    Returns the number of points in MLflow.
    """
    files = open_storage(storage)
    logged = _read_metrics(database or Path(storage) / "mlflow.db")
    saved = [
        set(_sorted_points(points))
        for points in [*_finished_curves(files).values(), *_checkpoint_curves(files)]
    ]
    count = 0
    for run, logged_points in logged.items():
        curves = {point for point in logged_points if point[0].startswith(("loss/", "val/", "data/"))}
        assert not curves or any(curves <= points for points in saved), (
            f"run {run} is ahead of its checkpoint"
        )
        count += len(curves)
    return count


def _finished_curves(files: Storage) -> dict[str, list]:
    """MLflow run id -> the points of its curves.json; the longest if several training steps share a run."""
    weight_folders = []
    for key, _ in files.list("manifests"):
        value = json.loads(files.read(key))["value"]
        if "weights" in value:
            weight_folders.append((value["run_id"], value["weights"]))
    for key, _ in files.list("work"):
        if "/stable/trials/" in key and not key.endswith("clock.json"):
            trial = json.loads(files.read(key))["trial"]
            if trial["weights"]:
                weight_folders.append((trial["run"], trial["weights"]))
    longest: dict[str, list] = {}
    for run, weights in weight_folders:
        points = json.loads(files.read(f"{weights}/curves.json"))["points"]
        if len(points) > len(longest.get(run, [])):
            longest[run] = points
    return longest


def _checkpoint_curves(files: Storage) -> Iterator[list]:
    """The points of the newest committed checkpoint of each training."""
    for key, _ in files.list("work"):
        folder, _, name = key.rpartition("/")
        if name == "checkpoint_manager_snapshot.json":
            newest = json.loads(files.read(key))["latest_checkpoint_result"]
            if newest:
                yield json.loads(files.read(f"{folder}/{newest['checkpoint_dir_name']}/journal.json"))


def _read_metrics(database: Path, table: str = "metrics") -> dict[str, Curves]:
    curves: dict[str, Curves] = defaultdict(list)
    with closing(sqlite3.connect(database)) as tables:
        rows = tables.execute(f"select run_uuid, key, step, value, is_nan from {table}")
        for run, key, step, value, is_nan in rows:
            curves[run].append((key, step, "nan" if is_nan else repr(float(value))))
    return {run: sorted(points) for run, points in curves.items()}


def _sorted_points(points: list[Any]) -> Curves:
    flattened = []
    for step, values in points:
        for key, value in values.items():
            stored = value if value != value else min(max(value, -MAX_FLOAT), MAX_FLOAT)
            flattened.append((key, step, repr(float(stored))))
    return sorted(flattened)


def _compare(logged: Curves, latest: Curves, expected: Curves, context: str) -> None:
    names = {metric for metric, _, _ in expected}
    points = [point for point in logged if point[0] in names]
    missing, extra = sorted(set(expected) - set(points)), sorted(set(points) - set(expected))
    assert not missing, f"{context} lacks {len(missing)} of {len(expected)} points: {missing[:3]}"
    assert not extra, f"{context} holds {len(extra)} points that are not in curves.json: {extra[:3]}"
    assert points == expected, f"{context} holds points twice: {len(points)} instead of {len(expected)}"
    last = {point[0]: point for point in expected}  # sorted by step
    assert {point[0]: point for point in latest if point[0] in names} == last, context
