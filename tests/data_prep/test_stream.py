"""Batches are a pure function of the arguments and the step, for any number of ranks and threads and when resumed."""

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

from data_prep import stream as stream_module
from data_prep import tars
from data_prep.cache import ShardCache
from data_prep.canny import canny_edges
from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.manifest import load_manifest
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, read_index, write_partition_tars
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.stream import Batch, BatchStream, TooManyUnreadable, read_split

MASKS = {"box": 1, "brush": 1}
ARRAYS = ("image", "mask", "edge")


@pytest.fixture(scope="session")
def edges(shards, tmp_path_factory):
    """{sigma: folder of edge tars} for two sigmas."""
    manifest, folders = load_manifest(shards), {}
    for sigma in (1.0, 2.0):
        out = folders[sigma] = open_storage(tmp_path_factory.mktemp(f"edges-{sigma:g}"))
        entries = [write_edge_tars(shards, entry, {sigma: out})[sigma] for entry in manifest.shards]
        write_edge_manifest(entries, sigma, manifest.digest, out)
    return folders


def make(shards, **changes):
    arguments = {"size": 32, "batch_size": 8, "masks": MASKS, "seed": 3, "streams": 4, **changes}
    return BatchStream(shards, "train", **arguments)


def equal(one, other):
    pairs = [(getattr(one, name), getattr(other, name)) for name in ARRAYS]
    return one.keys == other.keys and all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)


def concatenate(batches):
    columns = [[getattr(batch, name) for batch in batches] for name in ARRAYS]
    arrays = [None if column[0] is None else np.concatenate(column) for column in columns]
    keys = [key for batch in batches for key in batch.keys]
    return Batch(*arrays, keys, range(len(keys)), batches[0].global_size)


def test_shapes_types_and_ranges(shards, edges):
    batch = make(shards, edges=edges, edge_source="full", sigmas=(1.0, 2.0)).batch_at(0)
    assert batch.image.shape == (8, 32, 32, 3)
    assert batch.mask.shape == batch.edge.shape == (8, 32, 32)
    assert [getattr(batch, name).dtype for name in ARRAYS] == [np.uint8, np.uint8, bool]
    assert set(np.unique(batch.mask)) == set(np.unique(batch.edge)) == {0, 1}
    assert make(shards).batch_at(0).edge is None


