"""Tars of a bucket on the local disk: once, whole, within bounds."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from faulty_proxy import faulty_proxy

from data_prep import cache as cache_module
from data_prep.cache import CacheFull, ShardCache
from data_prep.storage import Storage, StorageError, open_storage


@pytest.fixture
def bucket(s3):
    """Six objects of 1000 bytes, and what a manifest says of them."""
    storage, entries = open_storage(s3), []
    for number in range(6):
        data = bytes([number]) * 1000
        storage.write(f"{number}.tar", data)
        entries.append({"name": f"{number}.tar", "bytes": 1000, "sha256": hashlib.sha256(data).hexdigest()})
    return storage, entries


def held(folder):
    return {path.stem for path in folder.glob("*.tar")}


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_downloaded_once_by_many(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    counted = []
    download = type(storage).download
    monkeypatch.setattr(type(storage), "download", lambda *a: counted.append(a[1]) or download(*a))
    caches = [ShardCache(tmp_path, 10_000) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda n: caches[n % 2].path(storage, entries[n % 3]), range(24)))
    assert sorted(counted) == ["0.tar", "1.tar", "2.tar"]
    assert all(path.read_bytes() == bytes([n % 3]) * 1000 for n, path in enumerate(paths))
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_was_read_least_recently_goes_first_and_readers_keep_theirs(bucket, tmp_path):
    storage, entries = bucket
    cache = ShardCache(tmp_path, 3000)
    for number in range(3):
        os.utime(cache.path(storage, entries[number]), (number, number))
    with open(cache.path(storage, entries[1]), "rb") as reader:  # read again: 0 and 2 are the oldest now
        cache.path(storage, entries[3])
        cache.path(storage, entries[4])
        assert held(tmp_path) == {entries[n]["sha256"] for n in (1, 3, 4)}
        cache.path(storage, entries[5])
        cache.path(storage, entries[0])
        assert reader.read() == b"\1" * 1000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 3000


def test_what_is_not_what_the_manifest_says_is_named(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    monkeypatch.setattr(cache_module, "PAUSES", (0.0, 0.0))
    with pytest.raises(
        StorageError, match=r"0\.tar in s3://.*sha256 [0-9a-f]{12} instead of 000000000000"
    ) as error:
        ShardCache(tmp_path, 3000).path(storage, {**entries[0], "sha256": "0" * 64})
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_what_came_damaged_is_downloaded_again(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    monkeypatch.setattr(cache_module, "PAUSES", (0.0, 0.0))
    download, damaged = type(storage).download, [True, True]

    def flip(self: Storage, key: str, path: Path) -> None:
        download(self, key, path)
        if damaged and damaged.pop():
            path.write_bytes(b"\xff" + path.read_bytes()[1:])

    monkeypatch.setattr(type(storage), "download", flip)
    assert ShardCache(tmp_path, 3000).path(storage, entries[1]).read_bytes() == b"\1" * 1000


def test_a_tar_larger_than_the_cache_and_a_folder_that_fails(bucket, tmp_path):
    storage, entries = bucket
    with pytest.raises(CacheFull, match=r"data\.cache_gb"):
        ShardCache(tmp_path, 999).path(storage, entries[0])
    gone = ShardCache(tmp_path / "gone", 3000)
    (tmp_path / "gone").rmdir()
    with pytest.raises(CacheFull, match=r"data\.cache_dir .*gone cannot be used: No such file"):
        gone.path(storage, entries[0])


@pytest.fixture
def slow(bucket, tmp_path, monkeypatch):
    """Downloads that wait for `may_go`; for each that began, the bytes that were held for all."""
    download, may_go, rooms = type(bucket[0]).download, Event(), []

    def slowly(self: Storage, key: str, path: Path) -> None:
        rooms.append(sum(room.stat().st_size for room in tmp_path.glob(".tmp-*/room")))
        assert may_go.wait(30)
        download(self, key, path)

    monkeypatch.setattr(type(bucket[0]), "download", slowly)
    yield may_go, rooms
    may_go.set()


def test_downloads_under_way_count_and_are_waited_for(bucket, slow, tmp_path):
    """Six at once in a cache of three: never more than the limit is held, and all come."""
    (storage, entries), (may_go, rooms) = bucket, slow
    cache = ShardCache(tmp_path, 3500)
    with ThreadPoolExecutor(6) as pool:
        paths = [pool.submit(cache.path, storage, entry) for entry in entries]
        wait_until(lambda: len(rooms) == 3 and len(list(tmp_path.glob("*.lock"))) == 7)  # six, and the room's
        assert len(rooms) == 3
        may_go.set()
        assert {path.result().stem for path in paths} == {entry["sha256"] for entry in entries}
    assert max(rooms) <= 3500
    assert len(held(tmp_path)) == 3


def test_room_that_does_not_come_is_told(bucket, slow, tmp_path, monkeypatch):
    (storage, entries), (may_go, rooms) = bucket, slow
    cache = ShardCache(tmp_path, 1500)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.path, storage, entries[0])
        wait_until(lambda: rooms)
        monkeypatch.setattr(cache_module, "BUSY", (0.0, 0.0))
        with pytest.raises(CacheFull, match=r"no room for 1\.tar: other downloads hold data\.cache_gb"):
            cache.path(storage, entries[1])
        may_go.set()
        assert first.result().read_bytes() == bytes(1000)


def test_what_another_process_removed_in_this_moment_is_downloaded_again(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    cache, touch = ShardCache(tmp_path, 3000), os.utime
    path = cache.path(storage, entries[1])

    def evicted(name: Path) -> None:
        monkeypatch.setattr(cache_module.os, "utime", touch)
        name.unlink()
        touch(name)

    monkeypatch.setattr(cache_module.os, "utime", evicted)
    assert cache.path(storage, entries[1]) == path
    assert path.read_bytes() == b"\1" * 1000


ON_A_SMALL_DISK = """
import json, pathlib, subprocess, sys
from data_prep.cache import CacheFull, ShardCache
from data_prep.storage import open_storage
disk, uri, entries = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
cache, storage = ShardCache(disk, 10**9), open_storage(uri)
paths = [cache.path(storage, entry) for entry in entries[:3]]
print([path.exists() for path in paths], flush=True)
readers = [open(path, "rb") for path in paths if path.exists()]
try:
    cache.path(storage, entries[3])
