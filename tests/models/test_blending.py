"""Poisson blending: the oracles of papers.md 5.6, borders, and the equation itself."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data

from models.blending import poisson_blend


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[20:84, 180:260])


@pytest.fixture(scope="module")
def ramp() -> np.ndarray:
    y, x = np.mgrid[:48, :56]
    return np.stack([40 + 2 * x, 30 + 2 * y, 200 - x - y], axis=2).astype(np.uint8)


def hole(shape: tuple[int, ...], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(shape[:2], np.uint8)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = 1
    return mask


HOLES = {
    "inside": [(20, 40, 24, 50)],
    "one pixel": [(20, 21, 24, 25)],
    "two": [(4, 12, 4, 30), (20, 40, 24, 50)],
    "border": [(0, 20, 10, 40)],
    "corner": [(30, 64, 40, 80)],
    "one pixel inside the border": [(1, 20, 1, 40)],
    "all but a corner": [(0, 64, 1, 80), (1, 64, 0, 80)],
    "across": [(10, 30, 0, 80)],
}
every_hole = pytest.mark.parametrize("boxes", HOLES.values(), ids=HOLES.keys())


def noise(shape: tuple[int, ...], most: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, most, shape).astype(np.uint8)


@every_hole
def test_a_prediction_that_is_the_photograph_gives_it_back(photo, boxes) -> None:
    assert np.array_equal(poisson_blend(photo, photo, hole(photo.shape, *boxes)), photo)


@every_hole
def test_a_constant_offset_is_removed(photo, boxes) -> None:
    image = (photo // 2 + 40).astype(np.uint8)  # room for the offset
    for offset in (25, -30):
        filled = (image.astype(int) + offset).astype(np.uint8)
        assert np.array_equal(poisson_blend(image, filled, hole(image.shape, *boxes)), image)


@pytest.mark.parametrize("composed", [False, True])
@every_hole
def test_known_pixels_stay_and_the_holes_contents_are_not_read(photo, boxes, composed) -> None:
    mask, filled = hole(photo.shape, *boxes), noise(photo.shape)
    other = np.where(mask[..., None] > 0, noise(photo.shape, 9), photo)
    blended = poisson_blend(photo, filled, mask, composed=composed)
    assert blended.dtype == np.uint8
    assert np.array_equal(blended[mask == 0], photo[mask == 0])
    assert np.array_equal(poisson_blend(other, filled, mask, composed=composed)[mask > 0], blended[mask > 0])


@every_hole
def test_the_result_solves_the_poisson_equation(photo, boxes) -> None:
    """The differences to a pixel's neighbours are those of `filled`, on average over the neighbours there are."""
    mask = hole(photo.shape, *boxes)
    image, filled = (90 + noise(photo.shape, 50)), (90 + noise(photo.shape, 40))
    blended = poisson_blend(image, filled, mask).astype(int)
    height, width = mask.shape
    worst = 0
    for y, x in np.argwhere(mask):
        residual, degree = np.zeros(3), 0
        for v, u in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            if 0 <= v < height and 0 <= u < width:  # Neumann at the image's border: no term
                wanted = filled[y, x].astype(int) - filled[v, u].astype(int)
                residual += blended[y, x] - blended[v, u] - wanted
                degree += 1
        worst = max(worst, np.abs(residual).max() / degree)
    assert worst <= 1  # each of the values is rounded by half a level


def test_at_the_images_border_nothing_is_fixed() -> None:
    """A hole across the whole height between columns of 100 and 160: a ramp, the same in every row."""
    image = np.full((20, 32, 3), 100, np.uint8)
    image[:, 21:] = 160
    blended = poisson_blend(image, np.full_like(image, 7), hole(image.shape, (0, 20, 2, 21)))
    expected = np.round(100 + 60 * (np.arange(2, 21) - 1) / 20)
    assert np.array_equal(blended[:, 2:21], np.broadcast_to(expected[None, :, None], (20, 19, 3)))


