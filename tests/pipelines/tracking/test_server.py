"""Probes of MLflow servers, with real servers on loopback."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.network import LONG_RETRIES_VARIABLE
from pipelines.contracts import RegisterOutputs, RunSettings
from pipelines.registry.client import RegistryError, registry_client
from pipelines.tracking import server as tracking_server
from pipelines.tracking.runs import Tracking, TrackingError, ensure_experiment, version_exists
from pipelines.tracking.server import check_server

Say = Callable[..., str]
HTML = b"<!DOCTYPE html><html><body>Ray Dashboard</body></html>"


pytestmark = pytest.mark.slow  # servers


@pytest.fixture(autouse=True)
def fast_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout of two seconds instead of ten, no earlier probes, no proxies."""
    monkeypatch.setattr(tracking_server, "FIRST_RESPONSE_SECONDS", 2.0)
    monkeypatch.setattr(tracking_server, "_last_success", {})
    monkeypatch.setattr(tracking_server, "_last_failure", {})
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in (
        "no_proxy",
        "NO_PROXY",
        LONG_RETRIES_VARIABLE,
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@contextmanager
def server(status: int, body: bytes = b"", seconds: float = 0.0) -> Iterator[str]:
    """A server that gives this response to every request, after some seconds."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ended.wait(seconds)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    ended.set()
    http_server.shutdown()
    http_server.server_close()


def probe_error(uri: str) -> str:
    start = time.monotonic()
    with pytest.raises(TrackingError) as error:
        check_server(uri)
    assert (
        time.monotonic() - start < tracking_server.FIRST_RESPONSE_SECONDS + 8
    )  # the first import of MLflow too
    assert "\n" not in str(error.value)
    assert "planted" not in str(error.value)
    return str(error.value)


def error_body(code: str) -> bytes:
    return json.dumps({"error_code": code, "message": "no"}).encode()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, HTML, "there is no MLflow server at {}: the response is a web page"),
        (404, HTML, "there is no MLflow server at {}"),
        (404, b"404: Not Found", "the response is 404 Not Found"),
        (405, b"", "the response is 405"),
        (401, b"You are not authenticated.", "{} refuses: set MLFLOW_TRACKING_USERNAME"),
        (403, b"Forbidden", "{} refuses (403): see MLFLOW_TRACKING_USERNAME"),
        (403, error_body("PERMISSION_DENIED"), "may not do that in the MLflow at {}"),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts 127.0.0.1:"),
        (503, b"busy", "{} answers 503 (Service Unavailable): try again"),
        (500, HTML, "{} answers 500"),
    ],
)
def test_unusable_servers_are_explained(status: int, body: bytes, message: str) -> None:
    with server(status, body) as uri:
        assert message.format(uri) in probe_error(uri)


def test_wrong_credentials_name_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-9")
    with server(401) as uri:
        assert "does not know 'me' with this password: see MLFLOW_TRACKING_PASSWORD" in probe_error(uri)


def test_unreachable_servers_are_explained() -> None:
    assert "http://127.0.0.1:9 does not answer (connection refused)" in probe_error(
        "http://me:planted-9@127.0.0.1:9"
    )
    assert "there is no host no-such-host.invalid" in probe_error("http://no-such-host.invalid:5000")
    with server(200, b"{}", seconds=30) as uri:
        assert f"{uri} does not answer within 2 s: start it" in probe_error(uri)
    with socket.socket() as silent:  # it accepts the connection and never responds
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        assert "does not answer within 2 s" in probe_error(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with server(200, b"{}") as uri:
        assert f"does not use TLS: probably {uri}" in probe_error(uri.replace("http", "https"))


def test_a_working_server_is_probed_once_per_minute() -> None:
    with server(200, b'{"experiments": []}') as uri:
        check_server(uri)
    check_server(uri)  # it is down now, but the last probe still counts


def test_a_failed_probe_is_not_repeated_at_once() -> None:
    with server(200, b"{}", seconds=30) as uri:
        message = probe_error(uri)
        start = time.monotonic()
        assert probe_error(uri) == message
        assert time.monotonic() - start < 1


def test_jobs_and_databases_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_server("sqlite:////nowhere/mlflow.db")
    check_server("postgresql://127.0.0.1:9/x")
    monkeypatch.setenv(LONG_RETRIES_VARIABLE, "1")
    check_server("http://127.0.0.1:9")


def test_a_proxy_is_used_for_other_hosts_but_not_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = "http://mlflow.example:5000"
    monkeypatch.setenv("http_proxy", "http://me:planted-9@127.0.0.1:9")
    with server(200, b"{}") as uri:
        check_server(uri)
        check_server(uri.replace("127.0.0.1", "localhost"))
    message = probe_error(remote)
    assert (
        "does not answer (connection refused) through the proxy of http_proxy (http://127.0.0.1:9)" in message
    )
    assert "add mlflow.example to no_proxy" in message
    for status, words in (
        (502, "answers 502"),
        (407, "requires a user and a password"),
        (403, "no MLflow server"),
    ):
        with server(status, HTML) as proxy:
            monkeypatch.setenv("http_proxy", proxy)
            tracking_server._last_failure.clear()
            message = probe_error(remote)
            assert words in message
            assert f"through the proxy of http_proxy ({proxy})" in message


def test_an_unreachable_server_is_an_error_except_for_a_finished_run() -> None:
    uri = "http://127.0.0.1:9"
    tracking = Tracking(uri, "e")
    with pytest.raises(TrackingError, match=r"9 does not answer \(connection refused\): start it"):
        ensure_experiment(tracking)
    with pytest.raises(RegistryError, match="9 does not answer"), registry_client(uri):
        pass
    with (
        pytest.raises(RegistryError, match=r"probably http://127\.0\.0\.1:5000"),
        registry_client("127.0.0.1:5000"),
    ):
        pass
    outputs = RegisterOutputs("m", "1", True, "")
    assert version_exists(outputs, "key", RunSettings(tracking=tracking))
    with server(404, error_body("RESOURCE_DOES_NOT_EXIST")) as other:
        settings = RunSettings(tracking=Tracking(other, "e"))
        tracking_server._last_success[other] = time.monotonic()
        assert not version_exists(outputs, "key", settings)
