"""LaMa's and MAT's masks against the numbers of their released generators (docs/papers.md, 9)."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy import ndimage

from data_prep import mask_benchmarks
from data_prep.mask_strokes import irregular_strokes
from data_prep.masks import check_mask_spec, make_mask, open_masks

# kind, resolution -> mean, 5 %, median and 95 % quantile of the hole area in per cent, of 1000 masks (LaMa) and 2000
# (MAT) that the released generators drew
RELEASED_AREAS = {
    ("lama_thin", 256): (28.9, 7.6, 29.8, 47.8),
    ("lama_thin", 512): (28.9, 6.4, 30.3, 47.5),
    ("lama_medium", 256): (24.3, 2.0, 27.0, 43.5),
    ("lama_medium", 512): (27.4, 3.6, 28.9, 47.8),
    ("lama_thick", 256): (27.3, 5.9, 27.8, 48.0),
    ("lama_thick", 512): (26.4, 3.5, 26.8, 46.8),
    ("mat_small", 256): (22.0, 2.5, 20.0, 49.7),
    ("mat_small", 512): (22.1, 3.2, 19.4, 50.2),
    ("mat_large", 256): (41.4, 8.7, 42.6, 71.8),
    ("mat_large", 512): (39.9, 10.0, 39.7, 70.2),
}


def areas_of(kind: str, size: int, count: int, **options: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([make_mask(kind, size, size, rng, **options).mean() for _ in range(count)])


@pytest.mark.parametrize(("kind", "resolution"), RELEASED_AREAS)
def test_hole_areas_are_those_of_the_released_generator(kind: str, resolution: int) -> None:
    count = 400
    areas = 100 * areas_of(kind, resolution, count)
    mean, low, median, high = RELEASED_AREAS[kind, resolution]
    error = areas.std() * (1 / count + 1 / 1000) ** 0.5  # of the difference of the two means
    assert abs(areas.mean() - mean) < 4 * error
    assert abs(np.median(areas) - median) < 6 * error
    assert abs(np.quantile(areas, 0.05) - low) < 3
    assert abs(np.quantile(areas, 0.95) - high) < 5


@pytest.mark.parametrize("kind", ["thin", "medium", "thick"])
def test_half_the_image_is_lamas_limit_of_a_hole(kind: str) -> None:
    """docs/papers.md 9.1: of thick masks 34.5 % are dropped, at 512 pixels 45.7 %; no limit keeps all of them."""
    assert areas_of(f"lama_{kind}", 256, 200).max() <= 0.5
    all_areas = areas_of(f"lama_{kind}", 256, 600, max_area=1)
    if kind == "thick":
        assert abs((all_areas > 0.5).mean() - 0.345) < 4 * (0.345 * 0.655 / 600) ** 0.5
        large = areas_of("lama_thick", 512, 300, max_area=1)
        assert abs((large > 0.5).mean() - 0.457) < 4 * (0.457 * 0.543 / 300) ** 0.5


def test_three_of_thirteen_medium_and_thick_masks_are_rectangles(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/papers.md 9.1: 1 : 0.3; a mask has either lines or rectangles, and no thin one has rectangles."""
    counts = {"lines": 0, "boxes": 0}

    def count(name: str, mask: np.ndarray) -> np.ndarray:
        counts[name] += 1
        return mask

    one = np.eye(64, dtype=np.uint8)
    monkeypatch.setattr(mask_benchmarks, "irregular_strokes", lambda *args: count("lines", one))
    monkeypatch.setattr(mask_benchmarks, "_lama_boxes", lambda *args: count("boxes", one))
    areas_of("lama_thin", 64, 300)
    assert counts == {"lines": 300, "boxes": 0}
    areas_of("lama_thick", 64, 3000)
    assert abs(counts["boxes"] / 3000 - 0.3 / 1.3) < 4 * (0.2308 * 0.7692 / 3000) ** 0.5


