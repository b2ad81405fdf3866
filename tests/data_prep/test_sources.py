"""Decoding of all file formats: correct pixels or a reason; photograph sources."""

from __future__ import annotations

import io
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep import images
from data_prep.images import PhotoError, decode_photo
from data_prep.sources import bundled_photo, open_source
from data_prep.storage import open_storage

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(bundled_photo("astronaut")[100:260, 150:390])  # 160 x 240


def ramp(low: int, high: int) -> np.ndarray:
    return np.linspace(low, high, 64)[None].repeat(16, 0)


def test_png_is_decoded_exactly_and_jpeg_closely(photo):
    assert np.array_equal(decode_photo(encode(photo)), np.asarray(photo))
    difference = np.abs(decode_photo(encode(photo, "JPEG", quality=95)).astype(int) - np.asarray(photo))
    assert difference.mean() < 3


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "WEBP", "GIF", "JPEG2000", "TGA"])
def test_other_formats(photo, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    difference = np.abs(decode_photo(encode(photo, kind, **options)).astype(int) - np.asarray(photo))
    assert difference.mean() < (10 if kind == "GIF" else 0.5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Where the stored image's corner at row 0, column 0 is displayed (EXIF 2.3, tag 0x0112)."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:4, :4] = RED
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_photo(encode(Image.fromarray(pixels), exif=exif))
    assert decoded.shape == ((16, 24, 3) if orientation < 5 else (24, 16, 3))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert tuple(decoded[corner[orientation]]) == RED
    assert int((decoded[..., 0] == 255).sum()) == 16


def test_gray_and_bilevel():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decode_photo(encode(Image.fromarray(gray))), np.dstack([gray] * 3))
    bits = decode_photo(encode(Image.fromarray(gray >= 128)))
    assert np.array_equal(bits, np.dstack([(gray >= 128) * np.uint8(255)] * 3))


def test_sixteen_bits_are_scaled_not_clipped():
    deep = ramp(0, 65535).astype(np.uint16)
    expected = np.dstack([np.floor(deep / 257 + 0.5)] * 3)
    for kind in ("PNG", "TIFF"):
        decoded = decode_photo(encode(Image.fromarray(deep), kind))
        assert np.array_equal(decoded, expected)
    color_png = cv2.imencode(".png", np.dstack([deep, deep[::-1], deep[:, ::-1]]))[1].tobytes()
    decoded = decode_photo(color_png)
    assert np.abs(decoded[..., 2].astype(int) - ramp(0, 255)).max() <= 1
    assert np.abs(decoded[..., 0].astype(int) - ramp(255, 0)).max() <= 1


def test_float_tiff():
    decoded = decode_photo(encode(Image.fromarray(ramp(0, 1).astype(np.float32)), "TIFF"))
    assert np.abs(decoded[..., 0].astype(int) - ramp(0, 255)).max() <= 1


def test_palette_with_and_without_transparency():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([*RED, *BLUE] + [0] * 762)
    image.paste(1, (0, 0, 8, 16))
    decoded = decode_photo(encode(image))
    assert tuple(decoded[0, 0]) == BLUE
    assert tuple(decoded[0, 15]) == RED
    clear = decode_photo(encode(image, transparency=0))
    assert tuple(clear[0, 0]) == BLUE
    assert tuple(clear[0, 15]) == WHITE


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (0, 0, 8, 16))
    image.putpixel((15, 0), (0, 0, 0, 128))
    decoded = decode_photo(encode(image))
    assert tuple(decoded[0, 0]) == GREEN
    assert tuple(decoded[8, 12]) == WHITE
    assert np.abs(decoded[0, 15].astype(int) - 127).max() <= 1
    gray = Image.new("LA", (16, 16), (0, 0))
    assert (decode_photo(encode(gray)) == 255).all()


