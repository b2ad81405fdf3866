"""Reads and writes TIFFs that Pillow cannot: 16 bits and more in several channels, floats, extra channels.

tifffile reads the structure. Pillow's libtiff decompresses what tifffile needs another package for (LZW, Zstandard).
Structure and predictors: TIFF 6.0, sections 8, 14 and 18; Adobe Photoshop TIFF Technical Note 3 (floats).
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data_prep.images import MAX_PIXELS, PhotoError, check_size
from pipelines.inference.exif import Exif, Field, build_ifd, integer_field
from pipelines.inference.pixels import Pixels

COLOR_SPACES = {0: "grey", 1: "grey", 2: "rgb", 5: "cmyk"}  # by TIFF's photometric interpretation
PHOTOMETRIC = {"grey": 1, "rgb": 2, "cmyk": 5, "ycbcr": 6, "lab": 8}
EXTRA_SAMPLES = {"other": 0, "premultiplied": 1, "alpha": 2}
TIFFFILE_COMPRESSIONS = {
    1,
    8,
    32946,
    32773,
}  # that tifffile decodes itself: none, deflate (two codes), PackBits
NO_PREDICTOR, HORIZONTAL_PREDICTOR, FLOAT_PREDICTOR = 1, 2, 3
STRIP_BYTES = 1 << 18
DEFLATE_LEVEL = 1  # with the predictor, higher levels save 3 % and take two to seven times as long
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs errors that it also raises


def is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def list_pages(data: bytes) -> list[int]:
    """Numbers, from 0, of the pages, without thumbnails and transparency masks. PhotoError if the file is damaged."""
    with open_tiff(data) as file:
        numbers = [
            number
            for number, page in enumerate(file.pages)
            if number == 0 or not int(page.aspage().subfiletype) & 0b101
        ]
    if not numbers:
        raise PhotoError("damaged or truncated: it has no page")
    return numbers


def page_offset(data: bytes, number: int) -> int:
    """Offset of a page's IFD."""
    with open_tiff(data) as file:
        return int(file.pages[number].offset)


def read_page(data: bytes, number: int) -> Pixels | None:
    """The values of a page as stored; None if Pillow can read the page. PhotoError if it is damaged."""
    with open_tiff(data) as file:
        page: Any = file.pages[number].aspage()
        extra_samples = tuple(int(value) for value in page.extrasamples)
        is_deep = page.bitspersample in (16, 32, 64) or bool({0, 1} & set(extra_samples))
        color_space = COLOR_SPACES.get(int(page.photometric))
        if not is_deep or color_space is None or page.dtype is None or int(page.compression) in (6, 7):
            return None
        check_size(page.imagewidth, page.imagelength, 1, MAX_PIXELS)
        values = _read_values(page, file.filehandle)
    extra_count = len(extra_samples) or values.shape[2] - {"grey": 1, "rgb": 3, "cmyk": 4}[color_space]
    names = {number: name for name, number in EXTRA_SAMPLES.items()}
    extra_channels = tuple(names.get(value, "alpha" if value == 999 else "other") for value in extra_samples)
    if not extra_channels and extra_count > 0:  # OpenCV does not tag its alpha channel
        extra_channels = ("alpha", *["other"] * (extra_count - 1))
    if int(page.photometric) == 0 and values.dtype.kind == "u":  # white is 0
        values[..., 0] = np.iinfo(values.dtype).max - values[..., 0]
    return Pixels(values, color_space, extra_channels)


def _read_values(page: Any, file: Any) -> np.ndarray:
    """Decode a page to [H,W,C] in native byte order."""
    if page.imagedepth != 1 or page.ndim not in (2, 3):
        raise PhotoError(f"a TIFF of shape {page.shape} is not a photograph")
    if int(page.compression) in TIFFFILE_COMPRESSIONS and page.predictor != FLOAT_PREDICTOR:
        values = page.asarray()
        if values.ndim == 3 and page.planarconfig == 2 and page.samplesperpixel > 1:
            values = np.moveaxis(values, 0, -1)
    else:
        compression, predictor = int(page.compression), int(page.predictor)
        page.compression = tifffile.COMPRESSION.NONE  # from here on tifffile gets decompressed bytes
        page.predictor = NO_PREDICTOR if predictor == FLOAT_PREDICTOR else predictor
        out = np.zeros(page.shaped, page.dtype)
        samples = 1 if page.planarconfig == 2 else page.samplesperpixel
        strips = -(-page.imagelength // max(1, page.rowsperstrip or page.imagelength))
        for index, (offset, size) in enumerate(zip(page.dataoffsets, page.databytecounts)):
            if page.is_tiled:
                height, width = page.tilelength, page.tilewidth
            else:
                first = index % strips * page.rowsperstrip
                height, width = min(page.rowsperstrip, page.imagelength - first), page.imagewidth
            file.seek(offset)
            row_bytes = width * samples * page.dtype.itemsize
            data = _decompress(file.read(size), height, row_bytes, compression, int(page.fillorder))
            if predictor == FLOAT_PREDICTOR:
                data = _undo_float_predictor(data, page.dtype, samples, page.parent.byteorder)
            segment, (plane, depth, top, left, _), shape = page.decode(data.tobytes(), index)
            if segment is not None:
                slices = (slice(top, top + shape[1]), slice(left, left + shape[2]))
                out[plane, depth][slices] = segment[0, : shape[1], : shape[2]]
        values = np.moveaxis(out[:, 0], 0, -2).reshape(*out.shape[2:4], -1)
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    return values[..., None] if values.ndim == 2 else values


def _decompress(data: bytes, height: int, row_bytes: int, compression: int, fill_order: int) -> np.ndarray:
    """Decompress a strip or tile with libtiff to uint8 [height,row_bytes], wrapped in a TIFF of its own."""
    # Pillow limits the number of pixels, not of bytes: four channels where possible
    channels, photometric = (4, 5) if row_bytes % 4 == 0 else (1, 1)
    fields = {
        256: row_bytes // channels,
        257: height,
        258: (8,) * channels,
        259: compression,
        262: photometric,
    }
    fields |= {266: fill_order, 273: 0, 277: channels, 278: height, 279: len(data)}
    directory = ImageFileDirectory_v2()
    for tag, value in fields.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)
    file.write(data)
    with Image.open(file, formats=["TIFF"]) as image:
        return np.asarray(image).reshape(height, row_bytes)


