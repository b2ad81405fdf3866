"""The pages about models: what they show of a registry, foreign text as text, and what may be asked of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipelines import registry
from pipelines.registry.alias_moves import REJECTED_TAG
from pipelines.registry.searching import PROTOCOL_TAG, SCORES_TAG, scores_json
from pipelines.studio.app import create_app
from pipelines.studio.models_pages import PNG
from pipelines.studio.settings import StudioSettings
from support.mlflow_stores import MlflowStore, PipelineOutputs

ORIGIN = "http://127.0.0.1:8266"
SCRIPT = "<script>alert(1)</script>"


class Browser:
    """A client of the studio with a session; `csrf` as a page of it shows it."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        page = client.get("/models", params={"token": "token"})
        found = re.search(r'name="csrf-token" content="([^"]+)"', page.text)
        assert found
        self.csrf = found[1]

    def text(self, path: str, status: int = 200) -> str:
        response = self.client.get(path)
        assert response.status_code == status, response.text
        return response.text

    def post(self, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        headers = {"X-CSRF-Token": self.csrf, "Origin": ORIGIN}
        response = self.client.post(path, json=body, headers=headers)
        assert response.status_code == status, response.text
        result: dict[str, Any] = response.json()
        return result


def browse(uri: str, storage: Path | str) -> Iterator[Browser]:
    app = create_app(StudioSettings(uri, str(storage), token="token"))
    with TestClient(app, base_url=ORIGIN) as client:
        yield Browser(client)


@pytest.fixture
def faces(bare: MlflowStore) -> MlflowStore:
    """`faces` with three versions: 1 and 2 were champion, 3 is worse and of another protocol."""
    bare.client.create_registered_model("faces", description=f"Faces. {SCRIPT} [x](javascript:alert(1))")
    for number, psnr in enumerate((20.0, 21.0, 19.5), start=1):
        scores = {f"brush/{band}psnr_rgb_hole": psnr for band in ("", "0-10/", "10-20/")}
        tags = {
            "model": "edge_connect",
            "size": "64",
            "sigma": "2",
            "inpaint.metric": f"psnr_rgb_hole {psnr}",
            "inpaint.recipe": f"recipe-{number}{SCRIPT}",
            PROTOCOL_TAG: "p2" if number == 3 else "p1",
            SCORES_TAG: scores_json(scores | {"brush/l1_percent": psnr / 10}),
            "note": SCRIPT,
        }
        if number == 3:
            tags[REJECTED_TAG] = f"worse {SCRIPT}"
        bare.client.create_model_version(
            "faces", "file:///nowhere", bare.run_id, tags=tags, description=f"# Card\n\n{SCRIPT}"
        )
    for version in "12":
        registry.promote("faces", version, reason=f"sharper {SCRIPT}", tracking_uri=bare.uri)
    return bare


@pytest.fixture
def browser(faces: MlflowStore, tmp_path: Path) -> Iterator[Browser]:
    yield from browse(faces.uri, tmp_path / "storage")


def test_the_list_shows_each_model_with_its_champion(browser: Browser) -> None:
    page = browser.text("/models")
    assert '<a href="/models/faces">faces</a>' in page
    assert "EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning" in page
    assert re.search(r'href="/models/faces/2">version 2</a> <span class="score">21.00', page)
    assert "3 versions · 1 did not become champion" in page
    assert "PSNR hole, brush masks over 3 versions, 19.50 to 21.00" in page


def test_an_empty_registry_says_how_to_get_models(bare: MlflowStore, tmp_path: Path) -> None:
    for browser in browse(bare.uri, tmp_path):
        page = browser.text("/models")
        assert "No model is registered yet" in page
        assert 'data-copy="inpaint run demo"' in page


def test_a_model_has_its_versions_scores_and_history(browser: Browser) -> None:
    page = browser.text("/models/faces")
    rows = re.findall(r'data-choose="(\d+)"', page)
    assert rows == ["3", "2", "1"]
    assert "version 2 became champion instead of version 1, by " in page
    assert "version 3 did not become champion: worse" in page
    assert "Hollow dots: scored under another protocol" in page
    assert 'data-rollback="champion"' in page
    page = browser.text("/models/faces?metric=l1_percent&masks=brush&band=all")
    assert "l1 % over" not in page
    assert "l1 %, brush masks over 3 versions: 2.000 in version 1, 1.950 in version 3" in page


@pytest.mark.parametrize(
    "query", ["metric=../x", "masks=%3Cscript%3E", "band=99-100", "metric=&masks=&band="]
)
def test_a_score_that_does_not_exist_is_replaced_by_the_main_one(browser: Browser, query: str) -> None:
    assert "PSNR hole, brush masks over 3 versions" in browser.text(f"/models/faces?{query}")


def test_a_version_has_scores_by_band_and_says_that_its_files_are_gone(browser: Browser) -> None:
    page = browser.text("/models/faces/3")
    assert "PSNR hole by hole area: all holes 19.50, holes of 0-10 % 19.50, holes of 10-20 % 19.50" in page
    assert "files cannot be read" in page
    assert "over all holes only, as the evaluation is not in the storage" in page
    assert '<a class="button primary" href="/?version=faces/3">Try it</a>' in page
    assert 'href="/models/compare?a=faces/2&amp;b=faces/3">Compare with the champion</a>' in page
    assert "MLFLOW_TRACKING_URI" in page
    assert "Compare with the champion" not in browser.text("/models/faces/2")


def test_foreign_text_is_shown_as_text(browser: Browser) -> None:
    for path in ("/models", "/models/faces", "/models/faces/3", "/models/compare?a=faces/1&b=faces/3"):
        page = browser.text(path)
        assert SCRIPT not in page, path
        assert "javascript:alert" not in re.sub(r"\[x\]\(javascript:alert\(1\)\)", "", page), path
        assert not re.search(r"<[^>]+\sstyle=", page), "the policy refuses style attributes"
        assert not re.search(r"<[^>]+\son\w+=", page)
    assert "&lt;script&gt;" in browser.text("/models/faces/3")


def test_no_absolute_path_is_shown(browser: Browser, tmp_path: Path) -> None:
    for path in ("/models/faces", "/models/faces/3"):
        assert str(tmp_path) not in browser.text(path)


@pytest.mark.parametrize(
    "path",
    [
        "/models/other",
        "/models/faces/9",
        "/models/faces/..%2f..%2fetc",
        "/models/faces/3/picture/0",
        "/models/faces/3/picture/-1",
        "/models/compare?a=faces/1&b=faces/9",
        "/models/compare?a=../1&b=faces/1",
    ],
)
def test_unknown_names_are_not_found(browser: Browser, path: str) -> None:
    assert "Not found" in browser.text(path, status=404)


def test_two_versions_are_compared_by_their_stored_scores(browser: Browser) -> None:
    page = browser.text("/models/compare?a=faces/1&b=faces@champion")
    assert 'value="faces/2"' in page, "the alias is resolved"
    assert "+1.00" in page
    assert "not comparable" not in page
    assert "not comparable" in browser.text("/models/compare?a=faces/1&b=faces/3")
    assert "A and B are the same version" in browser.text("/models/compare?a=faces/1&b=faces/1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "faces/9"}, "there is no version 'faces/9'"),
        ({"a": "/etc/passwd"}, "there is no version"),
        ({"b": "faces/1"}, "the same version"),
        ({"masks": ["/etc"]}, "there is no kind '…/etc'|there is no kind"),
        ({"masks": []}, "masks"),
        ({"photographs": "/home"}, "bundled or scored"),
        ({"count": 100000}, "count"),
        ({"folder": "/tmp"}, "folder"),
    ],
)
def test_a_comparison_takes_allowed_values_only(
    browser: Browser, change: dict[str, Any], message: str
) -> None:
    body = {"a": "faces/1", "b": "faces/2"} | change
    status = 404 if "a" in change else 400
    assert re.search(message, browser.post("/api/models/compare", body, status)["error"])


