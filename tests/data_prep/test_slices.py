"""Sharding that goes on: interrupted, grown, shrunk, repaired; and the listings it is cut from."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, load_manifest, make_slice, plan
from data_prep.slices import Listing, deal
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.tars import read_index

OPTIONS = ShardOptions(size=32, format="png", val=0.2, test=0)


def shard(source, out, length=5, stop_after=None, options=OPTIONS):
    """What pipelines.data.fanout does, in this process; the numbers of the slices that were made."""
    slices, parts = plan(source, out, options, length)
    made = []
    for piece in slices:
        if piece.number not in parts:
            if len(made) == stop_after:
                return made
            parts[piece.number] = make_slice(source, piece, out, options)
            made.append(piece.number)
    assemble([parts[piece.number] for piece in slices], options, source.uri, out)
    return made


def content(storage):
    return {key: storage.read(key) for key, _ in storage.list()}


def times(storage):
    return {key: storage.path(key).stat().st_mtime_ns for key, _ in storage.list() if key.endswith(".tar")}


def names(out):
    return sorted(
        name for entry in load_manifest(out)["shards"] for name in read_index(out, entry["name"])["names"]
    )


@pytest.fixture
def folder(photos, tmp_path):
    copy = tmp_path / "photos"
    copy.mkdir()
    for path in photos.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_an_interrupted_sharding_goes_on_to_the_same_bytes(photos, tmp_path):
    source, whole, cut = (open_source(str(photos)), *(open_storage(tmp_path / name) for name in "ab"))
    assert shard(source, whole) == [0, 1, 2, 3, 4]
    assert shard(source, cut, stop_after=2) == [0, 1]
    before = times(cut)
    assert shard(source, cut) == [2, 3, 4]
    assert content(cut) == content(whole)
    assert times(cut).items() >= before.items()
    assert shard(source, cut) == []


def test_a_damaged_or_missing_tar_is_made_again_alone(photos, tmp_path):
    source, out = open_source(str(photos)), open_storage(tmp_path)
    shard(source, out)
    expected = content(out)
    out.delete("train-00001.tar")
    out.write("train-00003.tar", b"cut")
    assert shard(source, out) == [1, 3]
    assert content(out) == expected


def test_photographs_that_come_later_make_new_shards_only(folder, tmp_path):
    out = open_storage(tmp_path / "out")
    later = [path.rename(tmp_path / path.name) for path in sorted(folder.iterdir())[::4]]
    assert shard(open_source(str(folder)), out) == [0, 1, 2, 3]
    before = times(out)
    for path in later:
        path.rename(folder / path.name)
    assert shard(open_source(str(folder)), out) == [4, 5]
    assert times(out).items() > before.items()
    assert names(out) == sorted(path.name for path in folder.iterdir())


def test_photographs_that_go_or_change_touch_their_own_slices(folder, tmp_path):
    out = open_storage(tmp_path / "out")
    shard(open_source(str(folder)), out)
    before = times(out)
    first, second = (read_index(out, f"train-0000{n}.tar")["names"][0] for n in (0, 2))
    (folder / first).unlink()
    (folder / second).write_bytes((folder / second).read_bytes() + b"trailing")
    assert shard(open_source(str(folder)), out) == [0, 2, 5]
    assert names(out) == sorted(path.name for path in folder.iterdir())
    now = times(out)
    assert all(now[name] == time for name, time in before.items() if name[-9:-4] in ("00001", "00003"))


@pytest.mark.parametrize("goes", ["a.png", "z.png"])
def test_a_duplicate_takes_the_place_of_the_one_that_goes(folder, tmp_path, goes):
    out, same = open_storage(tmp_path / "out"), min(folder.iterdir()).read_bytes()
    (folder / "a.png").write_bytes(same)
    (folder / "z.png").write_bytes(same)
    shard(open_source(str(folder)), out, length=3)
    told = load_manifest(out)["duplicates"]
    assert len(told) == 2
    assert sum(load_manifest(out)["splits"].values()) == 23
    (folder / goes).unlink()
    shard(open_source(str(folder)), out, length=3)
    assert sum(load_manifest(out)["splits"].values()) == 23
    left = {pair[field] for pair in load_manifest(out)["duplicates"] for field in ("name", "same_as")}
    assert goes not in left
    assert len(left) == 2
    assert not shard(open_source(str(folder)), out, length=3)


def test_shards_of_other_settings_are_not_mixed(photos, tmp_path):
    out = open_storage(tmp_path)
    shard(open_source(str(photos)), out)
    with pytest.raises(ValueError, match="size 32, not 40: choose another folder"):
        plan(open_source(str(photos)), out, ShardOptions(size=40, format="png", val=0.2, test=0), 5)


def test_tars_are_bounded_in_bytes(photos, tmp_path):
    out = open_storage(tmp_path)
    options = ShardOptions(size=32, format="png", val=0, test=0, shard_mb=0.03072)
    shard(open_source(str(photos)), out, length=23, options=options)
    entries = load_manifest(out)["shards"]
    assert len(entries) > 3
    assert [entry["name"] for entry in entries][:2] == ["train-00000-1.tar", "train-00000-2.tar"]
    assert max(entry["bytes"] for entry in entries) == 30_720
    assert all(entry["bytes"] == out.size(entry["name"]) for entry in entries)
    assert len(names(out)) == 23


def test_new_photographs_are_dealt_from_all_of_the_listing(tmp_path):
    """A listing in the order of 20 classes: every slice shows nearly all of them."""
    listing = tmp_path / "all.txt"
    listing.write_text("".join(f"class-{n // 100:02d}/{n}.jpg\n" for n in range(2000)))
    slices = deal(Listing(open_source(str(listing))), [], 80)
    assert [len(piece.names) for piece in slices] == [80] * 25
    assert all(len({name.split("/")[0] for name in piece.names}) == 20 for piece in slices)
    assert Counter(name for piece in slices for name in piece.names).most_common(1)[0][1] == 1


def test_a_listing_file(photos, tmp_path, s3):
    some = sorted(path.name for path in photos.iterdir())[3:9]
    text = "\ufeff" + some[0] + "\r\n\n" + f"{photos}/{some[1]}\n" + "\n".join(some[2:])
    listing = tmp_path / "some.txt"
    listing.write_text(text)
    source, out = open_source(str(listing), root=str(photos)), open_storage(tmp_path / "out")
    assert source.names() == [some[0], f"{photos}/{some[1]}", *some[2:]]
    shard(source, out)
    assert names(out) == sorted([some[0], f"{photos}/{some[1]}", *some[2:]])
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
def test_a_listing_leads_nowhere_else(photos, tmp_path, line):
    (tmp_path / "secret.png").write_bytes(min(photos.iterdir()).read_bytes())
    (tmp_path / "sub").mkdir()
    good = min(path.name for path in photos.iterdir())
    (tmp_path / "sub" / good).write_bytes((photos / good).read_bytes())
    (tmp_path / "sub" / "all.txt").write_text(f"{line}\n{good}\n")
    out = open_storage(tmp_path / "out")
    shard(open_source(str(tmp_path / "sub" / "all.txt")), out)
    assert [reject["name"] for reject in load_manifest(out)["rejects"]] == [line]
    assert names(out) == [good]


def test_empty_and_missing_listings_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_source(str(tmp_path / "none.txt")).names()
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="names no photograph"):
        open_source(str(tmp_path / "none.txt")).names()


def test_a_listing_is_compact_and_has_a_digest(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{n:07d}-{rng.integers(1 << 30):x}.jpg" for n in range(5000)]
    (tmp_path / "all.txt").write_text("\n".join(lines))
    listing = Listing(open_source(str(tmp_path / "all.txt")))
    assert len(listing) == 5000
    assert listing.slice(0, [4, 4999]).names == (lines[4], lines[4999])
    (tmp_path / "all.txt").write_text("\n".join([*lines[:-1], "other.jpg"]))
    assert Listing(open_source(str(tmp_path / "all.txt"))).digest != listing.digest


def test_a_damaged_record_is_named(photos, tmp_path):
    out = open_storage(tmp_path)
    shard(open_source(str(photos)), out)
    out.write("slices/00002.json", json.dumps({"names": []}).encode())
    with pytest.raises(ValueError, match=r"slices/00002\.json"):
        shard(open_source(str(photos)), out)
