"""The pages of runs, requested from the application: what they say, what they escape, and what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from data_prep.storage import open_storage
from pipelines.durable import run_status
from pipelines.studio.app import create_app
from pipelines.studio.runs_pages import REPORT_POLICY
from pipelines.studio.settings import StudioSettings
from support.studio_storage import (
    ERROR,
    FAILED_RUN,
    FINISHED_RUN,
    REPORT_SENTENCE,
    RUNNING_RUN,
    SWEEP_RUN,
    StudioStorage,
)

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StudioStorage:
    made = StudioStorage.create(tmp_path_factory.mktemp("studio"))
    run = made.record("hostile", ["data.source=/srv/photographs", "data.size=32"])
    run_status.save_workflow(run, f"inpaint run {SCRIPT}", f"name: {SCRIPT}\n")
    made.start_attempt(run, "shard", error=f"{SCRIPT} in /home/someone/secret/photo.jpg")
    made.storage.write("status/torn.json", b"{")
    return made


@pytest.fixture(scope="module")
def client(made: StudioStorage) -> Iterator[TestClient]:
    """Of a studio that may read; refreshes do not matter here."""
    tracking = f"sqlite:///{made.folder.parent}/mlflow.db"
    app = create_app(StudioSettings(tracking, str(made.folder)))
    with made.running(), TestClient(app, base_url="http://127.0.0.1:8266") as client:
        yield client


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_list_has_every_run_with_its_state(client: TestClient) -> None:
    response = client.get("/runs")
    assert response.status_code == 200
    states = re.findall(r'<li data-state="(\w+)">.*?<a class="run" href="/runs/([^"]+)"', response.text, re.S)
    assert {name: state for state, name in states} == {
        SWEEP_RUN: "running",
        RUNNING_RUN: "running",
        FAILED_RUN: "failed",
        "hostile": "failed",
        FINISHED_RUN: "finished",
        "torn": "unreadable",
    }
    text = text_of(response.text)
    assert "train-context_encoder 25 %, 15:00 left" in text
    assert ERROR in text
    assert REPORT_SENTENCE in text
    assert "status/torn.json is damaged" in text
    assert "style=" not in response.text


def test_a_failed_run_says_why_and_how_to_go_on(client: TestClient) -> None:
    text = text_of(client.get(f"/runs/{FAILED_RUN}").text)
    assert "train-edge_connect failed in attempt 2" in text
    assert text.count(ERROR) == 1
    assert re.search(r"The traceback is in the storage, in attempts/\w+-train-edge_connect/2.json", text)
    assert f"inpaint run {FAILED_RUN}.yaml --storage" in text
    assert "No command was recorded" in text


def test_a_finished_run_links_to_versions_and_reports(client: TestClient, made: StudioStorage) -> None:
    page = client.get(f"/runs/{FINISHED_RUN}").text
    assert 'href="/models/edges/2"' in page
    (address,) = re.findall(r'href="(/runs/demo/report/[^"]+)"', page)
    report = client.get(address)
    assert report.status_code == 200
    assert report.headers["content-security-policy"] == REPORT_POLICY
    (file,) = (made.folder / "reports").iterdir()
    assert report.content == file.read_bytes()
    assert "<script" not in report.text


def test_a_sweep_has_a_table_of_trials(client: TestClient) -> None:
    page = client.get(f"/runs/{SWEEP_RUN}").text
    text = text_of(page)
    assert "2 finished, 1 stopped, 1 failed, 1 running" in text
    assert "the loss is nan at step 120" in text
    (best,) = re.findall(r'<tr class="best">(.*?)</tr>', page, re.S)
    assert "21.00" in best
    assert "style=" not in page


def test_the_graph_shows_the_running_step(client: TestClient) -> None:
    page = client.get(f"/runs/{RUNNING_RUN}").text
    assert page.count('class="node finished"') == 2
    assert page.count('class="node open running"') == 1
    assert "running 25 %" in page
    assert "resuming from step 80 with 2 workers" in page


def test_foreign_text_is_text_and_paths_are_cut(client: TestClient) -> None:
    page = client.get("/runs/hostile").text
    assert SCRIPT not in page
    assert SCRIPT not in client.get("/runs").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; in …/photo.jpg" in page
    assert "/home/someone" not in page
    recipe = client.get("/runs/hostile/recipe.yaml")
    assert recipe.text == f"name: {SCRIPT}\n"
    assert recipe.headers["content-type"].startswith("application/yaml")
    assert "attachment" in recipe.headers["content-disposition"]
    assert client.get(f"/runs/{FINISHED_RUN}/recipe.yaml").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/runs/none",
        "/runs/..%2F..%2Fetc",
        f"/runs/{FINISHED_RUN}/report/..%2Fstatus%2Fdemo.json",
        f"/runs/{FINISHED_RUN}/report/%2Fetc%2Fpasswd",
        f"/runs/{FINISHED_RUN}/report/none.html",
        "/runs/none/report/none.html",
    ],
)
def test_names_are_looked_up_and_never_joined_to_a_path(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert "root:" not in response.text


def test_reports_of_another_run_are_not_found(client: TestClient, made: StudioStorage) -> None:
    (file,) = (made.folder / "reports").iterdir()
    assert client.get(f"/runs/{FAILED_RUN}/report/{file.name}").status_code == 404


def test_the_snapshot_id_is_that_of_the_page(client: TestClient) -> None:
    client.get("/runs")
    page = client.get("/runs").text
    answer = client.get("/api/snapshot?section=runs").json()
    assert f'data-snapshot="{answer["snapshot"]}"' in page
    assert client.get("/api/snapshot?section=other").status_code == 400


def test_a_page_with_an_old_value_has_its_id(tmp_path: Path) -> None:
    """A refresh may end between reading the value and writing the page; the next check then renews the page."""
    made = StudioStorage.create(tmp_path)
    app = create_app(StudioSettings(f"sqlite:///{tmp_path}/mlflow.db", str(made.folder)))
    runs = app.state.studio.runs
    runs.get()
    started: list[Callable[[], None]] = []
    runs._start, runs._due_at = started.append, 0.0
    values = runs.get

    def get_and_refresh(wait_seconds: float = 0.0) -> object:
        value = values(wait_seconds)
        if started:
            started.pop()()
        return value

    runs.get = get_and_refresh
    client = TestClient(app, base_url="http://127.0.0.1:8266")  # whose start loads nothing
    with made.running():
        page = client.get("/runs").text
    assert ">interrupted</span>" in page
    assert f'data-snapshot="{runs.id}"' not in page


def test_the_page_of_an_empty_storage_says_how_to_begin(tmp_path: Path) -> None:
    app = create_app(StudioSettings(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "runs")))
    with TestClient(app, base_url="http://127.0.0.1:8266") as client:
        assert "inpaint run demo --storage" in client.get("/runs").text


def test_a_storage_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    open_storage(tmp_path / "runs")
    app = create_app(StudioSettings(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "runs")))
    with TestClient(app, base_url="http://127.0.0.1:8266") as client:
        response = client.get("/runs")
    assert response.status_code in (200, 503)
    assert json.dumps(str(tmp_path)) not in response.text
