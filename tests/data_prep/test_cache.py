"""Tars of a bucket on the local disk: once, whole, within bounds."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

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


def test_what_is_not_what_the_manifest_says_is_named(bucket, tmp_path):
    storage, entries = bucket
    with pytest.raises(StorageError, match=r"0\.tar .* is not what the manifest says"):
        ShardCache(tmp_path, 3000).path(storage, {**entries[0], "sha256": "0" * 64})
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_tar_larger_than_the_cache_and_a_full_disk(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    with pytest.raises(CacheFull, match=r"data\.cache_gb"):
        ShardCache(tmp_path, 999).path(storage, entries[0])

    def full(*_: object) -> None:
        raise StorageError("cannot write") from OSError(28, "No space left on device")

    monkeypatch.setattr(type(storage), "download", full)
    with pytest.raises(CacheFull, match=r"disk of data\.cache_dir"):
        ShardCache(tmp_path, 3000).path(storage, entries[0])


def test_prefetched_before_it_is_asked_for(bucket, tmp_path):
    storage, entries = bucket
    cache = ShardCache(tmp_path, 6000)
    cache.prefetch(storage, [*entries, {**entries[0], "name": "gone", "sha256": "f" * 64}])
    wait_until(lambda: held(tmp_path) == {entry["sha256"] for entry in entries[:3]})  # half of the cache
    cache.close()


def _slow_download(self: Storage, key: str, path: object) -> None:
    time.sleep(1000)


def _hang(storage: Storage, entry: dict, folder: object) -> None:
    type(storage).download = _slow_download  # type: ignore[method-assign]
    ShardCache(folder, 3000).path(storage, entry)  # type: ignore[arg-type]


def test_a_killed_download_is_taken_up_by_the_next(bucket, tmp_path, monkeypatch):
    storage, entries = bucket
    process = multiprocessing.get_context("spawn").Process(target=_hang, args=(storage, entries[0], tmp_path))
    process.start()
    wait_until(lambda: list(tmp_path.glob(".tmp-*")))
    process.kill()
    process.join()
    assert ShardCache(tmp_path, 3000).path(storage, entries[0]).read_bytes() == bytes(1000)
    assert not list(tmp_path.glob(".tmp-*"))
    stale = tmp_path / f".tmp-{'a' * 64}"  # and what nobody wants any more is removed in time
    stale.write_bytes(bytes(2500))
    monkeypatch.setattr(cache_module, "STALE", 0.0)
    ShardCache(tmp_path, 3000).path(storage, entries[1])
    assert not stale.exists()
    assert len(held(tmp_path)) == 2
