"""Known pixels stay bit-identical in every mode and depth, as far as the output format can store them; notes name the
rest."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pipelines.inference.fill import fill
from support.inpainting import HEIGHT, WIDTH, hole_mask, loaded_model, photograph

HOLE = hole_mask()
RNG = np.random.default_rng(1)
RGB = photograph()
ALPHA = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1).astype(np.uint8)
RGBA = np.concatenate([RGB, ALPHA], axis=2)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))[..., None]
DEEP = RGBA.astype(np.uint16) * 257 ^ RNG.integers(0, 256, RGBA.shape, np.uint16)  # all 16 bits differ
DEEP_GREY = DEEP[..., :1]
DEEP_LA = DEEP[..., [0, 3]]
FLOATS = (DEEP_GREY / np.float32(65535)).astype(np.float32)
CMYK = np.asarray(Image.fromarray(RGB).convert("CMYK")).copy()
CMYK[..., 3] = GREY[..., 0] // 3


def pillow(mode: str, values: np.ndarray, **options: Any) -> Callable[[Path], None]:
    raw = np.packbits(values[..., 0], axis=1) if mode == "1" else values
    return lambda path: Image.frombytes(mode, (WIDTH, HEIGHT), raw.tobytes()).save(path, **options)


def png(values: np.ndarray, bits: int = 16, transparent: tuple[int, ...] = ()) -> Callable[[Path], None]:
    """A PNG of 16 bits per channel, or of grey with 4, written without the code under test."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stored = values.astype(">u2") if bits == 16 else values[:, ::2] << 4 | values[:, 1::2]
    rows = b"".join(b"\0" + row.tobytes() for row in stored)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, kind, 0, 0, 0))
    if transparent:
        file += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return lambda path: (
        path.write_bytes(file + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")) and None
    )


def tiff(values: np.ndarray, colours: str = "minisblack", **options: Any) -> Callable[[Path], None]:
    """Writes with tifffile; with `planarconfig` separate, channels come first."""
    options.setdefault("extrasamples", {2: ["unassalpha"], 4: ["unassalpha"]}.get(values.shape[2]))
    if colours == "separated":
        options["extrasamples"] = None
    data = values.transpose(2, 0, 1) if options.get("planarconfig") == "separate" else values
    data = values[..., 0] if values.shape[2] == 1 else data
    return lambda path: tifffile.imwrite(path, data, photometric=colours, metadata=None, **options)


def opencv(values: np.ndarray, *options: int) -> Callable[[Path], None]:
    order = [2, 1, 0, 3][: values.shape[2]] if values.shape[2] > 2 else slice(None)
    return lambda path: cv2.imwrite(str(path), values[..., order], list(options)) and None


def ppm(magic: str, max_value: int, values: np.ndarray) -> Callable[[Path], None]:
    header = f"{magic}\n# 255\n{WIDTH} {HEIGHT}\n{max_value}\n".encode()
    return lambda path: path.write_bytes(header + values.astype(">u2").tobytes()) and None


PALETTE = Image.fromarray(RGB).quantize(16)
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))
CLEAR = np.asarray(PALETTE)[..., None] == 3
PALETTE_RGBA = np.concatenate([PALETTE_RGB, np.where(CLEAR, 0, 255).astype(np.uint8)], axis=2)
BITS = np.asarray(Image.fromarray(RGB).convert("1"))[..., None]
KEY = tuple(int(value) for value in DEEP[2, 3, :3])
KEYED = np.concatenate([DEEP[..., :3], np.full_like(DEEP_GREY, 65535)], axis=2)
KEYED[2, 3, 3] = 0
SIGNED = (DEEP_GREY.astype(np.int32) - 32768).astype(np.int16)
TEN = DEEP[..., :3] >> 6
WRITE_LZW = (cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW)

