"""Mask images of every mode, depth and colour that tools write, the option `hole`, and errors that list values."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.images import PhotoError
from data_prep.mask_reading import (
    describe_values,
    parse_hole_values,
    read_drawing,
    read_mask,
    read_mask_and_matches,
)
from data_prep.mask_values import AmbiguousMask
from data_prep.masks import make_mask, resize_mask
from data_prep.sources import bundled_photo

HOLE = np.zeros((60, 80), bool)
HOLE[20:35, 25:45] = True
OTHER = np.zeros_like(HOLE)
OTHER[40:55, 50:75] = True
BORDER = np.zeros_like(HOLE)
BORDER[18:37, 23:47] = True
BORDER &= ~HOLE
ImageLike = np.ndarray | Image.Image


def encode(image: ImageLike, kind: str = "PNG", **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def levels(hole: float, background: float = 0, dtype: Any = np.uint8) -> np.ndarray:
    return np.where(HOLE, hole, background).astype(dtype)


def colors(
    hole: tuple[int, ...], background: tuple[int, ...] = (0, 0, 0), where: np.ndarray = HOLE
) -> np.ndarray:
    return np.where(where[..., None], np.uint8(hole), np.uint8(background)).astype(np.uint8)


def voc_palette() -> list[int]:
    """PASCAL VOC's palette: the bits of a class number in turn to red, green and blue, from the highest bit down."""
    bits = [[sum((n >> (3 * i + c) & 1) << (7 - i) for i in range(3)) for c in range(3)] for n in range(256)]
    return [channel for color in bits for channel in color]


