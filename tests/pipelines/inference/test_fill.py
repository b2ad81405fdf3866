"""Filling one photograph: known pixels, image modes, orientation, masks, tiles and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.canny import canny_edges
from data_prep.images import decode_photo
from models import build_model
from pipelines.inference.fill import FillResult, fill
from pipelines.inference.tiles import TilePlan, downscale
from pipelines.registry import LoadedModel
from pipelines.weights import CheckpointInfo
from support.inpainting import HEIGHT, WIDTH, hole_mask, loaded_model, mean_color, photograph

ORIENTATION = 0x0112


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    Image.fromarray(hole_mask()).save(tmp_path / "mask.png")
    return {"image": tmp_path / "photo.png", "mask": tmp_path / "mask.png", "out": tmp_path / "out.png"}


def run(files: dict[str, Path], model: LoadedModel | None = None, **options: Any) -> FillResult:
    return fill(model or loaded_model(), files["image"], files["mask"], files["out"], **options)


def save_palette(path: Path) -> None:
    Image.fromarray(photograph()).quantize(16).save(path)


def save_clear_palette(path: Path) -> None:
    Image.fromarray(photograph()).quantize(16).save(path, transparency=3)


def save_transparent(path: Path, mode: str = "RGBA") -> None:
    alpha = Image.fromarray(np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8))
    image = Image.fromarray(photograph()).convert(mode[:-1])
    image.putalpha(alpha)
    assert image.mode == mode
    image.save(path)


def save_deep_grey(path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    Image.fromarray(values).save(path)


MODES = {
    "grey.png": (lambda path: Image.fromarray(photograph()).convert("L").save(path), "L"),
    "one bit.png": (lambda path: Image.fromarray(photograph()).convert("1").save(path), "1"),
    "palette.png": (save_palette, "RGB"),
    "clear palette.png": (save_clear_palette, "RGBA"),
    "alpha.png": (save_transparent, "RGBA"),
    "grey alpha.png": (lambda path: save_transparent(path, "LA"), "LA"),
    "cmyk.jpg": (lambda path: Image.fromarray(photograph()).convert("CMYK").save(path), "RGB"),
    "sixteen bits.png": (save_deep_grey, "I;16"),
    "größe 大.webp": (lambda path: Image.fromarray(photograph()).save(path), "RGB"),
}


@pytest.mark.parametrize("name", MODES)
def test_known_pixels_stay_in_every_mode(files: dict[str, Path], name: str) -> None:
    save, mode = MODES[name]
    files["image"] = files["image"].with_name(name)
    save(files["image"])
    run(files)
    hole = hole_mask()
    before, after = (decode_photo(files[key].read_bytes()) for key in ("image", "out"))
    np.testing.assert_array_equal(after[~hole], before[~hole])
    color_count = 2 if mode == "1" else 1  # a dithered gray has both values
    assert len(np.unique(after[hole].reshape(-1, 3), axis=0)) == color_count, (
        "the hole does not have the model's constant colour"
    )
    image_after, image_before = Image.open(files["out"]), Image.open(files["image"])
    assert image_after.mode == mode
    if "A" in mode:
        alpha = np.asarray(image_before.convert("RGBA"))[..., 3]
        np.testing.assert_array_equal(np.asarray(image_after)[..., -1], np.where(hole, 255, alpha))
        known = (alpha == 0) & ~hole  # colours of transparent pixels stay too
        np.testing.assert_array_equal(
            np.asarray(image_after)[known], np.asarray(image_before.convert(mode))[known]
        )
    if mode == "I;16":
        np.testing.assert_array_equal(np.asarray(image_after)[~hole], np.asarray(image_before)[~hole])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_written_upright(files: dict[str, Path], orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = photograph()
    inverse_transpose = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Image.Transpose values: flips, ROTATE_90 for 6, ...
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(inverse_transpose[orientation]))
    files["image"] = files["image"].with_name("turned.png")
    stored.save(files["image"], exif=exif)
    run(files)
    after, hole = np.asarray(Image.open(files["out"])), hole_mask()
    np.testing.assert_array_equal(after[~hole], upright[~hole])
    assert (after[hole] != upright[hole]).any()
    assert Image.open(files["out"]).getexif().get(ORIENTATION, 1) == 1

    if orientation >= 5:  # a mask of the file's stored pixels is transposed with them
        mask = Image.fromarray(hole_mask().astype(np.uint8) * 255)
        mask.transpose(Image.Transpose(inverse_transpose[orientation])).save(files["mask"])
        report = run(files)
        assert "turned like the photograph" in " ".join(report.notes)
        np.testing.assert_array_equal(np.asarray(Image.open(files["out"])), after)


def test_pixels_in_the_hole_do_not_affect_the_result(files: dict[str, Path]) -> None:
    outs = []
    for content in (0, 255):
        pixels = photograph()
        pixels[hole_mask()] = content
        Image.fromarray(pixels).save(files["image"])
        run(files)
        outs.append(files["out"].read_bytes())
    assert outs[0] == outs[1]


def test_jpeg_is_written_with_a_warning_that_names_png(files: dict[str, Path]) -> None:
    save_transparent(files["image"])
    files["out"] = files["out"].with_suffix(".jpg")
    report = run(files)
    assert any("JPEG cannot keep" in line and "out.png" in line for line in report.warnings)
    assert Image.open(files["out"]).size == (WIDTH, HEIGHT)


def test_icc_profile_is_kept(files: dict[str, Path]) -> None:
    Image.fromarray(photograph()).save(files["image"], icc_profile=b"a profile")
    run(files)
    assert Image.open(files["out"]).info["icc_profile"] == b"a profile"


def test_mask_of_another_size_is_scaled_or_refused(files: dict[str, Path]) -> None:
    Image.fromarray(hole_mask()).resize((WIDTH // 2, HEIGHT // 2)).save(files["mask"])
    report = run(files)
    assert any("resized to the photograph's 60x44" in note for note in report.notes)
    assert report.hole_percent == pytest.approx(100 * hole_mask().mean(), abs=2)
    Image.new("L", (50, 50)).save(files["mask"])
    files["out"].unlink()
    with pytest.raises(ValueError, match=r"mask .*mask.png is 50x50 px, the photograph 60x44") as error:
        run(files)
    assert "\n" not in str(error.value)
    assert not files["out"].exists()


def test_an_inverted_mask_is_reported(files: dict[str, Path]) -> None:
    Image.fromarray(~hole_mask()).save(files["mask"])
    assert any("looks inverted" in w and "--invert-mask" in w for w in run(files).warnings)
    report = run(files, invert=True)
    assert report.warnings == ()
    assert report.hole_percent == pytest.approx(100 * hole_mask().mean(), abs=0.01)
    assert f"{report.hole_percent:g} % hole" in report.report_lines[0]


def test_an_empty_mask_warns_and_a_full_mask_fails(files: dict[str, Path]) -> None:
    Image.new("L", (WIDTH, HEIGHT), 0).save(files["mask"])
    assert any("empty" in warning for warning in run(files).warnings)
    np.testing.assert_array_equal(np.asarray(Image.open(files["out"])), photograph())
    Image.new("L", (WIDTH, HEIGHT), 255).save(files["mask"])
    with pytest.raises(ValueError, match="--invert-mask"):
        run(files)


def test_dilation_grows_the_hole(files: dict[str, Path]) -> None:
    grown = run(files, dilate=3)
    assert grown.hole_percent > run(files).hole_percent
    with pytest.raises(ValueError, match="--dilate"):
        run(files, dilate=-1)


def test_a_hole_larger_than_in_training_warns(files: dict[str, Path]) -> None:
    hole = np.zeros((HEIGHT, WIDTH), bool)
    hole[4:40, 4:50] = True
    Image.fromarray(hole).save(files["mask"])
    report = run(files, loaded_model(hole_range=[0.1, 0.3]))
    assert any(
        "larger than toy was trained for" in warning and "30%" in warning for warning in report.warnings
    )
    assert run(files, loaded_model(hole_range=[0.1, 0.9], size=64), blend=True).warnings == ()


def test_large_photographs_are_filled_in_tiles(tmp_path: Path) -> None:
    height, width, max_tile_size = 900, 1400, 128
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=2).astype(np.uint8)
    hole = np.zeros((height, width), bool)
    hole[100:130, 200:240] = True  # small: not resized
    hole[500:800, 700:1100] = True  # large: downscaled
    hole[890:, :12] = True  # in a corner
    files = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "out")}
    Image.fromarray(pixels).save(files["image"])
    Image.fromarray(hole).save(files["mask"])
    sizes: list[tuple[int, ...]] = []
    model = loaded_model(lambda x: (sizes.append(tuple(x.shape[2:])), mean_color(x))[1], size=64)
    calls: list[tuple[int, int]] = []
    report = run(
        files, model, max_tile_size=max_tile_size, progress=lambda done, total: calls.append((done, total))
    )
    after = np.asarray(Image.open(files["out"]))
    np.testing.assert_array_equal(after[~hole], pixels[~hole])
    assert sizes == [(64, 64), (96, 96), (128, 128)]
    assert [tile.model_size for tile in report.tiles] == [(64, 64), (96, 96), (128, 128)]
    text = "\n".join(report.report_lines)
    assert "800x800 px at (500, 100), resized to 128x128 and back" in text
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for tile, (y, x_) in zip(report.tiles, [(895, 5), (115, 220), (650, 900)]):
        slices = (
            slice(tile.top, tile.top + tile.height),
            slice(tile.left, tile.left + tile.width),
        )
        surroundings = pixels[slices][~hole[slices]].mean(0)  # each hole is filled from its own surroundings
        assert abs(after[y, x_] - surroundings).max() < 3


@pytest.mark.parametrize("seed", range(6))
def test_tiles_cover_every_hole_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 400, 2)
    hole = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 12)):
        y, x, h, w = rng.integers(0, height), rng.integers(0, width), *rng.integers(1, 50, 2)
        hole[y : y + h, x : x + w] = True
    size, max_tile_size = 32, 96
    plan = TilePlan(hole, size, max_tile_size)
    fill_count = np.zeros(hole.shape, int)
    for tile in plan.tiles:
        own_holes = plan.own_holes(tile) & hole[tile.slices]
        assert own_holes.shape == (tile.height, tile.width), "inside the photograph"
        fill_count[tile.slices] += own_holes
        rows, columns = np.flatnonzero(own_holes.any(1)), np.flatnonzero(own_holes.any(0))
        box = max(np.ptp(rows), np.ptp(columns)) + 1
        side = -(-max(2 * box, size) // 32) * 32
        side = max(2 * box, size) if side > max_tile_size else side
        assert (tile.height, tile.width) == (min(side, height), min(side, width))
        assert max(tile.model_size) <= max_tile_size
        assert tile.is_resized == (max(tile.height, tile.width) > max_tile_size)
    np.testing.assert_array_equal(fill_count, hole)
    for i, a in enumerate(plan.tiles):  # overlapping tiles are merged if the result is small enough
        for b in plan.tiles[:i]:
            are_disjoint = a.top >= b.top + b.height or b.top >= a.top + a.height
            are_disjoint |= a.left >= b.left + b.width or b.left >= a.left + a.width
            union = hole & (own_holes_mask(plan, hole, a) | own_holes_mask(plan, hole, b))
            rows, columns = np.flatnonzero(union.any(1)), np.flatnonzero(union.any(0))
            side = max(2 * (max(np.ptp(rows), np.ptp(columns)) + 1), size)
            assert are_disjoint or max(min(side, height), min(side, width)) > max_tile_size


def test_a_scratch_is_split_instead_of_downscaled() -> None:
    hole = np.zeros((700, 900), np.uint8)
    cv2.line(hole, (30, 10), (880, 690), 1, 5)
    hole[400:650, 100:350] = 1  # too thick to split
    plan = TilePlan(hole > 0, 32, 128)
    fill_count = np.zeros(hole.shape, int)
    for tile in plan.tiles:
        fill_count[tile.slices] += plan.own_holes(tile) & (hole[tile.slices] > 0)
    np.testing.assert_array_equal(fill_count, hole)
    assert len(plan.tiles) > 10
    assert [tile.is_resized for tile in plan.tiles].count(True) == 1


def own_holes_mask(plan: TilePlan, hole: np.ndarray, tile: Any) -> np.ndarray:
    mask = np.zeros(hole.shape, bool)
    mask[tile.slices] = plan.own_holes(tile)
    return mask


def test_downscaling_averages_known_pixels_only() -> None:
    image = np.full((40, 40, 3), 80, np.uint8)
    hole = np.zeros((40, 40), bool)
    hole[:, 10] = True  # a scratch, a quarter of the area of its cells
    hole[20:30, 20:30] = True
    image[hole] = 255
    small, small_hole = downscale(image, hole, (10, 10))
    assert (small[~small_hole] == 80).all()
    assert not small_hole[0].any(), "mostly known cells are holes"
    assert small_hole[6, 6]


def test_user_edges_replace_edges_inside_the_hole(files: dict[str, Path], tmp_path: Path) -> None:
    inputs: list[torch.Tensor] = []
    model = loaded_model(lambda x: (inputs.append(x), mean_color(x))[1], needs_edges=True, sigma=1.5, size=64)
    drawing = np.full((HEIGHT, WIDTH), 255, np.uint8)
    drawing[15, 25:50] = 0  # dark on light, and longer than the hole
    Image.fromarray(drawing).save(tmp_path / "drawing.png")
    run(files, model, edges_path=tmp_path / "drawing.png")
    edge, hole = inputs[0][0, 4].numpy() > 0, hole_mask()
    np.testing.assert_array_equal(edge[hole], (drawing == 0)[hole])
    np.testing.assert_array_equal(edge[~hole], canny_edges(photograph(), 1.5, hole)[~hole])
    with pytest.raises(ValueError, match="takes no edges"):
        run(files, edges_path=tmp_path / "drawing.png")


def test_blending_removes_the_seam_and_changes_no_known_pixel(files: dict[str, Path]) -> None:
    ramp = (
        np.broadcast_to(np.linspace(40, 200, WIDTH)[None, :, None], (HEIGHT, WIDTH, 3))
        .round()
        .astype(np.uint8)
    )
    Image.fromarray(ramp).save(files["image"])
    truth = torch.from_numpy(ramp.copy()).permute(2, 0, 1)[None] / 255

    def darker(x: torch.Tensor) -> torch.Tensor:  # the truth, 30 levels too dark
        return torch.where(x[:, 3:4] > 0.5, truth[..., : x.shape[2], : x.shape[3]] - 30 / 255, x[:, :3])

    hole, errors = hole_mask(), []
    for blend in (False, True):
        run(files, loaded_model(darker, size=64), blend=blend)
        filled = np.asarray(Image.open(files["out"])).astype(int)
        assert np.array_equal(filled[~hole], ramp[~hole])
        errors.append(np.abs(filled - ramp)[hole].mean())
    assert errors[0] > 25
    assert errors[1] < 2


def test_a_failed_fill_keeps_the_old_file(files: dict[str, Path]) -> None:
    run(files)
    before = files["out"].read_bytes()

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("too deep")

    with pytest.raises(ValueError, match=r"hole at 44x44 px .* cannot be filled: too deep|too deep"):
        run(files, loaded_model(broken))
    assert files["out"].read_bytes() == before
    assert sorted(path.name for path in files["out"].parent.iterdir()) == ["mask.png", "out.png", "photo.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "out.gif"}, r"--out .*out.gif: write a .png"),
        ({"out": "nowhere/out.png"}, r"folder .*nowhere does not exist"),
        ({"out": "photo.png"}, r"would overwrite"),
        ({"image": "missing.png"}, r"photograph .*missing.png cannot be read"),
        ({"mask": "missing.png"}, r"mask .*missing.png cannot be read"),
        ({"image": "text.png"}, r"text.png cannot be read as a photograph: not an image"),
        ({"mask": "text.png"}, r"mask .*text.png cannot be read: not an image"),
    ],
)
def test_errors_are_one_line_naming_the_file(
    files: dict[str, Path], change: dict[str, str], message: str
) -> None:
    folder = files["image"].parent
    (folder / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=message) as error:
        run({**files, **{key: folder / name for key, name in change.items()}})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--max-tile-size"):
        run(files, max_tile_size=4)


def test_context_encoder_fills_scattered_holes(files: dict[str, Path]) -> None:
    """Its context window cannot hold all of them: each hole is filled in its own tile, the others are bridged."""
    torch.manual_seed(0)
    encoder = build_model("context_encoder", size=32, width=0.0625)
    module = encoder.frozen_completion()
    model = LoadedModel(
        module, "context_encoder", None, CheckpointInfo(encoder.name, size=32), encoder.check_hole
    )
    pixels, hole = photograph(200, 240), np.zeros((200, 240), bool)
    for y, x in [(0, 0), (20, 60), (60, 20), (150, 200), (190, 100)]:
        hole[y : y + 10, x : x + 14] = True
    Image.fromarray(pixels).save(files["image"])
    Image.fromarray(hole).save(files["mask"])
    report = run(files, model, max_tile_size=48)
    after = np.asarray(Image.open(files["out"]))
    np.testing.assert_array_equal(after[~hole], pixels[~hole])
    assert len(report.tiles) > 1
    hole[:] = False
    hole[20:180, 5:235] = True
    Image.fromarray(hole).save(files["mask"])
    with pytest.raises(ValueError, match="context_encoder cannot fill"):
        run(files, model)
