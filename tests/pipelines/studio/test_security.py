"""Requests that other sites, other hosts and other browsers could send to the studio."""

from __future__ import annotations

import logging
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from pipelines.studio import sessions
from support.studio_client import ORIGIN, csrf_token, reader, running_app, studio_settings, writer


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    with running_app(studio_settings(tmp_path)) as app:
        yield app


def token(app: FastAPI) -> str:
    return str(app.state.studio.settings.token)


def test_the_links_token_becomes_a_session(app: FastAPI) -> None:
    client = reader(app)
    answer = client.get(f"/token?a=1&token={token(app)}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/token?a=1")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("inpaint-studio-8266=")
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
    assert token(app) not in cookie
    assert csrf_token(client)
    assert not csrf_token(reader(app))


def test_a_link_from_another_site_is_loaded_again_with_the_cookie(app: FastAPI) -> None:
    """Browsers send a strict cookie only with requests that the studio's own pages begin."""
    client, from_elsewhere = reader(app), {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    page = client.get("/token", headers=from_elsewhere)
    assert 'http-equiv="refresh"' in page.text
    assert "csrf-token" not in page.text
    assert (
        "csrf-token" in client.get("/token", headers={**from_elsewhere, "Sec-Fetch-Site": "same-origin"}).text
    )
    assert client.get(
        f"/token?token={token(app)}", headers=from_elsewhere, follow_redirects=False
    ).is_redirect


@pytest.mark.parametrize("path", ["//evil.example/", "/%2f/evil.example/", "/\\evil.example"])
def test_the_redirect_stays_in_the_studio(app: FastAPI, path: str) -> None:
    answer = reader(app).get(f"{ORIGIN}{path}?token={token(app)}", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/")
    assert not answer.headers["location"].startswith(("//", "/\\"))


def test_a_wrong_link_shows_the_form(app: FastAPI) -> None:
    client = reader(app)
    answer = client.get("/models?token=wrong")
    assert answer.status_code == 403
    assert "not that of this studio" in answer.text
    assert not client.cookies


def test_the_form_takes_the_token_and_bounds_failures(app: FastAPI) -> None:
    client = reader(app)
    client.headers["Origin"] = ORIGIN
    for _ in range(sessions.MAX_FAILURES):
        answer = client.post("/token", json={"token": "wrong"})
        assert (answer.status_code, "terminal" in answer.json()["error"]) == (403, True)
    assert client.post("/token", json={"token": token(app)}).status_code == 429
    app.state.studio.sessions._failures.clear()
    assert client.post("/token", json={"token": token(app)}).status_code == 200
    assert csrf_token(client)
    assert client.post("/token", content=b"[" * 100_000).status_code == 400


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil",
        "192.168.0.2:8266",
        "[::2]",
        "localhost:8:8",
        "",
    ],
)
def test_other_hosts_are_refused(app: FastAPI, host: str) -> None:
    answer = reader(app).get("/token", headers={"Host": host})
    assert answer.status_code == 421
    assert answer.text.count("\n") == 1
    assert "Content-Security-Policy" in answer.headers


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:8266", "LOCALHOST"])
def test_loopback_names_with_any_port_are_served(app: FastAPI, host: str) -> None:
    assert reader(app).get("/token", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost:8266"},
        {"Origin": "https://127.0.0.1:8266"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"X-CSRF-Token": "wrong"},
        {"X-CSRF-Token": ""},
        {"Cookie": "inpaint-studio-8266=wrong"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/photos/sample/chelsea"),
        ("PUT", "/api/photos/x/mask"),
        ("DELETE", "/api/x"),
        ("OPTIONS", "/api/x"),
    ],
)
def test_writes_of_other_sites_are_refused(
    app: FastAPI, headers: dict[str, str], method: str, path: str
) -> None:
    client = writer(app)
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 403
    assert set(answer.json()) == {"error"}
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_write_without_an_origin_is_refused(app: FastAPI) -> None:
    client = writer(app)
    del client.headers["Origin"]
    assert client.post("/api/photos/sample/chelsea").status_code == 403


