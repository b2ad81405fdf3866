"""Weights by address: fetched once, checked, kept; refused in one line."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.resources import local_options, local_path

BODY = b"weights of a feature stack"
SUM = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/vgg.pth" else 404)
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("INPAINT_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_weights_are_fetched_once_and_checked(server: tuple[str, list[str]]) -> None:
    address, asked = server
    options = {"width": 0.5, "features": {"name": "vgg19", "weights": f"{address}/vgg.pth", "sha256": SUM}}
    found = local_options(options)
    assert Path(found["features"]["weights"]).read_bytes() == BODY
    assert local_options(options) == found
    assert asked == ["/vgg.pth"]
    assert found["width"] == 0.5


def test_what_cannot_be_trusted_or_had_is_refused_in_one_line(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, _ = server
    for weights, sha256, words in (
        (f"{address}/vgg.pth", None, "sha256"),
        (f"{address}/vgg.pth", "0" * 64, SUM),
        (f"{address}/none.pth", SUM, "404"),
        ("ftp://host/vgg.pth", SUM, "s3://"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            local_path(weights, sha256)
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_local_files_are_used_where_they_are() -> None:
    assert local_path("/weights/vgg.pth") == "/weights/vgg.pth"
    assert local_path("file:///weights/vgg.pth") == "/weights/vgg.pth"
    assert local_options({"features": "efficientnet_lite0"}) == {"features": "efficientnet_lite0"}