except CacheFull as error:
    print(error)
print([len(reader.read()) for reader in readers], sorted(path.name for path in disk.glob(".tmp-*")))
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs a mount namespace for a small disk",
)
def test_a_disk_that_is_full(s3, tmp_path):
    """A real one: old tars make room; where readers keep theirs, the caller is told."""
    storage, entries = open_storage(s3), []
    for number in range(4):
        data = bytes([number]) * 400_000
        storage.write(f"{number}.tar", data)
        entries.append(
            {"name": f"{number}.tar", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        )
    program = [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path), s3, json.dumps(entries)]
    done = subprocess.run([*NAMESPACE, *program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[False, True, True]",
        f"the disk of data.cache_dir {tmp_path} is full",
        "[400000, 400000] []",
    ]


def test_prefetched_before_it_is_asked_for(bucket, tmp_path):
    storage, entries = bucket
    cache = ShardCache(tmp_path, 6000)
    cache.prefetch(storage, [*entries, {**entries[0], "name": "gone", "sha256": "f" * 64}])
    wait_until(lambda: held(tmp_path) == {entry["sha256"] for entry in entries[:3]})  # half of the cache
    cache.close()


def _download(storage: Storage, entry: dict, folder: Path) -> None:
    ShardCache(folder, 3000).path(storage, entry)


def test_a_killed_download_is_taken_up_and_its_room_is_free_again(server, bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    with faulty_proxy(server) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.uri)
        for key in ("0.tar", "1.tar"):
            faults.few(10**6, "stall 1000", f"GET /{storage.bucket}/{key}")
            arguments = storage, entries[int(key[0])], tmp_path
            process = multiprocessing.get_context("spawn").Process(target=_download, args=arguments)
            process.start()
            wait_until(lambda key=key: any(f"/{key}" in seen for seen in faults.seen if "GET" in seen))
            assert list(tmp_path.glob(".tmp-*/room"))
            process.kill()
            process.join()
        faults.script = lambda method, path: ""
        cache = ShardCache(tmp_path, 3000)
        assert cache.path(storage, entries[0]).read_bytes() == bytes(1000)
        for number in (2, 3):  # nobody asks for 1 again: its room is given to others
            cache.path(storage, entries[number])
    assert held(tmp_path) == {entries[n]["sha256"] for n in (0, 2, 3)}
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("sha256", ["../outside", "/outside", "", "A" * 64, None, "a" * 64 + "\n"])
def test_no_manifest_leads_out_of_the_folder(bucket, tmp_path, sha256):
    storage, (entry, *_) = bucket
    outside = tmp_path / "outside.tar"
    outside.write_bytes(storage.read("0.tar"))  # as large as the manifest says
    cache = ShardCache(tmp_path / "cache", 10_000)
    for use in (lambda hostile: cache.path(storage, hostile), cache.drop):
        with pytest.raises(StorageError, match="has no sha256 in its manifest") as error:
            use({**entry, "sha256": sha256})
        assert "\n" not in str(error.value)
    assert outside.exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "outside.tar"]
