"""A photograph's metadata (EXIF, colour profile, resolution, XMP, text) and how each output format stores it."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.inference.exif import (
    ICC_PROFILE,
    ORIENTATION,
    RESOLUTION_UNIT,
    X_RESOLUTION,
    XMP,
    Y_RESOLUTION,
    Exif,
    Field,
    integer_field,
    read_block,
    read_ifd,
)

XMP_KEY = "XML:com.adobe.xmp"  # key of XMP in a PNG's text
COLOR_CHUNKS = (b"cHRM", b"cICP", b"gAMA", b"sRGB")  # PNG chunks with gamma and primaries
SRGB_GAMMA = struct.pack(">I", 45455)
MAX_JPEG_SEGMENT = 65533 - 29  # bytes of EXIF or XMP in a JPEG segment
MAX_DPI = 1e5
IMAGE_DESCRIPTION = 270
PAGE_LAYOUT = re.compile(rb'\s*(\{"shape"|ImageJ=|(<\?xml.*)?<OME)', re.DOTALL)
"""Descriptions in which programs store the page layout: wrong for a single page."""


@dataclass
class Metadata:
    """Metadata of one photograph; None or empty: not in its file."""

    exif: Exif | None = None
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    xmp: bytes | None = None
    text: dict[str, str] = field(default_factory=dict)
    color_chunks: dict[bytes, bytes] = field(default_factory=dict)
    """The COLOR_CHUNKS of a PNG."""
    axes_swapped: bool = False
    """Whether making the photograph upright swapped its width and height."""
    notes: list[str] = field(default_factory=list)

    @property
    def orientation(self) -> int:
        return int((self.exif and self.exif.get_number(ORIENTATION)) or 1)


def read_image_metadata(image: Image.Image, data: bytes) -> Metadata:
    """Metadata of a loaded image other than TIFF. Damaged parts are left out, with a note."""
    info = image.info
    metadata = Metadata(icc_profile=info.get("icc_profile") or None, dpi=_valid_dpi(info.get("dpi")))
    block = info.get("exif") or _raw_profile_exif(info)
    if block:
        try:
            metadata.exif = read_block(block)
        except (ValueError, struct.error) as error:
            metadata.notes.append(f"the EXIF data is damaged and left out ({error})")
    if metadata.exif and not metadata.dpi:
        metadata.dpi = _exif_dpi(metadata.exif)
    xmp = info.get("xmp") or info.get(XMP_KEY)
    metadata.xmp = _clean_xmp(xmp.encode() if isinstance(xmp, str) else xmp)
    for key, value in getattr(image, "text", {}).items():
        if key != XMP_KEY and not key.startswith("Raw profile type"):
            metadata.text[key] = str(value)
    comment = info.get("comment")
    if image.format != "JPEG2000" and isinstance(comment, bytes) and comment.strip(b"\0 "):
        metadata.text.setdefault("Comment", comment.rstrip(b"\0").decode("utf-8", "replace"))
    if image.format == "PNG":
        metadata.color_chunks = {kind: value for kind, value in _png_chunks(data) if kind in COLOR_CHUNKS}
    return metadata


def read_page_metadata(data: bytes, offset: int) -> Metadata:
    """Metadata of the TIFF page whose IFD is at `offset`."""
    try:
        exif = read_ifd(data, offset)
    except (ValueError, struct.error) as error:
        return Metadata(notes=[f"the tags are damaged and left out ({error})"])
    description = exif.fields.get(IMAGE_DESCRIPTION)
    if description and PAGE_LAYOUT.match(description.data):
        del exif.fields[IMAGE_DESCRIPTION]
    metadata = Metadata(exif)
    metadata.icc_profile = exif.fields[ICC_PROFILE].data if ICC_PROFILE in exif.fields else None
    metadata.xmp = _clean_xmp(exif.fields[XMP].data) if XMP in exif.fields else None
    metadata.dpi = _exif_dpi(exif)
    return metadata


def png_save_options(metadata: Metadata, notes: list[str]) -> dict[str, Any]:
    """Arguments of Pillow's PNG writer; adds to `notes` what is kept and left out."""
    options, info = _save_options(metadata), PngInfo()
    for kind, data in metadata.color_chunks.items():
        info.add(kind, data)
    if metadata.xmp:
        info.add_itxt(XMP_KEY, metadata.xmp)
    for key, value in metadata.text.items():
        if 0 < len(key.encode("utf-8")) < 80:
            info.add_text(key, value)
    _note_kept(metadata, {*options, *(["xmp"] if metadata.xmp else [])}, notes)
    return options | {"pnginfo": info}


def jpeg_save_options(metadata: Metadata, notes: list[str]) -> dict[str, Any]:
    """Arguments of Pillow's JPEG writer; adds to `notes` what is kept and left out."""
    options = _save_options(metadata)
    if metadata.xmp:
        options["xmp"] = metadata.xmp
    for name, label in (("exif", "EXIF"), ("xmp", "XMP")):
        if len(options.get(name, b"")) > MAX_JPEG_SEGMENT:
            notes.append(f"{label} of {len(options[name])} bytes is left out: JPEG holds {MAX_JPEG_SEGMENT}")
            del options[name]
    excluded = [key for key in metadata.text if key != "Comment"]
    if "Comment" in metadata.text:
        comment = metadata.text["Comment"].encode("utf-8")
        if len(comment) <= MAX_JPEG_SEGMENT:
            options["comment"] = comment
        else:
            excluded.append("Comment")
    _note_left_out(excluded, metadata, "JPEG", notes)
    _note_kept(metadata, set(options), notes)
    return options


