"""Sharding resumes after interruptions, changes of the source and damage; listings."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from data_prep.manifest import load_manifest
from data_prep.partitions import SourceListing, assign_partitions, read_partition_records
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.tars import read_index

OPTIONS = ShardOptions(size=32, format="png", val=0.2, test=0)


def shard(source, out, partition_size=5, stop_after=None, options=OPTIONS):
    """Shard as pipelines.data.shard_tasks does, in this process. Returns the indexes of the partitions written."""
    partitions, results = plan_shards(source, out, options, partition_size)
    written = []
    for partition in partitions:
        if partition.index not in results:
            if len(written) == stop_after:
                return written
            results[partition.index] = write_partition(source, partition, out, options)
            written.append(partition.index)
    merge_partitions([results[p.index] for p in partitions], options, source.uri, out)
    return written


def read_all(storage):
    return {key: storage.read(key) for key, _ in storage.list()}


def modification_times(storage):
    return {
        key: storage.local_path(key).stat().st_mtime_ns for key, _ in storage.list() if key.endswith(".tar")
    }


def sharded_names(out):
    return sorted(
        name for entry in load_manifest(out).shards for name in read_index(out, entry.name)["names"]
    )


@pytest.fixture
def folder(photos, tmp_path):
    copy = tmp_path / "photos"
    copy.mkdir()
    for path in photos.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_interrupted_sharding_resumes_to_the_same_bytes(photos, tmp_path):
    source, complete, interrupted = (
        open_source(str(photos)),
        *(open_storage(tmp_path / name) for name in "ab"),
    )
    assert shard(source, complete) == [0, 1, 2, 3, 4]
    assert shard(source, interrupted, stop_after=2) == [0, 1]
    before = modification_times(interrupted)
    assert shard(source, interrupted) == [2, 3, 4]
    assert read_all(interrupted) == read_all(complete)
    assert modification_times(interrupted).items() >= before.items()
    assert shard(source, interrupted) == []


def test_only_damaged_or_missing_tars_are_rebuilt(photos, tmp_path):
    source, out = open_source(str(photos)), open_storage(tmp_path)
    shard(source, out)
    expected = read_all(out)
    out.delete("train-00001.tar")
    out.write("train-00003.tar", b"cut")
    assert shard(source, out) == [1, 3]
    assert read_all(out) == expected


def test_later_photographs_only_add_new_shards(folder, tmp_path):
    out = open_storage(tmp_path / "out")
    later = [path.rename(tmp_path / path.name) for path in sorted(folder.iterdir())[::4]]
    assert shard(open_source(str(folder)), out) == [0, 1, 2, 3]
    before = modification_times(out)
    for path in later:
        path.rename(folder / path.name)
    assert shard(open_source(str(folder)), out) == [4, 5]
    assert modification_times(out).items() > before.items()
    assert sharded_names(out) == sorted(path.name for path in folder.iterdir())


def test_removed_or_changed_photographs_affect_only_their_partitions(folder, tmp_path):
    out = open_storage(tmp_path / "out")
    shard(open_source(str(folder)), out)
    before = modification_times(out)
    first, second = (read_index(out, f"train-0000{n}.tar")["names"][0] for n in (0, 2))
    (folder / first).unlink()
    (folder / second).write_bytes((folder / second).read_bytes() + b"trailing")
    assert shard(open_source(str(folder)), out) == [0, 2, 5]
    assert sharded_names(out) == sorted(path.name for path in folder.iterdir())
    after = modification_times(out)
    assert all(after[name] == time for name, time in before.items() if name[-9:-4] in ("00001", "00003"))


@pytest.mark.parametrize("removed", ["a.png", "z.png"])
def test_a_duplicate_replaces_its_removed_original(folder, tmp_path, removed):
    out, data = open_storage(tmp_path / "out"), min(folder.iterdir()).read_bytes()
    (folder / "a.png").write_bytes(data)
    (folder / "z.png").write_bytes(data)
    shard(open_source(str(folder)), out, partition_size=3)
    assert len(load_manifest(out).duplicates) == 2
    assert sum(load_manifest(out).splits.values()) == 23
    (folder / removed).unlink()
    shard(open_source(str(folder)), out, partition_size=3)
    assert sum(load_manifest(out).splits.values()) == 23
    remaining = {name for pair in load_manifest(out).duplicates for name in (pair.name, pair.duplicate_of)}
    assert removed not in remaining
    assert len(remaining) == 2
    assert not shard(open_source(str(folder)), out, partition_size=3)


def test_a_folder_with_shards_of_other_options_is_refused(photos, tmp_path):
    out = open_storage(tmp_path)
    shard(open_source(str(photos)), out)
    with pytest.raises(ValueError, match="size 32, not 40: choose another folder"):
        plan_shards(open_source(str(photos)), out, ShardOptions(size=40, format="png", val=0.2, test=0), 5)


def test_tars_have_a_maximum_size(photos, tmp_path):
    out = open_storage(tmp_path)
    options = ShardOptions(size=32, format="png", val=0, test=0, max_shard_mb=0.03072)
    shard(open_source(str(photos)), out, partition_size=23, options=options)
    entries = load_manifest(out).shards
    assert len(entries) > 3
    assert [entry.name for entry in entries][:2] == ["train-00000-1.tar", "train-00000-2.tar"]
    assert max(entry.bytes for entry in entries) == 30_720
    assert all(entry.bytes == out.size(entry.name) for entry in entries)
    assert len(sharded_names(out)) == 23


def test_each_partition_samples_the_whole_listing(tmp_path):
    """A listing sorted by 20 classes: every partition contains all of them."""
    listing = tmp_path / "all.txt"
    listing.write_text("".join(f"class-{n // 100:02d}/{n}.jpg\n" for n in range(2000)))
    partitions = assign_partitions(SourceListing(open_source(str(listing))), [], 80)
    assert [len(p.names) for p in partitions] == [80] * 25
    assert all(len({name.split("/")[0] for name in p.names}) == 20 for p in partitions)
    assert Counter(name for p in partitions for name in p.names).most_common(1)[0][1] == 1


def test_a_listing_file(photos, tmp_path, s3):
    some = sorted(path.name for path in photos.iterdir())[3:9]
    text = "\ufeff" + some[0] + "\r\n\n" + f"{photos}/{some[1]}\n" + "\n".join(some[2:])
    listing = tmp_path / "some.txt"
    listing.write_text(text)
    source, out = open_source(str(listing), root=str(photos)), open_storage(tmp_path / "out")
    assert source.names() == [some[0], f"{photos}/{some[1]}", *some[2:]]
    shard(source, out)
    assert sharded_names(out) == sorted([some[0], f"{photos}/{some[1]}", *some[2:]])
    bucket = open_storage(f"{s3}/lists")
    bucket.write("all.lst", "\n".join(some).encode())
    for name in some:
        bucket.upload(photos / name, name)
    remote = open_source(f"{s3}/lists/all.lst")  # relative to its own folder
    assert remote.names() == some
    assert remote.read(some[0]) == (photos / some[0]).read_bytes()


@pytest.mark.parametrize(
    "line",
    ["../secret.png", "/etc/passwd", "pipe:cat /etc/passwd", "s3://other/x.png", "a/../../b", "gone.png"],
)
def test_a_listing_cannot_leave_its_root(photos, tmp_path, line):
    (tmp_path / "secret.png").write_bytes(min(photos.iterdir()).read_bytes())
    (tmp_path / "sub").mkdir()
    good = min(path.name for path in photos.iterdir())
    (tmp_path / "sub" / good).write_bytes((photos / good).read_bytes())
    (tmp_path / "sub" / "all.txt").write_text(f"{line}\n{good}\n")
    out = open_storage(tmp_path / "out")
    shard(open_source(str(tmp_path / "sub" / "all.txt")), out)
    assert [reject.name for reject in load_manifest(out).rejects] == [line]
    assert sharded_names(out) == [good]


def test_empty_and_missing_listings_give_one_line_errors(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_source(str(tmp_path / "none.txt")).names()
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="names no photograph"):
        open_source(str(tmp_path / "none.txt")).names()


def test_a_listing_gives_partitions_and_a_digest(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{n:07d}-{rng.integers(1 << 30):x}.jpg" for n in range(5000)]
    (tmp_path / "all.txt").write_text("\n".join(lines))
    listing = SourceListing(open_source(str(tmp_path / "all.txt")))
    assert len(listing) == 5000
    assert listing.partition(0, [4, 4999]).names == (lines[4], lines[4999])
    (tmp_path / "all.txt").write_text("\n".join([*lines[:-1], "other.jpg"]))
    assert SourceListing(open_source(str(tmp_path / "all.txt"))).digest != listing.digest


def test_a_damaged_record_is_named(photos, tmp_path):
    out = open_storage(tmp_path)
    shard(open_source(str(photos)), out)
    out.write("partitions/00002.json", json.dumps({"names": []}).encode())
    with pytest.raises(ValueError, match=r"partitions/00002\.json"):
        shard(open_source(str(photos)), out)


def test_records_of_release_0_1_0_are_read(photos, tmp_path):
    out = open_storage(tmp_path)
    shard(open_source(str(photos)), out)
    expected = read_partition_records(out, 5)
    for index in range(5):
        record = json.loads(out.read(f"partitions/{index:05d}.json"))
        out.delete(f"partitions/{index:05d}.json")
        record["marks"], record["part"] = record.pop("fingerprints"), record.pop("result")
        for entry in record["part"]["shards"]:
            entry["slice"] = entry.pop("partition")
        out.write(f"slices/{index:05d}.json", json.dumps(record).encode())
    assert None not in expected
    assert read_partition_records(out, 5) == expected
    out.write("slices/00002.json", b"{")
    assert read_partition_records(out, 5)[2] is None
