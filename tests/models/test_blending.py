"""Poisson blending: the known results of docs/papers.md 5.6, borders, and the equation."""

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


def boxes_mask(shape: tuple[int, ...], *boxes: tuple[int, int, int, int]) -> np.ndarray:
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


def noise(shape: tuple[int, ...], high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(np.uint8)


@every_hole
def test_a_prediction_equal_to_the_photograph_returns_it(photo, boxes) -> None:
    assert np.array_equal(poisson_blend(photo, photo, boxes_mask(photo.shape, *boxes)), photo)


@every_hole
def test_a_constant_offset_is_removed(photo, boxes) -> None:
    image = (photo // 2 + 40).astype(np.uint8)  # so that the offset does not overflow
    for offset in (25, -30):
        filled = (image.astype(int) + offset).astype(np.uint8)
        assert np.array_equal(poisson_blend(image, filled, boxes_mask(image.shape, *boxes)), image)


@pytest.mark.parametrize("is_composite", [False, True])
@every_hole
def test_known_pixels_do_not_change_and_the_hole_is_not_read(photo, boxes, is_composite) -> None:
    mask, filled = boxes_mask(photo.shape, *boxes), noise(photo.shape)
    other = np.where(mask[..., None] > 0, noise(photo.shape, 9), photo)
    blended = poisson_blend(photo, filled, mask, is_composite=is_composite)
    assert blended.dtype == np.uint8
    assert np.array_equal(blended[mask == 0], photo[mask == 0])
    assert np.array_equal(
        poisson_blend(other, filled, mask, is_composite=is_composite)[mask > 0], blended[mask > 0]
    )


@every_hole
def test_the_result_solves_the_poisson_equation(photo, boxes) -> None:
    """A pixel's differences to its neighbours are those of `filled`, on average over the existing neighbours."""
    mask = boxes_mask(photo.shape, *boxes)
    image, filled = (90 + noise(photo.shape, 50)), (90 + noise(photo.shape, 40))
    blended = poisson_blend(image, filled, mask).astype(int)
    height, width = mask.shape
    worst = 0
    for y, x in np.argwhere(mask):
        residual, degree = np.zeros(3), 0
        for v, u in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            if 0 <= v < height and 0 <= u < width:  # Neumann at the image's border: no term
                difference = filled[y, x].astype(int) - filled[v, u].astype(int)
                residual += blended[y, x] - blended[v, u] - difference
                degree += 1
        worst = max(worst, np.abs(residual).max() / degree)
    assert worst <= 1  # each value is rounded by up to half a level


def test_the_images_border_is_neumann() -> None:
    """A hole of full height between columns of 100 and 160: the result is a ramp, the same in each row."""
    image = np.full((20, 32, 3), 100, np.uint8)
    image[:, 21:] = 160
    blended = poisson_blend(image, np.full_like(image, 7), boxes_mask(image.shape, (0, 20, 2, 21)))
    expected = np.round(100 + 60 * (np.arange(2, 21) - 1) / 20)
    assert np.array_equal(blended[:, 2:21], np.broadcast_to(expected[None, :, None], (20, 19, 3)))


def test_a_hole_at_the_border_takes_the_level_of_its_known_side() -> None:
    image = np.full((20, 32, 3), 100, np.uint8)
    blended = poisson_blend(image, np.full_like(image, 240), boxes_mask(image.shape, (0, 20, 12, 32)))
    assert np.array_equal(blended, image)


@pytest.mark.parametrize("is_composite", [False, True])
def test_a_hole_of_everything_or_of_nothing(photo, is_composite) -> None:
    filled, mask = noise(photo.shape), np.ones(photo.shape[:2], np.uint8)
    assert np.array_equal(poisson_blend(photo, filled, mask, is_composite=is_composite), filled)
    assert np.array_equal(poisson_blend(photo, filled, mask * 0, is_composite=is_composite), photo)


def test_any_nonzero_mask_value_is_hole(photo) -> None:
    mask, filled = boxes_mask(photo.shape, *HOLES["two"]), noise(photo.shape)
    blended = poisson_blend(photo, filled, mask)
    assert np.array_equal(poisson_blend(photo, filled, mask * 255), blended)
    assert np.array_equal(poisson_blend(photo, filled, mask > 0), blended)


def test_separate_holes_are_blended_independently(photo) -> None:
    filled, (one, two) = noise(photo.shape), HOLES["two"]
    both = poisson_blend(photo, filled, boxes_mask(photo.shape, one, two))
    for box in (one, two):
        region = slice(*box[:2]), slice(*box[2:])
        assert np.array_equal(
            both[region], poisson_blend(photo, filled, boxes_mask(photo.shape, box))[region]
        )


# -- is_composite: outside the hole `filled` is the photograph -------------------------------------------------


def composite(image: np.ndarray, mask: np.ndarray, offset: int) -> np.ndarray:
    return np.where(mask[..., None] > 0, image.astype(int) + offset, image).astype(np.uint8)


COMPOSITE_HOLES = (
    [(20, 40, 24, 50)],
    [(0, 20, 10, 40)],
    [(30, 48, 40, 56)],
    [(10, 30, 0, 56)],
    [(20, 21, 20, 50)],
)


@pytest.mark.parametrize("boxes", COMPOSITE_HOLES)
@pytest.mark.parametrize("offset", [0, 25, -9])
def test_in_a_composite_an_offset_of_a_smooth_image_is_removed(ramp, boxes, offset) -> None:
    mask = boxes_mask(ramp.shape, *boxes)
    filled = composite(ramp, mask, offset)
    assert np.array_equal(poisson_blend(ramp, filled, mask, is_composite=True), ramp)
    # without is_composite there is nothing to blend
    assert np.array_equal(poisson_blend(ramp, filled, mask), filled)


def test_in_a_composite_most_of_an_offset_of_a_photograph_is_removed(photo) -> None:
    image = (photo // 2 + 40).astype(np.uint8)
    mask = boxes_mask(image.shape, *HOLES["inside"])
    inside = mask > 0

    def error(filled: np.ndarray) -> float:
        return float(np.abs(filled[inside].astype(int) - image[inside]).mean())

    filled = composite(image, mask, 40)
    assert error(filled) == 40
    assert error(poisson_blend(image, filled, mask, is_composite=True)) < 4
    assert error(poisson_blend(image, image, mask, is_composite=True)) < 4


@pytest.mark.parametrize(
    ("image", "filled", "mask"),
    [
        ((8, 8, 3), (8, 8, 3), (8, 9)),
        ((8, 8, 3), (8, 9, 3), (8, 8)),
        ((8, 8), (8, 8), (8, 8)),
        ((8, 8, 4), (8, 8, 4), (8, 8)),
    ],
)
def test_arrays_of_wrong_shapes_are_refused(image, filled, mask) -> None:
    with pytest.raises(ValueError, match="image and filled uint8"):
        poisson_blend(*(np.ones(shape, np.uint8) for shape in (image, filled, mask)))


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        poisson_blend(np.zeros((8, 8, 3)), np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8))
