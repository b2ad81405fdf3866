"""EXIF as raw fields: an existing block is patched only where a fill makes it untrue; for a TIFF it is rebuilt.

Pillow's writer would change field types, write '?' for non-ASCII letters and move maker notes.
Structure: TIFF 6.0, section 2, and CIPA DC-008 (EXIF 2.32), section 4.6.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ORIENTATION, THUMBNAIL_OFFSET, THUMBNAIL_BYTES = 274, 513, 514
EXIF_IFD, GPS_IFD, INTEROP_IFD = 34665, 34853, 40965  # tags whose value is the offset of another IFD
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
XMP, PHOTOSHOP, ICC_PROFILE = 700, 34377, 34675
# tags of (x, y), which swap their values when a photograph is rotated by 90 degrees
AXIS_PAIRS = ((256, 257), (X_RESOLUTION, Y_RESOLUTION), (40962, 40963))
TYPE_BYTES = {  # type code -> bytes of one value
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
INTEGER_FORMATS = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # type code -> format of `struct`
LAYOUT_TAGS = {  # tags about the storage of a TIFF's pixels: the written file has its own
    *range(254, 267),
    *(273, ORIENTATION, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 301, 317),
    *range(320, 348),
    *range(512, 522),
    *range(529, 533),
    *(XMP, PHOTOSHOP, ICC_PROFILE, 37724, 50838, 50839),
}


@dataclass(frozen=True)
class Field:
    """One entry of an IFD."""

    type_code: int
    """TIFF's code for the data type."""
    count: int
    data: bytes
    """The values in the block's byte order."""
    offset: int = 0
    """Offset of the data in the block."""


@dataclass
class Exif:
    """The fields of an EXIF block or of an IFD of a TIFF."""

    byte_order: str
    """'<' or '>', as in `struct`."""
    fields: dict[int, Field] = field(default_factory=dict)
    sub_ifds: dict[int, dict[int, Field]] = field(default_factory=dict)
    """EXIF_IFD, GPS_IFD or INTEROP_IFD -> the fields of that IFD."""
    block: bytes = b""
    """The block that was read; empty for an IFD of a TIFF."""
    thumbnail_pointer_offset: int = 0
    """Offset of the pointer to the thumbnail's IFD."""
    thumbnail_spans: tuple[tuple[int, int], ...] = ()
    """(start, end) of the thumbnail's IFD and of its pixels in the block."""

    def get_number(self, tag: int) -> float | None:
        """The first value of an integer or rational field; None if there is none."""
        entry = self.fields.get(tag)
        if entry is None or len(entry.data) < TYPE_BYTES.get(entry.type_code, 9):
            return None
        if entry.type_code in INTEGER_FORMATS:
            return float(
                struct.unpack_from(self.byte_order + INTEGER_FORMATS[entry.type_code], entry.data)[0]
            )
        if entry.type_code == 5:
            numerator, denominator = struct.unpack_from(self.byte_order + "2I", entry.data)
            return numerator / denominator if denominator else None
        return None

    def upright_block(self, swap_axes: bool) -> bytes:
        """The block for upright pixels: orientation 1, no thumbnail, x and y tags swapped if `swap_axes`.

        All other bytes and offsets stay the same.
        """
        if not self.block:
            return build_block(self.byte_order, self.fields_to_keep(swap_axes))
        block = bytearray(self.block)
        orientation = self.fields.get(ORIENTATION)
        if orientation and orientation.type_code in INTEGER_FORMATS and orientation.data:
            struct.pack_into(
                self.byte_order + INTEGER_FORMATS[orientation.type_code], block, orientation.offset, 1
            )
        if swap_axes:
            for fields in (self.fields, *self.sub_ifds.values()):
                for x_tag, y_tag in AXIS_PAIRS:
                    x_field, y_field = fields.get(x_tag), fields.get(y_tag)
                    if (
                        x_field
                        and y_field
                        and (x_field.type_code, x_field.count) == (y_field.type_code, y_field.count)
                    ):
                        block[x_field.offset : x_field.offset + len(x_field.data)] = y_field.data
                        block[y_field.offset : y_field.offset + len(y_field.data)] = x_field.data
        if self.thumbnail_spans:
            struct.pack_into(self.byte_order + "I", block, self.thumbnail_pointer_offset, 0)
            for start, end in self.thumbnail_spans:
                block[start:end] = bytes(end - start)
        return bytes(block)

    def fields_to_keep(self, swap_axes: bool = False, exclude: Iterable[int] = ()) -> dict[int, Field | dict]:
        """All fields except LAYOUT_TAGS and `exclude`, as arguments of `build_block`."""
        excluded = {*LAYOUT_TAGS, EXIF_IFD, GPS_IFD, INTEROP_IFD, *exclude}
        fields: dict[int, Field | dict] = {
            tag: value for tag, value in self.fields.items() if tag not in excluded and value.type_code <= 13
        }
        for tag in (EXIF_IFD, GPS_IFD):
            sub_ifd: dict[int, Field | dict] = {
                key: value for key, value in self.sub_ifds.get(tag, {}).items() if value.type_code <= 13
            }
            sub_ifd.pop(INTEROP_IFD, None)
            if tag == EXIF_IFD and (interop := self.sub_ifds.get(INTEROP_IFD)):
                sub_ifd[INTEROP_IFD] = dict(interop)
            if sub_ifd:
                fields[tag] = _swap_axis_fields(sub_ifd) if swap_axes else sub_ifd
        return _swap_axis_fields(fields) if swap_axes else fields


