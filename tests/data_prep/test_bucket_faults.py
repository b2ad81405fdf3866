"""A bucket behind a network that fails: what passes is survived, what does not is said at once."""

from __future__ import annotations

import time

import pytest
from faulty_proxy import faulty_proxy

from data_prep import bucket as bucket_module
from data_prep.storage import DeniedKey, MissingKey, StorageError, open_storage


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


def test_a_server_that_is_gone_for_a_while(faults, storage, capfd):
    faults.down(8)
    began = time.monotonic()
    assert storage.read("a/2") == b"two"
    assert time.monotonic() - began > 7
    assert "does not answer; trying for another" in capfd.readouterr().err


def test_patience_ends(faults, storage, monkeypatch):
    monkeypatch.setenv("INPAINT_S3_PATIENCE", "1")
    faults.few(10**6, "503")
    with pytest.raises(StorageError, match="cannot read a/1"):
        storage.read("a/1")


def test_a_server_that_never_answered_is_told_soon(faults, s3):
    faults.few(10**6, "reset")
    began = time.monotonic()
    with pytest.raises(StorageError, match="does not answer"):
        open_storage(s3).check_writable()
    assert time.monotonic() - began < 20  # boto3's own tries


def test_what_does_not_pass_is_said_at_once(faults, storage):
    faults.few(1, "403")
    before = len(faults.seen)
    with pytest.raises(DeniedKey, match="rights"):
        storage.read("a/1")
    with pytest.raises(MissingKey):
        storage.read("none")
    assert len(faults.seen) == before + 2


def test_a_conditional_write_whose_answer_is_lost_is_known_as_ours(faults, storage):
    faults.few(1, "lost", "PUT /")
    assert storage.create("lease", b"mine")
    assert not storage.create("lease", b"theirs")
    seen = storage.read_tagged("lease")
    faults.few(1, "lost", "PUT /")
    assert storage.replace_if("lease", b"renewed", seen.etag)
    assert not storage.replace_if("lease", b"late", seen.etag)
    assert storage.read("lease") == b"renewed"