def test_cmyk(photo):
    decoded = decode_photo(encode(photo.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - np.asarray(photo)).mean() < 3  # with inverted CMYK about 100


def test_a_truncated_file_is_rejected_with_a_reason(photo):
    for kind in ("JPEG", "PNG", "TIFF", "GIF"):
        data = encode(photo, kind)
        with pytest.raises(PhotoError, match=r"truncated|not an image"):
            decode_photo(data[: len(data) * 2 // 3])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_truncated_jpeg_with_a_thumbnail_is_rejected(photo):
    """The thumbnail's end marker does not count."""
    large = encode(photo, "JPEG", quality=95)
    thumbnail = b"Exif\0\0" + encode(photo.reduce(8), "JPEG")
    complete = large[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + large[2:]
    assert np.array_equal(decode_photo(complete), decode_photo(large))
    with pytest.raises(PhotoError, match="truncated"):
        decode_photo(complete[: len(complete) * 2 // 3])


@pytest.mark.parametrize("short_side", [None, 80, 40, 20, 10])
def test_opencv_decodes_jpegs_to_the_same_pixels_as_pillow(photo, short_side, monkeypatch):
    data = encode(photo, "JPEG", quality=90)
    by_opencv = decode_photo(data, short_side=short_side)
    monkeypatch.setattr(images, "_decode_jpeg_opencv", lambda *_: None)
    assert np.array_equal(decode_photo(data, short_side=short_side), by_opencv)


def test_damaged_bytes_raise_only_photo_errors(photo):
    """Any damage gives pixels or a PhotoError."""
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"):
        data = np.frombuffer(encode(photo.resize((60, 40)), kind), np.uint8)
        for _ in range(30):
            broken = data.copy()
            broken[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
            with suppress(PhotoError):
                decoded = decode_photo(broken.tobytes()[: rng.integers(1, len(data) + 1)], max_pixels=100_000)
                assert decoded.dtype == np.uint8
                assert decoded.ndim == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is text\n" * 50, "not an image"),
        (b"\x7fELF" + bytes(500), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not an image"),
        (b"\xff\xd8\xff\xe0", "not an image|truncated"),
    ],
)
def test_files_that_are_not_images_are_rejected(data, reason):
    with pytest.raises(PhotoError, match=reason):
        decode_photo(data)


def test_too_small_and_too_large_images_are_rejected():
    with pytest.raises(PhotoError, match="too small: 1 x 1"):
        decode_photo(encode(Image.new("RGB", (1, 1))))
    with pytest.raises(PhotoError, match=r"gigantic: 100 x 90 .* 8999"):
        decode_photo(encode(Image.new("RGB", (100, 90))), max_pixels=8999)


def test_a_gigantic_image_is_rejected_before_it_is_decoded():
    """16 gigapixels in a few bytes: rejected by the header."""
    header = bytearray(encode(Image.new("1", (16, 16))))
    header[16:24] = (131072).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(PhotoError, match="gigantic"):
        decode_photo(bytes(header))


def test_large_jpegs_are_decoded_at_a_reduced_size(photo):
    data = encode(photo.resize((1920, 1280)), "JPEG")
    assert decode_photo(data).shape == (1280, 1920, 3)
    assert decode_photo(data, short_side=100).shape == (320, 480, 3)
    assert decode_photo(data, short_side=700).shape == (1280, 1920, 3)


def test_folder_source(tmp_path):
    for name in ("b.png", "ä ö.png", "sub/..a.png", "a b/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(str(tmp_path))
    assert source.names() == sorted(["b.png", "ä ö.png", "sub/..a.png", "a b/c.png"])
    assert all(source.read(name) == name.encode() for name in source.names())
    assert source.split_group("b.png") is None


def test_bucket_source(s3):
    open_storage(s3).write("photos/x y.jpg", b"1")
    open_storage(s3).write("other/z.jpg", b"2")
    source = open_source(f"{s3}/photos")
    assert source.names() == ["x y.jpg"]
    assert source.read("x y.jpg") == b"1"


def test_empty_and_missing_sources_give_one_line_errors(tmp_path, s3):
    for uri in (str(tmp_path), s3):
        with pytest.raises(ValueError, match="is empty") as error:
            open_source(uri).names()
        assert uri in str(error.value)
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(str(tmp_path / "nowhere")).names()


def test_bundled_tiles():
    source = open_source("bundled")
    names = source.names()
    assert 600 < len(names) < 640
    assert names == sorted(set(names))
    photo = bundled_photo("coffee")
    full = decode_photo(source.read("coffee/full/002-003"))
    assert np.array_equal(full, photo[128:192, 192:256])
    half = decode_photo(source.read("coffee/half/001-002"))
    mean = photo[128:256, 256:384].reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(half - mean).max() <= 0.5 + 1e-6
    with pytest.raises(ValueError, match="tile"):
        open_source("bundled", tile_size=1000)


def test_bundled_tiles_without_contrast_are_not_used():
    source = open_source("bundled")
    listed = set(source.names())
    for half in (False, True):
        photo = bundled_photo("rocket", half)  # much of it is clear sky
        for y, x in np.ndindex(photo.shape[0] // 64, photo.shape[1] // 64):
            gray = photo[64 * y : 64 * y + 64, 64 * x : 64 * x + 64].mean(2)
            assert (f"rocket/{'half' if half else 'full'}/{y:03d}-{x:03d}" in listed) == (gray.std() >= 10)


def test_no_area_of_a_bundled_photograph_is_in_two_groups():
    source = open_source("bundled")
    group_of_tile: dict[tuple, str] = {}
    for name in source.names():
        photo, scale, position = name.split("/")
        y, x = map(int, position.split("-"))
        span = 2 if scale == "half" else 1  # in full-scale tiles
        for dy in range(span):
            for dx in range(span):
                assert group_of_tile.setdefault(
                    (photo, y * span + dy, x * span + dx), source.split_group(name)
                ) == source.split_group(name)
