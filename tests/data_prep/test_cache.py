"""ShardCache: one download per tar, complete files, bounded size."""

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
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from data_prep import cache as cache_module
from data_prep.cache import CacheFull, ShardCache
from data_prep.manifest import TarEntry
from data_prep.storage import Storage, StorageError, open_storage
from support.faulty_proxy import faulty_proxy


@pytest.fixture
def bucket(s3):
    """Six objects of 1000 bytes and their manifest entries."""
    storage, entries = open_storage(s3), []
    for number in range(6):
        data = bytes([number]) * 1000
        storage.write(f"{number}.tar", data)
        entries.append(TarEntry(f"{number}.tar", 1, 1000, hashlib.sha256(data).hexdigest()))
    return storage, entries


def cached_hashes(folder):
    return {path.stem for path in folder.glob("*.tar")}


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_readers_share_one_download(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    downloads = []
    download = type(storage).download
    monkeypatch.setattr(type(storage), "download", lambda *a: downloads.append(a[1]) or download(*a))
    caches = [ShardCache(tmp_path, 10_000) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda n: caches[n % 2].fetch(storage, entries[n % 3]), range(24)))
    assert sorted(downloads) == ["0.tar", "1.tar", "2.tar"]
    assert all(path.read_bytes() == bytes([n % 3]) * 1000 for n, path in enumerate(paths))
    assert not list(tmp_path.glob(".tmp-*"))


def test_least_recently_used_tars_are_evicted_and_open_files_stay_readable(bucket, tmp_path):
    storage, entries = bucket
    cache = ShardCache(tmp_path, 3000)
    for number in range(3):
        os.utime(cache.fetch(storage, entries[number]), (number, number))
    with open(cache.fetch(storage, entries[1]), "rb") as reader:  # used again: 0 and 2 are the oldest now
        cache.fetch(storage, entries[3])
        cache.fetch(storage, entries[4])
        assert cached_hashes(tmp_path) == {entries[n].sha256 for n in (1, 3, 4)}
        cache.fetch(storage, entries[5])
        cache.fetch(storage, entries[0])
        assert reader.read() == b"\1" * 1000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 3000


