"""A bucket behind a network that fails: what passes is survived, what does not is said at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_proxy import faulty_proxy

from data_prep import bucket as bucket_module
from data_prep.storage import DeniedKey, MissingKey, StorageError, open_storage

SHIPPED = bucket_module.PAUSE


@pytest.fixture
def faults(server, s3, monkeypatch):
    """The way to the bucket's server; pauses are short."""
    monkeypatch.setattr(bucket_module, "PAUSE", (0.05, 0.2))
    with faulty_proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        yield proxy


@pytest.fixture
def storage(faults, s3):
    """Of which the server has answered once."""
    storage = open_storage(f"{s3}/x")
    storage.write("a/1", b"one" * 1000)
    storage.write("a/2", b"two")
    return storage


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut", "stall 0.3"])
def test_what_passes_is_survived(faults, storage, tmp_path, fault):
    """Several failures in a row are more than boto3 tries by itself."""
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
        faults.few(1 if fault.startswith("stall") else 3, fault)
        assert call()


def test_a_server_that_is_gone_for_20_seconds(faults, storage, tmp_path, monkeypatch, capfd):
    """The port is closed, and everything goes on where it stood, with the pauses as they are shipped."""
    monkeypatch.setattr(bucket_module, "PAUSE", SHIPPED)
    (tmp_path / "up").write_bytes(b"up" * 1000)
    calls = {
        "read": lambda: storage.read("a/2") == b"two",
        "write": lambda: storage.write("b", b"") is None,
        "create": lambda: storage.create("c", b"ours"),
        "list": lambda: [key for key, _ in storage.list("a")] == ["a/1", "a/2"],
        "upload": lambda: storage.upload(tmp_path / "up", "up") is None,
        "download": lambda: storage.download("a/1", tmp_path / "down") is None,
    }
    began = time.monotonic()
    faults.down(20)
    with ThreadPoolExecutor(len(calls)) as pool:
        done = {name: pool.submit(call) for name, call in calls.items()}
        assert all(future.result() for future in done.values()), done
    assert 20 <= time.monotonic() - began < 45
    assert (tmp_path / "down").read_bytes() == b"one" * 1000
    assert storage.read("up") == b"up" * 1000
    assert f"{storage.uri} does not answer; trying for another" in capfd.readouterr().err


def test_patience_ends(faults, storage, monkeypatch):
    monkeypatch.setenv("INPAINT_S3_PATIENCE", "1")
    faults.few(10**6, "503")
    with pytest.raises(StorageError, match="cannot read a/1"):
        storage.read("a/1")


@pytest.mark.parametrize("fault", ["reset", "stall 100"])
def test_a_server_that_never_answered_is_told_soon(faults, s3, monkeypatch, fault):
    """Also one that takes the connection and says nothing."""
    monkeypatch.setattr(bucket_module, "BRIEF", 1.0)
    monkeypatch.setattr(bucket_module, "SILENCE", (60.0, 2.0))
    faults.few(10**6, fault)
    began = time.monotonic()
    with pytest.raises(StorageError, match="does not answer; is it up"):
        open_storage(s3).check_writable()
    assert time.monotonic() - began < 6


def test_a_server_that_first_says_no_has_answered(faults, s3):
    storage = open_storage(s3)
    with pytest.raises(MissingKey):
        storage.read("none")
    assert bucket_module._patience() == bucket_module.PATIENCE


def test_what_does_not_pass_is_said_at_once(faults, storage):
    faults.few(1, "403")
    before = len(faults.seen)
    with pytest.raises(DeniedKey, match="rights"):
        storage.read("a/1")
    with pytest.raises(MissingKey):
        storage.read("none")
    faults.few(1, "501")  # what a server answers that does not know conditions
    with pytest.raises(StorageError, match="NotImplemented"):
        storage.write("a/3", b"")
    assert len(faults.seen) == before + 3


@pytest.mark.parametrize(
    ("variable", "mend"),
    [
        ("AWS_ACCESS_KEY_ID", "does not know this access key; check AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "secret key is wrong; check AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_refused_credentials_are_said_at_once(gateway_s3, monkeypatch, variable, mend):
    """By a server that checks them, also after it has answered: it would be tried for a minute otherwise."""
    storage = open_storage(gateway_s3)
    storage.write("a", b"1")
    bucket_module._client_for.cache_clear()  # clients are kept by their user, not by the secret
    monkeypatch.setenv(variable, "wrong-but-secret")
    calls = (storage.check_writable, lambda: storage.read("a"), lambda: list(storage.list()))
    began = time.monotonic()
    for call in calls:
        with pytest.raises(StorageError, match=mend) as error:
            call()
        assert "wrong-but-secret" not in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(StorageError, match="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        storage.size("a")  # HEAD has no body to say which
    assert time.monotonic() - began < 5
    bucket_module._client_for.cache_clear()


def test_a_conditional_write_whose_answer_is_lost_is_known_as_ours(faults, storage):
    faults.few(1, "lost", "PUT /")
    assert storage.create("lease", b"mine")
    assert not storage.create("lease", b"theirs")
    seen = storage.read_tagged("lease")
    faults.few(1, "lost", "PUT /")
    assert storage.replace_if("lease", b"renewed", seen.etag)
    assert not storage.replace_if("lease", b"late", seen.etag)
    assert storage.read("lease") == b"renewed"


def test_losing_an_answer_and_then_the_server_is_survived(faults, storage):
    """The new trouble counts, not the 412 that was being looked into."""
    left = {"PUT": 1, "HEAD": 6}  # the first PUT's answer, and the look at whose object stands

    def script(method: str, path: str) -> str:
        if method not in left or left[method] == 0 or (method == "HEAD" and left["PUT"]):
            return ""
        left[method] -= 1
        return "lost" if method == "PUT" else "reset"

    assert bucket_module._obeys_conditions(storage)  # asked once an endpoint, with requests of its own
    faults.script = script
    assert storage.create("lease", b"mine")
    assert left == {"PUT": 0, "HEAD": 0}


def test_a_lost_answer_of_a_server_without_conditions(gateway, gateway_s3, monkeypatch):
    """Signatures hold through the proxy, as it keeps the Host."""
    monkeypatch.setattr(bucket_module, "PAUSE", (0.05, 0.2))
    monkeypatch.setattr(bucket_module, "SETTLE", 0.2)
    with faulty_proxy(gateway) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.uri)
        storage = open_storage(gateway_s3)
        assert not bucket_module._obeys_conditions(storage)
        faults.few(1, "lost", "PUT /")
        assert storage.create("lease", b"mine")
        assert not storage.create("lease", b"theirs")
        faults.few(5, "503")
        assert storage.read("lease") == b"mine"
