"""Checks of uploaded files before they are decoded: format by their first bytes, size in pixels by their header."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from fastapi import HTTPException, Request

from data_prep.images import PhotoError, open_image
from pipelines.inference import tiff
from pipelines.inference.photo_file import SINGLE_PHOTO_FORMATS, list_frames

FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "TIFF": "tif",
    "WEBP": "webp",
    "BMP": "bmp",
    "PPM": "ppm",
}
"""Pillow's names of the formats that are taken -> suffix of the file in the session's folder."""
TAKEN = "the studio takes JPEG, PNG, TIFF, WebP, BMP, PPM and PGM"
GIGANTIC = re.compile(r"Image size \((\d+) pixels\)")  # in the error of Pillow, which opens no such file
MAX_NAME_CHARS = 80
MAX_BYTES_PER_PIXEL = 16  # of a decoded TIFF: four channels of 32 bits; more count as more pixels
MAX_FRAME_PIXELS = 4  # times the limit: to decode a frame of an animation, all before it are decoded


@dataclass(frozen=True)
class Header:
    """What a file's header says, without its pixels."""

    format: str
    width: int
    height: int
    frames: int
    word: str
    """For a frame in this format: frame, page or photograph."""


def shown_name(request: Request) -> str:
    """The file's name of the header X-File-Name: only to be shown, never a path."""
    return clean_name(unquote(request.headers.get("x-file-name", ""), errors="replace"))


def clean_name(name: str) -> str:
    """The last component, without control characters and marks that change the direction of text, at most 80 long."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    kept = "".join(char for char in last if unicodedata.category(char)[0] != "C")
    kept = " ".join(kept.split())
    if len(kept) > MAX_NAME_CHARS:
        stem, dot, suffix = kept.rpartition(".")
        end = f"{dot}{suffix}" if stem and len(suffix) <= 5 else ""
        kept = f"{kept[: MAX_NAME_CHARS - len(end) - 1]}…{end}"
    return "photograph" if kept.strip(". ") == "" else kept


def has_known_magic(data: bytes) -> bool:
    """Whether the first bytes are those of a format that is taken."""
    return (
        data[:3] == b"\xff\xd8\xff"
        or data[:8] == b"\x89PNG\r\n\x1a\n"
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or data[:2] == b"BM"
        or (data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace())
        or tiff.is_tiff(data)
    )


def check_upload(data: bytes, name: str, max_pixels: int, frame: int | None = None) -> Header:
    """The header of an uploaded image. HTTPException in one line: 400 for one that cannot be read, 413 for too many
    pixels. Nothing is decoded."""
    if not data:
        raise HTTPException(400, f"{name} is empty (0 bytes): choose another file")
    if not has_known_magic(data):
        raise HTTPException(400, f"{name} is in none of the formats: {TAKEN}")
    try:
        if tiff.is_tiff(data):
            return _tiff_header(data, name, max_pixels, frame)
        with open_image(data, max_pixels=10**12) as image:
            kind, width, height = str(image.format), image.width, image.height
        if kind not in FORMATS:
            raise HTTPException(400, f"{name} is in none of the formats: {TAKEN}")
        _check_pixels(name, width, height, max_pixels)
        numbers, word = list_frames(data)
    except PhotoError as error:
        if found := GIGANTIC.search(str(error.__context__)):
            raise HTTPException(413, _too_many_pixels(name, "", int(found[1]), max_pixels)) from None
        raise HTTPException(400, f"{name} cannot be read: {error}") from None
    count = 1 if kind in SINGLE_PHOTO_FORMATS else len(numbers)
    if (frame or 1) * width * height > MAX_FRAME_PIXELS * max_pixels:
        raise HTTPException(413, f"{name}: frame {frame} is too far into the animation: save it as a PNG")
    return Header(kind, width, height, count, word)


def _tiff_header(data: bytes, name: str, max_pixels: int, frame: int | None) -> Header:
    numbers = tiff.list_pages(data)
    number = numbers[min(max(frame or 1, 1), len(numbers)) - 1]
    with tiff.open_tiff(data) as file:
        page: Any = file.pages[number].aspage()
        width, height = int(page.imagewidth), int(page.imagelength)
        planes = int(page.imagedepth) * int(page.samplesperpixel)
        row_bytes = width * planes * max(1, int(page.bitspersample) // 8)
    _check_pixels(name, width, height, max_pixels)
    if row_bytes * height > MAX_BYTES_PER_PIXEL * max_pixels:
        size = row_bytes * height / 2**20
        raise HTTPException(
            413, f"{name} takes {size:,.0f} MiB when decoded: save it with fewer bits or channels"
        )
    return Header("TIFF", width, height, len(numbers), "page")


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        size = f"{width} x {height} px, "
        raise HTTPException(413, _too_many_pixels(name, size, width * height, max_pixels))


def _too_many_pixels(name: str, size: str, pixels: int, max_pixels: int) -> str:
    return (
        f"{name} has {size}{pixels / 1e6:,.1f} megapixels; the studio takes up to {max_pixels / 1e6:g}: "
        "scale it down, or use `inpaint fill`"
    )
