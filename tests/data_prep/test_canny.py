"""canny_edges against skimage.feature.canny on photographs, with and without a hole; edge tars and their PNGs."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2gray
from skimage.feature import canny

from data_prep.canny import canny_edges
from data_prep.edge_maps import (
    decode_edges,
    encode_edges,
    load_edge_manifest,
    write_edge_manifest,
    write_edge_tars,
)
from data_prep.images import decode_photo
from data_prep.manifest import load_manifest
from data_prep.masks import make_mask
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, read_index, write_partition_tars
from data_prep.sources import bundled_photo, open_source
from data_prep.storage import open_storage

SIGMAS = (0.5, 1, 2, 3, 5)
PHOTOS = ("astronaut", "chelsea", "china", "coffee", "flower", "hubble", "motorcycle", "rocket")


def photo(name):
    """A crop whose size differs between the photographs; some sides are odd."""
    full = bundled_photo(name)
    return full[: 201 + 3 * len(name), 40 : 40 + 255 + len(name)]


def f1(edges, reference):
    """F1 score with a tolerance of one pixel."""
    near = [cv2.dilate(x.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for x in (edges, reference)]
    hits = edges[near[1]].sum() / max(1, edges.sum()), reference[near[0]].sum() / max(1, reference.sum())
    return 1.0 if not edges.any() and not reference.any() else 2 * hits[0] * hits[1] / max(sum(hits), 1e-9)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_equals_skimage(sigma):
    for name in PHOTOS:
        image = photo(name)
        edges, reference = canny_edges(image, sigma), canny(rgb2gray(image), sigma=sigma)
        assert edges.dtype == bool
        assert edges.shape == image.shape[:2]
        assert f1(edges, reference) >= 0.999, name
        assert (edges != reference).mean() < 1e-3, name


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", ["center", "brush", "half", "box_and_brush"])
def test_equals_skimage_with_a_hole(sigma, kind):
    rng = np.random.default_rng(int(sigma * 10))
    for name in PHOTOS[:4]:
        image = photo(name)
        mask = make_mask(kind, *image.shape[:2], rng)
        edges, reference = (
            canny_edges(image, sigma, mask),
            canny(rgb2gray(image), sigma=sigma, mask=mask == 0),
        )
        assert f1(edges, reference) >= 0.999, name
        assert (edges != reference).mean() < 1e-3, name


@pytest.mark.parametrize("sigma", [0, *SIGMAS])
def test_edges_do_not_depend_on_the_contents_of_the_hole(sigma):
    rng = np.random.default_rng(0)
    image = photo("coffee")
    for kind in ("center", "brush", "box"):
        mask = make_mask(kind, *image.shape[:2], rng)
        edges = canny_edges(image, sigma, mask)
        for contents in (0, 255, rng.integers(0, 256, image.shape, np.uint8)):
            changed = np.where(mask[..., None] == 1, contents, image).astype(np.uint8)
            assert np.array_equal(canny_edges(changed, sigma, mask), edges)
        assert not edges[cv2.dilate(mask, np.ones((3, 3), np.uint8)) == 1].any()


def test_a_hole_creates_no_edges():
    """A constant image has no edges, whatever the hole's shape; skimage agrees."""
    image = np.full((96, 96, 3), 180, np.uint8)
    rng = np.random.default_rng(1)
    for kind in ("center", "brush", "half"):
        for sigma in (0, 1, 4):
            assert not canny_edges(image, sigma, make_mask(kind, 96, 96, rng)).any()


def test_an_empty_mask_changes_nothing_and_a_full_one_leaves_no_edges():
    image = photo("china")
    assert np.array_equal(canny_edges(image, 2, np.zeros(image.shape[:2], np.uint8)), canny_edges(image, 2))
    assert not canny_edges(image, 2, np.ones(image.shape[:2], np.uint8)).any()


def test_a_step_gives_one_line_at_its_position():
    image = np.zeros((64, 64), np.uint8)
    image[:, 30:] = 255
    for sigma in (0, 0.5, 2):
        columns = np.flatnonzero(canny_edges(image, sigma)[1:-1].all(0))
        assert set(columns) <= {29, 30}
        assert len(columns) >= 1


def test_no_blur_at_sigma_zero():
    """A blur of sigma 5 removes a line of one pixel."""
    image = np.zeros((64, 64), np.uint8)
    image[:, 32] = 120
    assert canny_edges(image, 0).any()
    assert not canny_edges(image, 5).any()


def test_grey_and_rgb_agree():
    grey = np.ascontiguousarray(photo("rocket")[..., 1])
    assert np.mean(canny_edges(grey, 2) != canny_edges(np.dstack([grey] * 3), 2)) < 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3), (1, 40), (9, 200)])
