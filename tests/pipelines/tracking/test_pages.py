"""Addresses of MLflow's pages: those that its web application routes, without passwords, '' for databases."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from pipelines.tracking.pages import experiment_page, run_page, version_page


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("http://localhost:5000", "http://localhost:5000"),
        ("https://host/team/mlflow/", "https://host/team/mlflow"),
        ("http://ann:secret@host:5000", "http://host:5000"),
    ],
)
def test_pages_of_a_server(uri: str, server: str) -> None:
    assert experiment_page(uri, "3") == f"{server}/#/experiments/3/runs"
    assert run_page(uri, "3", "ab12") == f"{server}/#/experiments/3/runs/ab12"
    assert version_page(uri, "deepfill v2", "7") == f"{server}/#/models/deepfill%20v2/versions/7"


@pytest.mark.parametrize("uri", ["sqlite:////data/mlflow.db", "postgresql://u:p@host/db", "databricks", ""])
def test_a_database_has_no_pages(uri: str) -> None:
    assert experiment_page(uri, "3") == run_page(uri, "3", "ab12") == version_page(uri, "m", "1") == ""


def test_the_installed_mlflow_has_these_routes() -> None:
    folder = Path(mlflow.__file__).parent / "server/js/build/static/js"
    (script,) = folder.glob("main.*.js")
    text = script.read_text(encoding="utf-8")
    for route in (
        "/experiments/:experimentId/runs",
        "/experiments/:experimentId/runs/:runUuid",
        "/models/:modelName/versions/:version",
    ):
        assert f'"{route}"' in text, f"MLflow's web application no longer has {route}"