def test_a_hole_open_to_one_side_takes_the_other_sides_level() -> None:
    image = np.full((20, 32, 3), 100, np.uint8)
    blended = poisson_blend(image, np.full_like(image, 240), hole(image.shape, (0, 20, 12, 32)))
    assert np.array_equal(blended, image)


@pytest.mark.parametrize("composed", [False, True])
def test_a_hole_that_covers_everything_or_nothing(photo, composed) -> None:
    filled, mask = noise(photo.shape), np.ones(photo.shape[:2], np.uint8)
    assert np.array_equal(poisson_blend(photo, filled, mask, composed=composed), filled)
    assert np.array_equal(poisson_blend(photo, filled, mask * 0, composed=composed), photo)


def test_any_mark_that_is_not_zero_is_hole(photo) -> None:
    mask, filled = hole(photo.shape, *HOLES["two"]), noise(photo.shape)
    once = poisson_blend(photo, filled, mask)
    assert np.array_equal(poisson_blend(photo, filled, mask * 255), once)
    assert np.array_equal(poisson_blend(photo, filled, mask > 0), once)


def test_holes_apart_are_blended_as_if_alone(photo) -> None:
    filled, (one, two) = noise(photo.shape), HOLES["two"]
    both = poisson_blend(photo, filled, hole(photo.shape, one, two))
    for box in (one, two):
        part = slice(*box[:2]), slice(*box[2:])
        assert np.array_equal(both[part], poisson_blend(photo, filled, hole(photo.shape, box))[part])


# -- composed: what completes returns the photograph outside the hole --------------------------------------------


def composite(image: np.ndarray, mask: np.ndarray, offset: int) -> np.ndarray:
    return np.where(mask[..., None] > 0, image.astype(int) + offset, image).astype(np.uint8)


COMPOSED_HOLES = (
    [(20, 40, 24, 50)],
    [(0, 20, 10, 40)],
    [(30, 48, 40, 56)],
    [(10, 30, 0, 56)],
    [(20, 21, 20, 50)],
)


@pytest.mark.parametrize("boxes", COMPOSED_HOLES)
@pytest.mark.parametrize("offset", [0, 25, -9])
def test_composed_an_offset_of_a_smooth_picture_is_removed(ramp, boxes, offset) -> None:
    mask = hole(ramp.shape, *boxes)
    filled = composite(ramp, mask, offset)
    assert np.array_equal(poisson_blend(ramp, filled, mask, composed=True), ramp)
    # taken as the network's own output everywhere, a composite has nothing to blend
    assert np.array_equal(poisson_blend(ramp, filled, mask), filled)


def test_composed_most_of_an_offset_of_a_photograph_is_removed(photo) -> None:
    image = (photo // 2 + 40).astype(np.uint8)
    mask = hole(image.shape, *HOLES["inside"])
    inside = mask > 0

    def error(filled: np.ndarray) -> float:
        return float(np.abs(filled[inside].astype(int) - image[inside]).mean())

    filled = composite(image, mask, 40)
    assert error(filled) == 40
    assert error(poisson_blend(image, filled, mask, composed=True)) < 4
    assert error(poisson_blend(image, image, mask, composed=True)) < 4


@pytest.mark.parametrize(
    ("image", "filled", "mask"),
    [
        ((8, 8, 3), (8, 8, 3), (8, 9)),
        ((8, 8, 3), (8, 9, 3), (8, 8)),
        ((8, 8), (8, 8), (8, 8)),
        ((8, 8, 4), (8, 8, 4), (8, 8)),
    ],
)
def test_arrays_that_do_not_go_together_are_named(image, filled, mask) -> None:
    with pytest.raises(ValueError, match="image and filled uint8"):
        poisson_blend(*(np.ones(shape, np.uint8) for shape in (image, filled, mask)))


def test_floats_are_named() -> None:
    with pytest.raises(ValueError, match="float64"):
        poisson_blend(np.zeros((8, 8, 3)), np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8))
