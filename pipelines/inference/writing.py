"""Output of a filled photograph: early check of the path, conversion to the format, atomic write."""

from __future__ import annotations

import io
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import getchunks

from pipelines.inference import tiff
from pipelines.inference.metadata import Metadata, jpeg_save_options, png_save_options, tiff_fields
from pipelines.inference.photo_file import PhotoFile
from pipelines.inference.pixels import COLOR_NAMES, PILLOW_MODES, Pixels
from pipelines.path_checks import check_writable_file

LOSSLESS_FORMATS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
LOSSY_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG"}
MAX_JPEG_SIDE = 65535  # pixels
LOSSY_WARNING = "JPEG cannot keep the known pixels identical"
TEMPORARY = ".inpaint-"  # begins the name of a file that is not yet complete
PNG_COMPRESS_LEVEL = 4
ROWS_PER_CHUNK = 256  # of a 16-bit PNG, compressed at a time


class WriteError(ValueError):
    """A file cannot be written: a full disk, or a folder that is gone. One line."""


def output_format(path: Path) -> str:
    return {**LOSSLESS_FORMATS, **LOSSY_FORMATS}[path.suffix.lower()]


def check_output_path(path: Path, sources: list[Path]) -> list[str]:
    """Warnings about writing to `path`; ValueError if it is not writable or would overwrite one of `sources`."""
    suffix = path.suffix.lower()
    if suffix not in LOSSLESS_FORMATS | LOSSY_FORMATS:
        raise ValueError(f"--out {path}: write a .png (or .tif, or .jpg)")
    check_writable_file(path, "--out")
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"--out {path} would overwrite an input: give another name")
    if suffix in LOSSY_FORMATS:
        png_name = path.with_suffix(".png").name
        return [f"{LOSSY_WARNING}; write a PNG to keep them: --out {png_name}"]
    return []


def convert_for_format(photo: PhotoFile, path: Path) -> None:
    """Convert the pixels to what the format of `path` can store, and note what it cannot.

    ValueError in one line if the photograph is too large for the format.
    """
    file_format, pixels, notes = output_format(path), photo.pixels, photo.notes
    height, width = pixels.values.shape[:2]
    if file_format == "JPEG" and max(height, width) > MAX_JPEG_SIDE:
        raise ValueError(
            f"--out {path}: a JPEG has at most {MAX_JPEG_SIDE} px per side, the photograph is {width}x{height}"
        )
    if file_format != "TIFF":
        photo.pixels = (
            _convert_for_png(pixels, notes) if file_format == "PNG" else _convert_for_jpeg(pixels, notes)
        )
    if photo.pixels.color_space != pixels.color_space and photo.metadata.icc_profile:
        photo.metadata.icc_profile = None
        notes.append(
            f"the {COLOR_NAMES[pixels.color_space]} colour profile is left out: it does not describe RGB"
        )
    notes += _describe_kept(photo.pixels, photo.pixels.values.dtype == pixels.values.dtype)


def _convert_for_png(pixels: Pixels, notes: list[str]) -> Pixels:
    if "other" in pixels.extra_channels:
        notes.append("an extra channel is left out: PNG does not hold it")
        pixels = pixels.drop_other_channels()
    if pixels.color_space not in ("grey", "rgb"):
        notes.append(
            f"{COLOR_NAMES[pixels.color_space]} becomes RGB with 8 bits per channel: PNG does not hold it"
        )
        pixels = pixels.to_rgb()
    if pixels.has_open_range:
        black, white, dtype = pixels.black, pixels.white, pixels.values.dtype
        pixels, is_unchanged = pixels.to_uint16()
        if not is_unchanged:
            notes.append(
                f"{dtype} becomes 16 bits per channel, {black:g} to {white:g} as 0 to 65535: PNG does not hold it"
            )
    if "premultiplied" in pixels.extra_channels:
        notes.append("premultiplied colours are divided by alpha: PNG does not hold them")
        pixels = pixels.unpremultiply()
    return pixels


def _convert_for_jpeg(pixels: Pixels, notes: list[str]) -> Pixels:
    kind, bits = pixels.values.dtype.kind, 8 * pixels.values.itemsize
    if kind == "f" or bits > 8:
        depth = (
            f"{pixels.values.dtype} ({pixels.black:g} to {pixels.white:g})"
            if pixels.has_open_range
            else f"{bits} bits per channel"
        )
        notes.append(f"{depth} becomes 8 bits per channel: JPEG holds no more")
    if kind == "b":
        notes.append("black and white becomes grey: JPEG does not hold one bit")
    if pixels.alpha_index is not None:
        notes.append("transparency is composed on white: JPEG does not hold it")
    if "other" in pixels.extra_channels:
        notes.append("an extra channel is left out: JPEG does not hold it")
    return pixels.flatten_on_white()


