"""The stream beside bare loops that do the same work on the same bytes in memory, beside a plain webdataset pipeline,
and beside EdgeConnect's way; the first batch after resuming; and how well an epoch is shuffled. `make bench` prints the
ratios."""

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

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.masks import make_mask
from data_prep.order import Order
from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, make_slice, plan
from data_prep.slices import Listing, deal
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from data_prep.stream import Stream
from data_prep.tars import read_index

SIZE, BATCH, PHOTOS, SIGMA = 256, 16, 512, 2.0


Data = tuple[Storage, Storage, dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """512 photographs of 272 x 363 pixels in four shards, and their edges."""
    return make(tmp_path_factory, ShardOptions(size=SIZE, margin=16, val=0, test=0))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The same cut to 256 x 256 pixels, as EdgeConnect has them."""
    return make(tmp_path_factory, ShardOptions(size=SIZE, crop="square", val=0, test=0))


def make(folders: pytest.TempPathFactory, options: ShardOptions) -> Data:
    cv2.setNumThreads(1)
    shards, edges = (open_storage(folders.mktemp(name)) for name in ("shards", "edges"))
    source = Crops(PHOTOS)
    slices, _ = plan(source, shards, options, PHOTOS // 4)
    parts = [make_slice(source, piece, shards, options) for piece in slices]
    manifest = assemble(parts, options, source.uri, shards)
    made = [write_edge_shard(shards, entry, {SIGMA: edges})[SIGMA] for entry in manifest["shards"]]
    assemble_edges(made, SIGMA, manifest["digest"], edges)
    return shards, edges, manifest


def members(storage: Storage, manifest: dict[str, Any]) -> list[bytes]:
    found = []
    for entry in manifest["shards"]:
        index, tar = read_index(storage, entry["name"]), storage.read(entry["name"])
        found += [tar[o : o + s] for o, s in zip(index["offsets"], index["sizes"], strict=True)]
    return found


def rates(cases: dict[str, Callable[[], int]], rounds: int = 5) -> dict[str, float]:
    """Photographs a second, each case's best of several rounds in turn."""
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in cases.items():
            start = time.perf_counter()
            count = call()
            found[name] = max(found.get(name, 0), count / (time.perf_counter() - start))
    return found


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_stream(data: Data, squares: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, edges, manifest = data
    photos, maps = members(shards, manifest), members(edges, manifest)
    rng = np.random.default_rng(0)

    def decode(photo: bytes) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR_RGB)

    def bare() -> int:
        for photo in photos:
            decode(photo)
        return PHOTOS

    def bare_all() -> int:
        """Decode, draw a mask, decode the edges, cut both to size: into fresh arrays, one photograph after another."""
        for photo, edge in zip(photos, maps, strict=True):
            image = decode(photo)
            make_mask("box_and_brush", SIZE, SIZE, rng)
            line = cv2.imdecode(np.frombuffer(edge, np.uint8), cv2.IMREAD_GRAYSCALE)
            top, left = (int(rng.integers(length - SIZE + 1)) for length in image.shape[:2])
            np.ascontiguousarray(image[top : top + SIZE, left : left + SIZE])
            np.ascontiguousarray(line[top : top + SIZE, left : left + SIZE] != 0)
        return PHOTOS

    def ours(shards: Storage = shards, **changes: Any) -> int:
        """Two epochs."""
        stream = Stream(
            shards, "train", **{"size": SIZE, "batch": BATCH, "streams": 2, "masks": "center", **changes}
        )
        return sum(len(batch["keys"]) for batch in stream.batches(0, 2 * PHOTOS // BATCH))

    urls = [str(shards.path(entry["name"])) for entry in manifest["shards"]]

    def plain_webdataset(decoder: Any) -> int:
        """Its usual form: shuffled shards, a shuffle buffer, decoding, a random crop, batches."""

        def cut(image: np.ndarray) -> np.ndarray:
            top, left = (random.randrange(length - SIZE + 1) for length in image.shape[:2])
            return image[top : top + SIZE, left : left + SIZE]

        pipeline = (
            webdataset.WebDataset(urls, shardshuffle=4)
            .shuffle(PHOTOS)
            .decode(*decoder)
            .to_tuple("jpg")
            .map_tuple(cut)
            .batched(BATCH, collation_fn=lambda rows: np.stack([row[0] for row in rows]))
        )
        return sum(len(batch) for batch in pipeline)

    originals = Crops(64)
    for name in originals.names():
        (tmp_path / name).write_bytes(originals.read(name))
    files = sorted(tmp_path.iterdir())

    def edge_connects_way() -> int:
        """Its released data set: each image file is read, cut square and resized, skimage's grey and Canny on the fly, a
        random block, floats in planes."""
        for file in files:
            with Image.open(file) as opened:
                whole = np.asarray(opened.convert("RGB"))
            side = min(whole.shape[:2])
            top, left = ((length - side) // 2 for length in whole.shape[:2])
            square = Image.fromarray(whole[top : top + side, left : left + side])
            image = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            grey = rgb2gray(image)
            line = canny(grey, sigma=SIGMA).astype(np.float32)
            mask = make_mask("block", SIZE, SIZE, rng)
            [np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / 255, grey, line, mask]
        return len(files)

    by_cv2 = [lambda key, value: decode(value) if key.endswith("jpg") else None]
    stored = {"edges": {SIGMA: edges}, "edge_source": "full", "sigmas": (SIGMA,)}
    found = rates(
        {
            "bare decoding loop": bare,
            "stream": ours,
            "webdataset, its own decoder": lambda: plain_webdataset(["rgb8"]),
            "webdataset, OpenCV's decoder": lambda: plain_webdataset(by_cv2),
            "bare loop, masks and edges": bare_all,
            "stream, masks and edges": lambda: ours(masks="box_and_brush", **stored),
            "stream, masks and edges, 2 threads": lambda: ours(masks="box_and_brush", threads=2, **stored),
            "stream, squares, blocks and edges": lambda: ours(
                squares[0], masks="block", **stored | {"edges": {SIGMA: squares[1]}}
            ),
            "stream, masks and live edges": lambda: ours(
                masks="box_and_brush", **stored | {"edge_source": "live"}
            ),
            "EdgeConnect's way": edge_connects_way,
        }
    )
    ratios = {
        "stream / bare decoding loop": found["stream"] / found["bare decoding loop"],
        "the same with masks and edges": found["stream, masks and edges"]
        / found["bare loop, masks and edges"],
        "stream / webdataset": found["stream"] / found["webdataset, its own decoder"],
        "stream / webdataset with OpenCV": found["stream"] / found["webdataset, OpenCV's decoder"],
        "stream, squares / EdgeConnect's way": found["stream, squares, blocks and edges"]
        / found["EdgeConnect's way"],
    }
    with capsys.disabled():
        print(f"\nPhotographs a second on one core, {SIZE} px crops of JPEGs")
        print(*(f"{name:46s} {rate:8.0f}" for name, rate in found.items()), sep="\n")
        print(*(f"{name:46s} {ratio:8.2f}" for name, ratio in ratios.items()), sep="\n")
    assert [ratio >= least for ratio, least in zip(ratios.values(), (0.82, 0.85, 1, 1, 9), strict=True)] == [
        True
    ] * 5


@pytest.mark.benchmark
def test_the_first_batch_after_resuming(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    shards, edges, _ = data
    seconds = []
    for step in (0, 1_000_017, 5_000_011):
        start = time.perf_counter()
        stream = Stream(
            shards,
            "train",
            size=SIZE,
            batch=BATCH,
            streams=2,
            masks="brush",
            edges={SIGMA: edges},
            edge_source="full",
        )
        next(stream.batches(step, step + 1))
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        print("\nThe first batch from a new stream at its beginning and far on: ", end="")
        print(", ".join(f"{s:.3f} s" for s in seconds))
    assert max(seconds) < 1


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_how_well_an_epoch_is_shuffled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A million photographs listed by 365 classes, in shards of 1000. A batch of 64 of a full shuffle shows 58.7
    classes in the mean; and the next sample of a line is of another class but once in 365."""
    classes, each = 365, 2740
    listing = tmp_path / "all.txt"
    with open(listing, "w") as file:
        file.writelines(f"{name:03d}/{number}\n" for name in range(classes) for number in range(each))
    dealt = deal(Listing(open_source(str(listing))), [], 1000)
    label = np.concatenate([[int(name[:3]) for name in piece.names] for piece in dealt])
    counts = [len(piece.names) for piece in dealt]
    in_order = np.sort(label)
    full = np.random.default_rng(1).permutation(label)
    order = Order(counts, 0, 8)
    rng = np.random.default_rng(2)
    batches = rng.integers(0, classes * each // 64, 400)

    def numbers(step: int) -> list[int]:
        return [order.at(n // 8, step * 8 + n % 8).number for n in range(64)]

    chosen = [numbers(int(step)) for step in batches]
    shown = {
        "a full shuffle": [full[step * 64 : step * 64 + 64] for step in batches],
        "our order": [label[rows] for rows in chosen],
        "our order, had shards been cut in listing order": [in_order[rows] for rows in chosen],
        "no shuffle": [in_order[step * 64 : step * 64 + 64] for step in batches],
    }
    with capsys.disabled():
        print("\nDistinct classes in a batch of 64, mean of 400 batches; full shuffle in theory:", end=" ")
        print(f"{classes * (1 - (1 - 1 / classes) ** 64):.1f}")
        for name, rows in shown.items():
            print(f"{name:50s} {np.mean([len(set(row)) for row in rows]):6.1f}")
    ours, best = (np.mean([len(set(row)) for row in shown[name]]) for name in ("our order", "a full shuffle"))
    assert ours > 0.98 * best
