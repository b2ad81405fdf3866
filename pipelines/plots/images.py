"""Sample grids as in the papers, and pictures of edges: known edges black, generated edges blue."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

DRAWN_EDGE_COLOR = (37, 99, 235)
HOLE_COLOR = (233, 239, 252)
GAP_PIXELS = 4
DRAWING_PREFIXES = ("edges", "attention")


@dataclass(frozen=True)
class Grid:
    """Rows of pictures (uint8 [H,W,3], None = no result) under column names. Columns called `edges...` and
    `attention...` are drawings."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[np.ndarray | None, ...], ...]
    note: str = ""

    def is_drawing(self, column: int) -> bool:
        """Whether a column shows one-pixel lines, which smooth scaling would blur."""
        return self.columns[column].startswith(DRAWING_PREFIXES)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H,W] or [H,W,3] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes as uint8 [H,W,3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def masked_image(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph uint8 [H,W,3] with its hole (mask [H,W], 1 = hole) white."""
    return np.where(mask[..., None] != 0, np.uint8(255), image)


def edges_image(
    known_edges: np.ndarray, mask: np.ndarray, drawn_edges: np.ndarray | None = None
) -> np.ndarray:
    """Edges on white, uint8 [H,W,3]: known edges (bool [H,W], outside the hole) black, generated ones in the hole blue.

    drawn_edges: bool or float [H,W] in [0,1], the opacity of the blue. The hole has a faint tint.
    """
    hole = (mask != 0)[..., None]
    picture = np.where(hole, np.array(HOLE_COLOR, float), 255.0)
    picture[(known_edges != 0) & ~hole[..., 0]] = 0
    if drawn_edges is not None:
        strength = np.clip(drawn_edges.astype(float), 0, 1)[..., None] * hole
        picture = (1 - strength) * picture + strength * np.array(DRAWN_EDGE_COLOR, float)
    return picture.round().astype(np.uint8)


def sample_strip(
    truths: Sequence[np.ndarray] | np.ndarray,
    masks: Sequence[np.ndarray] | np.ndarray,
    edges: Sequence[np.ndarray] | np.ndarray | None,
    results: Sequence[np.ndarray] | np.ndarray,
) -> np.ndarray:
    """A small picture without captions, shown during training. One row per photograph: truth, masked, edges, result.

    truths and results uint8 [N,H,W,3], masks [N,H,W] with 1 = hole, edges bool [N,H,W] or None (no such column; edges
    in the hole are blue). Returns uint8 [N*(H+4)-4, columns*(W+4)-4, 3] on white.
    """
    rows = []
    for index, (truth, mask, result) in enumerate(zip(truths, masks, results, strict=True)):
        row = [truth, masked_image(truth, mask)]
        if edges is not None:
            row.append(edges_image(edges[index], mask, edges[index]))
        rows.append([*row, result])
    if not rows:
        raise ValueError("a sample strip needs at least one photograph")
    height, width = rows[0][0].shape[:2]
    sheet = np.full(
        (len(rows) * (height + GAP_PIXELS) - GAP_PIXELS, len(rows[0]) * (width + GAP_PIXELS) - GAP_PIXELS, 3),
        255,
        dtype=np.uint8,
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = i * (height + GAP_PIXELS), j * (width + GAP_PIXELS)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def sample_grid(grid: Grid, cell_pixels: int = 128) -> np.ndarray:
    """The grid as one picture with captions, uint8 [H,W,3]; the longer side of each cell is `cell_pixels`.

    Photographs are interpolated smoothly; line drawings are first enlarged by a whole factor with nearest neighbour.
    """
    if not grid.rows:
        raise ValueError(f"the sample grid {grid.title!r} has no rows")
    cells = [
        [_resize_cell(cell, cell_pixels, grid.is_drawing(j)) for j, cell in enumerate(row)]
        for row in grid.rows
    ]
    heights = [max(cell.shape[0] for cell in row) for row in cells]
    font = _font(max(11, round(cell_pixels / 9)))
    captions = [_wrap_caption(name, font, cell_pixels) for name in grid.columns]
    header_height = max(caption.count("\n") + 1 for caption in captions) * round(font.size * 1.3) + 6
    gap = max(GAP_PIXELS, cell_pixels // 20)
    width = len(grid.columns) * (cell_pixels + gap) + gap
    sheet = Image.new("RGB", (width, header_height + sum(heights) + gap * (len(heights) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, caption in enumerate(captions):
        center = gap + j * (cell_pixels + gap) + cell_pixels / 2
        draw.multiline_text(
            (center, header_height), caption, font=font, fill=(60, 60, 67), anchor="md", align="center"
        )
    top = header_height + gap
    for row, height in zip(cells, heights, strict=True):
        for j, cell in enumerate(row):
            left = gap + j * (cell_pixels + gap) + (cell_pixels - cell.shape[1]) // 2
            sheet.paste(Image.fromarray(cell), (left, top))
            box = (left - 1, top - 1, left + cell.shape[1], top + cell.shape[0])
            draw.rectangle(box, outline=(222, 222, 226))  # the border of white pictures
        top += height + gap
    return np.asarray(sheet)


def _resize_cell(cell: np.ndarray | None, side: int, drawing: bool) -> np.ndarray:
    if cell is None:
        return _placeholder(side)
    height, width = cell.shape[:2]
    scale = side / max(height, width)
    if drawing and scale > 1:  # a whole factor first: all lines stay equally wide
        cell = np.repeat(np.repeat(cell, int(scale), axis=0), int(scale), axis=1)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(cell, size, interpolation=cv2.INTER_AREA if drawing else smooth).astype(np.uint8)


def _placeholder(side: int) -> np.ndarray:
    sheet = Image.new("RGB", (side, side), (248, 248, 249))
    font = _font(max(11, side // 8))
    ImageDraw.Draw(sheet).text((side / 2, side / 2), "n/a", font=font, fill=(140, 140, 148), anchor="mm")
    return np.asarray(sheet)


def _wrap_caption(caption: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break a caption into lines of at most `width`: at spaces; in wider words also after _, -, / and before @."""
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
    return cast(
        ImageFont.FreeTypeFont, ImageFont.load_default(size)
    )  # comes with Pillow: the same everywhere
