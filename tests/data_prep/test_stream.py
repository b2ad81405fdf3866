"""Batches: a pure function of the arguments and the step, whatever ranks, threads and interruptions there are."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from skimage.color import rgb2gray
from skimage.feature import canny

from data_prep import reading
from data_prep import stream as stream_module
from data_prep.cache import ShardCache
from data_prep.canny import assemble_edges, canny_edges, write_edge_shard
from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, load_manifest, read_index, write_slice
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.stream import Stream, TooManyBad, read_split

MASKS = {"box": 1, "brush": 1}
ARRAYS = ("image", "mask", "edge")


@pytest.fixture(scope="session")
def edges(shards, tmp_path_factory):
    """{sigma: edge maps} of two sigmas."""
    manifest, found = load_manifest(shards), {}
    for sigma in (1.0, 2.0):
        found[sigma] = open_storage(tmp_path_factory.mktemp(f"edges-{sigma:g}"))
        parts = [
            write_edge_shard(shards, entry, {sigma: found[sigma]})[sigma] for entry in manifest["shards"]
        ]
        assemble_edges(parts, sigma, manifest["digest"], found[sigma])
    return found


def make(shards, **changes):
    return Stream(
        shards, "train", **{"size": 32, "batch": 8, "masks": MASKS, "seed": 3, "streams": 4, **changes}
    )


def equal(one, other):
    same = one["keys"] == other["keys"]
    return same and all(
        (one[name] is None and other[name] is None) or np.array_equal(one[name], other[name])
        for name in ARRAYS
    )


def joined(parts):
    whole = {
        name: None if parts[0][name] is None else np.concatenate([p[name] for p in parts]) for name in ARRAYS
    }
    return {**whole, "keys": [key for part in parts for key in part["keys"]]}


def test_shapes_types_and_ranges(shards, edges):
    batch = make(shards, edges=edges, edge_source="full", sigmas=(1.0, 2.0)).batch(0)
    assert batch["image"].shape == (8, 32, 32, 3)
    assert batch["mask"].shape == batch["edge"].shape == (8, 32, 32)
    assert [batch[name].dtype for name in ARRAYS] == [np.uint8, np.uint8, bool]
    assert set(np.unique(batch["mask"])) == set(np.unique(batch["edge"])) == {0, 1}
    assert make(shards).batch(0)["edge"] is None


def test_the_ranks_parts_are_the_one_global_batch(shards, edges):
    """Also where the ranks share a stream's line."""
    for source in ("none", "full", "masked"):
        options = {"edge_source": source, "edges": edges, "sigmas": (1.0, 2.0)}
        alone = make(shards, **options)
        for world in (2, 3, 4, 5, 8):
            ranks = [make(shards, rank=rank, world=world, **options) for rank in range(world)]
            for step in (0, 1, 5, 17):
                assert equal(joined([rank.batch(step) for rank in ranks]), alone.batch(step))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_batch_at_every_step_and_resume_anywhere(shards, edges, threads):
    options = {"edge_source": "full", "edges": edges, "sigmas": (1.0, 2.0)}
    expected = [make(shards, **options).batch(step) for step in range(12)]
    for start in (0, 1, 7, 11, 12):
        resumed = list(make(shards, threads=threads, **options).batches(start, 12))
        assert len(resumed) == 12 - start
        assert all(equal(a, b) for a, b in zip(resumed, expected[start:], strict=True))