def test_lama_boxes_have_the_published_sides_numbers_and_margin() -> None:
    """Thick, 256 pixels: 1 to 3 rectangles with sides of 30 to 150 at least 10 pixels from the border."""
    config, rng = mask_benchmarks._LAMA["thick", 256], np.random.default_rng(0)
    sides, numbers = set(), set()
    for _ in range(2000):
        mask = mask_benchmarks._lama_boxes(256, 256, rng, config, 1.0)
        assert not mask[:10].any()
        assert not mask[-10:].any()
        assert not mask[:, :10].any()
        assert not mask[:, -10:].any()
        labels, number = ndimage.label(mask)
        numbers.add(number)
        for box in ndimage.find_objects(labels):
            height, width = (part.stop - part.start for part in box)
            if mask[box].all():  # not a union of overlapping ones
                sides |= {height, width}
    assert numbers == {1, 2, 3}
    assert (min(sides), max(sides)) == (30, 150)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_irregular_lines_have_the_published_angles_lengths_and_widths(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """docs/papers.md 9.1: angles of 0.01 + {0, 1, 2, 3} radians, negative on lines 0, 2 ..; 1 to 5 segments per line."""
    drawn: list[tuple[tuple[int, int], tuple[int, int], int]] = []
    monkeypatch.setattr(
        cv2, "line", lambda mask, start, end, color, thickness: drawn.append((start, end, thickness))
    )
    rng, side = np.random.default_rng(0), 256
    lengths, thicknesses, angles, segments = [], [], {0: [], 1: []}, []
    for _ in range(1500):
        drawn.clear()
        irregular_strokes(side, side, rng, 2, 10, 40, scale)
        begins = [n for n, (start, _, _) in enumerate(drawn) if n == 0 or start != drawn[n - 1][1]]
        if len(begins) != 2:  # one line happens to begin at the end of the other
            continue
        segments += [begins[1], len(drawn) - begins[1]]
        for n, ((x, y), (end_x, end_y), thickness) in enumerate(drawn):
            thicknesses.append(thickness)
            if 0 < end_x < side and 0 < end_y < side:  # the others end at the border
                lengths.append(np.hypot(end_x - x, end_y - y))
                if lengths[-1] > 20 * scale:
                    angles[int(n >= begins[1])].append(np.arctan2(end_x - x, end_y - y))
    assert set(segments) == {1, 2, 3, 4, 5}
    assert set(thicknesses) == {max(1, round(scale * n)) for n in range(5, 15)}
    assert abs(min(lengths) - 10 * scale) < 2
    assert abs(max(lengths) - 49 * scale) < 2
    for line, sign in ((0, -1), (1, 1)):
        expected = np.angle(np.exp(1j * sign * (0.01 + np.arange(4))))
        distance = np.abs(np.angle(np.exp(1j * (np.array(angles[line])[:, None] - expected))))
        assert distance.min(1).max() < 0.15  # an end is truncated to whole pixels
        assert set(distance.argmin(1)) == {0, 1, 2, 3}


def test_mat_rectangles_are_counted_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 pixels, large: 0 to 4 rectangles up to half the side, 0 to 2 up to the side, 0 to 8 lines; small: 2, 1, 3."""
    seen: dict[str, list[int]] = {"half": [], "whole": [], "lines": []}
    per_mask = {"half": 0, "whole": 0}

    def rectangle(mask: np.ndarray, rng: np.random.Generator, part: int) -> None:
        per_mask["half" if part == 2 else "whole"] += 1

    def lines(*args: object) -> np.ndarray:
        seen["lines"].append(args[3])  # type: ignore[arg-type]
        for name in ("half", "whole"):
            seen[name].append(per_mask[name])
            per_mask[name] = 0
        return np.eye(512, dtype=np.uint8)

    monkeypatch.setattr(mask_benchmarks, "_fill_rectangle", rectangle)
    monkeypatch.setattr(mask_benchmarks, "zigzag_strokes", lines)
    for kind, expected in (("mat_large", (4, 2, 8)), ("mat_small", (2, 1, 3))):
        for values in seen.values():
            values.clear()
        areas_of(kind, 512, 300)
        assert tuple(max(seen[name]) for name in ("half", "whole", "lines")) == expected
        assert all(set(values) == set(range(max(values) + 1)) for values in seen.values())


def test_the_configuration_follows_the_size_of_the_image() -> None:
    for kind in ("lama_thick", "mat_large"):
        for size, resolution in ((256, 256), (511, 256), (512, 512), (640, 512)):
            chosen, named = (
                make_mask(kind, size, size, np.random.default_rng(1), resolution=value)
                for value in (0, resolution)
            )
            assert np.array_equal(chosen, named)
        one, other = (
            make_mask(kind, 512, 512, np.random.default_rng(1), resolution=value) for value in (256, 512)
        )
        assert not np.array_equal(one, other)


def test_an_area_range_is_kept() -> None:
    areas = areas_of("mat_large", 64, 200, min_area=0.2, max_area=0.3)
    assert areas.min() > 0.2
    assert areas.max() < 0.3


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("lama_thin", {"max_area": 0}, "max_area 0: above 0, at most 1"),
        ("lama_thick", {"resolution": 128}, "resolution 128: 256, 512, or 0"),
        ("lama_thick", {"max_area": 1e-6}, "none of 1000 masks has so little hole"),
        ("mat_small", {"min_area": 0.6, "max_area": 0.5}, "0 <= min_area < max_area <= 1"),
        ("mat_small", {"min_area": 0.9999}, "none of 1000 masks has such an area"),
        ("mat_large", {"min_aera": 0.1}, "did you mean 'min_area'"),
    ],
)
def test_errors_name_the_option(kind: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        make_mask(kind, 64, 64, np.random.default_rng(0), **options)
    assert "\n" not in str(error.value)


def test_they_are_masks_for_training() -> None:
    spec = {"lama_thick": {"max_area": 1, "weight": 2}, "mat_small": 1, "lama_thin": {"resolution": 512}}
    check_mask_spec(spec, 64)
    source = open_masks(spec)
    masks = [source.sample(64, 64, np.random.default_rng(n)) for n in range(30)]
    assert {mask.tobytes() for mask in masks} == {
        source.sample(64, 64, np.random.default_rng(n)).tobytes() for n in range(30)
    }
    assert all(mask.any() and not mask.all() for mask in masks)
