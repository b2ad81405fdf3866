"""The warnings of a fill: tiles larger than in training, and a visible seam."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.sources import bundled_photo
from models.blending import poisson_blend
from models.classical import inpaint
from pipelines.inference.fill import fill
from pipelines.inference.seam import measure_seam
from pipelines.registry import LoadedModel
from support.inpainting import loaded_model

SIDE = 128
NONE = np.zeros((SIDE, SIDE), bool)
CORNERS = {
    "astronaut": (20, 180),
    "chelsea": (60, 150),
    "coffee": (10, 300),
    "china": (150, 300),
    "rocket": (100, 260),
}


def real_photograph(name: str) -> np.ndarray:
    """uint8 [128,128,3], with smooth parts, edges and textures."""
    top, left = CORNERS[name]
    return np.ascontiguousarray(bundled_photo(name)[top : top + SIDE, left : left + SIDE])


def disc(radius: int = 30) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    return np.asarray(x * x + y * y < radius * radius)


def filled_with(photo: np.ndarray, fill_in: np.ndarray) -> np.ndarray:
    return np.where(disc()[..., None], fill_in.clip(0, 255), photo).astype(np.uint8)


@pytest.mark.parametrize("name", CORNERS)
def test_a_seam_is_a_step_that_its_surroundings_do_not_have(name: str) -> None:
    photo, hole = real_photograph(name), disc()
    assert not measure_seam(photo, hole, NONE).is_visible
    for method in ("telea", "patchmatch"):
        assert not measure_seam(inpaint(photo, hole.astype(np.uint8), method), hole, NONE).is_visible
    around = measure_seam(photo, hole, NONE).around
    offset = np.sign(128 - photo[hole].mean()) * (12 + 2 * around)  # no channel is clipped
    shifted = filled_with(photo, photo + offset)
    seam = measure_seam(shifted, hole, NONE)
    assert seam.is_visible
    assert abs(seam.step - abs(offset)) < around + 4
    tinted = filled_with(photo, photo + np.array([offset, 0, 0]))
    assert measure_seam(tinted, hole, NONE).is_visible
    blended = poisson_blend(photo, shifted, hole.astype(np.uint8), is_composite=True)
    assert not measure_seam(blended, hole, NONE).is_visible


def test_a_texture_hides_a_step() -> None:
    rng = np.random.default_rng(0)
    rough = np.repeat(np.repeat(rng.integers(60, 190, (SIDE // 8, SIDE // 8, 3)), 8, 0), 8, 1).astype(
        np.uint8
    )
    smooth = np.full((SIDE, SIDE, 3), 128, np.uint8)
    assert measure_seam(filled_with(smooth, smooth + 12.0), disc(), NONE).is_visible
    assert not measure_seam(filled_with(rough, rough + 12.0), disc(), NONE).is_visible


def test_unknown_pixels_and_large_holes_are_measured_right() -> None:
    photo = real_photograph("astronaut")
    others = np.zeros_like(NONE)
    others[:, :20] = True
    garbled = np.where(others[..., None], 255 - photo, photo)
    left = np.zeros_like(NONE)
    left[40:80, 20:60] = True
    assert measure_seam(garbled, left, others) == measure_seam(photo, left, others)
    large = np.full((3000, 3000, 3), 100, np.uint8)
    hole = np.zeros((3000, 3000), bool)
    hole[300:2700, 200:2800] = True
    large[hole] += 10
    start = time.monotonic()
    seam = measure_seam(large, hole, np.zeros_like(hole))
    assert time.monotonic() - start < 3
    assert (seam.step, seam.around) == (10, 0)
    assert not measure_seam(large, np.zeros_like(hole), hole).is_visible


def run(
    folder: Path, model: LoadedModel, photo: np.ndarray, hole: np.ndarray, **options: bool | int
) -> tuple[str, ...]:
    """The warnings of a fill."""
    Image.fromarray(photo).save(folder / "photo.png")
    Image.fromarray(hole).save(folder / "mask.png")
    return fill(model, folder / "photo.png", folder / "mask.png", folder / "out.png", **options).warnings


def painter(photo: np.ndarray, offset: float = 0) -> LoadedModel:
    """A model that fills the hole with the photograph itself, lighter by `offset` levels."""
    truth = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255 + offset / 255
    return loaded_model(lambda x: torch.where(x[:, 3:4] > 0.5, truth, x[:, :3]).clamp(0, 1), size=SIDE)


def test_a_fill_with_a_seam_hints_at_blend(tmp_path: Path) -> None:
    photo = real_photograph("coffee") // 2 + 40
    assert run(tmp_path, painter(photo), photo, disc(33)) == ()
    (warning,) = run(tmp_path, painter(photo, 30), photo, disc(33))
    assert warning.startswith("a seam shows at the border of the hole: colours differ by ")
    assert warning.endswith(" around it; --blend hides it")
    assert run(tmp_path, painter(photo, 30), photo, disc(33), blend=True) == ()
    filled = np.asarray(Image.open(tmp_path / "out.png"))
    assert not measure_seam(filled, disc(33), NONE).is_visible


def test_tiles_larger_than_in_training_warn(tmp_path: Path) -> None:
    photo = real_photograph("coffee")

    def warnings(name: str = "toy", **options: int) -> tuple[str, ...]:
        size = options.pop("size")
        found = run(tmp_path, loaded_model(name=name, size=size), photo, disc(33), blend=True, **options)
        return tuple(warning for warning in found if "tile" in warning)

    assert warnings(size=40) == (
        "the tile is larger than toy was trained on: 128x128 px, trained on 40x40; expect a worse fill; --max-tile-size "
        "40 downscales it, or train with a larger data.size",
    )
    assert warnings(size=40, max_tile_size=60) == ()
    assert warnings(size=86) == ()
    assert warnings("context_encoder", size=40) == ()  # resamples to its window
    assert len(warnings("deepfill_v2", size=40)) == 1
