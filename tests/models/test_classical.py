"""Classical baselines: docs/papers.md 7.3."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage.data

from models.classical import METHODS, inpaint

every_method = pytest.mark.parametrize("method", METHODS)


def square_mask(height: int = 40, width: int = 56) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[12:28, 20:36] = 1
    return mask


def photograph() -> np.ndarray:
    return skimage.data.chelsea()[30:286:4, 100:356:4].copy()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@every_method
def test_a_constant_stays_constant(method) -> None:
    image = np.full((40, 56, 3), (10, 130, 250), np.uint8)
    assert np.abs(inpaint(image, square_mask(), method).astype(int) - image).max() <= 1


@pytest.mark.parametrize("method", ["telea", "navier_stokes"])  # patchmatch only copies patches
def test_a_linear_ramp_continues_into_the_hole(method) -> None:
    image = np.repeat(np.linspace(100, 155, 56)[None, :, None], 40, 0).repeat(3, 2).astype(np.uint8)
    error = np.abs(inpaint(image, square_mask(), method).astype(int) - image)[square_mask() > 0]
    assert error.mean() <= 2  # the ramp rises 16 levels across the hole


@every_method
@pytest.mark.parametrize("corner", [(12, 20), (0, 0), (30, 46)])
def test_known_pixels_do_not_change_and_the_hole_is_not_read(method, corner) -> None:
    image = noise(40, 56)
    mask = np.zeros((40, 56), np.uint8)
    top, left = corner
    mask[top : top + 10, left : left + 10] = 255
    filled = inpaint(image, mask, method)
    assert filled.dtype == np.uint8
    assert (filled[mask == 0] == image[mask == 0]).all()
    other = image.copy()
    other[mask > 0] = 255 - other[mask > 0]
    assert (inpaint(other, mask, method) == filled).all()


@every_method
def test_an_empty_hole_and_a_hole_of_everything(method) -> None:
    image = noise(20, 20)
    assert (inpaint(image, np.zeros((20, 20), np.uint8), method) == image).all()
    assert (inpaint(image, np.ones((20, 20), np.uint8), method) == 128).all()


@every_method
def test_wrong_arguments_are_refused(method) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="there are telea, navier_stokes, patchmatch"):
        inpaint(image, image[..., 0], method + "2")
    with pytest.raises(ValueError, match=r"mask \[H,W\]"):
        inpaint(image, image, method)


def test_patchmatch_continues_a_periodic_texture_and_telea_does_not() -> None:
    y, x = np.mgrid[:96, :96]
    wave = 128 + 60 * np.sin(2 * np.pi * x / 16) + 60 * np.sin(2 * np.pi * y / 12)
    image = np.stack([wave, 255 - wave, wave / 2], 2).round().astype(np.uint8)
    mask = np.zeros((96, 96), np.uint8)
    mask[32:64, 32:64] = 1
    telea, patchmatch = (
        np.square(inpaint(image, mask, method).astype(float) - image)[mask > 0].mean()
        for method in ("telea", "patchmatch")
    )
    assert patchmatch < telea / 10


def test_patchmatch_is_deterministic_across_threads_and_processes(capfd, tmp_path) -> None:
    image = photograph()
    masks = np.stack(
        [np.roll(np.pad(np.ones((16, 16), np.uint8), ((8, 40), (8, 40))), 6 * n) for n in range(4)]
    )
    first = np.stack([inpaint(image, mask, "patchmatch") for mask in masks])
    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(first, [*pool.map(lambda mask: inpaint(image, mask, "patchmatch"), masks)])
    assert capfd.readouterr() == ("", "")
    np.savez(tmp_path / "inputs.npz", image=image, masks=masks)
    run_python(
        """
        from patchmatch import patch_match
        inputs = np.load("inputs.npz")
        patch_match.set_random_seed(99)
        other_seed = patch_match.inpaint(inputs["image"], inputs["masks"][0], patch_size=3)
        filled = [inpaint(inputs["image"], mask, "patchmatch") for mask in inputs["masks"]]
        assert (other_seed != filled[0]).any()
        np.save("filled.npy", np.stack(filled))
        """,
        tmp_path,
    )
    assert np.array_equal(np.load(tmp_path / "filled.npy"), first)


def test_patchmatch_fills_or_refuses_photographs_and_holes_of_every_size(tmp_path) -> None:
    """In another process: a crash in the C library would end it. Images are constant, so the result is known."""
    output = run_python(
        """
        filled = refused = 0
        rng = np.random.default_rng(0)
        sizes = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (4, 7), (7, 8), (8, 8), (8, 40), (9, 13), (33, 47)]
        for (h, w), radius in itertools.product(sizes, (0.4, 1, 2, 3, 7)):
            pixel, corner, edge, ring, half, all_but_one, random = holes = np.zeros((7, h, w), bool)
            pixel[h // 2, w // 2] = corner[0, 0] = edge[: h // 3] = half[:, : w // 2] = True
            ring[[0, -1]] = ring[:, [0, -1]] = True
            all_but_one[:] = True
            all_but_one[-1, -1] = False
            random[:] = rng.random((h, w)) < 0.7
            image = np.full((h, w, 3), (10, 130, 250), np.uint8)
            for hole in holes:
                if hole.all():
                    continue
                try:
                    result = inpaint(image, hole, "patchmatch", radius)
                except ValueError as error:
                    assert "patchmatch cannot fill a hole of" in str(error)
                    refused += 1
                    assert min(h, w) < 9 or hole.mean() > 0.9 or radius == 7
                else:
                    assert np.abs(result.astype(int) - image).max() <= 1, (h, w, radius, hole)
                    filled += 1
        print(filled, refused)
        """,
        tmp_path,
    )
    filled, refused = map(int, output.split())
    assert filled > refused > 0


def run_python(program: str, folder: Path) -> str:
    root = Path(__file__).parents[2]
    head = "import itertools, numpy as np\nfrom models.classical import inpaint\n"
    run = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