def _undo_float_predictor(data: np.ndarray, dtype: np.dtype, samples: int, byte_order: str) -> np.ndarray:
    """Undo the floating-point predictor: byte differences, one plane per byte, most significant first."""
    height, row_bytes = data.shape
    decoded = np.cumsum(data.reshape(height, -1, samples), axis=1, dtype=np.uint8).reshape(height, row_bytes)
    planes = decoded.reshape(height, dtype.itemsize, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(planes if byte_order == ">" else planes[..., ::-1])


@contextmanager
def open_tiff(data: bytes) -> Iterator[tifffile.TiffFile]:
    """Open with tifffile; any of its errors becomes a PhotoError."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            yield file
    except PhotoError:
        raise
    except MemoryError:
        raise PhotoError("gigantic: no memory to decode it") from None
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise PhotoError(f"damaged or truncated: {first_line or type(error).__name__}") from error


def encode_tiff(pixels: Pixels, exif: Exif | None, fields: dict[int, Field | dict]) -> bytes:
    """A TIFF of one page, compressed with deflate, with the additional `fields`, in the byte order of `exif`."""
    byte_order = exif.byte_order if exif else "<"
    values = pixels.values
    height, width, channels = values.shape
    is_bool = values.dtype == np.bool_
    is_uncompressed = pixels.color_space == "ycbcr"  # if compressed, libtiff would decode it to RGB
    use_predictor = values.dtype.kind in "ui" and not is_uncompressed
    rows = min(height, max(1, STRIP_BYTES // (values.itemsize * width * channels)))
    strips = []
    for top in range(0, height, rows):
        strip = values[top : top + rows]
        if is_bool:
            strip = np.packbits(strip[..., 0], axis=1)
        elif use_predictor:
            strip = strip.copy()
            strip[:, 1:] -= values[top : top + rows, :-1]
        data = strip.astype(strip.dtype.newbyteorder("<" if byte_order == "<" else ">")).tobytes()
        strips.append(data if is_uncompressed else zlib.compress(data, DEFLATE_LEVEL))
    sizes = [len(strip) for strip in strips]
    offsets = (8 + np.cumsum([0, *sizes[:-1]])).tolist()
    bits = 1 if is_bool else 8 * values.itemsize
    sample_format = {"b": 1, "u": 1, "i": 2, "f": 3}[values.dtype.kind]
    all_fields = dict(fields) | {
        256: integer_field(byte_order, 4, width),
        257: integer_field(byte_order, 4, height),
        258: integer_field(byte_order, 3, *[bits] * channels),
        259: integer_field(byte_order, 3, 1 if is_uncompressed else 8),
        262: integer_field(byte_order, 3, PHOTOMETRIC[pixels.color_space]),
        273: integer_field(byte_order, 4, *offsets),
        277: integer_field(byte_order, 3, channels),
        278: integer_field(byte_order, 4, rows),
        279: integer_field(byte_order, 4, *sizes),
        284: integer_field(byte_order, 3, 1),
        317: integer_field(byte_order, 3, HORIZONTAL_PREDICTOR if use_predictor else NO_PREDICTOR),
        339: integer_field(byte_order, 3, *[sample_format] * channels),
    }
    if pixels.extra_channels:
        all_fields[338] = integer_field(
            byte_order, 3, *(EXTRA_SAMPLES[name] for name in pixels.extra_channels)
        )
    if pixels.color_space == "ycbcr":
        all_fields[530] = integer_field(byte_order, 3, 1, 1)
        white = b"".join(struct.pack(byte_order + "2I", value, 1) for value in (0, 255, 128, 255, 128, 255))
        all_fields[532] = Field(5, 6, white)
    end = 8 + sum(sizes)
    end += end % 2
    signature = b"II" if byte_order == "<" else b"MM"
    header = signature + struct.pack(byte_order + "HI", 42, end)
    body = header + b"".join(strips)
    return body.ljust(end, b"\0") + build_ifd(byte_order, all_fields, end)