def _describe_kept(pixels: Pixels, is_same_dtype: bool) -> list[str]:
    """Notes about properties that are kept although the fill is 8-bit RGB."""
    notes = []
    kind, bits = pixels.values.dtype.kind, 8 * pixels.values.itemsize
    if not is_same_dtype:
        pass
    elif kind == "f":
        notes.append(f"floats of {bits} bits are kept; the hole is filled with 256 steps")
    elif bits > 8:
        notes.append(f"{bits} bits per channel are kept; the hole is filled with 8")
    elif kind == "b":
        notes.append("black and white is kept: the hole is dithered")
    if pixels.color_space == "grey" and kind != "b":
        notes.append("grey is kept: the hole is filled in grey")
    if pixels.alpha_index is not None:
        notes.append("transparency is kept; the hole becomes opaque")
    if "other" in pixels.extra_channels:
        notes.append("extra channels are kept, also in the hole")
    return notes


def encode_photo(pixels: Pixels, metadata: Metadata, file_format: str, notes: list[str]) -> bytes:
    """The file's bytes, for pixels from `convert_for_format`; adds to `notes` which metadata is kept."""
    if file_format == "TIFF":
        return tiff.encode_tiff(pixels, metadata.exif, tiff_fields(metadata, notes))
    file = io.BytesIO()
    if file_format == "JPEG":
        options = jpeg_save_options(metadata, notes)
        _pillow_image(pixels).save(file, file_format, quality=95, subsampling=0, **options)
        return file.getvalue()
    options = png_save_options(metadata, notes)
    if pixels.values.dtype == np.uint16 and pixels.values.shape[2] > 1:
        return _encode_16_bit_png(pixels.values, options)
    _pillow_image(pixels).save(file, file_format, compress_level=PNG_COMPRESS_LEVEL, **options)
    return file.getvalue()


def _pillow_image(pixels: Pixels) -> Image.Image:
    values = pixels.values
    height, width, channels = values.shape
    if channels == 1:
        return Image.fromarray(values[..., 0])
    mode = PILLOW_MODES[pixels.color_space] + ("A" if pixels.extra_channels else "")
    return Image.frombytes(mode, (width, height), values.tobytes())


def _encode_16_bit_png(values: np.ndarray, options: dict) -> bytes:
    """A PNG of uint16 [H,W,2 to 4], which Pillow does not write: Pillow's chunks with another IHDR and IDAT.

    Each row is filtered by Sub or Up (PNG's filters 1 and 2), whichever gives the smaller differences.
    """
    height, width, channels = values.shape
    compressor = zlib.compressobj(tiff.DEFLATE_LEVEL)
    compressed = b""
    previous_row = np.zeros((1, 2 * width * channels), np.uint8)
    for top in range(0, height, ROWS_PER_CHUNK):
        block = values[top : top + ROWS_PER_CHUNK]
        rows = block.astype(">u2").view(np.uint8).reshape(len(block), -1)
        sub, up = rows.copy(), rows - np.concatenate([previous_row, rows[:-1]])
        sub[:, 2 * channels :] -= rows[:, : -2 * channels]
        costs = [np.abs(f.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64) for f in (sub, up)]
        use_up = (costs[1] < costs[0])[:, None]
        filtered_rows = np.concatenate([use_up + np.uint8(1), np.where(use_up, up, sub)], axis=1)
        compressed += compressor.compress(filtered_rows.tobytes())
        previous_row = rows[-1:]
    compressed += compressor.flush()
    colour_type = {2: 4, 3: 2, 4: 6}[channels]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour_type, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data, _ in getchunks(Image.new("L", (1, 1)), **options):
        data = {b"IHDR": header, b"IDAT": compressed}.get(kind, data)
        png += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return png


def write_atomically(path: Path, data: bytes) -> None:
    """Write the file atomically: readers see the old or the complete new file. WriteError in one line."""
    temporary_path = None
    try:
        descriptor, temporary_path = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary_path, 0o666 & ~_umask())
        os.replace(temporary_path, path)
    except OSError as error:
        raise WriteError(f"--out {path} cannot be written: {error.strerror or error}") from None
    finally:
        if temporary_path:
            Path(temporary_path).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
