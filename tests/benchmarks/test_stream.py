"""The stream against bare loops that do the same work on the same bytes in memory, against a plain webdataset pipeline and
against EdgeConnect's data loading; the first batch after resuming; and the quality of the shuffling. `make bench` prints
the ratios."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset
from photographs import Crops
from PIL import Image
from skimage.color import rgb2gray
from skimage.feature import canny

from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.manifest import Manifest
from data_prep.masks import make_mask
from data_prep.partitions import SourceListing, assign_partitions
from data_prep.preprocess import ShardOptions
from data_prep.sampler import ShardSampler
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from data_prep.stream import BatchStream
from data_prep.tars import read_index

SIZE, BATCH, PHOTOS, SIGMA = 256, 16, 512, 2.0


Data = tuple[Storage, Storage, Manifest]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """512 photographs of 272 x 363 pixels in four shards, and their edges."""
    return make(tmp_path_factory, ShardOptions(size=SIZE, margin=16, val=0, test=0))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The same photographs cropped to 256 x 256 pixels, as in EdgeConnect."""
    return make(tmp_path_factory, ShardOptions(size=SIZE, crop="square", val=0, test=0))


def make(folders: pytest.TempPathFactory, options: ShardOptions) -> Data:
    cv2.setNumThreads(1)
    shards, edges = (open_storage(folders.mktemp(name)) for name in ("shards", "edges"))
    source = Crops(PHOTOS)
    partitions, _ = plan_shards(source, shards, options, PHOTOS // 4)
    results = [write_partition(source, partition, shards, options) for partition in partitions]
    manifest = merge_partitions(results, options, source.uri, shards)
    edge_entries = [write_edge_tars(shards, entry, {SIGMA: edges})[SIGMA] for entry in manifest.shards]
    write_edge_manifest(edge_entries, SIGMA, manifest.digest, edges)
    return shards, edges, manifest


def members(storage: Storage, manifest: Manifest) -> list[bytes]:
    samples = []
    for entry in manifest.shards:
        index, tar = read_index(storage, entry.name), storage.read(entry.name)
        samples += [tar[o : o + s] for o, s in zip(index["offsets"], index["sizes"], strict=True)]
    return samples


def rates(cases: dict[str, Callable[[], int]], rounds: int = 5) -> dict[str, float]:
    """Photographs per second: the best of several alternating rounds per case."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in cases.items():
            start = time.perf_counter()
            count = call()
            best[name] = max(best.get(name, 0), count / (time.perf_counter() - start))
    return best


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_speed_of_the_stream(
    data: Data, squares: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, edges, manifest = data
    photos, maps = members(shards, manifest), members(edges, manifest)
    rng = np.random.default_rng(0)

    def decode(photo: bytes) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR_RGB)

    def bare_decoding() -> int:
        for photo in photos:
            decode(photo)
        return PHOTOS

    def bare_with_masks_and_edges() -> int:
        """Decode, make a mask, decode the edges, crop both into new arrays, one photograph after another."""
        for photo, edge in zip(photos, maps, strict=True):
            image = decode(photo)
            make_mask("box_and_brush", SIZE, SIZE, rng)
            line = cv2.imdecode(np.frombuffer(edge, np.uint8), cv2.IMREAD_GRAYSCALE)
            top, left = (int(rng.integers(length - SIZE + 1)) for length in image.shape[:2])
            np.ascontiguousarray(image[top : top + SIZE, left : left + SIZE])
            np.ascontiguousarray(line[top : top + SIZE, left : left + SIZE] != 0)
        return PHOTOS

    def ours(shards: Storage = shards, **changes: Any) -> int:
        """Two epochs of the stream."""
        stream = BatchStream(
            shards, "train", **{"size": SIZE, "batch_size": BATCH, "streams": 2, "masks": "center", **changes}
        )
        return sum(len(batch.keys) for batch in stream.iter_batches(0, 2 * PHOTOS // BATCH))

    urls = [str(shards.local_path(entry.name)) for entry in manifest.shards]

    def plain_webdataset(decoder: Any) -> int:
        """The usual form: shuffled shards, a shuffle buffer, decoding, a random crop, batches."""

        def random_crop(image: np.ndarray) -> np.ndarray:
            top, left = (random.randrange(length - SIZE + 1) for length in image.shape[:2])
            return image[top : top + SIZE, left : left + SIZE]

        pipeline = (
            webdataset.WebDataset(urls, shardshuffle=4)
            .shuffle(PHOTOS)
            .decode(*decoder)
            .to_tuple("jpg")
            .map_tuple(random_crop)
            .batched(BATCH, collation_fn=lambda rows: np.stack([row[0] for row in rows]))
        )
        return sum(len(batch) for batch in pipeline)

    originals = Crops(64)
    for name in originals.names():
        (tmp_path / name).write_bytes(originals.read(name))
    files = sorted(tmp_path.iterdir())

    def edge_connect_loading() -> int:
        """EdgeConnect's released data set: each image file is read, cropped square and resized, with skimage's rgb2gray and
        Canny on the fly, a random block, and conversion to float planes."""
        for file in files:
            with Image.open(file) as file_image:
                photo = np.asarray(file_image.convert("RGB"))
            side = min(photo.shape[:2])
            top, left = ((length - side) // 2 for length in photo.shape[:2])
            square = Image.fromarray(photo[top : top + side, left : left + side])
            image = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            gray = rgb2gray(image)
            edge = canny(gray, sigma=SIGMA).astype(np.float32)
            mask = make_mask("block", SIZE, SIZE, rng)
            [np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / 255, gray, edge, mask]
        return len(files)

    by_cv2 = [lambda key, value: decode(value) if key.endswith("jpg") else None]
    stored = {"edges": {SIGMA: edges}, "edge_source": "full", "sigmas": (SIGMA,)}
    rate = rates(
        {
            "bare decoding loop": bare_decoding,
            "stream": ours,
            "webdataset, its own decoder": lambda: plain_webdataset(["rgb8"]),
            "webdataset, OpenCV's decoder": lambda: plain_webdataset(by_cv2),
            "bare loop, masks and edges": bare_with_masks_and_edges,
            "stream, masks and edges": lambda: ours(masks="box_and_brush", **stored),
            "stream, masks and edges, 2 threads": lambda: ours(masks="box_and_brush", threads=2, **stored),
            "stream, squares, blocks and edges": lambda: ours(
                squares[0], masks="block", **stored | {"edges": {SIGMA: squares[1]}}
            ),
            "stream, masks and live edges": lambda: ours(
                masks="box_and_brush", **stored | {"edge_source": "live"}
            ),
            "EdgeConnect's loading": edge_connect_loading,
        }
    )
    ratios = {
        "stream / bare decoding loop": rate["stream"] / rate["bare decoding loop"],
        "the same with masks and edges": rate["stream, masks and edges"] / rate["bare loop, masks and edges"],
        "stream / webdataset": rate["stream"] / rate["webdataset, its own decoder"],
        "stream / webdataset with OpenCV": rate["stream"] / rate["webdataset, OpenCV's decoder"],
        "stream, squares / EdgeConnect's loading": rate["stream, squares, blocks and edges"]
        / rate["EdgeConnect's loading"],
    }
    with capsys.disabled():
        print(f"\nPhotographs per second on one core, {SIZE} px crops of JPEGs")
        print(*(f"{name:46s} {value:8.0f}" for name, value in rate.items()), sep="\n")
        print(*(f"{name:46s} {ratio:8.2f}" for name, ratio in ratios.items()), sep="\n")
    assert [
        ratio >= minimum for ratio, minimum in zip(ratios.values(), (0.82, 0.85, 1, 1, 9), strict=True)
    ] == [True] * 5


@pytest.mark.benchmark
def test_the_first_batch_after_resuming(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    shards, edges, _ = data
    seconds = []
    for step in (0, 1_000_017, 5_000_011):
        start = time.perf_counter()
        stream = BatchStream(
            shards,
            "train",
            size=SIZE,
            batch_size=BATCH,
            streams=2,
            masks="brush",
            edges={SIGMA: edges},
            edge_source="full",
        )
        next(stream.iter_batches(step, step + 1))
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        print("\nThe first batch of a new stream at its beginning and far on: ", end="")
        print(", ".join(f"{s:.3f} s" for s in seconds))
    assert max(seconds) < 1


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_quality_of_the_shuffling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A million photographs listed by 365 classes, in shards of 1000. With a full shuffle, a batch of 64 has 58.7 classes
    on average."""
    classes, photos_per_class = 365, 2740
    listing = tmp_path / "all.txt"
    with open(listing, "w") as file:
        file.writelines(
            f"{name:03d}/{number}\n" for name in range(classes) for number in range(photos_per_class)
        )
    partitions = assign_partitions(SourceListing(open_source(str(listing))), [], 1000)
    labels = np.concatenate([[int(name[:3]) for name in partition.names] for partition in partitions])
    counts = [len(partition.names) for partition in partitions]
    sorted_labels = np.sort(labels)
    fully_shuffled = np.random.default_rng(1).permutation(labels)
    sampler = ShardSampler(counts, 0, 8)
    rng = np.random.default_rng(2)
    steps = rng.integers(0, classes * photos_per_class // 64, 400)

    def rows_of_batch(step: int) -> list[int]:
        return [sampler.sample_at(n // 8, step * 8 + n % 8).index_in_split for n in range(64)]

    batch_rows = [rows_of_batch(int(step)) for step in steps]
    batch_labels = {
        "a full shuffle": [fully_shuffled[step * 64 : step * 64 + 64] for step in steps],
        "our order": [labels[rows] for rows in batch_rows],
        "our order, if partitions followed the listing order": [sorted_labels[rows] for rows in batch_rows],
        "no shuffle": [sorted_labels[step * 64 : step * 64 + 64] for step in steps],
    }
    with capsys.disabled():
        print("\nDistinct classes in a batch of 64, mean of 400 batches; full shuffle in theory:", end=" ")
        print(f"{classes * (1 - (1 - 1 / classes) ** 64):.1f}")
        for name, rows in batch_labels.items():
            print(f"{name:50s} {np.mean([len(set(row)) for row in rows]):6.1f}")
    ours, best = (
        np.mean([len(set(row)) for row in batch_labels[name]]) for name in ("our order", "a full shuffle")
    )
    assert ours > 0.98 * best
