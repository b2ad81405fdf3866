"""Downloads of weights: once, checked by sha256, cached; errors in one line."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.downloads import download, with_local_weights

BODY = b"weights of a feature stack"
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200 if self.path == "/vgg.pth" else 404)
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("INPAINT_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()


def test_weights_are_downloaded_once_and_checked(server: tuple[str, list[str]]) -> None:
    address, requests = server
    options = {"width": 0.5, "features": {"name": "vgg19", "weights": f"{address}/vgg.pth", "sha256": SHA256}}
    local = with_local_weights(options)
    assert Path(local["features"]["weights"]).read_bytes() == BODY
    assert with_local_weights(options) == local
    assert requests == ["/vgg.pth"]
    assert local["width"] == 0.5


def test_unchecked_wrong_or_missing_files_are_refused_in_one_line(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, _ = server
    for weights, sha256, message in (
        (f"{address}/vgg.pth", None, "sha256"),
        (f"{address}/vgg.pth", "0" * 64, SHA256),
        (f"{address}/none.pth", SHA256, "404"),
        ("ftp://host/vgg.pth", SHA256, "s3://"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            download(weights, sha256)
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.slow
def test_local_files_are_used_in_place() -> None:
    assert download("/weights/vgg.pth") == "/weights/vgg.pth"
    assert download("file:///weights/vgg.pth") == "/weights/vgg.pth"
    assert with_local_weights({"features": "efficientnet_lite0"}) == {"features": "efficientnet_lite0"}