def test_a_tar_with_another_hash_than_in_the_manifest_is_named(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    monkeypatch.setattr(cache_module, "RETRY_DELAYS", (0.0, 0.0))
    with pytest.raises(
        StorageError, match=r"0\.tar in s3://.*sha256 [0-9a-f]{12} instead of 000000000000"
    ) as error:
        ShardCache(tmp_path, 3000).fetch(storage, replace(entries[0], sha256="0" * 64))
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_damaged_download_is_repeated(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    monkeypatch.setattr(cache_module, "RETRY_DELAYS", (0.0, 0.0))
    download, damage_next = type(storage).download, [True, True]

    def flip(self: Storage, key: str, path: Path) -> None:
        download(self, key, path)
        if damage_next and damage_next.pop():
            path.write_bytes(b"\xff" + path.read_bytes()[1:])

    monkeypatch.setattr(type(storage), "download", flip)
    assert ShardCache(tmp_path, 3000).fetch(storage, entries[1]).read_bytes() == b"\1" * 1000


def test_a_tar_larger_than_the_cache_and_a_missing_cache_folder(bucket, tmp_path):
    storage, entries = bucket
    with pytest.raises(CacheFull, match=r"data\.cache_gb"):
        ShardCache(tmp_path, 999).fetch(storage, entries[0])
    gone = ShardCache(tmp_path / "gone", 3000)
    (tmp_path / "gone").rmdir()
    with pytest.raises(CacheFull, match=r"data\.cache_dir .*gone cannot be used: there is no such file"):
        gone.fetch(storage, entries[0])


@pytest.fixture
def slow(bucket, tmp_path, monkeypatch):
    """Downloads that wait for `proceed`; at the start of each, the bytes reserved by all are appended to a list."""
    download, proceed, reserved = type(bucket[0]).download, Event(), []

    def download_slowly(self: Storage, key: str, path: Path) -> None:
        reserved.append(sum(file.stat().st_size for file in tmp_path.glob(".tmp-*/room")))
        assert proceed.wait(30)
        download(self, key, path)

    monkeypatch.setattr(type(bucket[0]), "download", download_slowly)
    yield proceed, reserved
    proceed.set()


def test_running_downloads_count_and_are_awaited(bucket, slow, tmp_path):
    """Six concurrent downloads in a cache for three: the limit is kept, and all succeed."""
    (storage, entries), (proceed, reserved) = bucket, slow
    cache = ShardCache(tmp_path, 3500)
    with ThreadPoolExecutor(6) as pool:
        paths = [pool.submit(cache.fetch, storage, entry) for entry in entries]
        # six, and room.lock
        wait_until(lambda: len(reserved) == 3 and len(list(tmp_path.glob("*.lock"))) == 7)
        assert len(reserved) == 3
        proceed.set()
        assert {path.result().stem for path in paths} == {entry.sha256 for entry in entries}
    assert max(reserved) <= 3500
    assert len(cached_hashes(tmp_path)) == 3


def test_space_that_is_not_freed_in_time_is_reported(bucket, slow, tmp_path, monkeypatch):
    (storage, entries), (proceed, reserved) = bucket, slow
    cache = ShardCache(tmp_path, 1500)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.fetch, storage, entries[0])
        wait_until(lambda: reserved)
        monkeypatch.setattr(cache_module, "RESERVE_TIMEOUT_SECONDS", 0.0)
        with pytest.raises(CacheFull, match=r"no space for 1\.tar: other downloads hold data\.cache_gb"):
            cache.fetch(storage, entries[1])
        proceed.set()
        assert first.result().read_bytes() == bytes(1000)


def test_a_tar_evicted_by_another_process_meanwhile_is_downloaded_again(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    cache, touch = ShardCache(tmp_path, 3000), os.utime
    path = cache.fetch(storage, entries[1])

    def evict_and_touch(name: Path) -> None:
        monkeypatch.setattr(cache_module.os, "utime", touch)
        name.unlink()
        touch(name)

    monkeypatch.setattr(cache_module.os, "utime", evict_and_touch)
    assert cache.fetch(storage, entries[1]) == path
    assert path.read_bytes() == b"\1" * 1000


ON_A_SMALL_DISK = """
import json, pathlib, subprocess, sys
from data_prep.cache import CacheFull, ShardCache
from data_prep.manifest import TarEntry
from data_prep.storage import open_storage
disk, uri, entries = pathlib.Path(sys.argv[1]), sys.argv[2], [TarEntry(**entry) for entry in json.loads(sys.argv[3])]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
cache, storage = ShardCache(disk, 10**9), open_storage(uri)
paths = [cache.fetch(storage, entry) for entry in entries[:3]]
print([path.exists() for path in paths], flush=True)
readers = [open(path, "rb") for path in paths if path.exists()]
try:
    cache.fetch(storage, entries[3])
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
def test_a_full_disk(s3, tmp_path):
    """On a real small disk: old tars are evicted; if open files keep the space, CacheFull is raised."""
    storage, entries = open_storage(s3), []
    for number in range(4):
        data = bytes([number]) * 400_000
        storage.write(f"{number}.tar", data)
        entries.append(
            {
                "name": f"{number}.tar",
                "count": 1,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    program = [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path), s3, json.dumps(entries)]
    done = subprocess.run([*NAMESPACE, *program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[False, True, True]",
        f"the disk of data.cache_dir {tmp_path} is full",
        "[400000, 400000] []",
    ]


def test_prefetch_downloads_up_to_half_of_the_cache(bucket, tmp_path):
    storage, entries = bucket
    cache = ShardCache(tmp_path, 6000)
    cache.prefetch(storage, [*entries, replace(entries[0], name="gone", sha256="f" * 64)])
    # half of the cache
    wait_until(lambda: cached_hashes(tmp_path) == {entry.sha256 for entry in entries[:3]})
    cache.stop_prefetch()


def _download(storage: Storage, entry: TarEntry, folder: Path) -> None:
    ShardCache(folder, 3000).fetch(storage, entry)


def test_a_killed_download_is_repeated_and_its_reservation_released(server, bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    with faulty_proxy(server) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.uri)
        for key in ("0.tar", "1.tar"):
            faults.fail_next(10**6, "stall 1000", f"GET /{storage.bucket}/{key}")
            arguments = storage, entries[int(key[0])], tmp_path
            process = multiprocessing.get_context("spawn").Process(target=_download, args=arguments)
            process.start()
            wait_until(
                lambda key=key: any(f"/{key}" in request for request in faults.requests if "GET" in request)
            )
            assert list(tmp_path.glob(".tmp-*/room"))
            process.kill()
            process.join()
        faults.script = lambda method, path: ""
        cache = ShardCache(tmp_path, 3000)
        assert cache.fetch(storage, entries[0]).read_bytes() == bytes(1000)
        for number in (2, 3):  # nobody asks for 1 again: others get its space
            cache.fetch(storage, entries[number])
    assert cached_hashes(tmp_path) == {entries[n].sha256 for n in (0, 2, 3)}
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("sha256", ["../outside", "/outside", "", "A" * 64, "a" * 64 + "\n"])
def test_a_manifest_cannot_lead_out_of_the_cache_folder(bucket, tmp_path, sha256):
    storage, (entry, *_) = bucket
    outside = tmp_path / "outside.tar"
    outside.write_bytes(storage.read("0.tar"))  # of the size in the manifest
    cache = ShardCache(tmp_path / "cache", 10_000)
    for method in (lambda hostile: cache.fetch(storage, hostile), cache.discard):
        with pytest.raises(StorageError, match="has no valid sha256 in its manifest") as error:
            method(replace(entry, sha256=sha256))
        assert "\n" not in str(error.value)
    assert outside.exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "outside.tar"]