def test_small_and_thin_images(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for sigma in (0, 1, 5):
        reference = canny(image / 255, sigma=sigma) if sigma else None
        edges = canny_edges(image, sigma)
        assert edges.shape == shape
        if reference is not None:
            assert np.array_equal(edges, reference)


@pytest.mark.parametrize(
    ("image", "sigma", "mask", "words"),
    [
        (np.zeros((8, 8), np.float32), 1, None, "uint8"),
        (np.zeros((8, 8, 4), np.uint8), 1, None, r"\[8, 8, 4\]"),
        (np.zeros((8, 8), np.uint8), -1, None, "sigma -1"),
        (np.zeros((8, 8), np.uint8), 1, np.zeros((4, 4)), "does not fit"),
    ],
)
def test_errors_for_wrong_images_sigmas_and_masks(image, sigma, mask, words):
    with pytest.raises(ValueError, match=words):
        canny_edges(image, sigma, mask)


def test_edge_tars_match_the_photograph_tars(shards, tmp_path):
    manifest = load_manifest(shards)
    outs = [open_storage(tmp_path / name) for name in ("a", "b")]
    for out in outs:
        parts = [write_edge_tars(shards, entry, {2.0: out})[2.0] for entry in manifest.shards]
        write_edge_manifest(parts, 2.0, manifest.digest, out)
    assert [(key, outs[0].read(key)) for key, _ in outs[0].list()] == [
        (key, outs[1].read(key)) for key, _ in outs[1].list()
    ]
    listed = load_edge_manifest(outs[0], manifest.digest)
    assert listed.sigma == 2.0
    for entry, photos in zip(listed.shards, manifest.shards, strict=True):
        assert entry.photos_sha256 == photos.sha256
        assert entry.sha256 == hashlib.sha256(outs[0].read(entry.name)).hexdigest()
        index, theirs = read_index(outs[0], entry.name), read_index(shards, photos.name)
        assert index["keys"] == theirs["keys"]
        for row in range(entry.count):
            stored = [
                storage.read_range(entry.name, i["offsets"][row], i["sizes"][row])
                for storage, i in ((outs[0], index), (shards, theirs))
            ]
            edges = cv2.imdecode(np.frombuffer(stored[0], np.uint8), cv2.IMREAD_UNCHANGED)
            image = cv2.imdecode(np.frombuffer(stored[1], np.uint8), cv2.IMREAD_COLOR_RGB)
            assert stored[0][24] == 1  # bits per pixel in the PNG's header
            assert np.array_equal(edges > 0, canny(rgb2gray(image), sigma=2.0))


def test_edges_of_other_shards_are_refused(shards, tmp_path):
    out = open_storage(tmp_path / "edges")
    with pytest.raises(ValueError, match="inpaint edges"):
        load_edge_manifest(out, "x")
    write_edge_manifest([], 2.0, "other digest", out)
    with pytest.raises(ValueError, match="other shards"):
        load_edge_manifest(out, load_manifest(shards).digest)
    entry = replace(load_manifest(shards).shards[0], sha256="0" * 64)
    with pytest.raises(ValueError, match="not what the manifest says"):
        write_edge_tars(shards, entry, {2.0: out})


def test_writing_edges_does_not_modify_the_photograph_tars(tmp_path):
    source, out = open_source("bundled"), open_storage(tmp_path / "shards")
    options = ShardOptions(size=64, val=0, test=0)
    manifest = merge_partitions(
        [write_partition_tars(source, source.names()[:3], 0, out, options)], options, source.uri, out
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    write_edge_tars(out, manifest.shards[0], {1.0: open_storage(tmp_path / "edges")})
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}


def test_edge_maps_are_small_pngs_that_any_decoder_reads(photo_256):
    """At 256 pixels the bundled photographs' tiles take on average under 2.5 KB at sigma 2 and under 5 KB at 0.5."""
    for sigma, max_bytes in ((2.0, 2500), (0.5, 5000)):
        maps = [canny_edges(photo, sigma) for photo in photo_256]
        stored = [encode_edges(edges) for edges in maps]
        assert np.mean([len(data) for data in stored]) < max_bytes
        for edges, data in zip(maps, stored, strict=True):
            assert np.array_equal(decode_edges(data), edges)
            assert np.array_equal(
                cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) > 0, edges
            )
            with Image.open(io.BytesIO(data)) as opened:
                assert opened.mode == "1"
                assert np.array_equal(np.asarray(opened), edges)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 33])
def test_edge_maps_of_any_width_and_from_any_png(width):
    edges = np.random.default_rng(width).random((5, width)) < 0.3
    assert np.array_equal(decode_edges(encode_edges(edges)), edges)
    file = io.BytesIO()
    Image.fromarray(edges).save(file, "PNG")
    assert np.array_equal(decode_edges(file.getvalue()), edges)
    for damaged in (b"", encode_edges(edges)[:30], encode_edges(edges)[:50]):
        with pytest.raises(ValueError, match="rebuild the edges"):
            decode_edges(damaged)


@pytest.fixture(scope="module")
def photo_256():
    source = open_source("bundled", tile_size=256)
    return [decode_photo(source.read(name)) for name in source.names()]
