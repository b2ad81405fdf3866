"""Masks against the papers' numbers (areas, sides, positions), and mask images of all kinds and folders of them."""

from __future__ import annotations

import inspect
import io
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_prep import mask_shapes
from data_prep.images import PhotoError
from data_prep.mask_shapes import MASK_GENERATORS
from data_prep.masks import (
    MASK_KINDS,
    FolderMasks,
    fixed_masks,
    looks_inverted,
    make_mask,
    open_masks,
    read_mask,
)
from data_prep.sources import bundled_photo
from data_prep.storage import open_storage

SIZES = [(64, 64), (128, 128), (256, 256), (96, 160), (61, 91)]


def sample_masks(kind, height, width, number, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [make_mask(kind, height, width, rng, **options) for _ in range(number)]


def bounding_box(mask):
    """(top, left, height, width) of a mask that is one full rectangle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert mask.sum() == box[2] * box[3]
    return tuple(int(value) for value in box)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_every_kind_is_binary_seeded_and_has_hole_and_known_pixels(kind, size):
    masks, same_seed, other_seed = (sample_masks(kind, *size, 20, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(masks, same_seed))
    for mask in masks:
        assert mask.shape == size
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}
    is_random = any(not np.array_equal(a, b) for a, b in zip(masks, other_seed))
    assert is_random == (kind != "center")
    masks[0][:] = 0  # must not change a cached mask
    assert sample_masks(kind, *size, 1, 1)[0].any()


def test_center_is_the_context_encoders_square():
    """docs/papers.md 1.1: rows and columns 32..95 of 128; 1.4: the overlap leaves the inner square, (64 - 2 ov)^2."""
    (mask,) = sample_masks("center", 128, 128, 1)
    assert bounding_box(mask) == (32, 32, 64, 64)
    for overlap, frame in ((7, 1596), (4, 960)):
        (inner,) = sample_masks("center", 128, 128, 1, overlap=overlap)
        assert bounding_box(inner) == (32 + overlap, 32 + overlap, 64 - 2 * overlap, 64 - 2 * overlap)
        assert int(mask.sum()) - int(inner.sum()) == frame
    assert bounding_box(sample_masks("center", 64, 64, 1, overlap=4)[0]) == (18, 18, 28, 28)
    assert bounding_box(sample_masks("center", 64, 96, 1)[0]) == (16, 24, 32, 48)


def test_deepfill_box():
    """docs/papers.md 2.3: a 128 square, corner in 0..127, shrunk by U{0..16} from both ends: sides 96, 98, .. 128."""
    boxes = np.array([bounding_box(mask) for mask in sample_masks("box", 256, 256, 3000)])
    assert set(boxes[:, 2]) == set(boxes[:, 3]) == set(range(96, 129, 2))
    corners = boxes[:, :2] + boxes[:, 2:] // 2 - 64  # of the square before it was shrunk
    assert corners.min() == 0
    assert corners.max() == 127
    assert abs(corners.mean() - 63.5) < 4 * 37 / 3000**0.5
    assert {box[2:] for box in map(bounding_box, sample_masks("box", 256, 256, 20, delta=0))} == {(128, 128)}
    margin = np.array([bounding_box(mask) for mask in sample_masks("box", 256, 256, 500, delta=0, margin=20)])
    assert margin[:, :2].min() >= 20
    assert (margin[:, :2] + margin[:, 2:]).max() <= 236


def test_glcic_box():
    """docs/papers.md 5.3: one rectangle, each side uniform in 96..128."""
    boxes = np.array([bounding_box(mask) for mask in sample_masks("box", 256, 256, 3000, rule="glcic")])
    assert set(boxes[:, 2]) == set(boxes[:, 3]) == set(range(96, 129))
    assert abs(np.corrcoef(boxes[:, 2], boxes[:, 3])[0, 1]) < 0.1
    assert boxes[:, :2].min() == 0
    assert (boxes[:, 0] + boxes[:, 2]).max() == 256


@pytest.mark.parametrize("size", [32, 64, 128, 512])
def test_lengths_scale_with_the_image(size):
    """The hole covers the same fraction of the image at every size (an unscaled brush at 64 px would cover 45 %)."""
    for kind in MASK_KINDS:
        options = (
            {"resolution": 256} if "resolution" in inspect.signature(MASK_GENERATORS[kind]).parameters else {}
        )
        reference = np.mean([mask.mean() for mask in sample_masks(kind, 256, 256, 150, **options)])
        mean_area = np.mean([mask.mean() for mask in sample_masks(kind, size, size, 150, **options)])
        assert abs(mean_area - reference) < 0.03, kind


def test_edge_connect_block_and_half():
    """docs/papers.md 4.3: one square of half the side, 25 %; the left or the right half."""
    corners = set()
    for mask in sample_masks("block", 64, 64, 500):
        top, left, height, width = bounding_box(mask)
        assert (height, width) == (32, 32)
        corners |= {top, left}
    assert corners == set(range(33))
    halves = {bounding_box(mask) for mask in sample_masks("half", 64, 64, 30)}
    assert halves == {(0, 0, 64, 32), (0, 32, 64, 32)}


def test_several_blocks_cover_at_most_a_quarter():
    """docs/papers.md 1.4: several smaller, possibly overlapping blocks, up to 1/4 of the image."""
    areas = [mask.mean() for mask in sample_masks("block", 128, 128, 300, count=5)]
    assert max(areas) <= 0.25
    assert min(areas) >= 0.04


@pytest.mark.parametrize("size", SIZES)
def test_region_area(size):
    """docs/papers.md 1.3: only windows with more than 20 % and less than 30 % hole."""
    areas = np.array([mask.mean() for mask in sample_masks("region", *size, 300)])
    assert areas.min() > 0.2
    assert areas.max() < 0.3
    assert len({mask.tobytes() for mask in sample_masks("region", *size, 50)}) == 50


def test_region_pattern_follows_the_released_code():
    """600 x 600 uniform noise, resized bicubically (for 64 px: to 5000), thresholded at 1/4."""
    noise = np.random.default_rng(2016).random((600, 600), np.float32)
    expected = cv2.resize(noise, (5000, 5000), interpolation=cv2.INTER_CUBIC) < 0.25
    assert np.array_equal(mask_shapes._region_pattern(64), expected)


def test_region_windows_are_all_those_with_a_suitable_area():
    pattern = mask_shapes._region_pattern(64)
    corners = {tuple(corner) for corner in mask_shapes._region_corners(64, 64, 0.2, 0.3).tolist()}
    assert mask_shapes._region_pattern(64) is pattern  # cached
    rng = np.random.default_rng(0)
    for top, left in rng.integers(0, (5000 - 64) // 8 + 1, (500, 2)) * 8:
        area = pattern[top : top + 64, left : left + 64].mean()
        assert (0.2 < area < 0.3) == ((top, left) in corners)


@pytest.mark.parametrize("size", [128, 512])  # 128 has the largest pattern, 10,000 x 10,000 pixels
def test_region_masks_need_little_memory(size):
    """Peak memory of a process, of which Python, NumPy and OpenCV take 70 MB; the pattern as floats would take 400."""
    code = (
        "import numpy as np; from data_prep.masks import make_mask\n"
        f"make_mask('region', {size}, {size}, np.random.default_rng(0))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 300 * 1024  # KiB


@pytest.mark.parametrize("width", [12, 25, 39])
def test_brush_strokes_have_the_papers_width(width):
    """docs/papers.md 3.4: round joints as wide as the stroke; widths 12..39 by default (next test)."""
    for mask in sample_masks("brush", 256, 256, 30, strokes=1, min_width=width, max_width=width):
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width - 3, width - 3))
        inside = cv2.erode(mask, disc, borderType=cv2.BORDER_CONSTANT, borderValue=1)
        assert inside.any()
        opened = cv2.dilate(inside, disc)  # a stroke is a union of discs, except for a pixel on its border
        assert (mask & ~opened).mean() < 0.01


def test_brush_widths():
    """Single straight strokes that do not touch the border are 12 to 39 pixels wide."""
    widths = []
    for mask in sample_masks("brush", 256, 256, 200, strokes=1, min_vertices=1, max_vertices=1):
        depth = ndimage.distance_transform_edt(np.pad(mask, 40, "edge"))[40:-40, 40:-40]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if min(rows[0], columns[0]) > 0 and max(rows[-1], columns[-1]) < 255:
            widths.append(2 * depth.max())
    assert 11 <= min(widths) < 15
    assert 37 < max(widths) <= 42


def test_brush_covers_all_of_a_wide_image():
    """Width and height are not swapped: strokes reach the right end of a wide image."""
    coverage = np.sum(sample_masks("brush", 64, 256, 400), axis=0)
    assert (coverage > 0).mean() > 0.98
    assert coverage[:, 192:].mean() > 0.5 * coverage[:, :192].mean()


def test_box_and_brush_is_their_union():
    for mask, box in zip(sample_masks("box_and_brush", 256, 256, 1, 7), sample_masks("box", 256, 256, 1, 7)):
        assert (mask >= box).all()
    mean = np.mean([mask.mean() for mask in sample_masks("box_and_brush", 128, 128, 300)])
    means = [
        np.mean([mask.mean() for mask in sample_masks(kind, 128, 128, 300)]) for kind in ("box", "brush")
    ]
    assert max(means) < mean < sum(means)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_mask("brsh", 64, 64, np.random.default_rng()), "did you mean 'brush'"),
        (lambda: make_mask("box", 64, 64, np.random.default_rng(), sied=3), "did you mean 'side'"),
        (lambda: make_mask("half", 64, 64, np.random.default_rng(), side=3), "no options"),
        (lambda: make_mask("box", 64, 64, np.random.default_rng(), side="3"), "side is '3'"),
        (lambda: make_mask("box", 64, 64, np.random.default_rng(), side=300), "side, delta, margin"),
        (lambda: make_mask("box", 64, 64, np.random.default_rng(), rule="x"), "deepfill or glcic"),
        (lambda: make_mask("center", 64, 64, np.random.default_rng(), overlap=40), "overlap"),
        (
            lambda: make_mask("region", 64, 64, np.random.default_rng(), min_area=0.9, max_area=0.95),
            "no window",
        ),
        (lambda: make_mask("box", 4, 64, np.random.default_rng()), "at least 8"),
        (lambda: open_masks("boxx"), "did you mean 'box'"),
        (lambda: open_masks({"box": 0}), "weight 0"),
        (lambda: open_masks({"box": {"delta": -1}}), "delta"),
        (lambda: open_masks({}), "no kind"),
        (lambda: open_masks("no/such/folder"), "no mask images"),
    ],
)
def test_errors_name_the_kind_option_or_folder(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def encode(image: Image.Image, kind="PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def hole():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 15:40] = 1
    return mask


def test_read_mask_accepts_every_mode(hole, tmp_path):
    grey = Image.fromarray(hole * 255)
    images = [grey.convert(mode) for mode in ("1", "L", "RGB", "RGBA", "P", "CMYK", "I")]
    images += [Image.fromarray(hole.astype(np.uint16) * 65535), grey.convert("LA")]
    for image in images:
        kind = "PNG" if image.mode == "P" else "TIFF"
        assert np.array_equal(read_mask(encode(image, kind)), hole), image.mode
    (tmp_path / "mask.png").write_bytes(encode(grey))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), hole)
    assert np.array_equal(read_mask(encode(Image.fromarray(hole))), hole)  # 0 and 1
    assert np.array_equal(read_mask(encode(grey, "JPEG")), hole)  # grey borders are thresholded at half
    assert np.array_equal(read_mask(encode(grey), invert=True), 1 - hole)


def test_read_mask_uses_transparency(hole):
    strokes = np.zeros((*hole.shape, 4), np.uint8)
    strokes[hole == 1] = (200, 0, 0, 255)  # red strokes on a transparent layer
    assert np.array_equal(read_mask(encode(Image.fromarray(strokes))), hole)
    photo = bundled_photo("astronaut")[: hole.shape[0], : hole.shape[1]]
    erased = np.dstack([photo, (1 - hole) * np.uint8(255)])
    assert np.array_equal(read_mask(encode(Image.fromarray(erased))), hole)


def test_read_mask_dilates(hole):
    grown = read_mask(encode(Image.fromarray(hole * 255)), dilate=3)
    distance = ndimage.distance_transform_edt(1 - hole)
    assert grown[distance <= 2.5].all()
    assert not grown[distance > 3.1].any()


def test_read_mask_refuses_other_files():
    with pytest.raises(PhotoError, match="not an image"):
        read_mask(b"text")


def test_inverted_masks_are_detected():
    for kind in ("center", "box", "region", "brush"):
        masks = sample_masks(kind, 256, 256, 50)
        assert not any(looks_inverted(mask) for mask in masks)
        assert all(looks_inverted(1 - mask) for mask in masks)
    assert looks_inverted(np.ones((64, 64), np.uint8))
    assert not looks_inverted(np.zeros((64, 64), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Thirty brush masks of 128 pixels, white = hole, and a text file."""
    for number, mask in enumerate(sample_masks("brush", 128, 128, 30)):
        Image.fromarray(mask * 255).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "LICENSE.txt").write_text("free")
    return tmp_path


