"""S3Storage over a failing network: transient errors are retried, permanent ones raised at once."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.storage import DeniedKey, MissingKey, StorageError, open_storage, s3_retry
from data_prep.storage import s3 as s3_module
from support.faulty_proxy import faulty_proxy

DEFAULT_BACKOFF = s3_retry.BACKOFF_SECONDS


@pytest.fixture
def faults(server, s3, monkeypatch):
    """A faulty proxy before the S3 server; the backoff is short."""
    monkeypatch.setattr(s3_retry, "BACKOFF_SECONDS", (0.05, 0.2))
    with faulty_proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        yield proxy


@pytest.fixture
def storage(faults, s3):
    """A storage whose server has answered before."""
    storage = open_storage(f"{s3}/x")
    storage.write("a/1", b"one" * 1000)
    storage.write("a/2", b"two")
    return storage


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut", "stall 0.3"])
def test_transient_errors_are_retried(faults, storage, tmp_path, fault):
    """More consecutive failures than boto3 retries by itself."""
    local = tmp_path / "file"
    for call in (
        lambda: storage.read("a/1") == b"one" * 1000,
        lambda: storage.read_range("a/1", 3, 6) == b"oneone",
        lambda: storage.size("a/2") == 3,
        lambda: [key for key, _ in storage.list()] == ["a/1", "a/2"],
        lambda: storage.download("a/1", local) is None and local.read_bytes() == b"one" * 1000,
        lambda: storage.upload(local, "b") is None and storage.read("b") == b"one" * 1000,
        lambda: storage.copy("a/2", "b") is None and storage.read("b") == b"two",
        lambda: storage.delete("b") is None and not storage.exists("b"),
    ):
        faults.fail_next(1 if fault.startswith("stall") else 3, fault)
        assert call()


@pytest.mark.parametrize("seconds", [7, pytest.param(20, marks=pytest.mark.soak)])
def test_a_temporarily_unreachable_server_is_retried(faults, storage, tmp_path, monkeypatch, capfd, seconds):
    """While the port is closed all operations wait, with the default backoff, and then succeed."""
    monkeypatch.setattr(s3_retry, "BACKOFF_SECONDS", DEFAULT_BACKOFF)
    (tmp_path / "up").write_bytes(b"up" * 1000)
    calls = {
        "read": lambda: storage.read("a/2") == b"two",
        "write": lambda: storage.write("b", b"") is None,
        "create": lambda: storage.put_if_absent("c", b"ours"),
        "list": lambda: [key for key, _ in storage.list("a")] == ["a/1", "a/2"],
        "upload": lambda: storage.upload(tmp_path / "up", "up") is None,
        "download": lambda: storage.download("a/1", tmp_path / "down") is None,
    }
    start = time.monotonic()
    faults.take_down(seconds)
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = {name: pool.submit(call) for name, call in calls.items()}
        assert all(future.result() for future in futures.values()), futures
    assert seconds <= time.monotonic() - start < seconds + 25
    assert (tmp_path / "down").read_bytes() == b"one" * 1000
    assert storage.read("up") == b"up" * 1000
    assert f"{storage.uri} does not answer; trying for another" in capfd.readouterr().err


def test_retries_are_limited(faults, storage, monkeypatch):
    monkeypatch.setenv("INPAINT_S3_RETRY_SECONDS", "1")
    faults.fail_next(10**6, "503")
    with pytest.raises(StorageError, match="cannot read a/1"):
        storage.read("a/1")


@pytest.mark.parametrize("fault", ["reset", "stall 100"])
def test_an_endpoint_that_never_answered_fails_soon(faults, s3, monkeypatch, fault):
    """Also if it accepts the connection and sends nothing."""
    monkeypatch.setattr(s3_retry, "FIRST_CONTACT_SECONDS", 1.0)
    monkeypatch.setattr(s3_retry, "READ_TIMEOUTS", (60.0, 2.0))
    faults.fail_next(10**6, fault)
    start = time.monotonic()
    with pytest.raises(StorageError, match="does not answer; is it up"):
        open_storage(s3).check_writable()
    assert time.monotonic() - start < 20  # instead of 90 s for a known endpoint


def test_an_error_response_counts_as_an_answer(faults, s3):
    storage = open_storage(s3)
    with pytest.raises(MissingKey):
        storage.read("none")
    assert s3_retry.retry_seconds() == s3_retry.RETRY_SECONDS


def test_permanent_errors_are_raised_at_once(faults, storage):
    faults.fail_next(1, "403")
    before = len(faults.requests)
    with pytest.raises(DeniedKey, match="rights"):
        storage.read("a/1")
    with pytest.raises(MissingKey):
        storage.read("none")
    faults.fail_next(1, "501")  # from servers without conditional writes
    with pytest.raises(StorageError, match="NotImplemented"):
        storage.write("a/3", b"")
    assert len(faults.requests) == before + 3


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("AWS_ACCESS_KEY_ID", "does not know this access key; check AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "secret key is wrong; check AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_wrong_credentials_are_reported_at_once(gateway_s3, monkeypatch, variable, hint):
    """By a server that checks credentials, also after it has answered: no retries for a minute."""
    storage = open_storage(gateway_s3)
    storage.write("a", b"1")
    correct = os.environ[variable]
    monkeypatch.setenv(variable, "wrong-but-secret")
    calls = (storage.check_writable, lambda: storage.read("a"), lambda: list(storage.list()))
    start = time.monotonic()
    for call in calls:
        with pytest.raises(StorageError, match=hint) as error:
            call()
        assert "wrong-but-secret" not in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(StorageError, match="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        storage.size("a")  # a response to HEAD has no body with details
    assert time.monotonic() - start < 5
    monkeypatch.setenv(variable, correct)
    assert storage.read("a") == b"1"


def test_a_conditional_write_with_a_lost_response_is_recognized_as_ours(faults, storage):
    faults.fail_next(1, "lost", "PUT /")
    assert storage.put_if_absent("lease", b"mine")
    assert not storage.put_if_absent("lease", b"theirs")
    current = storage.read_with_etag("lease")
    faults.fail_next(1, "lost", "PUT /")
    assert storage.put_if_match("lease", b"renewed", current.etag)
    assert not storage.put_if_match("lease", b"late", current.etag)
    assert storage.read("lease") == b"renewed"


def test_a_lost_response_followed_by_connection_errors_is_survived(faults, storage):
    """The new connection error is retried, although a 412 was being handled."""
    remaining = {"PUT": 1, "HEAD": 6}  # the first PUT's response, then the check of the stored token

    def script(method: str, path: str) -> str:
        if method not in remaining or remaining[method] == 0 or (method == "HEAD" and remaining["PUT"]):
            return ""
        remaining[method] -= 1
        return "lost" if method == "PUT" else "reset"

    assert s3_module._supports_conditional_put(storage)  # probed once per endpoint, with requests of its own
    faults.script = script
    assert storage.put_if_absent("lease", b"mine")
    assert remaining == {"PUT": 0, "HEAD": 0}


def test_a_lost_response_of_a_server_without_conditional_writes(gateway, gateway_s3, monkeypatch):
    """Signatures stay valid through the proxy, which keeps the Host header."""
    monkeypatch.setattr(s3_retry, "BACKOFF_SECONDS", (0.05, 0.2))
    monkeypatch.setattr(s3_module, "CLAIM_SECONDS", 0.2)
    with faulty_proxy(gateway) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.uri)
        storage = open_storage(gateway_s3)
        assert not s3_module._supports_conditional_put(storage)
        faults.fail_next(1, "lost", "PUT /")
        assert storage.put_if_absent("lease", b"mine")
        assert not storage.put_if_absent("lease", b"theirs")
        faults.fail_next(5, "503")
        assert storage.read("lease") == b"mine"


HTML = b"<!DOCTYPE html><html><body>Ray Dashboard</body></html>"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, HTML, "it lists no bucket"),
        (200, b"", "it lists no bucket"),
        (404, HTML, "it answers 404"),
        (405, b"405: Method Not Allowed", "it answers 405"),
        (403, b"Forbidden", "it answers 403"),
        (503, b"busy", "it answers 503"),
    ],
)
def test_another_kind_of_server_is_reported(s3, monkeypatch, status, body, reason):
    """At the first request: its 404 would look like a missing key, and its page like an object."""
    monkeypatch.setattr(s3_retry, "FIRST_CONTACT_SECONDS", 0.5)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.replace("//", "//me:planted-9@"))
    try:
        for _ in range(2):
            with pytest.raises(StorageError) as error:
                open_storage(s3).read("a")
            assert f"the server at {endpoint} is not an S3 server ({reason})" in str(error.value)
            assert not isinstance(error.value, MissingKey)
            assert "planted" not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()


def test_a_wrong_endpoint_is_reported(s3, monkeypatch):
    monkeypatch.setattr(s3_retry, "FIRST_CONTACT_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match=r"not a URL: probably http://127\.0\.0\.1:9000"):
        open_storage(s3).read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9000")
    with pytest.raises(StorageError, match=r"there is no host no-such-host\.invalid"):
        open_storage(s3).read("a")