@pytest.mark.parametrize(("batch", "streams"), [(1, 1), (4, 2), (6, 3), (64, 4)])
def test_every_sample_once_an_epoch_and_every_batch_full(shards, batch, streams):
    """Also when the split is smaller than a batch."""
    stream = make(shards, batch=batch, streams=streams, masks="center")
    steps = -(-3 * stream.samples // batch) + streams
    batches = [stream.batch(step)["keys"] for step in range(steps)]
    assert all(len(keys) == batch for keys in batches)
    seen = Counter(key for keys in batches for key in keys)
    assert max(seen.values()) == 1
    everything = {key for key, _ in read_split(shards, "train", 32)}
    assert len(everything) == stream.samples
    for epoch in range(2):
        assert {key for e, key in seen if e == epoch} == everything


def test_what_is_drawn_depends_on_the_sample_alone(shards):
    """Another number of streams changes the order, and no sample's crop, flip or mask."""
    seen = {}
    for streams in (1, 2, 4):
        stream = make(shards, streams=streams)
        for step in range(8):
            batch = stream.batch(step)
            for key, image, mask in zip(batch["keys"], batch["image"], batch["mask"]):
                first = seen.setdefault(key, (image, mask))
                assert np.array_equal(first[0], image)
                assert np.array_equal(first[1], mask)


def test_crops_flips_and_masks_vary_between_epochs(shards):
    stream = make(shards, batch=4, masks="brush")
    by_key: dict[str, list] = {}
    for step in range(40):
        batch = stream.batch(step)
        for (_, key), image, mask in zip(batch["keys"], batch["image"], batch["mask"]):
            by_key.setdefault(key, []).append((image.tobytes(), mask.tobytes()))
    assert all(len(set(seen)) == len(seen) for seen in by_key.values())


def test_a_crop_is_a_piece_of_the_stored_photograph_flipped_or_not(shards):
    whole = dict(read_split(shards, "train", 36))
    index = {key: shape for key, shape in _shapes(shards).items() if shape == [36, 36]}
    flips = Counter()
    for flip in (True, False):
        for step in range(12):
            batch = make(shards, flip=flip).batch(step)
            for (_, key), image in zip(batch["keys"], batch["image"]):
                if key not in index:
                    continue
                pieces = [
                    (mirrored, whole[key][y : y + 32, x : x + 32][:, :: -1 if mirrored else 1])
                    for mirrored in (False, True)
                    for y in range(5)
                    for x in range(5)
                ]
                fits = [mirrored for mirrored, piece in pieces if np.array_equal(piece, image)]
                assert fits
                flips[flip, fits[0]] += 1
    assert not flips[False, True]


def _shapes(shards):
    found = {}
    for entry in load_manifest(shards)["shards"]:
        index = read_index(shards, entry["name"])
        found |= dict(zip(index["keys"], index["shapes"]))
    return found


def test_flips_are_half_of_all(tmp_path):
    """Images that are dark on the left and light on the right tell which way they came."""
    source, out = open_source("bundled"), open_storage(tmp_path)
    options = ShardOptions(size=64, format="png", val=0, test=0)
    names = source.names()[:200]
    assemble([write_slice(source, names, 0, out, options)], options, source.uri, out)
    straight = dict(read_split(out, "train", 64))
    for flip, share in ((True, 0.5), (False, 0.0)):
        stream = Stream(out, "train", size=64, batch=len(straight), masks="center", flip=flip)
        batch = stream.batch(0)
        turned = [
            not np.array_equal(image, straight[key]) for (_, key), image in zip(batch["keys"], batch["image"])
        ]
        assert abs(np.mean(turned) - share) <= (0.15 if share else 0)


def test_stored_edges_are_cropped_and_flipped_like_the_photograph(shards, edges):
    """Inside the crop, away from its border, they are Canny's of the crop at one of the two sigmas."""
    stream = make(shards, edges=edges, edge_source="full", sigmas=(1.0, 2.0), masks="center")
    counted = Counter()
    for step in range(6):
        batch = stream.batch(step)
        for image, edge in zip(batch["image"], batch["edge"]):
            grey = rgb2gray(image)
            inner = slice(10, 22)
            differing = {
                s: np.mean(canny(grey, sigma=s)[inner, inner] != edge[inner, inner]) for s in (1.0, 2.0)
            }
            counted[min(differing, key=differing.__getitem__)] += 1
            assert min(differing.values()) < 0.12
    assert len(counted) == 2
    assert (batch["edge"] * batch["mask"]).any()  # the hole's edges are kept: models decide


def test_masked_edges_are_canny_with_the_hole_masked_out(shards):
    batch = make(shards, edge_source="masked", sigmas=(1.5,)).batch(2)
    for image, mask, edge in zip(batch["image"], batch["mask"], batch["edge"]):
        assert np.array_equal(edge, canny_edges(image, 1.5, mask))
        assert not (edge * mask).any()


def test_adding_edges_changes_neither_photographs_nor_masks(shards, edges):
    plain, edged = make(shards), make(shards, edges=edges, edge_source="full", sigmas=(1.0,))
    for step in range(3):
        a, b = plain.batch(step), edged.batch(step)
        assert np.array_equal(a["image"], b["image"])
        assert np.array_equal(a["mask"], b["mask"])


def test_a_bucket_with_and_without_a_cache(shards, edges, s3, tmp_path, monkeypatch):
    bucket, edge_bucket = open_storage(f"{s3}/shards"), open_storage(f"{s3}/edges")
    for source, target in ((shards, bucket), (edges[1.0], edge_bucket)):
        for key, _ in source.list():
            target.upload(source.path(key), key)
    options = {"edge_source": "full", "sigmas": (1.0,)}
    expected = make(shards, edges=edges, **options)
    caches = [None, ShardCache(tmp_path / "large", 10**9), ShardCache(tmp_path / "small", 40_000)]
    for cache in caches:  # the small one holds two of the photographs' tars
        stream = make(bucket, edges={1.0: edge_bucket}, cache=cache, **options)
        assert all(equal(stream.batch(step), expected.batch(step)) for step in range(9))
    sums = {entry["sha256"] for entry in load_manifest(shards)["shards"]}
    cached = sorted((tmp_path / "large").glob("*.tar"))
    assert sums & {path.stem for path in cached} == sums - _sums(shards, "val")
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))
    for path in cached:
        path.write_bytes(bytes(path.stat().st_size))  # what a failing disk may leave
    repaired = make(bucket, edges={1.0: edge_bucket}, cache=caches[1], **options)
    assert all(equal(repaired.batch(step), expected.batch(step)) for step in range(6))
    assert not repaired.bad