def tiff_fields(metadata: Metadata, notes: list[str]) -> dict[int, Field | dict]:
    """A TIFF's metadata fields; adds to `notes` what is kept and left out."""
    byte_order = metadata.exif.byte_order if metadata.exif else "<"
    fields = metadata.exif.fields_to_keep(metadata.axes_swapped) if metadata.exif else {}
    if dpi := _output_dpi(metadata):
        for tag, value in zip((X_RESOLUTION, Y_RESOLUTION), dpi):
            # a TIFF keeps its own resolution fields
            if not (metadata.exif and not metadata.exif.block and tag in fields):
                fields[tag] = _rational_field(byte_order, value)
                fields[RESOLUTION_UNIT] = integer_field(byte_order, 3, 2)
    for tag, data in ((XMP, metadata.xmp), (ICC_PROFILE, metadata.icc_profile)):
        if data:
            fields[tag] = Field(7 if tag == ICC_PROFILE else 1, len(data), data)
    excluded = [key for key in metadata.text if key != "Comment" or IMAGE_DESCRIPTION in fields]
    if "Comment" not in excluded and "Comment" in metadata.text:
        comment = metadata.text["Comment"].encode() + b"\0"
        fields[IMAGE_DESCRIPTION] = Field(2, len(comment), comment)
    _note_left_out(excluded, metadata, "TIFF", notes)
    values = {
        "exif": set(fields) - {X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, XMP, ICC_PROFILE},
        "xmp": metadata.xmp,
    }
    _note_kept(metadata, {name for name, value in values.items() if value}, notes)
    return fields


def _save_options(metadata: Metadata) -> dict[str, Any]:
    options: dict[str, Any] = {"icc_profile": metadata.icc_profile or b""}
    if dpi := _output_dpi(metadata):
        options["dpi"] = dpi
    exif = metadata.exif
    if exif and (exif.block or exif.fields_to_keep(exclude=(X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT))):
        options["exif"] = b"Exif\0\0" + exif.upright_block(metadata.axes_swapped)
    return options


def _note_kept(metadata: Metadata, stored: set[str], notes: list[str]) -> None:
    """Note what is kept; EXIF and XMP only if `stored` names them."""
    kept = [
        *(["EXIF"] if "exif" in stored else []),
        *(["colour profile"] if metadata.icc_profile else []),
        *([f"{metadata.dpi[0]:.4g} dpi"] if metadata.dpi else []),
        *(["XMP"] if "xmp" in stored else []),
    ]
    if kept:
        notes.append(f"kept: {', '.join(kept)}")
    if metadata.exif and metadata.exif.thumbnail_spans:
        notes.append("the EXIF thumbnail is left out: it shows the photograph before the fill")


def _note_left_out(keys: list[str], metadata: Metadata, file_format: str, notes: list[str]) -> None:
    if keys:
        notes.append(f"text is left out, as {file_format} does not hold it: {', '.join(keys)[:200]}")
    is_not_srgb = (
        metadata.color_chunks.get(b"gAMA", SRGB_GAMMA) != SRGB_GAMMA and b"sRGB" not in metadata.color_chunks
    )
    if (is_not_srgb or b"cICP" in metadata.color_chunks) and not metadata.icc_profile:
        notes.append(f"the PNG's gamma or primaries are left out: {file_format} does not hold them")


def _output_dpi(metadata: Metadata) -> tuple[float, float] | None:
    return metadata.dpi[::-1] if metadata.dpi and metadata.axes_swapped else metadata.dpi


def _exif_dpi(exif: Exif) -> tuple[float, float] | None:
    x_resolution, y_resolution = exif.get_number(X_RESOLUTION), exif.get_number(Y_RESOLUTION)
    scale = {2: 1.0, 3: 2.54}.get(int(exif.get_number(RESOLUTION_UNIT) or 2))
    return (
        _valid_dpi((x_resolution * scale, y_resolution * scale))
        if scale and x_resolution and y_resolution
        else None
    )


def _valid_dpi(value: Any) -> tuple[float, float] | None:
    """A pair of plausible pixels per inch; None for anything else."""
    try:
        x_dpi, y_dpi = (float(side) for side in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    is_valid = all(math.isfinite(side) and 0 < side <= MAX_DPI for side in (x_dpi, y_dpi))
    return (x_dpi, y_dpi) if is_valid else None


def _rational_field(byte_order: str, value: float) -> Field:
    is_integer = abs(value - round(value)) < 0.005
    numerator, denominator = (round(value), 1) if is_integer else (round(value * 10000), 10000)
    return Field(5, 1, struct.pack(byte_order + "2I", numerator, denominator))


def _clean_xmp(xmp: bytes | None) -> bytes | None:
    """XMP without the orientation and the thumbnails, which a fill makes untrue."""
    if not xmp:
        return None
    for pattern in (
        rb'\s*tiff:Orientation="[^"]*"',
        rb"<tiff:Orientation>.*?</tiff:Orientation>",
        rb"<xmp:Thumbnails>.*?</xmp:Thumbnails>",
        rb"<xap:Thumbnails>.*?</xap:Thumbnails>",
    ):
        xmp = re.sub(pattern, b"", xmp, flags=re.DOTALL)
    return xmp


def _raw_profile_exif(info: dict[Any, Any]) -> bytes | None:
    """The EXIF block that ImageMagick stores as text in a PNG; None if there is none or it is damaged."""
    text = info.get("Raw profile type exif")
    if not isinstance(text, str):
        return None
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return None


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(type, data) of a PNG's chunks before its pixels."""
    chunks, offset = [], 8
    while offset + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, offset)
        kind = data[offset + 4 : offset + 8]
        if kind == b"IDAT":
            break
        chunks.append((kind, data[offset + 8 : offset + 8 + size]))
        offset += 12 + size
    return chunks