def test_folder_of_masks(folder):
    source = open_masks(str(folder))
    assert source.describe() == f"30 masks of {folder} (white = hole)"
    originals = {read_mask(path).tobytes() for path in folder.glob("*.png")}
    samples = {source.sample(128, 128, np.random.default_rng(n)).tobytes() for n in range(300)}
    assert samples == originals
    small = source.sample(32, 48, np.random.default_rng(0))
    assert small.shape == (32, 48)
    assert set(np.unique(small)) <= {0, 1}
    assert pickle.loads(pickle.dumps(source)) == source


def test_folder_polarity_is_inferred_from_the_masks(folder):
    expected = fixed_masks(str(folder), 64, 64, 5, 0)
    for path in folder.glob("*.png"):
        Image.fromarray((1 - read_mask(path)) * 255).save(path)
    source = open_masks(str(folder))
    assert "black = hole" in source.describe()
    assert all(np.array_equal(a, b) for a, b in zip(source.fixed_set(64, 64, 5, 0), expected))
    white = open_masks({str(folder): {"invert": False}})
    assert all(np.array_equal(a, 1 - b) for a, b in zip(white.fixed_set(64, 64, 5, 0), expected))


def test_folder_options(folder, s3):
    in_range = open_masks({str(folder): {"band": [0.1, 0.2]}})
    assert isinstance(in_range, FolderMasks)
    for name in in_range.names:
        assert 0.1 < read_mask(folder / name).mean() <= 0.2
    assert 0 < len(in_range.names) < 30
    with pytest.raises(ValueError, match="90%"):
        open_masks({str(folder): {"band": [0.9, 1.0]}})
    with pytest.raises(ValueError, match="did you mean 'invert'"):
        open_masks({str(folder): {"inverted": True}})
    augmented = open_masks({str(folder): {"augment": True}})
    samples = {augmented.sample(64, 64, np.random.default_rng(n)).tobytes() for n in range(1500)}
    assert len(samples) > 200  # eight orientations of thirty masks
    bucket = open_storage(s3)
    for path in folder.glob("*.png"):
        bucket.write(f"masks/{path.name}", path.read_bytes())
    remote, local = (fixed_masks(uri, 64, 64, 4, 1) for uri in (f"{s3}/masks", str(folder)))
    assert all(np.array_equal(a, b) for a, b in zip(remote, local))