def _sums(shards, split):
    return {entry["sha256"] for entry in load_manifest(shards)["shards"] if entry["split"] == split}


def test_tars_are_fetched_before_their_window(shards, s3, tmp_path):
    bucket = open_storage(f"{s3}/shards")
    for key, _ in shards.list():
        bucket.upload(shards.path(key), key)
    cache = ShardCache(tmp_path, 10**9)
    stream = make(bucket, batch=1, streams=1, cache=cache)
    stream.batch(0)
    deadline = time.monotonic() + 30
    while {path.stem for path in tmp_path.glob("*.tar")} != _sums(shards, "train"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cache.close()


def test_leaving_the_loop_stops_the_threads(shards):
    before = threading.active_count()
    batches = make(shards, threads=4).batches(0, 10_000)
    assert len(list(islice(batches, 3))) == 3
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("stream"):
            thread.join(10)
    assert threading.active_count() <= before


def test_only_a_few_batches_are_made_ahead(shards, monkeypatch):
    made = []
    begin = Stream._begin
    monkeypatch.setattr(Stream, "_begin", lambda self: made.append(self) or begin(self))
    batches = make(shards).batches(0, 100)
    next(batches)
    assert len(made) <= stream_module.AHEAD + 1
    batches.close()


@pytest.fixture
def damaged(photos, tmp_path, monkeypatch):
    """Shards in which one photograph has a flipped byte, and the next one's tar is gone; with their two names."""
    monkeypatch.setattr(reading, "PAUSES", (0.0,))
    source, out = open_source(str(photos)), open_storage(tmp_path)
    options, names = ShardOptions(size=32, val=0, test=0), source.names()
    parts = [write_slice(source, names[n::3], n, out, options) for n in range(3)]
    manifest = assemble(parts, options, source.uri, out)
    first, second = (entry["name"] for entry in manifest["shards"][:2])
    index, data = read_index(out, first), bytearray(out.read(first))
    data[index["offsets"][2] + index["sizes"][2] // 2] ^= 1
    out.write(first, bytes(data))
    out.delete(second)
    return out, f"{first} {index['keys'][2]}", second


def test_what_cannot_be_read_is_named_and_stops_the_stream(damaged):
    shards, flipped, gone = damaged
    with pytest.raises(TooManyBad, match=rf"(?s){flipped}: .*CRC-32|{gone} .* is not in") as error:
        list(make(shards).batches(0, 6))
    assert "inpaint data check" in str(error.value)
    with pytest.raises(TooManyBad, match="8 samples cannot be read"):
        list(make(shards, max_bad=7).batches(0, 6))


def test_others_stand_in_for_what_cannot_be_read_the_same_for_all_readers(damaged):
    shards, flipped, gone = damaged
    alone = make(shards, max_bad=9)
    expected = [alone.batch(step) for step in range(9)]
    assert len(alone.bad) == 9
    assert {name for name in alone.bad if not name.startswith(gone)} == {flipped}
    ranks = [make(shards, max_bad=9, rank=rank, world=2, threads=2) for rank in range(2)]
    for got, batch in zip(zip(*(rank.batches(2, 9) for rank in ranks)), expected[2:], strict=True):
        assert equal(joined(got), batch)
    seen = {key for batch in expected for _, key in batch["keys"]}
    manifest = load_manifest(shards)
    readable = [read_index(shards, manifest["shards"][n]["name"])["keys"] for n in (0, 2)]
    assert seen == {key for keys in readable for key in keys} - {flipped.split()[1]}


def test_a_truncated_tar_is_named(damaged):
    shards, _, gone = damaged
    shards.write(gone, b"cut")
    with pytest.raises(TooManyBad, match=f"{gone} [0-9a-f]+: "):
        list(make(shards, max_bad=3).batches(0, 6))


def test_live_edges_are_the_stored_ones(shards, edges):
    stored = make(shards, edges=edges, edge_source="full", sigmas=(1.0, 2.0))
    live = make(shards, edge_source="live", sigmas=(1.0, 2.0))
    assert all(equal(stored.batch(step), live.batch(step)) for step in range(6))


def test_originals_are_read_as_their_copies_would_be(photos, tmp_path):
    """PNGs lose nothing: the stream of the files' own bytes is the stream of resized copies."""
    source, streams = open_source(str(photos)), []
    for kind in ("png", "original"):
        out, options = (
            open_storage(tmp_path / kind),
            ShardOptions(size=32, margin=4, format=kind, val=0, test=0),
        )
        assemble([write_slice(source, source.names(), 0, out, options)], options, source.uri, out)
        streams.append(make(out, edge_source="live"))
    assert all(equal(streams[0].batch(step), streams[1].batch(step)) for step in range(3))
    index = read_index(out, "train-00000.tar")
    for row, name in enumerate(index["names"]):
        data = out.read_range("train-00000.tar", index["offsets"][row], index["sizes"][row])
        assert data == (photos / name).read_bytes()


def test_keys_out_of_step_stop_the_stream(shards, edges, tmp_path):
    """Edge maps of the same number of other photographs."""
    other, manifest = open_storage(tmp_path), load_manifest(shards)
    for key, _ in edges[1.0].list():
        other.write(key, edges[1.0].read(key))
    for entry in manifest["shards"]:
        index = read_index(other, entry["name"])
        index["keys"] = index["keys"][::-1]
        other.write(entry["name"].replace(".tar", ".json"), json.dumps(index).encode())
    with pytest.raises(ValueError, match="not in the photographs' order"):
        list(make(shards, edges={1.0: other}, edge_source="full", sigmas=(1.0,)).batches(0, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"streams": 1, "batch": 2, "world": 3}, "3 workers need a photograph each"),
        ({"batch": 6, "streams": 4}, "train.batch = 6"),
        ({"size": 64}, "data.size = 64"),
        ({"masks": "boxx"}, "did you mean 'box'"),
        ({"edge_source": "full", "sigmas": (3.0,)}, "edges.sigma: no edge maps of sigma 3"),
        ({"edge_source": "masked", "sigmas": ()}, "edges.sigma is empty"),
        ({"edge_source": "some"}, "edges.source = 'some'"),
    ],
)
def test_what_does_not_fit_is_named(shards, changes, words):
    with pytest.raises(ValueError, match=words):
        make(shards, **changes)