FILES: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "1.png": (pillow("1", BITS), BITS),
    "1 fax.tif": (pillow("1", BITS, compression="group4"), BITS),
    "L.png": (pillow("L", GREY), GREY),
    "L 4 bits.png": (png(GREY >> 4, 4), (GREY >> 4) * 17),
    "L.bmp": (pillow("L", GREY), GREY),
    "LA.png": (pillow("LA", RGBA[..., [0, 3]]), RGBA[..., [0, 3]]),
    "LA.tif": (pillow("LA", RGBA[..., [0, 3]]), RGBA[..., [0, 3]]),
    "P.png": (lambda path: PALETTE.save(path), PALETTE_RGB),
    "P.tif": (lambda path: PALETTE.save(path), PALETTE_RGB),
    "P clear.png": (lambda path: PALETTE.save(path, transparency=3), PALETTE_RGBA),
    "P clear.gif": (lambda path: PALETTE.save(path, transparency=3), PALETTE_RGBA),
    "P grey.gif": (lambda path: Image.fromarray(GREY[..., 0]).save(path), GREY),
    "RGB.png": (pillow("RGB", RGB), RGB),
    "RGB.webp": (pillow("RGB", RGB, lossless=True), RGB),
    "RGBA.png": (pillow("RGBA", RGBA), RGBA),
    "RGBA.tif": (pillow("RGBA", RGBA, compression="tiff_lzw"), RGBA),
    "RGBA.webp": (pillow("RGBA", RGBA, lossless=True, exact=True), RGBA),
    "CMYK.tif": (pillow("CMYK", CMYK), CMYK),
    "16 grey.png": (png(DEEP_GREY), DEEP_GREY),
    "16 grey.pgm": (ppm("P5", 65535, DEEP_GREY), DEEP_GREY),
    "16 grey little.tif": (tiff(DEEP_GREY), DEEP_GREY),
    "16 grey big.tif": (tiff(DEEP_GREY, byteorder=">"), DEEP_GREY),
    "16 white is 0.tif": (tiff(65535 - DEEP_GREY, "miniswhite"), DEEP_GREY),
    "16 grey alpha.png": (png(DEEP_LA), DEEP_LA),
    "16 grey alpha.tif": (tiff(DEEP_LA), DEEP_LA),
    "16 RGB.png": (png(DEEP[..., :3]), DEEP[..., :3]),
    "16 RGB key.png": (png(DEEP[..., :3], transparent=KEY), KEYED),
    "16 RGB.ppm": (ppm("P6", 65535, DEEP[..., :3]), DEEP[..., :3]),
    "10 RGB.ppm": (ppm("P6", 1023, TEN), np.round(TEN * (65535 / 1023)).astype(np.uint16)),
    "16 RGB.tif": (tiff(DEEP[..., :3], "rgb"), DEEP[..., :3]),
    "16 RGB deflate.tif": (
        tiff(DEEP[..., :3], "rgb", compression="zlib", predictor=True, rowsperstrip=7),
        DEEP[..., :3],
    ),
    "16 RGB planar.tif": (tiff(DEEP[..., :3], "rgb", planarconfig="separate"), DEEP[..., :3]),
    "16 RGB tiles.tif": (tiff(DEEP[..., :3], "rgb", tile=(16, 32), compression="zlib"), DEEP[..., :3]),
    "16 RGB bigtiff.tif": (tiff(DEEP[..., :3], "rgb", bigtiff=True, byteorder=">"), DEEP[..., :3]),
    "16 RGB lzw.tif": (opencv(DEEP[..., :3], *WRITE_LZW), DEEP[..., :3]),
    "16 RGB.jp2": (opencv(DEEP[..., :3], cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000), DEEP[..., :3]),
    "16 RGBA.png": (png(DEEP), DEEP),
    "16 RGBA.tif": (tiff(DEEP, "rgb"), DEEP),
    "16 RGBA lzw, untagged alpha.tif": (opencv(DEEP, *WRITE_LZW), DEEP),
    "16 CMYK.tif": (tiff(DEEP, "separated"), DEEP),
    "16 signed.tif": (tiff(SIGNED), SIGNED),
    "32 grey.tif": (tiff(DEEP_GREY.astype(np.int32) * 9), DEEP_GREY.astype(np.int32) * 9),
    "float.tif": (tiff(FLOATS), FLOATS),
    "float big.tif": (tiff(FLOATS, byteorder=">"), FLOATS),
    "float lzw.tif": (opencv(FLOATS, *WRITE_LZW), FLOATS),
    "float RGB.tif": (tiff(DEEP[..., :3] / np.float32(65535), "rgb"), DEEP[..., :3] / np.float32(65535)),
    "half.tif": (tiff(FLOATS.astype(np.float16)), FLOATS.astype(np.float16)),
    "double heights.tif": (tiff(DEEP_GREY / 17.0 - 500), DEEP_GREY / 17.0 - 500),
    "multiplied.tif": (tiff(RGBA, "rgb", extrasamples=["assocalpha"]), RGBA),
    "with a mask.tif": (tiff(RGBA, "rgb", extrasamples=["unspecified"]), RGBA),
}