def read_block(data: bytes) -> Exif:
    """Parse an EXIF block, with or without its `Exif` prefix. ValueError if it is not one."""
    block = re.sub(rb"^(Exif\x00\x00)+", b"", data)
    byte_order, start, is_bigtiff = read_header(block)
    fields, pointer_offset = _read_ifd(block, start, byte_order, is_bigtiff)
    exif = Exif(
        byte_order, fields, _read_sub_ifds(block, fields, byte_order, is_bigtiff), block, pointer_offset
    )
    has_pointer = pointer_offset + 4 <= len(block)
    (thumbnail_ifd,) = struct.unpack_from(byte_order + "I", block, pointer_offset) if has_pointer else (0,)
    if thumbnail_ifd:
        thumbnail_fields, end = _read_ifd(block, thumbnail_ifd, byte_order, is_bigtiff)
        thumbnail = Exif(byte_order, thumbnail_fields)
        spans = [(thumbnail_ifd, min(end + 4, len(block)))]
        pixels, size = thumbnail.get_number(THUMBNAIL_OFFSET), thumbnail.get_number(THUMBNAIL_BYTES)
        if pixels and size:
            spans.append((int(pixels), min(int(pixels + size), len(block))))
        exif.thumbnail_spans = tuple((a, b) for a, b in spans if a < b)
    return exif


def read_ifd(data: bytes, offset: int) -> Exif:
    """Parse the IFD at `offset` of a TIFF. ValueError if there is none."""
    byte_order, _, is_bigtiff = read_header(data)
    fields, _ = _read_ifd(data, offset, byte_order, is_bigtiff)
    return Exif(byte_order, fields, _read_sub_ifds(data, fields, byte_order, is_bigtiff))


def read_header(data: bytes) -> tuple[str, int, bool]:
    """Byte order, offset of the first IFD, and whether it is a BigTIFF. ValueError if it is not a TIFF."""
    byte_order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    if byte_order is None or len(data) < 8:
        raise ValueError("no TIFF header")
    (magic,) = struct.unpack_from(byte_order + "H", data, 2)
    if magic == 43 and len(data) >= 16:
        return byte_order, struct.unpack_from(byte_order + "Q", data, 8)[0], True
    if magic != 42:
        raise ValueError("no TIFF header")
    return byte_order, struct.unpack_from(byte_order + "I", data, 4)[0], False