def test_splits_that_are_empty_or_unknown(shards):
    for split, words in (("test", "data.test"), ("training", "train, val, test")):
        with pytest.raises(ValueError, match=words):
            Stream(shards, split, size=32, batch=1, masks="center")
        with pytest.raises(ValueError, match=words):
            next(read_split(shards, split, 32))


def test_edges_of_other_photographs_are_refused(shards, tmp_path):
    other = open_storage(tmp_path)
    assemble_edges([], 1.0, "another digest", other)
    with pytest.raises(ValueError, match="other shards"):
        make(shards, edges={1.0: other}, edge_source="full", sigmas=(1.0,))
    assemble_edges([], 1.0, load_manifest(shards)["digest"], other)
    with pytest.raises(ValueError, match="lack train-0"):
        make(shards, edges={1.0: other}, edge_source="full", sigmas=(1.0,))


def test_read_split_is_the_centre_in_the_manifests_order(shards):
    whole, centre = dict(read_split(shards, "train", 36)), dict(read_split(shards, "train", 20))
    assert list(whole) == list(centre)
    assert all(photo.shape == (36, 36, 3) and photo.dtype == np.uint8 for photo in whole.values())
    assert all(np.array_equal(whole[key][8:28, 8:28], photo) for key, photo in centre.items())