def test_the_ranks_slices_are_the_global_batch(shards, edges):
    """Also when ranks share a stream of the sampler."""
    for source in ("none", "full", "masked"):
        options = {"edge_source": source, "edges": edges, "sigmas": (1.0, 2.0)}
        single = make(shards, **options)
        for world_size in (2, 3, 4, 5, 8):
            ranks = [make(shards, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
            for step in (0, 1, 5, 17):
                batches = [rank.batch_at(step) for rank in ranks]
                assert equal(concatenate(batches), single.batch_at(step))


@pytest.mark.parametrize("threads", [1, 3])
def test_iter_batches_equals_batch_at_and_resumes_anywhere(shards, edges, threads):
    options = {"edge_source": "full", "edges": edges, "sigmas": (1.0, 2.0)}
    expected = [make(shards, **options).batch_at(step) for step in range(12)]
    for start in (0, 1, 7, 11, 12):
        resumed = list(make(shards, threads=threads, **options).iter_batches(start, 12))
        assert len(resumed) == 12 - start
        assert all(equal(a, b) for a, b in zip(resumed, expected[start:], strict=True))


@pytest.mark.parametrize(("batch_size", "streams"), [(1, 1), (4, 2), (6, 3), (64, 4)])
def test_every_sample_occurs_once_per_epoch_and_every_batch_is_full(shards, batch_size, streams):
    """Also when the split is smaller than a batch."""
    stream = make(shards, batch_size=batch_size, streams=streams, masks="center")
    steps = -(-3 * stream.num_samples // batch_size) + streams
    batches = [stream.batch_at(step).keys for step in range(steps)]
    assert all(len(keys) == batch_size for keys in batches)
    occurrences = Counter(key for keys in batches for key in keys)
    assert max(occurrences.values()) == 1
    all_keys = {key for key, _ in read_split(shards, "train", 32)}
    assert len(all_keys) == stream.num_samples
    for epoch in range(2):
        assert {key for e, key in occurrences if e == epoch} == all_keys


def test_crop_flip_and_mask_depend_on_the_sample_only(shards):
    """Another number of streams changes only the order."""
    samples = {}
    for streams in (1, 2, 4):
        stream = make(shards, streams=streams)
        for step in range(8):
            batch = stream.batch_at(step)
            for key, image, mask in zip(batch.keys, batch.image, batch.mask):
                first = samples.setdefault(key, (image, mask))
                assert np.array_equal(first[0], image)
                assert np.array_equal(first[1], mask)


def test_crops_flips_and_masks_differ_between_epochs(shards):
    stream = make(shards, batch_size=4, masks="brush")
    by_key: dict[str, list] = {}
    for step in range(40):
        batch = stream.batch_at(step)
        for (_, key), image, mask in zip(batch.keys, batch.image, batch.mask):
            by_key.setdefault(key, []).append((image.tobytes(), mask.tobytes()))
    assert all(len(set(samples)) == len(samples) for samples in by_key.values())


def test_a_crop_is_a_region_of_the_stored_photograph_flipped_or_not(shards):
    photos = dict(read_split(shards, "train", 36))
    square_keys = {key for key, shape in _shapes(shards).items() if shape == [36, 36]}
    flips = Counter()
    for flip in (True, False):
        for step in range(12):
            batch = make(shards, flip=flip).batch_at(step)
            for (_, key), image in zip(batch.keys, batch.image):
                if key not in square_keys:
                    continue
                crops = [
                    (mirrored, photos[key][y : y + 32, x : x + 32][:, :: -1 if mirrored else 1])
                    for mirrored in (False, True)
                    for y in range(5)
                    for x in range(5)
                ]
                matches = [mirrored for mirrored, crop in crops if np.array_equal(crop, image)]
                assert matches
                flips[flip, matches[0]] += 1
    assert not flips[False, True]


def _shapes(shards):
    shapes = {}
    for entry in load_manifest(shards).shards:
        index = read_index(shards, entry.name)
        shapes |= dict(zip(index["keys"], index["shapes"]))
    return shapes


def test_half_of_the_samples_are_flipped(tmp_path):
    source, out = open_source("bundled"), open_storage(tmp_path)
    options = ShardOptions(size=64, format="png", val=0, test=0)
    names = source.names()[:200]
    merge_partitions([write_partition_tars(source, names, 0, out, options)], options, source.uri, out)
    unflipped = dict(read_split(out, "train", 64))
    for flip, expected in ((True, 0.5), (False, 0.0)):
        stream = BatchStream(out, "train", size=64, batch_size=len(unflipped), masks="center", flip=flip)
        batch = stream.batch_at(0)
        flipped = [
            not np.array_equal(image, unflipped[key]) for (_, key), image in zip(batch.keys, batch.image)
        ]
        assert abs(np.mean(flipped) - expected) <= (0.15 if expected else 0)


def test_stored_edges_are_cropped_and_flipped_like_the_photograph(shards, edges):
    """Away from the crop's border they equal Canny's of the crop at one of the two sigmas."""
    stream = make(shards, edges=edges, edge_source="full", sigmas=(1.0, 2.0), masks="center")
    best_sigmas = Counter()
    for step in range(6):
        batch = stream.batch_at(step)
        for image, edge in zip(batch.image, batch.edge):
            gray = rgb2gray(image)
            inner = slice(10, 22)
            difference = {
                s: np.mean(canny(gray, sigma=s)[inner, inner] != edge[inner, inner]) for s in (1.0, 2.0)
            }
            best_sigmas[min(difference, key=difference.__getitem__)] += 1
            assert min(difference.values()) < 0.12
    assert len(best_sigmas) == 2
    assert (batch.edge * batch.mask).any()  # the stream keeps the hole's edges; models mask them if needed


def test_masked_edges_are_canny_with_the_hole_masked_out(shards):
    batch = make(shards, edge_source="masked", sigmas=(1.5,)).batch_at(2)
    for image, mask, edge in zip(batch.image, batch.mask, batch.edge):
        assert np.array_equal(edge, canny_edges(image, 1.5, mask))
        assert not (edge * mask).any()


def test_adding_edges_changes_neither_photographs_nor_masks(shards, edges):
    plain, with_edges = make(shards), make(shards, edges=edges, edge_source="full", sigmas=(1.0,))
    for step in range(3):
        a, b = plain.batch_at(step), with_edges.batch_at(step)
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.mask, b.mask)


def test_a_bucket_with_and_without_a_cache(shards, edges, s3, tmp_path, monkeypatch):
    bucket, edge_bucket = open_storage(f"{s3}/shards"), open_storage(f"{s3}/edges")
    for source, target in ((shards, bucket), (edges[1.0], edge_bucket)):
        for key, _ in source.list():
            target.upload(source.local_path(key), key)
    options = {"edge_source": "full", "sigmas": (1.0,)}
    expected = make(shards, edges=edges, **options)
    caches = [None, ShardCache(tmp_path / "large", 10**9), ShardCache(tmp_path / "small", 40_000)]
    for cache in caches:  # the small one has room for two photograph tars
        stream = make(bucket, edges={1.0: edge_bucket}, cache=cache, **options)
        assert all(equal(stream.batch_at(step), expected.batch_at(step)) for step in range(9))
    checksums = {entry.sha256 for entry in load_manifest(shards).shards}
    cached = sorted((tmp_path / "large").glob("*.tar"))
    assert checksums & {path.stem for path in cached} == checksums - _checksums(shards, "val")
    monkeypatch.setattr(tars, "RETRY_DELAYS", (0.0, 0.0))
    for path in cached:
        path.write_bytes(bytes(path.stat().st_size))  # zeros, as after a disk failure
    repaired = make(bucket, edges={1.0: edge_bucket}, cache=caches[1], **options)
    assert all(equal(repaired.batch_at(step), expected.batch_at(step)) for step in range(6))
    assert not repaired.unreadable


def _checksums(shards, split):
    return {entry.sha256 for entry in load_manifest(shards).shards if entry.split == split}


def test_the_tars_of_the_next_shuffle_buffer_are_downloaded_in_advance(shards, s3, tmp_path):
    bucket = open_storage(f"{s3}/shards")
    for key, _ in shards.list():
        bucket.upload(shards.local_path(key), key)
    cache = ShardCache(tmp_path, 10**9)
    stream = make(bucket, batch_size=1, streams=1, cache=cache)
    stream.batch_at(0)
    deadline = time.monotonic() + 30
    while {path.stem for path in tmp_path.glob("*.tar")} != _checksums(shards, "train"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cache.stop_prefetch()


def test_closing_the_iterator_stops_the_threads(shards):
    before = threading.active_count()
    batches = make(shards, threads=4).iter_batches(0, 10_000)
    assert len(list(islice(batches, 3))) == 3
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("stream"):
            thread.join(10)
    assert threading.active_count() <= before


def test_only_a_few_batches_are_prefetched(shards, monkeypatch):
    started = []
    empty_batch = BatchStream._empty_batch
    monkeypatch.setattr(BatchStream, "_empty_batch", lambda self: started.append(self) or empty_batch(self))
    batches = make(shards).iter_batches(0, 100)
    next(batches)
    assert len(started) <= stream_module.PREFETCH_BATCHES + 1
    batches.close()


@pytest.fixture
def damaged(photos, tmp_path, monkeypatch):
    """(shards, the name of a photograph with a flipped byte, the name of a missing tar)."""
    monkeypatch.setattr(tars, "RETRY_DELAYS", (0.0,))
    source, out = open_source(str(photos)), open_storage(tmp_path)
    options, names = ShardOptions(size=32, val=0, test=0), source.names()
    results = [write_partition_tars(source, names[n::3], n, out, options) for n in range(3)]
    manifest = merge_partitions(results, options, source.uri, out)
    first, second = (entry.name for entry in manifest.shards[:2])
    index, data = read_index(out, first), bytearray(out.read(first))
    data[index["offsets"][2] + index["sizes"][2] // 2] ^= 1
    out.write(first, bytes(data))
    out.delete(second)
    return out, f"{first} {index['keys'][2]}", second


def test_unreadable_samples_are_named_and_too_many_stop_the_stream(damaged):
    shards, flipped, missing = damaged
    with pytest.raises(TooManyUnreadable, match=rf"(?s){flipped}: .*CRC-32|{missing} .* is not in") as error:
        list(make(shards).iter_batches(0, 6))
    assert "inpaint data check" in str(error.value)
    with pytest.raises(TooManyUnreadable, match="8 samples cannot be read"):
        list(make(shards, max_unreadable=7).iter_batches(0, 6))


def test_unreadable_samples_are_replaced_by_the_same_ones_on_every_rank(damaged):
    shards, flipped, missing = damaged
    single = make(shards, max_unreadable=9)
    expected = [single.batch_at(step) for step in range(9)]
    assert len(single.unreadable) == 9
    assert {name for name in single.unreadable if not name.startswith(missing)} == {flipped}
    ranks = [make(shards, max_unreadable=9, rank=rank, world_size=2, threads=2) for rank in range(2)]
    for batches, batch in zip(zip(*(rank.iter_batches(2, 9) for rank in ranks)), expected[2:], strict=True):
        assert equal(concatenate(batches), batch)
    keys = {key for batch in expected for _, key in batch.keys}
    manifest = load_manifest(shards)
    readable = [read_index(shards, manifest.shards[n].name)["keys"] for n in (0, 2)]
    assert keys == {key for tar_keys in readable for key in tar_keys} - {flipped.split()[1]}


def test_a_truncated_tar_is_named(damaged):
    shards, _, missing = damaged
    shards.write(missing, b"cut")
    with pytest.raises(TooManyUnreadable, match=f"{missing} [0-9a-f]+: "):
        list(make(shards, max_unreadable=3).iter_batches(0, 6))


def test_live_edges_equal_the_stored_ones(shards, edges):
    stored = make(shards, edges=edges, edge_source="full", sigmas=(1.0, 2.0))
    live = make(shards, edge_source="live", sigmas=(1.0, 2.0))
    assert all(equal(stored.batch_at(step), live.batch_at(step)) for step in range(6))


def test_stored_originals_give_the_same_batches_as_resized_copies(photos, tmp_path):
    """The copies are PNGs, which are lossless."""
    source, streams = open_source(str(photos)), []
    for kind in ("png", "original"):
        out = open_storage(tmp_path / kind)
        options = ShardOptions(size=32, margin=4, format=kind, val=0, test=0)
        result = write_partition_tars(source, source.names(), 0, out, options)
        merge_partitions([result], options, source.uri, out)
        streams.append(make(out, edge_source="live"))
    assert all(equal(streams[0].batch_at(step), streams[1].batch_at(step)) for step in range(3))
    index = read_index(out, "train-00000.tar")
    for row, name in enumerate(index["names"]):
        data = out.read_range("train-00000.tar", index["offsets"][row], index["sizes"][row])
        assert data == (photos / name).read_bytes()


def test_edge_maps_in_another_order_than_the_photographs_stop_the_stream(shards, edges, tmp_path):
    reversed_edges, manifest = open_storage(tmp_path), load_manifest(shards)
    for key, _ in edges[1.0].list():
        reversed_edges.write(key, edges[1.0].read(key))
    for entry in manifest.shards:
        index = read_index(reversed_edges, entry.name)
        index["keys"] = index["keys"][::-1]
        reversed_edges.write(entry.name.replace(".tar", ".json"), json.dumps(index).encode())
    stream = make(shards, edges={1.0: reversed_edges}, edge_source="full", sigmas=(1.0,))
    with pytest.raises(ValueError, match="not in the photographs' order"):
        list(stream.iter_batches(0, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"streams": 1, "batch_size": 2, "world_size": 3}, "3 workers need a photograph each"),
        ({"batch_size": 6, "streams": 4}, "train.batch = 6"),
        ({"size": 64}, "data.size = 64"),
        ({"masks": "boxx"}, "did you mean 'box'"),
        ({"edge_source": "full", "sigmas": (3.0,)}, "edges.sigma: no edge maps of sigma 3"),
        ({"edge_source": "masked", "sigmas": ()}, "edges.sigma is empty"),
        ({"edge_source": "some"}, "edges.mode = 'some'"),
    ],
)
def test_errors_name_the_field_of_the_recipe(shards, changes, words):
    with pytest.raises(ValueError, match=words):
        make(shards, **changes)


def test_an_empty_or_unknown_split_is_an_error(shards):
    for split, words in (("test", "data.test"), ("training", "train, val, test")):
        with pytest.raises(ValueError, match=words):
            BatchStream(shards, split, size=32, batch_size=1, masks="center")
        with pytest.raises(ValueError, match=words):
            next(read_split(shards, split, 32))


def test_edges_of_other_photographs_are_refused(shards, tmp_path):
    other = open_storage(tmp_path)
    write_edge_manifest([], 1.0, "another digest", other)
    with pytest.raises(ValueError, match="other shards"):
        make(shards, edges={1.0: other}, edge_source="full", sigmas=(1.0,))
    write_edge_manifest([], 1.0, load_manifest(shards).digest, other)
    with pytest.raises(ValueError, match="lack train-0"):
        make(shards, edges={1.0: other}, edge_source="full", sigmas=(1.0,))


def test_read_split_gives_centre_crops_in_the_manifests_order(shards):
    large, small = dict(read_split(shards, "train", 36)), dict(read_split(shards, "train", 20))
    assert list(large) == list(small)
    assert all(photo.shape == (36, 36, 3) and photo.dtype == np.uint8 for photo in large.values())
    assert all(np.array_equal(large[key][8:28, 8:28], photo) for key, photo in small.items())
