"""Proxies of the environment and time limits, with real servers."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from botocore.utils import get_environ_proxies

from data_prep.network import (
    bypass_proxy_for_loopback,
    call_with_timeout,
    describe_proxy,
    is_loopback,
    proxy_hint,
)
from data_prep.storage import open_storage, s3_retry

PROXIES = [
    name for word in ("http", "https", "all", "no") for name in (f"{word}_proxy", f"{word}_proxy".upper())
]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies at the start; what bypass_proxy_for_loopback sets is removed at the end."""
    for name in PROXIES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # urllib keeps the proxies that it met first, for the whole process
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.fixture
def hello_server() -> Iterator[str]:
    """host:port of a server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow  # a server
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_loopback_is_reached_without_the_proxy(
    hello_server: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://me:planted-9@127.0.0.1:9")
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get(f"http://{hello_server}", timeout=5)
    bypass_proxy_for_loopback()
    for host in (hello_server, hello_server.replace("127.0.0.1", "localhost")):
        assert requests.get(f"http://{host}", timeout=5).text == "hello"
        with urllib.request.urlopen(f"http://{host}", timeout=5) as response:
            assert response.read() == b"hello"
    assert get_environ_proxies("http://[::1]:9000") == {}


def test_no_proxy_entries_are_kept_and_nothing_changes_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bypass_proxy_for_loopback("http://127.0.0.1:5000")
    assert not {"no_proxy", "NO_PROXY"} & set(os.environ)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intern.example, localhost")
    bypass_proxy_for_loopback("http://127.0.0.7:5000", "http://mlflow.example:5000")
    bypass_proxy_for_loopback()
    for name in ("no_proxy", "NO_PROXY"):
        assert os.environ[name] == "intern.example,localhost,127.0.0.1,::1,[::1],127.0.0.7"
    monkeypatch.setenv("no_proxy", "*")
    bypass_proxy_for_loopback()
    assert os.environ["no_proxy"] == "*"


def test_the_proxy_of_a_url_is_described_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_proxy("http://mlflow.example") == proxy_hint("http://mlflow.example") == ""
    monkeypatch.setenv("HTTPS_PROXY", "http://me:planted-9@proxy:3128")
    assert describe_proxy("https://s3.example") == " through the proxy of HTTPS_PROXY (http://proxy:3128)"
    assert proxy_hint("https://s3.example:9") == "correct HTTPS_PROXY, or add s3.example to no_proxy"
    assert describe_proxy("http://s3.example") == ""
    monkeypatch.setenv("no_proxy", "s3.example")
    assert describe_proxy("https://s3.example") == ""


def test_the_error_of_an_unreachable_bucket_names_the_proxy(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setenv("http_proxy", "http://me:planted-9@127.0.0.1:9")
    storage = open_storage(s3)
    s3_retry.client_for.cache_clear()
    storage.write("a", b"1")  # on loopback
    assert storage.read("a") == b"1"
    monkeypatch.setattr(s3_retry, "FIRST_CONTACT_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example:9000")
    with pytest.raises(Exception, match="does not answer through the proxy of http_proxy") as error:
        storage.read("a")
    assert "add s3.example to no_proxy" in str(error.value)
    assert "planted" not in str(error.value)


def test_loopback_hosts() -> None:
    assert all(
        is_loopback(host) for host in ("localhost", "127.0.0.1", "127.3.2.1", "::1", "[::1]", "0.0.0.0")
    )
    assert not any(is_loopback(host) for host in ("", "10.0.0.1", "example.com", "localhost.example.com"))


def test_a_call_with_a_timeout_gives_its_result_its_error_or_a_timeout() -> None:
    assert call_with_timeout(5, lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(5, lambda: 1 / 0)
    release, start = threading.Event(), time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        call_with_timeout(0.2, release.wait)
    assert time.monotonic() - start < 3
    release.set()
