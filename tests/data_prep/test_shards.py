"""Sharding accounts for every file, is reproducible, and writes tars that any reader can read."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile

import cv2
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.images import decode_photo
from data_prep.manifest import Duplicate, PartitionResult, load_manifest
from data_prep.preprocess import ShardOptions, decode_sample
from data_prep.records import from_json, to_json
from data_prep.shards import merge_partitions, read_index, write_partition_tars
from data_prep.sources import open_source
from data_prep.storage import StorageError, local, open_storage

OPTIONS = ShardOptions(size=32, format="png", val=0.2, test=0.2)


def shard(source, out, options=OPTIONS, partition_size=5):
    names = source.names()
    starts = range(0, len(names), partition_size)
    results = [
        write_partition_tars(source, names[s : s + partition_size], n, out, options)
        for n, s in enumerate(starts)
    ]
    return merge_partitions(results, options, source.uri, out)


def read_all(storage):
    return {key: storage.read(key) for key, _ in storage.list()}


def png(height, width, value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_same_input_gives_the_same_bytes(photos, tmp_path, s3):
    outs = [open_storage(tmp_path / "a"), open_storage(tmp_path / "b"), open_storage(f"{s3}/shards")]
    for out in outs:
        shard(open_source(str(photos)), out)
    assert read_all(outs[0]) == read_all(outs[1]) == read_all(outs[2])
    assert len(read_all(outs[0])) > 6


def test_manifest_counts_and_hashes(photos, tmp_path):
    out = open_storage(tmp_path)
    manifest = shard(open_source(str(photos)), out)
    assert manifest == load_manifest(out)
    assert sum(manifest.splits.values()) == 23
    assert manifest.source == str(photos)
    for entry in manifest.shards:
        data = out.read(entry.name)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
    for split, count in manifest.splits.items():
        assert count == sum(entry.count for entry in manifest.shards if entry.split == split)


def test_tarfile_and_webdataset_agree_with_the_index(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    out = open_storage(tmp_path)
    manifest = shard(open_source(str(photos)), out)
    sharded_names = []
    for entry in manifest.shards:
        index, data = read_index(out, entry.name), out.read(entry.name)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {info.name: (info, tar.extractfile(info).read()) for info in tar}
        assert list(members) == [f"{key}.png" for key in index["keys"]]
        assert index["names"] == sorted(index["names"])
        for row, (info, member) in enumerate(members.values()):
            assert out.read_range(entry.name, index["offsets"][row], index["sizes"][row]) == member
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
            assert decode_sample(member).shape[:2] == tuple(index["shapes"][row])
            original = (photos / index["names"][row]).read_bytes()
            assert index["keys"][row] == hashlib.sha256(original).hexdigest()[:16]
        url = str(out.local_path(entry.name))
        samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
        assert [sample["__key__"] for sample in samples] == index["keys"]
        assert all(np.array_equal(s["png"], decode_sample(m)) for s, (_, m) in zip(samples, members.values()))
        sharded_names += index["names"]
    assert sorted(sharded_names) == sorted(path.name for path in photos.iterdir())


def test_splits_do_not_depend_on_the_other_photographs(photos, tmp_path):
    """Removing photographs or changing the partition size moves no other photograph to another split."""

    def splits(out):
        return {
            key: entry.split
            for entry in load_manifest(out).shards
            for key in read_index(out, entry.name)["keys"]
        }

    shard(open_source(str(photos)), open_storage(tmp_path / "all"))
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted(photos.iterdir())[::2]:
        (some / f"renamed {path.name}").write_bytes(path.read_bytes())
    shard(open_source(str(some)), open_storage(tmp_path / "half"), partition_size=3)
    all_splits, half_splits = splits(open_storage(tmp_path / "all")), splits(open_storage(tmp_path / "half"))
    assert len(half_splits) == 12
    assert half_splits.items() <= all_splits.items()


def test_split_fractions_and_groups(tmp_path):
    out = open_storage(tmp_path)
    source = open_source("bundled")
    manifest = shard(source, out, ShardOptions(size=64, val=0.15, test=0.25), partition_size=200)
    groups = len({source.split_group(name) for name in source.names()})
    for split, fraction in (("val", 0.15), ("test", 0.25)):
        deviation = (fraction * (1 - fraction) / groups) ** 0.5
        assert abs(manifest.splits[split] / sum(manifest.splits.values()) - fraction) < 4 * deviation
    split_of_group: dict[str, str] = {}
    for entry in manifest.shards:
        for name in read_index(out, entry.name)["names"]:
            assert split_of_group.setdefault(source.split_group(name), entry.split) == entry.split


@pytest.mark.parametrize("crop", ["none", "square"])
def test_stored_sizes(tmp_path, crop):
    folder = tmp_path / "photos"
    folder.mkdir()
    for height, width in ((40, 100), (100, 40), (33, 33), (20, 30), (36, 36)):
        (folder / f"{height}x{width}.png").write_bytes(png(height, width, height))
    out = open_storage(tmp_path / "out")
    shard(open_source(str(folder)), out, ShardOptions(size=32, margin=4, crop=crop, val=0, test=0))
    index = read_index(out, "train-00000.tar")
    shapes = dict(zip(index["names"], index["shapes"]))
    wide = {"40x100.png": [36, 90], "100x40.png": [90, 36], "20x30.png": [36, 54]}
    square = [36, 36]
    expected = dict.fromkeys(shapes, square) | (wide if crop == "none" else {})
    assert shapes == expected


def test_photographs_are_reduced_by_area_averaging(tmp_path):
    """Halving averages squares of 2 x 2 pixels: a checkerboard becomes grey, without aliasing."""
    folder = tmp_path / "photos"
    folder.mkdir()
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(folder / "board.png")
    out = open_storage(tmp_path / "out")
    shard(open_source(str(folder)), out, ShardOptions(size=32, format="png", val=0, test=0))
    index = read_index(out, "train-00000.tar")
    stored = decode_sample(out.read_range("train-00000.tar", index["offsets"][0], index["sizes"][0]))
    assert np.abs(stored.astype(int) - 127.5).max() <= 1


def test_jpegs_keep_colors(tmp_path):
    source = open_source("bundled")
    name = "coffee/full/002-003"
    write_partition_tars(source, [name], 0, open_storage(tmp_path), ShardOptions(size=64, val=0, test=0))
    out = open_storage(tmp_path)
    index = read_index(out, "train-00000.tar")
    stored = decode_sample(out.read_range("train-00000.tar", index["offsets"][0], index["sizes"][0]))
    assert np.abs(stored.astype(int) - decode_photo(source.read(name))).mean() < 3


def test_every_unusable_file_is_rejected_with_a_reason(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    good = png(40, 40)
    files = {
        "truncated.png": good[: len(good) // 2],
        "zero.jpg": b"",
        "notes.txt": b"hello",
        "one.png": png(1, 1),
        "tiny.png": png(8, 8, 3),
        "strip.png": png(20, 400),
        "gigantic.png": png(300, 300),
        "sub/two..dots and ünïcode.png": png(40, 40, 1),
        "good.png": good,
        "twin.png": good,
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "gone.png").symlink_to(folder / "nowhere")
    progress = []
    out = open_storage(tmp_path / "out")
    source = open_source(str(folder))
    names = [*source.names(), "vanished.png", "../outside.png"]
    options = ShardOptions(size=64, val=0, test=0, max_pixels=250 * 300)
    result = write_partition_tars(source, names, 0, out, options, progress.append)
    reasons = {reject.name: reject.reason for reject in result.rejects}
    expected = {
        "truncated.png": "truncated",
        "zero.jpg": "empty",
        "notes.txt": "not an image",
        "one.png": "too small",
        "tiny.png": "too small",
        "strip.png": "strip",
        "gigantic.png": "gigantic",
        "vanished.png": "is not in",
        "../outside.png": "not a valid key",
    }
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[name] for name, words in expected.items())
    assert all("\n" not in reason for reason in reasons.values())
    assert result.duplicates == (Duplicate("twin.png", "good.png"),)
    assert read_index(out, "train-00000.tar")["names"] != []
    assert sum(entry.count for entry in result.shards) == 2
    assert progress == list(range(1, len(names) + 1))
    assert from_json(PartitionResult, to_json(result), "it") == result


def test_a_name_that_is_not_unicode(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(png(40, 40))
    except OSError:
        pytest.skip("this file system wants unicode names")
    manifest = shard(open_source(str(folder)), open_storage(tmp_path / "out"))
    assert sum(manifest.splits.values()) == 1


def _tar_hashes(manifest):
    return sorted(entry.sha256 for entry in manifest.shards)


def test_duplicates_across_partitions_are_kept_once(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"z {path.name}").write_bytes(path.read_bytes())
    once, twice = open_storage(tmp_path / "once"), open_storage(tmp_path / "twice")
    shard(open_source(str(photos)), once)
    manifest = shard(open_source(str(folder)), twice)
    assert len(manifest.duplicates) == 23
    assert _tar_hashes(manifest) == _tar_hashes(load_manifest(once))
    keys = [key for entry in manifest.shards for key in read_index(twice, entry.name)["keys"]]
    assert len(keys) == len(set(keys)) == 23
    for entry in manifest.shards:
        assert hashlib.sha256(twice.read(entry.name)).hexdigest() == entry.sha256
    tars = {key for key, _ in twice.list() if key.endswith(".tar")}
    assert tars == {entry.name for entry in manifest.shards}


def test_no_usable_photograph_gives_a_one_line_error(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"no usable photograph \(1 rejects, first notes.txt: not an image"):
        shard(open_source(str(tmp_path / "photos")), open_storage(tmp_path / "out"))


def test_a_full_disk_is_an_error_and_rejects_no_photograph(photos, tmp_path, monkeypatch):
    def raise_disk_full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local.os, "fsync", raise_disk_full)
    with pytest.raises(StorageError, match="disk is full"):
        shard(open_source(str(photos)), open_storage(tmp_path))
    assert list(tmp_path.rglob("*.tar")) == []
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        load_manifest(open_storage(tmp_path))


def test_a_folder_without_a_valid_manifest_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="inpaint shard"):
        load_manifest(open_storage(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_manifest(open_storage(tmp_path))
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="version 99"):
        load_manifest(open_storage(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 4),
        ("margin", -1),
        ("crop", "round"),
        ("format", "gif"),
        ("quality", 0),
        ("val", 1.0),
        ("test", 0.95),
    ],
)
def test_options_are_checked(field, value):
    with pytest.raises(ValueError, match=f"data.{field} is"):
        ShardOptions(**{field: value})


def test_a_damaged_sample_is_named():
    with pytest.raises(ValueError, match="damaged"):
        decode_sample(b"not a photograph")
    assert decode_sample(cv2.imencode(".png", np.zeros((3, 4, 3), np.uint8))[1].tobytes()).shape == (3, 4, 3)
