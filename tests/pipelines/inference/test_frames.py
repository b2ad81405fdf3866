"""Files of several frames or pages: --frame chooses the one that is filled and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipelines.inference.fill import FillResult, fill
from support.inpainting import hole_mask, loaded_model, photograph

HOLE = hole_mask()
FRAMES = [photograph(seed=seed) for seed in range(3)]


def save_frames(path: Path, frames: list[np.ndarray]) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], **options)


def run(tmp_path: Path, name: str, **options: Any) -> FillResult:
    mask = tmp_path / options.pop("mask", "mask.png")
    if mask.name == "mask.png":
        Image.fromarray(HOLE).save(mask)
    return fill(loaded_model(), tmp_path / name, mask, tmp_path / "out.png", **options)


@pytest.mark.parametrize(
    ("name", "word"), [("a.gif", "frame"), ("a.webp", "frame"), ("a.png", "frame"), ("a.tif", "page")]
)
def test_several_frames_require_a_choice(tmp_path: Path, name: str, word: str) -> None:
    save_frames(tmp_path / name, FRAMES)
    with pytest.raises(
        ValueError,
        match=rf"{name} has 3 {word}s: choose one with --frame N, 1 to 3; only that one is written",
    ) as error:
        run(tmp_path, name)
    assert "\n" not in str(error.value)
    for number in (1, 2, 3):
        report = run(tmp_path, name, frame=number)
        with Image.open(tmp_path / name) as image:
            image.seek(number - 1)
            expected = np.asarray(image.convert("RGB"))
        after = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
        np.testing.assert_array_equal(after[~HOLE], expected[~HOLE])
        assert f"{word} {number} of 3 is filled; the others are not written" in report.notes
    for number in (0, 4, -1):
        with pytest.raises(
            ValueError, match=rf"--frame {number}: .*{name} has 3 {word}s, and the first is 1"
        ):
            run(tmp_path, name, frame=number)


def test_a_single_frame_needs_no_choice(tmp_path: Path) -> None:
    save_frames(tmp_path / "one.gif", FRAMES[:1])
    run(tmp_path, "one.gif")
    run(tmp_path, "one.gif", frame=1)
    with pytest.raises(ValueError, match=r"--frame 2: .* has one frame, and the first is 1"):
        run(tmp_path, "one.gif", frame=2)


def test_a_16_bit_page_keeps_its_tags(tmp_path: Path) -> None:
    deep = [frame.astype(np.uint16) * 257 + 5 for frame in FRAMES]
    with tifffile.TiffWriter(tmp_path / "deep.tif") as file:
        for number, page in enumerate(deep):
            file.write(
                page,
                photometric="rgb",
                resolution=(100 + number, 100),
                resolutionunit="INCH",
                contiguous=False,
            )
    out = tmp_path / "out.tif"
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    fill(loaded_model(), tmp_path / "deep.tif", tmp_path / "mask.png", out, frame=3)
    np.testing.assert_array_equal(tifffile.imread(out)[~HOLE], deep[2][~HOLE])
    with Image.open(out) as image:
        assert image.info["dpi"] == (102, 100)
        assert image.n_frames == 1


def test_reduced_copies_are_not_pages(tmp_path: Path) -> None:
    """Cloud-optimised GeoTIFFs and Photoshop files have them."""
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(FRAMES[0], photometric="rgb", metadata=None)
        for step in (2, 4):
            file.write(FRAMES[0][::step, ::step], photometric="rgb", subfiletype=1, metadata=None)
    run(tmp_path, "pyramid.tif")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png"))[~HOLE], FRAMES[0][~HOLE])


def test_an_mpo_is_one_photograph(tmp_path: Path) -> None:
    """Its further frames are a preview or the other eye."""
    first, second = (Image.fromarray(frame) for frame in FRAMES[:2])
    first.save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[second], quality=98, subsampling=0)
    assert Image.open(tmp_path / "two.jpg").format == "MPO"
    for options, number in (({}, 0), ({"frame": 1}, 0), ({"frame": 2}, 1)):
        run(tmp_path, "two.jpg", **options)
        after = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
        assert np.abs(after - FRAMES[number])[~HOLE].mean() < 5


def test_mask_frames_belong_to_the_photographs_frames(tmp_path: Path) -> None:
    masks = [np.roll(HOLE, 3 * number, axis=0).astype(np.uint8) * 255 for number in range(3)]
    save_frames(tmp_path / "masks.tif", masks)
    save_frames(tmp_path / "a.tif", FRAMES)
    save_frames(tmp_path / "one.png", FRAMES[:1])
    for number in (1, 2, 3):  # equally many frames: they belong together
        run(tmp_path, "a.tif", mask="masks.tif", frame=number)
        after, hole = np.asarray(Image.open(tmp_path / "out.png")), masks[number - 1] > 0
        np.testing.assert_array_equal(after[~hole], FRAMES[number - 1][~hole])
        assert len(np.unique(after[hole], axis=0)) == 1
    with pytest.raises(
        ValueError, match=r"the mask .*masks.tif has 3 pages, the photograph 1: save the matching one"
    ) as error:
        run(tmp_path, "one.png", mask="masks.tif")
    assert "\n" not in str(error.value)


def test_a_truncated_animation_fails_in_one_line(tmp_path: Path) -> None:
    save_frames(tmp_path / "a.gif", FRAMES)
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError) as error:
        run(tmp_path, "cut.gif")
    assert "\n" not in str(error.value)
    assert "cut.gif" in str(error.value)