def test_reading_needs_no_token_and_photographs_do(app: FastAPI) -> None:
    client = reader(app)
    assert client.get("/token").status_code == 200
    assert client.get("/api/samples").status_code == 200
    for path in ("/api/photos/x", "/api/photos/x/view", "/api/jobs/x", "/api/jobs/x/results/0/view"):
        assert client.get(path).status_code == 403


def test_a_session_sees_only_its_own(app: FastAPI) -> None:
    mine, other = writer(app), writer(app)
    photo = mine.post("/api/photos/sample/rocket").json()
    assert mine.get(photo["view"]).status_code == 200
    for path in ("", "/view", "/mask.png", "/edges?version=a/1"):
        assert other.get(f"/api/photos/{photo['id']}{path}").status_code == 404
    assert other.post("/api/fills", json={"photo": photo["id"], "versions": ["a/1"]}).status_code == 404


def test_files_are_private_and_removed_at_the_end(tmp_path: Path) -> None:
    with running_app(studio_settings(tmp_path)) as app:
        client = writer(app)
        client.post("/api/photos/sample/rocket")
        folders = [session.folder for session in app.state.studio.sessions._sessions.values()]
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in (*folders, folders[0].parent))
    assert not folders[0].parent.exists()


def test_the_oldest_session_ends_with_its_files(app: FastAPI) -> None:
    first = writer(app)
    first.post("/api/photos/sample/rocket")
    (folder,) = (session.folder for session in app.state.studio.sessions._sessions.values())
    for _ in range(sessions.MAX_SESSIONS):
        app.state.studio.sessions.open()
    assert not folder.exists()
    assert first.get("/api/jobs/x").status_code == 403


def test_folders_of_killed_studios_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: FastAPI
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, foreign = tmp_path / "inpaint-studio-left", tmp_path / "inpaint-studio-foreign"
    for folder in (left, foreign):
        folder.mkdir()
        (folder / "photo.png").touch()
    (left / "lock").touch()
    writer(app)
    assert not left.exists()
    assert foreign.exists()
    (own,) = tmp_path.glob("inpaint-studio-*/lock")
    sessions.remove_left_folders()
    assert own.exists()


def test_every_answer_has_the_headers(app: FastAPI) -> None:
    client = reader(app)
    for path in ("/token", "/static/studio.css", "/nothing", "/api/nothing", "/static/nothing"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == ("no-cache" if path.startswith("/static") else "no-store")


def test_static_files_stay_in_their_folder(app: FastAPI) -> None:
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"):
        assert reader(app).get(path).status_code == 404


def test_unexpected_errors_are_one_line_and_logged(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a secret detail")

    def explain() -> None:
        int("a library's message")

    app.add_api_route("/api/fail", fail)
    app.add_api_route("/fail", explain)
    with caplog.at_level(logging.ERROR):
        for path in ("/api/fail", "/fail"):
            answer = reader(app).get(path)
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert "library" not in answer.text
            assert "Content-Security-Policy" in answer.headers
    assert "a secret detail" in caplog.text


def test_errors_are_a_page_or_json(app: FastAPI) -> None:
    page, data = reader(app).get("/<script>"), reader(app).get("/api/x")
    assert (page.status_code, data.status_code) == (404, 404)
    assert "<h1>Not found</h1>" in page.text
    assert "<script>" not in page.text.replace('<script type="module"', "")
    assert data.json()["error"].startswith("there is no such page")


def test_large_bodies_of_other_routes_are_refused(app: FastAPI) -> None:
    client: TestClient = writer(app)
    answer = client.post("/api/fills", content=b" " * (2**20 + 1))
    assert answer.status_code == 413
    assert answer.json()["error"].count("\n") == 0