def read(path: Path) -> np.ndarray:
    """The values [H,W,C] of a result, read by a library that did not write it."""
    if path.suffix == ".tif":
        values = tifffile.imread(path)
    else:
        values = np.asarray(Image.open(path))
        if path.read_bytes()[24] == 16:
            values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if values.ndim == 3:
                values = values[..., [2, 1, 0, 3][: values.shape[2]]]
            if path.read_bytes()[25] == 4:
                np.testing.assert_array_equal(values[..., 0], values[..., 1])
                values = values[..., [0, 3]]
    return values if values.ndim == 3 else values[..., None]


def run(tmp_path: Path, name: str, suffix: str, model: Any = None, **options: Any) -> tuple[Path, str]:
    """The path of the result, and the report in one line."""
    source, mask, out = tmp_path / name, tmp_path / "mask.png", tmp_path / f"out{suffix}"
    FILES[name][0](source)
    Image.fromarray(HOLE).save(mask)
    return out, " | ".join(fill(model or loaded_model(), source, mask, out, **options).report_lines)


@pytest.mark.parametrize("name", FILES)
def test_tiff_keeps_all_known_values(tmp_path: Path, name: str) -> None:
    stored = FILES[name][1]
    out, report = run(tmp_path, name, ".tif")
    after = read(out)
    assert after.dtype == stored.dtype
    np.testing.assert_array_equal(after[~HOLE], stored[~HOLE])
    assert "TIFF does not hold" not in report
    if stored.dtype != np.bool_ and "with a mask" not in name:
        color_count = len(np.unique(after[HOLE], axis=0))
        assert color_count == 1, "the hole does not have the model's constant colour"
        assert (after[HOLE] != stored[HOLE]).any()


def in_png(name: str) -> np.ndarray | None:
    """The values as PNG stores them; None if they are only approximate."""
    stored = FILES[name][1]
    if name == "CMYK.tif":
        return np.asarray(Image.frombytes("CMYK", (WIDTH, HEIGHT), stored.tobytes()).convert("RGB"))
    if name == "with a mask.tif":
        return stored[..., :3]
    if name in ("float.tif", "float big.tif", "float lzw.tif", "float RGB.tif"):
        return np.round(stored.astype(np.float64) * 65535).astype(np.uint16)
    return stored if stored.dtype in (np.bool_, np.uint8, np.uint16) and "CMYK" not in name else None


@pytest.mark.parametrize("name", FILES)
def test_png_keeps_what_it_can_store_and_names_the_rest(tmp_path: Path, name: str) -> None:
    stored, expected = FILES[name][1], in_png(name)
    out, report = run(tmp_path, name, ".png")
    after = read(out)
    if expected is not None and name != "multiplied.tif":
        assert after.dtype == expected.dtype
        np.testing.assert_array_equal(after[~HOLE], expected[~HOLE])
    assert ("PNG does not hold" in report) == (expected is not stored or name == "multiplied.tif")
    assert (after[HOLE].reshape(-1, after.shape[2]) != 0).any()


@pytest.mark.parametrize("name", FILES)
def test_jpeg_names_what_it_cannot_store(tmp_path: Path, name: str) -> None:
    stored = FILES[name][1]
    out, report = run(tmp_path, name, ".jpg")
    with Image.open(out) as image:
        image.load()
        modes = {1: "L", 2: "L", 3: "RGB", 4: "CMYK" if "CMYK" in name else "RGB"}
        assert image.mode == modes[stored.shape[2]]
        assert image.size == (WIDTH, HEIGHT)
    assert "JPEG cannot keep the known pixels identical" in report
    assert ("8 bits per channel: JPEG holds no more" in report) == (stored.dtype not in (np.bool_, np.uint8))
    transparent = stored.shape[2] in (2, 4) and "CMYK" not in name and name != "with a mask.tif"
    assert ("transparency is composed on white: JPEG does not hold it" in report) == transparent