def test_an_alias_without_comparison_is_set_after_a_confirmation(
    browser: Browser, faces: MlflowStore
) -> None:
    plan = browser.post("/api/models/faces/3/plan", {"alias": "staging"})
    assert (plan["job"], plan["objection"]) == (None, False)
    assert "No version is staging now" in plan["html"]
    body = {"alias": "staging", "reason": f"to try\n it {SCRIPT}", "seen": plan["seen"]}
    answer = browser.post("/api/models/faces/3/promote", body)
    assert answer["text"] == "faces version 3 is now staging"
    move = registry.history("faces", faces.uri)[-1]
    assert (move.alias, move.to, move.reason) == ("staging", "3", f"to try it {SCRIPT}")
    assert "staging" in browser.text("/models/faces"), "the snapshot was read again"
    assert "already" in browser.post("/api/models/faces/3/plan", {"alias": "staging"}, 409)["error"]


def test_a_concurrent_move_is_refused_with_the_registrys_sentence(
    browser: Browser, faces: MlflowStore
) -> None:
    seen = browser.post("/api/models/faces/3/plan", {"alias": "staging"})["seen"]
    registry.promote("faces", "1", "staging", tracking_uri=faces.uri)
    body = {"alias": "staging", "seen": seen}
    error = browser.post("/api/models/faces/3/promote", body, 409)["error"]
    assert "made version 1 staging of faces at the same time" in error
    assert registry.alias_state("faces", "staging", faces.uri).version == "1"


def test_a_champion_needs_a_comparison(browser: Browser, faces: MlflowStore) -> None:
    error = browser.post("/api/models/faces/3/promote", {"alias": "champion", "force": True}, 409)["error"]
    assert error == "compare it with version 2, the champion, first"
    body = {"alias": "champion", "job": "unknown", "force": True}
    assert "no such job" in browser.post("/api/models/faces/3/promote", body, 404)["error"]
    assert registry.alias_state("faces", tracking_uri=faces.uri).version == "2"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"alias": "latest"}, 409, "cannot be an alias"),
        ({"alias": "a/b"}, 409, "cannot be an alias"),
        ({"alias": "staging", "reason": "x" * 501}, 400, "reason"),
        ({"alias": "staging", "force": "yes"}, 400, "force"),
    ],
)
def test_aliases_and_reasons_are_checked(
    browser: Browser, body: dict[str, Any], status: int, message: str
) -> None:
    assert message in browser.post("/api/models/faces/3/promote", body, status)["error"]


