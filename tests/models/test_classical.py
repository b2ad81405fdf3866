"""Classical baselines: papers.md 7.3."""

from __future__ import annotations

import numpy as np
import pytest

from models.classical import METHODS, inpaint

pytestmark = pytest.mark.parametrize("method", METHODS)


def hole(height: int = 40, width: int = 56) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[12:28, 20:36] = 1
    return mask


def test_a_constant_stays_constant(method) -> None:
    image = np.full((40, 56, 3), (10, 130, 250), np.uint8)
    assert np.abs(inpaint(image, hole(), method).astype(int) - image).max() <= 1


def test_a_linear_ramp_is_continued(method) -> None:
    image = np.repeat(np.linspace(100, 155, 56)[None, :, None], 40, 0).repeat(3, 2).astype(np.uint8)
    error = np.abs(inpaint(image, hole(), method).astype(int) - image)[hole() > 0]
    assert error.mean() <= 2  # the ramp rises 16 levels across the hole


@pytest.mark.parametrize("place", [(12, 20), (0, 0), (30, 46)])
def test_known_pixels_stay_and_the_hole_is_not_read(method, place) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    mask = np.zeros((40, 56), np.uint8)
    mask[place[0] : place[0] + 10, place[1] : place[1] + 10] = 255
    done = inpaint(image, mask, method)
    assert done.dtype == np.uint8
    assert (done[mask == 0] == image[mask == 0]).all()
    other = image.copy()
    other[mask > 0] = 255 - other[mask > 0]
    assert (inpaint(other, mask, method) == done).all()


def test_nothing_missing_and_nothing_known(method) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert (inpaint(image, np.zeros((20, 20), np.uint8), method) == image).all()
    assert (inpaint(image, np.ones((20, 20), np.uint8), method) == 128).all()


def test_wrong_arguments_are_named(method) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="there are telea, navier_stokes"):
        inpaint(image, image[..., 0], method + "2")
    with pytest.raises(ValueError, match=r"mask \[H,W\]"):
        inpaint(image, image, method)
