"""Filling one photograph: known pixels, modes, orientation, masks of every kind, windows, honest messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.canny import canny_edges
from data_prep.sources import decode_photo
from models import build_model
from pipelines.filling.fill import fill
from pipelines.filling.loading import LoadedModel
from pipelines.filling.windows import Plan, shrink

HEIGHT, WIDTH = 44, 60
ORIENTATION = 0x0112


def mean_colour(x: torch.Tensor) -> torch.Tensor:
    """The smallest model that keeps the interface: the known pixels' mean colour in the hole."""
    image, hole = x[:, :3], x[:, 3:4] > 0.5
    known = torch.where(hole, torch.zeros_like(image), image)
    mean = known.sum((2, 3), keepdim=True) / (~hole).sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(hole, mean, image)


def loaded(program: Callable[[torch.Tensor], torch.Tensor] = mean_colour, **metadata: Any) -> LoadedModel:
    return LoadedModel(program, "toy", "1", {"size": 16, **metadata})


def photograph(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """uint8 [H,W,3]: nothing in it is symmetric."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return (np.stack([x * 150 / width, y * 150 / height, (x + 2 * y) % 100], axis=2) + noise).astype(np.uint8)


def hole_mask(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[10:21, 30:45] = True
    return mask


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    Image.fromarray(hole_mask()).save(tmp_path / "mask.png")
    return {"image": tmp_path / "photo.png", "mask": tmp_path / "mask.png", "out": tmp_path / "out.png"}


def run(files: dict[str, Path], model: LoadedModel | None = None, **options: Any) -> dict[str, Any]:
    return fill(model or loaded(), files["image"], files["mask"], files["out"], **options)


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
    "one bit.png": (lambda path: Image.fromarray(photograph()).convert("1").save(path), "L"),
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
    save, kept = MODES[name]
    files["image"] = files["image"].with_name(name)
    save(files["image"])
    run(files)
    hole = hole_mask()
    before, after = (decode_photo(files[key].read_bytes()) for key in ("image", "out"))
    np.testing.assert_array_equal(after[~hole], before[~hole])
    assert len(np.unique(after[hole].reshape(-1, 3), axis=0)) == 1, "the model's one colour is in the hole"
    out, given = Image.open(files["out"]), Image.open(files["image"])
    assert out.mode == kept
    if "A" in kept:
        alpha = np.asarray(given.convert("RGBA"))[..., 3]
        np.testing.assert_array_equal(np.asarray(out)[..., -1], np.where(hole, 255, alpha))
        known = (alpha == 0) & ~hole  # colours that nobody sees stay too
        np.testing.assert_array_equal(np.asarray(out)[known], np.asarray(given.convert(kept))[known])
    if kept == "I;16":
        np.testing.assert_array_equal(np.asarray(out)[~hole], np.asarray(given)[~hole])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_come_out_upright(files: dict[str, Path], orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = photograph()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions: flips, ROTATE_90 for 6, ...
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    files["image"] = files["image"].with_name("turned.png")
    stored.save(files["image"], exif=exif)
    run(files)
    after, hole = np.asarray(Image.open(files["out"])), hole_mask()
    np.testing.assert_array_equal(after[~hole], upright[~hole])
    assert (after[hole] != upright[hole]).any()
    assert Image.open(files["out"]).getexif().get(ORIENTATION, 1) == 1

    if orientation >= 5:  # a mask drawn on the file's own pixels is turned along
        mask = Image.fromarray(hole_mask().astype(np.uint8) * 255)
        mask.transpose(Image.Transpose(undo[orientation])).save(files["mask"])
        report = run(files)
        assert "turned like the photograph" in " ".join(report["notes"])
        np.testing.assert_array_equal(np.asarray(Image.open(files["out"])), after)


def test_what_lies_in_the_hole_is_never_seen(files: dict[str, Path]) -> None:
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
    assert any("JPEG cannot keep" in line and "out.png" in line for line in report["warnings"])
    assert Image.open(files["out"]).size == (WIDTH, HEIGHT)


def test_icc_profile_is_kept(files: dict[str, Path]) -> None:
    Image.fromarray(photograph()).save(files["image"], icc_profile=b"a profile")
    run(files)
    assert Image.open(files["out"]).info["icc_profile"] == b"a profile"


def test_mask_of_another_size_is_scaled_or_refused(files: dict[str, Path]) -> None:
    Image.fromarray(hole_mask()).resize((WIDTH // 2, HEIGHT // 2)).save(files["mask"])
    report = run(files)
    assert any("resized to the photograph's 60x44" in note for note in report["notes"])
    assert report["hole_percent"] == pytest.approx(100 * hole_mask().mean(), abs=2)
    Image.new("L", (50, 50)).save(files["mask"])
    files["out"].unlink()
    with pytest.raises(ValueError, match=r"mask .*mask.png is 50x50 px, the photograph 60x44") as error:
        run(files)
    assert "\n" not in str(error.value)
    assert not files["out"].exists()


def test_polarity_is_checked(files: dict[str, Path]) -> None:
    Image.fromarray(~hole_mask()).save(files["mask"])
    assert any("looks inverted" in w and "--invert-mask" in w for w in run(files)["warnings"])
    report = run(files, invert=True)
    assert report["warnings"] == []
    assert report["hole_percent"] == pytest.approx(100 * hole_mask().mean(), abs=0.01)
    assert f"{report['hole_percent']:g} % hole" in report["lines"][0]


def test_empty_and_full_masks(files: dict[str, Path]) -> None:
    Image.new("L", (WIDTH, HEIGHT), 0).save(files["mask"])
    assert any("empty" in warning for warning in run(files)["warnings"])
    np.testing.assert_array_equal(np.asarray(Image.open(files["out"])), photograph())
    Image.new("L", (WIDTH, HEIGHT), 255).save(files["mask"])
    with pytest.raises(ValueError, match="--invert-mask"):
        run(files)


def test_dilation_grows_the_hole(files: dict[str, Path]) -> None:
    grown = run(files, dilate=3)
    assert grown["hole_percent"] > run(files)["hole_percent"]
    with pytest.raises(ValueError, match="--dilate"):
        run(files, dilate=-1)


def test_a_hole_larger_than_trained_for_is_said(files: dict[str, Path]) -> None:
    hole = np.zeros((HEIGHT, WIDTH), bool)
    hole[4:40, 4:50] = True
    Image.fromarray(hole).save(files["mask"])
    report = run(files, loaded(hole_range=[0.1, 0.3]))
    assert any(
        "larger than toy was trained for" in warning and "30%" in warning for warning in report["warnings"]
    )
    assert run(files, loaded(hole_range=[0.1, 0.9]))["warnings"] == []


def test_large_photographs_are_seen_through_windows(tmp_path: Path) -> None:
    height, width, max_side = 900, 1400, 128
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=2).astype(np.uint8)
    hole = np.zeros((height, width), bool)
    hole[100:130, 200:240] = True  # small: seen as it is
    hole[500:800, 700:1100] = True  # large: seen smaller
    hole[890:, :12] = True  # in a corner
    files = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "out")}
    Image.fromarray(pixels).save(files["image"])
    Image.fromarray(hole).save(files["mask"])
    sizes: list[tuple[int, ...]] = []
    model = loaded(lambda x: (sizes.append(tuple(x.shape[2:])), mean_colour(x))[1], size=64)
    calls: list[tuple[int, int]] = []
    report = run(files, model, max_side=max_side, progress=lambda done, total: calls.append((done, total)))
    after = np.asarray(Image.open(files["out"]))
    np.testing.assert_array_equal(after[~hole], pixels[~hole])
    assert sizes == [(64, 64), (96, 96), (128, 128)]
    assert [window["seen"] for window in report["windows"]] == [[64, 64], [96, 96], [128, 128]]
    text = "\n".join(report["lines"])
    assert "800x800 px at (500, 100), resized to 128x128 and back" in text
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for window, (y, x_) in zip(report["windows"], [(895, 5), (115, 220), (650, 900)]):
        place = (
            slice(window["top"], window["top"] + window["height"]),
            slice(window["left"], window["left"] + window["width"]),
        )
        around = pixels[place][~hole[place]].mean(0)  # each is filled from its own surroundings
        assert abs(after[y, x_] - around).max() < 3


@pytest.mark.parametrize("seed", range(6))
def test_windows_cover_every_hole_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 400, 2)
    hole = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 12)):
        y, x, h, w = rng.integers(0, height), rng.integers(0, width), *rng.integers(1, 50, 2)
        hole[y : y + h, x : x + w] = True
    size, max_side = 32, 96
    plan = Plan(hole, size, max_side)
    times = np.zeros(hole.shape, int)
    for window in plan.windows:
        own = plan.own(window) & hole[window.place]
        assert own.shape == (window.height, window.width), "inside the photograph"
        times[window.place] += own
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        box = max(np.ptp(rows), np.ptp(columns)) + 1
        side = -(-max(2 * box, size) // 32) * 32
        side = max(2 * box, size) if side > max_side else side
        assert (window.height, window.width) == (min(side, height), min(side, width))
        assert max(window.seen) <= max_side
        assert window.resized == (max(window.height, window.width) > max_side)
    np.testing.assert_array_equal(times, hole)
    for i, a in enumerate(plan.windows):  # no two that could be one
        for b in plan.windows[:i]:
            apart = a.top >= b.top + b.height or b.top >= a.top + a.height
            apart |= a.left >= b.left + b.width or b.left >= a.left + a.width
            union = hole & (member(plan, hole, a) | member(plan, hole, b))
            rows, columns = np.flatnonzero(union.any(1)), np.flatnonzero(union.any(0))
            side = max(2 * (max(np.ptp(rows), np.ptp(columns)) + 1), size)
            assert apart or max(min(side, height), min(side, width)) > max_side


def test_a_scratch_is_cut_instead_of_shrunk() -> None:
    hole = np.zeros((700, 900), np.uint8)
    cv2.line(hole, (30, 10), (880, 690), 1, 5)
    hole[400:650, 100:350] = 1  # too thick to cut
    plan = Plan(hole > 0, 32, 128)
    times = np.zeros(hole.shape, int)
    for window in plan.windows:
        times[window.place] += plan.own(window) & (hole[window.place] > 0)
    np.testing.assert_array_equal(times, hole)
    assert len(plan.windows) > 10
    assert [window.resized for window in plan.windows].count(True) == 1


def member(plan: Plan, hole: np.ndarray, window: Any) -> np.ndarray:
    whole = np.zeros(hole.shape, bool)
    whole[window.place] = plan.own(window)
    return whole


def test_shrinking_looks_at_known_pixels_only() -> None:
    image = np.full((40, 40, 3), 80, np.uint8)
    hole = np.zeros((40, 40), bool)
    hole[:, 10] = True  # a scratch, a quarter of its cells
    hole[20:30, 20:30] = True
    image[hole] = 255
    small, gap = shrink(image, hole, (10, 10))
    assert (small[~gap] == 80).all()
    assert not gap[0].any(), "known for the greater part"
    assert gap[6, 6]


def test_drawn_edges_count_inside_the_hole(files: dict[str, Path], tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    model = loaded(lambda x: (seen.append(x), mean_colour(x))[1], needs_edges=True, sigma=1.5, size=64)
    drawing = np.full((HEIGHT, WIDTH), 255, np.uint8)
    drawing[15, 25:50] = 0  # dark on light, and longer than the hole
    Image.fromarray(drawing).save(tmp_path / "drawing.png")
    run(files, model, edges_path=tmp_path / "drawing.png")
    edge, hole = seen[0][0, 4].numpy() > 0, hole_mask()
    np.testing.assert_array_equal(edge[hole], (drawing == 0)[hole])
    np.testing.assert_array_equal(edge[~hole], canny_edges(photograph(), 1.5, hole)[~hole])
    with pytest.raises(ValueError, match="takes no edges"):
        run(files, edges_path=tmp_path / "drawing.png")


def test_blending_takes_the_seam_away_and_no_known_pixel(files: dict[str, Path]) -> None:
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
        run(files, loaded(darker, size=64), blend=blend)
        done = np.asarray(Image.open(files["out"])).astype(int)
        assert np.array_equal(done[~hole], ramp[~hole])
        errors.append(np.abs(done - ramp)[hole].mean())
    assert errors[0] > 25
    assert errors[1] < 2


def test_failures_leave_the_old_file(files: dict[str, Path]) -> None:
    run(files)
    before = files["out"].read_bytes()

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("too deep")

    with pytest.raises(ValueError, match=r"hole at 44x44 px .* cannot be filled: too deep|too deep"):
        run(files, loaded(broken))
    assert files["out"].read_bytes() == before
    assert sorted(path.name for path in files["out"].parent.iterdir()) == ["mask.png", "out.png", "photo.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "out.gif"}, r"--out .*out.gif: write a .png"),
        ({"out": "nowhere/out.png"}, r"folder .*nowhere is not there"),
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
    with pytest.raises(ValueError, match="--max-side"):
        run(files, max_side=4)


def test_context_encoder_fills_scattered_holes(files: dict[str, Path]) -> None:
    """Its one window cannot hold all of them: each is filled from its own, the others bridged."""
    torch.manual_seed(0)
    encoder = build_model("context_encoder", size=32, width=0.0625)
    module = encoder.completion()
    model = LoadedModel(module, "context_encoder", None, {"size": 32}, encoder.check_hole)
    pixels, hole = photograph(200, 240), np.zeros((200, 240), bool)
    for y, x in [(0, 0), (20, 60), (60, 20), (150, 200), (190, 100)]:
        hole[y : y + 10, x : x + 14] = True
    Image.fromarray(pixels).save(files["image"])
    Image.fromarray(hole).save(files["mask"])
    report = run(files, model, max_side=48)
    after = np.asarray(Image.open(files["out"]))
    np.testing.assert_array_equal(after[~hole], pixels[~hole])
    assert len(report["windows"]) > 1
    hole[:] = False
    hole[20:180, 5:235] = True
    Image.fromarray(hole).save(files["mask"])
    with pytest.raises(ValueError, match="context_encoder cannot fill"):
        run(files, model)