def test_a_damaged_mask_is_named(folder):
    (folder / "07.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mask 07.png in .* empty"):
        open_masks(str(folder))


def test_mixtures_follow_their_weights():
    source = open_masks({"half": 3, "block": {"count": 1, "weight": 1}})
    assert source.describe() == "half 75%, block (count 1) 25%"
    rng = np.random.default_rng(0)
    halves = sum(source.sample(64, 64, rng).mean() == 0.5 for _ in range(1000))
    assert abs(halves - 750) < 4 * (1000 * 0.75 * 0.25) ** 0.5


def test_fixed_masks_are_a_function_of_their_arguments(folder):
    for spec in ("brush", "region", {"box": 1, "half": 1}, str(folder)):
        first, same_seed, other_seed = (fixed_masks(spec, 64, 64, 12, seed) for seed in (3, 3, 4))
        assert all(np.array_equal(a, b) for a, b in zip(first, same_seed))
        assert any(not np.array_equal(a, b) for a, b in zip(first, other_seed))
        fewer = fixed_masks(spec, 64, 64, 5, 3)
        assert all(np.array_equal(a, b) for a, b in zip(first, fewer))
    all_masks = fixed_masks(str(folder), 128, 128, 30, 0)
    assert len({mask.tobytes() for mask in all_masks}) == 30
    assert len(fixed_masks(str(folder), 128, 128, 45, 0)) == 45