def build_block(byte_order: str, fields: Mapping[int, Field | dict]) -> bytes:
    """An EXIF block of these fields; a mapping as a value becomes a sub-IFD."""
    signature = b"II" if byte_order == "<" else b"MM"
    return signature + struct.pack(byte_order + "HI", 42, 8) + build_ifd(byte_order, fields, 8)


def build_ifd(byte_order: str, fields: Mapping[int, Field | dict], start: int) -> bytes:
    """The bytes of an IFD and of the data that it points to, for offset `start` of a file."""
    entries, data = b"", b""
    data_start = start + 2 + 12 * len(fields) + 4
    for tag, value in sorted(fields.items()):
        offset = data_start + len(data)
        if not isinstance(value, Field):
            entries += struct.pack(byte_order + "HHII", tag, 4, 1, offset)
            data += build_ifd(byte_order, value, offset)
        elif len(value.data) <= 4:
            entries += struct.pack(byte_order + "HHI", tag, value.type_code, value.count) + value.data.ljust(
                4, b"\0"
            )
        else:
            entries += struct.pack(byte_order + "HHII", tag, value.type_code, value.count, offset)
            data += value.data
        data += bytes(len(data) % 2)
    return struct.pack(byte_order + "H", len(fields)) + entries + bytes(4) + data


def integer_field(byte_order: str, type_code: int, *values: int) -> Field:
    """A field of integers; type code 3 (16 bits) or 4 (32 bits)."""
    return Field(
        type_code, len(values), struct.pack(f"{byte_order}{len(values)}{INTEGER_FORMATS[type_code]}", *values)
    )


def _read_ifd(data: bytes, start: int, byte_order: str, is_bigtiff: bool) -> tuple[dict[int, Field], int]:
    """The fields of one IFD, except those that reach beyond the data, and the offset of the pointer to the next IFD."""
    entry_bytes, count_format, entry_format, inline_bytes = (
        (20, "Q", "HHQ", 8) if is_bigtiff else (12, "H", "HHI", 4)
    )
    first = start + struct.calcsize(byte_order + count_format)
    if first > len(data):
        raise ValueError("the first IFD lies beyond the end of the data")
    (count,) = struct.unpack_from(byte_order + count_format, data, start)
    fields: dict[int, Field] = {}
    for entry in range(first, min(first + count * entry_bytes, len(data) - entry_bytes + 1), entry_bytes):
        tag, type_code, value_count = struct.unpack_from(byte_order + entry_format, data, entry)
        length = value_count * TYPE_BYTES.get(type_code, len(data))
        offset = entry + entry_bytes - inline_bytes
        if length > inline_bytes:
            (offset,) = struct.unpack_from(byte_order + ("Q" if is_bigtiff else "I"), data, offset)
        if offset + length <= len(data):
            fields.setdefault(
                tag, Field(type_code, value_count, bytes(data[offset : offset + length]), offset)
            )
    return fields, first + count * entry_bytes


def _read_sub_ifds(
    data: bytes, fields: dict[int, Field], byte_order: str, is_bigtiff: bool
) -> dict[int, dict[int, Field]]:
    sub_ifds: dict[int, dict[int, Field]] = {}
    for tag in (EXIF_IFD, GPS_IFD, INTEROP_IFD):
        offset = Exif(byte_order, sub_ifds.get(EXIF_IFD, {}) if tag == INTEROP_IFD else fields).get_number(
            tag
        )
        if offset:
            try:
                sub_ifds[tag] = _read_ifd(data, int(offset), byte_order, is_bigtiff)[0]
            except (ValueError, struct.error):
                continue
    return sub_ifds


def _swap_axis_fields(fields: dict[int, Field | dict]) -> dict[int, Field | dict]:
    swapped = dict(fields)
    for x_tag, y_tag in AXIS_PAIRS:
        if x_tag in fields and y_tag in fields:
            swapped[x_tag], swapped[y_tag] = fields[y_tag], fields[x_tag]
    return swapped