def test_a_fill_keeps_grey_and_bit_depth(tmp_path: Path) -> None:
    """Levels 0, 100 and 255 become 257 times the level, opaque."""
    for level in (0, 100, 255):
        model = loaded_model(lambda x, level=level: x[:, :3] * 0 + level / 255)
        for name in ("16 grey alpha.png", "16 RGBA.tif", "16 grey.png"):
            after = read(run(tmp_path, name, ".png", model)[0])[HOLE]
            expected = [257 * level] * (1 if after.shape[1] < 3 else 3) + [65535] * (1 - after.shape[1] % 2)
            np.testing.assert_array_equal(after, np.broadcast_to(expected, after.shape))
        heights = read(run(tmp_path, "double heights.tif", ".tif", model)[0])[HOLE]
        known = FILES["double heights.tif"][1][~HOLE]
        np.testing.assert_allclose(heights, known.min() + level / 255 * np.ptp(known))


def test_a_cmyk_fill_converts_back_to_the_models_colour(tmp_path: Path) -> None:
    colour = (90, 150, 60)
    model = loaded_model(lambda x: x[:, :3] * 0 + torch.tensor(colour).view(1, 3, 1, 1) / 255)
    inks = read(run(tmp_path, "CMYK.tif", ".tif", model)[0])
    shown = np.asarray(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes()).convert("RGB"))
    assert np.abs(shown[HOLE].astype(int) - colour).max() <= 2
    assert inks[HOLE][:, 3].min() > 0, "no black ink in the hole, unlike around it"


def test_nan_and_infinity_in_floats(tmp_path: Path) -> None:
    values = FLOATS.copy()
    values[0, 0], values[1, 1], values[2, 2] = np.nan, np.inf, -np.inf
    values[HOLE] = 1e30
    tifffile.imwrite(tmp_path / "nan.tif", values[..., 0])
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    out = tmp_path / "out.tif"
    fill(loaded_model(), tmp_path / "nan.tif", tmp_path / "mask.png", out)
    after = tifffile.imread(out)
    np.testing.assert_array_equal(after[~HOLE], values[~HOLE][:, 0])
    assert 0 < after[HOLE].min() <= after[HOLE].max() < 1, "values in the hole affect the range"


def test_values_in_the_hole_do_not_affect_a_float_result(tmp_path: Path) -> None:
    results = []
    for content in (0.0, 9.0):
        values = FLOATS[..., 0].copy()
        values[HOLE] = content
        tifffile.imwrite(tmp_path / "in.tif", values)
        Image.fromarray(HOLE).save(tmp_path / "mask.png")
        fill(loaded_model(), tmp_path / "in.tif", tmp_path / "mask.png", tmp_path / "out.tif")
        results.append((tmp_path / "out.tif").read_bytes())
    assert results[0] == results[1]


def test_a_damaged_tiff_fails_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "16 RGB deflate.tif"
    FILES[path.name][0](path)
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    data = path.read_bytes()
    for name, damaged in {
        "cut.tif": data[: len(data) // 2],
        "header.tif": data[:8] + b"\xff" * 200,
        "huge.tif": data.replace(
            struct.pack("<HHII", 256, 4, 1, WIDTH), struct.pack("<HHII", 256, 4, 1, 1 << 28)
        ),
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a photograph: ") as error:
            fill(loaded_model(), tmp_path / name, tmp_path / "mask.png", tmp_path / "out.png")
        assert "\n" not in str(error.value)


def test_blending_and_tiles_work_in_any_depth(tmp_path: Path) -> None:
    """The fill of a 16-bit photograph is 257 times that of the 8-bit one."""
    height, width = 300, 420
    y, x = np.mgrid[:height, :width]
    shallow = np.stack([x * 200 // width, y * 200 // height, (x + y) % 250], axis=2).astype(np.uint8)
    hole = np.zeros((height, width), bool)
    hole[20:50, 30:80] = hole[120:250, 200:380] = True
    Image.fromarray(hole).save(tmp_path / "mask.png")
    dilated = cv2.dilate(hole.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))) > 0
    results = []
    for pixels in (shallow, shallow.astype(np.uint16) * 257 + 3):
        tifffile.imwrite(tmp_path / "in.tif", pixels, photometric="rgb")
        out = tmp_path / "out.png"
        options: dict[str, Any] = {"max_tile_size": 128, "blend": True, "dilate": 2}
        report = fill(loaded_model(size=32), tmp_path / "in.tif", tmp_path / "mask.png", out, **options)
        assert [tile.model_size == (tile.width, tile.height) for tile in report.tiles] == [
            True,
            False,
        ]
        results.append(read(out))
        np.testing.assert_array_equal(results[-1][~dilated], pixels[~dilated])
    np.testing.assert_array_equal(results[1][dilated], results[0][dilated].astype(np.uint16) * 257)
