"""LocalStorage and S3Storage behave the same; each error is one line that names the key and what to do."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep.storage import BadKey, MissingKey, Storage, StorageError, local, open_storage, s3_retry
from data_prep.storage import s3 as s3_module


@pytest.fixture(params=["folder", "s3", "gateway_s3"])
def storage(request, tmp_path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "storage")
    return open_storage(request.getfixturevalue(request.param) + "/some/prefix")


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_written_objects_can_be_read(storage):
    storage.write("a/b.bin", b"0123456789")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read_range("a/b.bin", 3, 4) == b"3456"
    assert storage.read_range("a/b.bin", 0, 0) == b""
    assert storage.size("a/b.bin") == 10
    assert storage.exists("a/b.bin")
    storage.write("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"new"


def test_names_with_spaces_unicode_and_dots(storage):
    names = ["with space.jpg", "Häuser/北京 ☂.png", "..two dots", "a..b", "100%+&=?#.jpg"]
    for name in names:
        storage.write(name, name.encode())
    assert [key for key, _ in storage.list()] == sorted(names)
    assert all(storage.read(name) == name.encode() for name in names)


@pytest.mark.parametrize("key", ["../up", "a/../../up", "/etc/passwd", "", "a//b", "./a", "a/", "nul\0"])
def test_keys_that_leave_the_storage_are_refused(storage, key):
    for method in (
        storage.read,
        storage.size,
        storage.delete,
        storage.subfolder,
        lambda k: storage.write(k, b""),
    ):
        with pytest.raises(BadKey):
            method(key)


def test_missing_objects(storage):
    assert storage.size("nothing") is None
    assert not storage.exists("nothing")
    storage.delete("nothing")
    storage.delete_tree("nothing")
    assert list(storage.list()) == []
    for call in (storage.read, storage.read_with_etag, lambda key: storage.read_range(key, 0, 1)):
        with pytest.raises(MissingKey) as error:
            call("nothing")
        assert "nothing is not in" in one_line(error)
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


def test_reading_past_the_end_is_an_error(storage):
    storage.write("short", b"abc")
    with pytest.raises(StorageError, match="short"):
        storage.read_range("short", 1, 5)
    with pytest.raises(StorageError, match="short"):
        storage.read_range("short", 7, 5)


def test_list_is_sorted_by_folder_and_hides_unpublished_files(storage):
    for key in ("b", "a/2", "a/1", "a1/x", "a.txt"):
        storage.write(key, b"xy")
    storage.write("a/.tmp-half", b"never published")
    assert list(storage.list()) == [(key, 2) for key in ("a.txt", "a/1", "a/2", "a1/x", "b")]
    assert list(storage.list("a")) == [("a/1", 2), ("a/2", 2)]
    assert list(storage.subfolder("a").list()) == [("1", 2), ("2", 2)]


def test_delete_tree_leaves_its_neighbors(storage):
    for key in ("a/1", "a/b/2", "a1/3", "c"):
        storage.write(key, b"")
    storage.delete_tree("a")
    assert [key for key, _ in storage.list()] == ["a1/3", "c"]


@pytest.mark.slow
def test_put_if_absent_succeeds_for_exactly_one_writer(storage):
    assert storage.put_if_absent("lease", b"first")
    assert not storage.put_if_absent("lease", b"second")
    assert storage.read("lease") == b"first"
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda number: storage.put_if_absent("race", b"%d" % number), range(8)))
    assert sum(wins) == 1
    assert storage.read("race") == b"%d" % wins.index(True)


def test_put_if_match_writes_only_if_the_etag_is_unchanged(storage):
    storage.write("lease", b"one")
    current = storage.read_with_etag("lease")
    assert current.data == b"one"
    assert abs(current.server_time - current.modified) < 30
    assert storage.put_if_match("lease", b"two", current.etag)
    assert not storage.put_if_match("lease", b"three", current.etag)
    assert storage.read("lease") == b"two"
    storage.delete("lease")
    assert not storage.put_if_match("lease", b"four", current.etag)
    assert not storage.exists("lease")


def test_upload_and_download(storage, tmp_path):
    uploaded, downloaded = tmp_path / "up", tmp_path / "new folder" / "down"
    uploaded.write_bytes(os.urandom(3 << 20))
    storage.upload(uploaded, "big/file")
    storage.download("big/file", downloaded)
    assert downloaded.read_bytes() == uploaded.read_bytes()
    with pytest.raises(MissingKey):
        storage.download("nothing", tmp_path / "nothing")
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_storage_is_picklable(storage):
    storage.write("a", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy == storage
    assert copy.read("a") == b"1"
    assert storage.subfolder("x").uri == storage.uri + "/x"


def test_check_writable_leaves_no_file(storage, tmp_path):
    storage.check_writable()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_only_a_local_storage_has_local_paths(storage, tmp_path):
    path = storage.local_path("a/b")
    assert path in (None, tmp_path / "storage" / "a" / "b")
    assert (path is None) == storage.uri.startswith("s3://")


def test_a_server_without_conditional_writes(s3, monkeypatch):
    """The server ignores If-None-Match: the probe detects it, and tokens are used instead."""
    storage = open_storage(s3)
    put = s3_module.S3Storage._put

    def put_without_condition(self, key, data, *, IfNoneMatch=None, IfMatch=None, **options):
        return put(self, key, data, **options)

    monkeypatch.setattr(s3_module.S3Storage, "_put", put_without_condition)
    monkeypatch.setattr(s3_module, "CLAIM_SECONDS", 0.0)
    assert not s3_module._supports_conditional_put(storage)
    assert storage.put_if_absent("lease", b"one")
    assert not storage.put_if_absent("lease", b"two")
    current = storage.read_with_etag("lease")
    assert storage.put_if_match("lease", b"three", current.etag)
    assert not storage.put_if_match("lease", b"four", current.etag)
    assert storage.read("lease") == b"three"


def test_the_error_names_a_missing_bucket(s3):
    wrong = open_storage("s3://no-such-bucket-here/prefix")
    for call in (wrong.check_writable, lambda: wrong.read("a"), lambda: list(wrong.list())):
        with pytest.raises(StorageError) as error:
            call()
        assert "no-such-bucket-here" in one_line(error)
        assert "no such bucket" in str(error.value)
        assert not isinstance(error.value, MissingKey)


def test_the_error_names_an_unreachable_server_without_the_secret(monkeypatch, unused_tcp_port_url):
    monkeypatch.setenv("AWS_ENDPOINT_URL", unused_tcp_port_url)
    monkeypatch.setattr(s3_retry, "FIRST_CONTACT_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "known-user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    storage = open_storage("s3://bucket/prefix")
    for call in (storage.check_writable, lambda: storage.read("a"), lambda: list(storage.list())):
        with pytest.raises(StorageError) as error:
            call()
        assert unused_tcp_port_url in one_line(error)
        assert "does not answer" in str(error.value)
        assert "very-secret" not in str(error.value)


@pytest.fixture
def unused_tcp_port_url(monkeypatch):
    config = s3_retry.Config
    monkeypatch.setattr(
        s3_retry, "Config", lambda **options: config(**{**options, "retries": {"total_max_attempts": 1}})
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_a_full_disk_gives_a_one_line_error_and_leaves_no_file(tmp_path, monkeypatch):
    storage = open_storage(tmp_path)
    storage.write("kept", b"old")

    def raise_disk_full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local.os, "fsync", raise_disk_full)
    for call in (
        lambda: storage.write("kept", b"new"),
        lambda: storage.put_if_absent("fresh", b"new"),
        storage.check_writable,
    ):
        with pytest.raises(StorageError) as error:
            call()
        assert "disk is full" in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert storage.read("kept") == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_kernel_reports_a_full_disk_as_simulated_above():
    with pytest.raises(OSError) as error, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert error.value.errno == errno.ENOSPC


def test_an_unwritable_folder_gives_a_one_line_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    storage = open_storage(tmp_path / "file" / "inside")  # below a file: fails even for root
    with pytest.raises(StorageError, match="cannot write") as error:
        storage.check_writable()
    assert str(tmp_path) in one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_write_permission_gives_a_one_line_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="rights"):
            open_storage(tmp_path).check_writable()
    finally:
        tmp_path.chmod(0o700)


WRITE_IN_A_LOOP = """
import sys
from data_prep.storage import open_storage
for number in range(1_000_000):
    open_storage(sys.argv[1]).write("object", bytes([number % 256]) * 200_000)
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_complete_object(tmp_path):
    command = [sys.executable, "-c", WRITE_IN_A_LOOP, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline()
        writer.kill()
    data = open_storage(tmp_path).read("object")
    assert len(data) == 200_000
    assert len(set(data)) == 1
    assert [key for key, _ in open_storage(tmp_path).list()] == ["object"]


def test_stale_temporary_files_of_killed_writers_are_removed(tmp_path, monkeypatch):
    storage = open_storage(tmp_path)
    storage.write("sub/kept", b"1")
    (tmp_path / "sub" / ".tmp-left").write_bytes(b"2")
    storage.remove_temporary_files()
    assert (tmp_path / "sub" / ".tmp-left").exists()  # may still be in use
    monkeypatch.setattr(local, "STALE_TEMPORARY_SECONDS", -1.0)
    storage.remove_temporary_files()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["kept"]


def test_invalid_storage_uris_are_rejected():
    with pytest.raises(ValueError, match="gs://"):
        open_storage("gs://bucket")
    with pytest.raises(ValueError, match="names no bucket"):
        open_storage("s3://")
    assert open_storage("relative").uri == str(Path("relative").absolute())
