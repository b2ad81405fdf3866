"""Texts without paths and passwords."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipelines.studio.shown import age, shown, shown_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read /home/ann/photos/a.jpg: no such file", "cannot read …/a.jpg: no such file"),
        ("the folder '/home/ann/my photos/x' is empty", "the folder '…/x' is empty"),
        ("file:///srv/mlflow/artifacts/1", "…/1"),
        ("sqlite:////srv/a/mlflow.db is locked", "…/mlflow.db is locked"),
        ("sqlite+pysqlite:////srv/a%2520/mlflow.db", "…/mlflow.db"),
        ("http://ann:secret@host:5000/api/2.0/x", "http://host:5000/api/2.0/x"),
        ("s3://bucket/prefix/key stays", "s3://bucket/prefix/key stays"),
        ("error:/home/ann/x", "error:…/x"),
        ("(/home/ann/x)", "(…/x)"),
        ("--data=/home/ann/x,/home/ann/y", "--data=…/x,…/y"),
        ("//home/ann/x", "…/x"),
        ("/home", "…/home"),
        ("/a/recipe.yaml:3:5: unknown key", "…/recipe.yaml:3:5: unknown key"),
        ("3/4 and a / b, edges/2, 10 MB/s, <br/>, relative/path/a.jpg, ../up/x", None),
        ("", None),
    ],
)
def test_absolute_paths_are_cut(text: str, expected: str | None) -> None:
    assert shown(text) == (text if expected is None else expected)


def test_paths_of_the_recipe_stay() -> None:
    recipe = "data:\n  source: /data/photos\n  masks: '/data/my masks'\n"
    text = "/data/photos is empty, '/data/my masks' too, but /data/photos/ann/x.jpg is not"
    assert shown(text, recipe) == "/data/photos is empty, '/data/my masks' too, but …/x.jpg is not"
    assert shown(None) == ""
    assert shown(12) == "12"


def test_addresses_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = os.getcwd()
    assert shown_address(f"sqlite:///{folder}/runs/mlflow.db") == "runs/mlflow.db"
    assert shown_address(f"{folder}/runs") == "runs"
    assert shown_address(f"file://{folder}/runs") == "runs"
    assert shown_address("/somewhere/else/runs") == "…/runs"
    assert shown_address("http://ann:secret@host:5000") == "http://host:5000"
    assert shown_address("s3://bucket/runs") == "s3://bucket/runs"


def test_ages() -> None:
    now = datetime.now(UTC)
    moments = {"now": 1, "30 s ago": 30.5, "3 min ago": 200, "5 h ago": 5.5 * 3600, "3 days ago": 3.5 * 86400}
    for text, seconds in moments.items():
        moment = now - timedelta(seconds=seconds)
        assert age(moment) == age(moment.isoformat()) == age(moment.timestamp()) == text
    assert age(None) == age("") == ""
