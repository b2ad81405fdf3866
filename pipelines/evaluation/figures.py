"""Pictures: rows of samples as the papers print them, and edges with the known ones black and the drawn ones blue."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

DRAWN_EDGE = (37, 99, 235)
HOLE_TINT = (233, 239, 252)
GAP = 4
DRAWINGS = ("edges", "attention")


@dataclass(frozen=True)
class Grid:
    """Rows of pictures (uint8 [H,W,3], None = no result) under column names; `edges...` and `attention...`
    columns are drawings."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[np.ndarray | None, ...], ...]
    note: str = ""

    def is_drawing(self, column: int) -> bool:
        """Whether a column holds one-pixel lines, which smooth scaling would wash out."""
        return self.columns[column].startswith(DRAWINGS)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H,W] or [H,W,3] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes as uint8 [H,W,3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def masked_picture(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph uint8 [H,W,3] with its hole (mask [H,W], 1 = hole) white."""
    return np.where(mask[..., None] != 0, np.uint8(255), image)


def edges_picture(known: np.ndarray, mask: np.ndarray, drawn: np.ndarray | None = None) -> np.ndarray:
    """Edges on white, uint8 [H,W,3]: known ones (bool [H,W], outside the hole) black, those in the hole blue.

    drawn: bool or float [H,W] in [0,1], a generator's edges; its strength is the blue's. The hole is faintly tinted.
    """
    hole = (mask != 0)[..., None]
    picture = np.where(hole, np.array(HOLE_TINT, float), 255.0)
    picture[(known != 0) & ~hole[..., 0]] = 0
    if drawn is not None:
        strength = np.clip(drawn.astype(float), 0, 1)[..., None] * hole
        picture = (1 - strength) * picture + strength * np.array(DRAWN_EDGE, float)
    return picture.round().astype(np.uint8)


def sample_strip(
    truths: Sequence[np.ndarray] | np.ndarray,
    masks: Sequence[np.ndarray] | np.ndarray,
    edges: Sequence[np.ndarray] | np.ndarray | None,
    results: Sequence[np.ndarray] | np.ndarray,
) -> np.ndarray:
    """A small picture without captions for a running training, a row a photograph: truth, masked, edges, result.

    truths and results uint8 [N,H,W,3], masks [N,H,W] with 1 = hole, edges bool [N,H,W] or None (no such column; an
    edge in the hole counts as drawn). Returns uint8 [N*(H+4)-4, columns*(W+4)-4, 3] on white.
    """
    rows = []
    for index, (truth, mask, result) in enumerate(zip(truths, masks, results, strict=True)):
        row = [truth, masked_picture(truth, mask)]
        if edges is not None:
            row.append(edges_picture(edges[index], mask, edges[index]))
        rows.append([*row, result])
    if not rows:
        raise ValueError("a sample strip needs at least one photograph")
    height, width = rows[0][0].shape[:2]
    sheet = np.full(
        (len(rows) * (height + GAP) - GAP, len(rows[0]) * (width + GAP) - GAP, 3), 255, dtype=np.uint8
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def sample_grid(grid: Grid, side: int = 128) -> np.ndarray:
    """The grid as one picture with captions, uint8 [H,W,3]; each cell's longer side is `side` pixels.

    Photographs are scaled smoothly; line drawings by whole factors of nearest neighbour where they can be.
    """
    if not grid.rows:
        raise ValueError(f"the sample grid {grid.title!r} has no rows")
    cells = [[_fit(cell, side, grid.is_drawing(j)) for j, cell in enumerate(row)] for row in grid.rows]
    heights = [max(cell.shape[0] for cell in row) for row in cells]
    font = _font(max(11, round(side / 9)))
    captions = [_wrap(name, font, side) for name in grid.columns]
    head = max(caption.count("\n") + 1 for caption in captions) * round(font.size * 1.3) + 6
    gap = max(GAP, side // 20)
    width = len(grid.columns) * (side + gap) + gap
    sheet = Image.new("RGB", (width, head + sum(heights) + gap * (len(heights) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, caption in enumerate(captions):
        centre = gap + j * (side + gap) + side / 2
        draw.multiline_text(
            (centre, head), caption, font=font, fill=(60, 60, 67), anchor="md", align="center"
        )
    top = head + gap
    for row, height in zip(cells, heights, strict=True):
        for j, cell in enumerate(row):
            left = gap + j * (side + gap) + (side - cell.shape[1]) // 2
            sheet.paste(Image.fromarray(cell), (left, top))
            box = (left - 1, top - 1, left + cell.shape[1], top + cell.shape[0])
            draw.rectangle(box, outline=(222, 222, 226))  # where white pictures end
        top += height + gap
    return np.asarray(sheet)


def _fit(cell: np.ndarray | None, side: int, drawing: bool) -> np.ndarray:
    if cell is None:
        return _not_available(side)
    height, width = cell.shape[:2]
    scale = side / max(height, width)
    if drawing and scale > 1:  # whole factors first: every line equally wide
        cell = np.repeat(np.repeat(cell, int(scale), axis=0), int(scale), axis=1)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(cell, size, interpolation=cv2.INTER_AREA if drawing else smooth).astype(np.uint8)


def _not_available(side: int) -> np.ndarray:
    sheet = Image.new("RGB", (side, side), (248, 248, 249))
    font = _font(max(11, side // 8))
    ImageDraw.Draw(sheet).text((side / 2, side / 2), "n/a", font=font, fill=(140, 140, 148), anchor="mm")
    return np.asarray(sheet)


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The caption in lines that fit the width, broken at spaces; words too wide for that after _, -, / and before @."""
    lines = [""]
    for word in caption.split():
        parts = [word] if font.getlength(word) <= width else re.findall(r"@?[^_@/-]*[_/-]|@?[^_@/-]+", word)
        for index, part in enumerate(parts):
            joined = f"{lines[-1]} {part}".strip() if index == 0 else lines[-1] + part
            if lines[-1] and font.getlength(joined) > width:
                lines.append(part)
            else:
                lines[-1] = joined
    return "\n".join(lines)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # Pillow's own: the same everywhere