def test_a_rollback_shows_where_it_returns_to(browser: Browser, faces: MlflowStore) -> None:
    plan = browser.post("/api/models/faces/rollback-plan", {"alias": "champion"})
    assert plan["previous"] == "1"
    assert "goes back from version 2 to <strong>version 1</strong>" in plan["html"]
    assert SCRIPT not in plan["html"]
    assert "-1.00" in plan["html"], "the stored scores of both"
    answer = browser.post("/api/models/faces/rollback", {"alias": "champion", "seen": plan["seen"]})
    assert answer["text"] == "faces: champion is version 1 again"
    error = browser.post("/api/models/faces/rollback", {"alias": "champion", "seen": plan["seen"]}, 409)
    assert "moved meanwhile" in error["error"]
    nowhere = browser.post("/api/models/faces/rollback-plan", {"alias": "candidate"}, 409)
    assert "no earlier candidate on record" in nowhere["error"]


def test_reading_needs_no_token_and_writing_does(browser: Browser) -> None:
    browser.client.cookies.clear()
    page = browser.text("/models/faces/3")
    assert page.count("disabled title=") == 2
    body = {"alias": "staging"}
    assert "needs the studio's token" in browser.post("/api/models/faces/3/plan", body, 403)["error"]


@pytest.mark.slow
def test_a_version_of_a_run_has_its_origin_intervals_and_pictures(
    registry_of_chain: str, chain: PipelineOutputs
) -> None:
    for browser in browse(registry_of_chain, chain.storage.uri):
        page = browser.text("/models/encoder/2")
        shards = chain.shards.digest
        for text in (
            f"{shards[:12]} ",
            "seeds: seed 1",
            "/runs/seeds",
            "commit 0123456789ab, with uncommitted",
        ):
            assert text in page
        assert "(95 % interval " in page
        assert 'data-copy="name: small\nseed: 1\n"' in page
        assert f'src="/models/encoder/2/picture/{0}"' in page, "the card's picture"
        response = browser.client.get("/models/encoder/2/picture/0")
        assert response.headers["content-type"] == "image/png"
        assert response.content.startswith(PNG)
        compared = browser.text("/models/compare?a=encoder/1&b=encoder/2")
        assert "recipe.seed" in compared


def wait_for_job(browser: Browser, job_id: str) -> dict[str, Any]:
    import time

    for _ in range(1200):
        job: dict[str, Any] = browser.client.get(f"/api/jobs/{job_id}").json()
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.1)
    raise AssertionError(job)


@pytest.mark.slow
def test_a_worse_champion_is_refused_unless_forced_and_two_versions_are_compared(
    registry_of_chain: str, chain: PipelineOutputs
) -> None:
    """In the worker process, on the photographs that the versions were scored on."""
    for browser in browse(registry_of_chain, chain.storage.uri):
        plan = browser.post("/api/models/encoder/3/plan", {"alias": "champion"})
        job_id = plan["job"]["id"]
        assert wait_for_job(browser, job_id)["state"] == "finished"
        planned = browser.client.get(f"/api/models/plans/{job_id}").json()
        assert planned["objection"] is True
        assert "encoder version 3 is worse than the champion, version 2" in planned["html"]
        body = {"alias": "champion", "job": job_id, "reason": "for the demo"}
        assert (
            "is worse than the champion" in browser.post("/api/models/encoder/3/promote", body, 409)["error"]
        )
        other = browser.post("/api/models/encoder/1/promote", body | {"force": True}, 409)
        assert "of another version" in other["error"]
        browser.post("/api/models/encoder/3/promote", body | {"force": True})
        move = registry.history("encoder", registry_of_chain)[-1]
        assert (move.to, move.forced, move.reason[:13]) == ("3", True, "for the demo;")
        rollback = browser.post("/api/models/encoder/rollback-plan", {"alias": "champion"})
        assert "The comparison on record of that move: PSNR hole" in rollback["html"]

        request = {"a": "encoder/1", "b": "encoder/2", "photographs": "scored", "masks": ["box"], "count": 12}
        job = wait_for_job(browser, browser.post("/api/models/compare", request)["id"])
        assert job["state"] == "finished", job["error"]
        html = browser.client.get(f"/api/models/comparisons/{job['id']}").json()["html"]
        assert "12 photographs of 32 × 32 pixels: the test photographs of encoder/2" in html
        assert "better" in html
        picture = browser.client.get(f"/api/models/comparisons/{job['id']}/0.png")
        assert picture.content.startswith(PNG)
        assert browser.client.get(f"/api/models/comparisons/{job['id']}/999.png").status_code == 404