def palette_image(classes: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.fromarray(classes.astype(np.uint8))
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(colors)
    return image


def encode_16_bit(values: np.ndarray) -> bytes:
    """uint16 [H,W,3] as a PNG of 16 bits per channel."""
    return cv2.imencode(".png", values)[1].tobytes()


RED = (255, 0, 0)
UNAMBIGUOUS = {
    "white": encode(levels(255)),
    "254 and 1": encode(levels(254, 1)),
    "noise at both ends": encode(
        levels(252) + np.random.default_rng(0).integers(0, 4, HOLE.shape).astype(np.uint8)
    ),
    "light and dark grey": encode(levels(200, 60)),
    "0 and 1": encode(levels(1)),
    "class 2": encode(levels(2)),
    "red turned to grey": encode(levels(76)),
    "one bit": encode(Image.fromarray(HOLE)),
    "fax": encode(Image.fromarray(HOLE), "TIFF", compression="group4"),
    "16 bits": encode(levels(65535, 0, np.uint16)),
    "16 bits, nearly": encode(levels(65534, 1, np.uint16)),
    "16 bits, 0 and 1": encode(levels(1, 0, np.uint16)),
    "16 bits, 0 and 255": encode(levels(255, 0, np.uint16)),
    "12 bits": encode(levels(4095, 0, np.uint16)),
    "16 bits per channel, 0 and 1": encode_16_bit(np.repeat(levels(1, 0, np.uint16)[..., None], 3, 2)),
    "16 bits per channel, red": encode_16_bit(colors((0, 0, 255)).astype(np.uint16) * 257),
    "instance numbers": encode(levels(1001, 0, np.int32), "TIFF"),
    "floats": encode(levels(1, 0, np.float32), "TIFF"),
    "dim floats": encode(levels(0.3, 0, np.float32), "TIFF"),
    "floats with NaN": encode(levels(1, np.nan, np.float32), "TIFF"),
    "red": encode(colors(RED)),
    "red on nearly black": encode(colors(RED, (2, 1, 3))),
    "dark red on black": encode(colors((128, 0, 0))),
    "opaque red": encode(Image.fromarray(colors(RED)).convert("RGBA")),
    "CMYK": encode(Image.fromarray(colors(RED)).convert("CMYK"), "TIFF"),
    "LAB": encode(Image.fromarray(colors(RED)).convert("LAB"), "TIFF"),
    "LA": encode(Image.fromarray(levels(255)).convert("LA")),
    "VOC, class 1": encode(palette_image(HOLE * 1, voc_palette())),
    "VOC, class 15": encode(palette_image(HOLE * 15, voc_palette())),
    "VOC with class 0 transparent": encode(palette_image(HOLE * 15, voc_palette()), transparency=0),
    "palette with black only": encode(palette_image(HOLE * 1, [0] * 768)),
    "grey palette, class 2": encode(palette_image(HOLE * 2, [n // 3 for n in range(768)])),
    "GIF": encode(Image.fromarray(colors(RED)).quantize(2), "GIF"),
    "red JPEG": encode(colors(RED), "JPEG", quality=75),
    "class 8 of VOC, JPEG": encode(colors((64, 0, 0)), "JPEG", quality=90),
    "dim JPEG": encode(colors((128, 0, 0)), "JPEG", quality=90),
    "yellow JPEG": encode(colors((255, 255, 0)), "JPEG", quality=30),
    "grey JPEG": encode(levels(110), "JPEG", quality=75),
    "strokes on a transparent background": encode(np.dstack([colors(RED), levels(255)])),
}


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    return encode(Image.fromarray(colors(RED)).transpose(Image.Transpose.ROTATE_90), exif=exif)


UNAMBIGUOUS["rotated by EXIF"] = rotated_by_exif()


@pytest.mark.parametrize("name", UNAMBIGUOUS)
def test_the_value_that_is_not_black_is_the_hole(name: str) -> None:
    np.testing.assert_array_equal(read_mask(UNAMBIGUOUS[name]), HOLE)
    np.testing.assert_array_equal(read_mask(UNAMBIGUOUS[name], invert=True), ~HOLE)


@pytest.mark.parametrize("color", [RED, (0, 0, 255), (128, 0, 0), (255, 255, 0), (100, 100, 100), (255,) * 3])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_antialiased_borders_are_thresholded_midway(color: tuple[int, ...], kind: str) -> None:
    large = Image.new("RGB", (640, 480))
    ImageDraw.Draw(large).ellipse((200, 160, 360, 280), fill=color)
    sharp = np.asarray(large.convert("L").resize((160, 120), Image.Resampling.BOX)) * 2.0
    mask = read_mask(encode(large.resize((160, 120), Image.Resampling.LANCZOS), kind))
    interior = (sharp == 0) | (sharp == sharp.max())
    assert mask[interior].tolist() == (sharp == sharp.max())[interior].tolist()
    assert abs(mask.sum() - np.pi * 20 * 15) < 25


def thresholded(data: bytes) -> np.ndarray:
    """Grey levels of at least 128."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L")) >= 128


@pytest.mark.parametrize("kind", ["brush", "box", "region"])
def test_processed_black_and_white_masks_are_thresholded_at_half(kind: str) -> None:
    mask = 255 * make_mask(kind, 128, 128, np.random.default_rng(1))
    small = cv2.resize(mask, (75, 75), interpolation=cv2.INTER_AREA)
    processed = {
        "jpeg": encode(mask, "JPEG", quality=30),
        "colour jpeg": encode(np.repeat(mask[..., None], 3, 2), "JPEG", quality=60),
        "blurred": encode(cv2.GaussianBlur(mask, (0, 0), 2)),
        "shrunk": encode(small),
        "enlarged": encode(cv2.resize(small, (300, 300), interpolation=cv2.INTER_CUBIC)),
        "webp": encode(mask, "WEBP", quality=50),
        "inverted": encode(255 - mask, "JPEG"),
    }
    for name, data in processed.items():
        np.testing.assert_array_equal(read_mask(data), thresholded(data), name)


def test_images_with_a_single_value() -> None:
    assert not read_mask(encode(levels(0, 0))).any()
    assert read_mask(encode(levels(255, 255))).all()


ERRORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "classes": (lambda: encode(np.where(OTHER, 2, levels(1))), r"0 \(\d\d.*, 2 \(7.81 %\), 1 \(6.25 %\)"),
    "class and void": (lambda: encode(np.where(BORDER, np.uint8(255), levels(1))), "255"),
    "VOC and void": (
        lambda: encode(palette_image(np.where(BORDER, 255, HOLE * 8), voc_palette())),
        r"0 = #000000 .*, 8 = #400000",
    ),
    "classes that all are black": (lambda: encode(palette_image(HOLE * 1 + OTHER * 2, [0] * 768)), "0 .*, 2 .*, 1 "),
    "trimap": (lambda: encode(np.where(OTHER, np.uint8(127), levels(255))), "127"),
    "trimap JPEG": (lambda: encode(np.where(OTHER, np.uint8(128), levels(255)), "JPEG"), "values from 0 to"),
    "three greys": (lambda: encode(np.where(OTHER, np.uint8(200), levels(100))), "200 .*100 "),
    "three greys, JPEG": (lambda: encode(np.where(OTHER, np.uint8(200), levels(100)), "JPEG"), "values"),
    "red, green": (lambda: encode(colors(RED) + colors((0, 255, 0), where=OTHER)), "#00ff00 .*, #ff0000"),
    "red, green, JPEG": (lambda: encode(colors(RED) + colors((0, 255, 0), where=OTHER), "JPEG"), "colours"),
    "white and red": (lambda: encode(colors((255,) * 3) + colors(RED, where=OTHER)), "#ff0000"),
    "red on white": (lambda: encode(colors(RED, (255, 255, 255))), "#ffffff .*, #ff0000 .*, neither"),
    "white on blue": (lambda: encode(colors((255, 255, 255), (0, 0, 255))), "neither of them black"),
    "classes 1 and 2": (lambda: encode(levels(2, 1)), r"1 \(.*, 2 \(.*neither"),
    "class 1 only": (lambda: encode(levels(1, 1)), r"1 \(100 %\) alone"),
    "red only": (lambda: encode(colors(RED, RED)), r"#ff0000 \(100 %\) alone"),
    "instance numbers": (lambda: encode(np.where(OTHER, 1100, levels(1000, 0, np.int32)), "TIFF"), "1100"),
    "strokes of two colours": (
        lambda: encode(np.dstack([colors(RED) + colors((255, 255, 0), where=OTHER), 255 * np.uint8(HOLE | OTHER)])),
        "#ffff00",
    ),
    "gradient": (lambda: encode(np.tile(np.arange(256, dtype=np.uint8), (64, 1))), "256 values from 0 to 255"),
    "photograph": (lambda: encode(bundled_photo("coffee")), r"\d+ colours"),
    "grey photograph": (lambda: encode(Image.fromarray(bundled_photo("chelsea")).convert("L")), "values from"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_ambiguous_mask_is_an_error_that_lists_its_values(name: str) -> None:
    make, words = ERRORS[name]
    with pytest.raises(AmbiguousMask, match=words) as error:
        read_mask(make())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


THREE_VALUES = encode(np.where(OTHER, np.uint8(2), levels(1)))
HOLE_VALUES: dict[str, tuple[bytes, Any, np.ndarray]] = {
    "class": (THREE_VALUES, 1, HOLE),
    "text": (THREE_VALUES, "2", OTHER),
    "list": (THREE_VALUES, [1, "2"], HOLE | OTHER),
    "range": (THREE_VALUES, "1-2", HOLE | OTHER),
    "background": (THREE_VALUES, 0, ~(HOLE | OTHER)),
    "palette index": (encode(palette_image(HOLE * 1 + OTHER * 15 + BORDER * 255, voc_palette())), 15, OTHER),
    "palette colour": (encode(palette_image(HOLE * 1 + OTHER * 15 + BORDER * 255, voc_palette())), "#800000", HOLE),
    "colour": (encode(colors(RED, (255, 255, 255))), "#ff0000", HOLE),
    "colour name": (encode(colors(RED) + colors((0, 255, 0), where=OTHER)), "red", HOLE),
    "colour without #": (encode(colors(RED, (255, 255, 255))), "ff0000", HOLE),
    "grey as a colour": (encode(levels(255)), "#ffffff", HOLE),
    "grey of RGB": (encode(colors((7, 7, 7), (9, 9, 9))), 7, HOLE),
    "white JPEG": (encode(levels(255), "JPEG", quality=95), 255, HOLE),
    "one bit": (encode(Image.fromarray(HOLE)), 1, HOLE),
    "32 bits": (encode(np.where(OTHER, 1100, levels(1000, 0, np.int32)), "TIFF"), 1000, HOLE),
    "floats": (encode(levels(0.7, 0.2, np.float32), "TIFF"), "0.5-1", HOLE),
    "without transparent pixels": (encode(np.dstack([colors(RED, RED), levels(255)])), "#ff0000", HOLE),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLE_VALUES)
def test_the_hole_can_be_given_by_value(name: str) -> None:
    data, value, expected = HOLE_VALUES[name]
    np.testing.assert_array_equal(read_mask(data, hole=parse_hole_values(value)), expected)


def test_the_values_of_the_hole_that_occur_are_returned() -> None:
    mask, matches = read_mask_and_matches(THREE_VALUES, hole=parse_hole_values([7, 2, "#ff0000"]))
    assert matches == {1}
    np.testing.assert_array_equal(mask, OTHER)
    assert describe_values(THREE_VALUES) == "the values 0 (85.9 %), 2 (7.81 %), 1 (6.25 %)"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "quotes: hole: '#ff0000'"),
        ("reddish", "not valid"),
        (True, "not valid"),
        ([], "empty"),
        ("5-2", "not valid"),
    ],
)
def test_invalid_hole_values_are_errors(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_hole_values(value)


def test_equal_hole_values_have_the_same_text() -> None:
    values = [2, "2", 2.0, "red", "#F00", "ff0000", "128-255"]
    assert [value.text for value in parse_hole_values(values)] == ["2", "2", "2", *["#ff0000"] * 3, "128-255"]


def test_drawings_may_have_any_colours() -> None:
    np.testing.assert_array_equal(read_drawing(encode(colors((0, 0, 255), (255, 255, 255)))), ~HOLE)
    np.testing.assert_array_equal(read_drawing(encode(np.dstack([colors(RED), levels(255)]))), HOLE)


def test_a_hole_smaller_than_a_pixel_is_kept_by_resizing() -> None:
    mask = np.zeros((512, 512), np.uint8)
    mask[100:103, 200:202] = 1
    assert np.argwhere(resize_mask(mask, 64, 64)).tolist() == [[12, 25]]
    assert not resize_mask(0 * mask, 64, 64).any()


def test_damaged_files_are_refused() -> None:
    for data in (b"", b"text", UNAMBIGUOUS["white"][:-40], UNAMBIGUOUS["16 bits per channel, 0 and 1"][:60]):
        with pytest.raises(PhotoError):
            read_mask(data)
