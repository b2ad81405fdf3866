"""Inspects data: summaries and contact sheets of shards, and the hole areas of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_prep.canny import canny_edges
from data_prep.edge_maps import decode_edges, load_edge_manifest
from data_prep.left_out import LeftOutEntry
from data_prep.manifest import Manifest, load_manifest
from data_prep.masks import HOLE_AREA_BANDS, MIN_MASK_SIDE, hole_area_band, make_mask_specs, open_masks
from data_prep.preprocess import ShardOptions, make_sample_decoder
from data_prep.sampler import find_segment
from data_prep.storage import Storage
from data_prep.tars import TarReader
from data_prep.verify import find_edge_datasets
from pipelines.plots.images import DRAWN_EDGE_COLOR, GAP_PIXELS, edges_image, encode_png

SAMPLES_PER_ROW = 3  # of a contact sheet
CELL_PIXELS = 128  # longer side of an image on a contact sheet
_EXAMPLES = 24  # masks that the plot of hole areas shows
_EXAMPLES_PER_ROW = 8


def finished_edge_datasets(shards: Storage, manifest: Manifest) -> dict[float, Storage]:
    """{sigma: folder} of the finished edge datasets beside these shards."""
    datasets = find_edge_datasets(shards, manifest.digest)
    return {dataset.sigma: dataset.folder for dataset in datasets if not dataset.problem}


@dataclass(frozen=True)
class ShardSummary:
    """The contents of a shard folder; `inpaint data show --json` prints these fields."""

    shards: str
    """uri of the folder"""
    source: str
    photographs: Mapping[str, int]
    """per split"""
    tars: int
    bytes: int
    options: ShardOptions
    rejects: int
    duplicates: int
    left_out: Mapping[str, LeftOutEntry] | None
    """None: unknown, for shards of a version that did not record it"""
    sigmas: tuple[float, ...]
    """of the finished edges"""


def summarize_shards(shards: Storage) -> ShardSummary:
    """The contents of a shard folder. Raises ValueError if it is not one."""
    manifest = load_manifest(shards)
    return ShardSummary(
        shards.uri,
        manifest.source,
        manifest.splits,
        len(manifest.shards),
        sum(entry.bytes for entry in manifest.shards),
        manifest.options,
        len(manifest.rejects),
        len(manifest.duplicates),
        manifest.left_out,
        tuple(finished_edge_datasets(shards, manifest)),
    )


class ContactSheet(NamedTuple):
    png: bytes
    edges: str
    """sigma of the edges, and whether they are stored"""
    keys: list[str]
    """of the samples, in the order of the sheet"""


def contact_sheet(
    shards: Storage,
    split: str,
    count: int,
    sigma: float | None,
    masks: str,
    seed: int,
    hole: Sequence[str] | None = None,
) -> ContactSheet:
    """Random photographs, each with a mask over it and its edges, uncropped, above its key.

    The edges are the stored ones of `sigma` (None: the first stored sigma), or are computed if there are none. `hole`
    lists the values that are the hole in a mask folder. Raises ValueError if the split is empty or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count {count}: a sheet shows 1 photograph or more")
    manifest = load_manifest(shards)
    entries = manifest.shards_of_split(split)
    if not entries:
        raise ValueError(f"the split {split} of {shards.uri} holds no photographs")
    edge_datasets = finished_edge_datasets(shards, manifest)
    sigma = next(iter(edge_datasets), 2.0) if sigma is None else sigma
    stored = None
    if sigma in edge_datasets:
        edge_manifest = load_edge_manifest(edge_datasets[sigma], manifest.digest)
        edge_entries = {entry.name: entry for entry in edge_manifest.shards}
        if missing := [entry.name for entry in entries if entry.name not in edge_entries]:
            raise ValueError(
                f"edges.json in {edge_datasets[sigma].uri} does not name {missing[0]}: rebuild the edges"
            )
        stored = TarReader(edge_datasets[sigma], [edge_entries[entry.name] for entry in entries])
    mask_source, rng = open_masks(make_mask_specs([masks], hole)[0]), np.random.default_rng(seed)
    photos, decode = TarReader(shards, entries), make_sample_decoder(manifest.options)
    ends = np.cumsum([entry.count for entry in entries])
    samples: dict[str, tuple[np.ndarray, ...]] = {}
    for index in np.sort(rng.choice(int(ends[-1]), min(count, int(ends[-1])), replace=False)):
        shard_index, index_in_shard = find_segment(ends, index)
        key, data = photos.read(shard_index, index_in_shard)
        photo = decode(data)
        edges = (
            decode_edges(stored.read(shard_index, index_in_shard)[1]) if stored else canny_edges(photo, sigma)
        )
        mask = mask_source.sample(photo.shape[0], photo.shape[1], rng)
        samples[key] = photo, overlay_mask(photo, mask), edges_image(edges, np.zeros_like(mask))
    origin = "stored" if stored else "computed now: none of this sigma are stored"
    return ContactSheet(
        encode_png(_contact_sheet_image(samples)), f"edges of sigma {sigma:g}, {origin}", list(samples)
    )


def overlay_mask(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph uint8 [H,W,3] with its hole (mask [H,W], 1 = hole) tinted but still visible."""
    tint = cv2.addWeighted(photo, 0.3, np.full_like(photo, DRAWN_EDGE_COLOR), 0.7, 0)
    return np.where(mask[..., None] != 0, tint, photo)


def _contact_sheet_image(samples: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """uint8 [H,W,3]: rows of SAMPLES_PER_ROW samples, each with its images side by side and its key beneath."""
    font: Any = ImageFont.load_default(12)
    keys, columns = list(samples), min(SAMPLES_PER_ROW, len(samples))
    cells = {key: [_fit(image) for image in images] for key, images in samples.items()}
    rows = [keys[start : start + columns] for start in range(0, len(keys), columns)]
    row_heights = [max(cells[key][0].height for key in row) for row in rows]
    sample_width, caption_height = 3 * (CELL_PIXELS + GAP_PIXELS) + 2 * GAP_PIXELS, 24
    height = sum(row_heights) + len(rows) * (GAP_PIXELS + caption_height)
    sheet = Image.new("RGB", (columns * sample_width, height), "white")
    draw, top = ImageDraw.Draw(sheet), GAP_PIXELS
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, key in enumerate(row):
            left = column * sample_width + 2 * GAP_PIXELS
            for n, cell in enumerate(cells[key]):
                sheet.paste(cell, (left + n * (CELL_PIXELS + GAP_PIXELS), top))
            draw.text((left, top + cells[key][0].height + 2), key, font=font, fill=(60, 60, 67))
        top += row_height + GAP_PIXELS + caption_height
    return np.asarray(sheet)


def _fit(array: np.ndarray) -> Image.Image:
    """Resized so that the longer side has CELL_PIXELS. The filters keep the pixels of a small image sharp and one-pixel
    lines visible."""
    image = Image.fromarray(array)
    method = Image.Resampling.BOX if max(image.size) >= CELL_PIXELS else Image.Resampling.NEAREST
    return ImageOps.contain(image, (CELL_PIXELS, CELL_PIXELS), method)


def hole_area_stats(spec: str | Mapping[str, Any], size: int, count: int, seed: int) -> dict[str, Any]:
    """Statistics of the hole areas of `count` masks of `size` x `size` pixels, as fractions of the image: mean,
    quantiles, and the fraction of the masks in each band.

    Raises ValueError for an unknown kind, folder or option, if `count` or `size` is too small, and if a frozen set has
    fewer masks or another size.
    """
    if count < 1 or size < MIN_MASK_SIDE:
        raise ValueError(
            f"count {count}, size {size}: at least 1 mask with sides of at least {MIN_MASK_SIDE} pixels"
        )
    source = open_masks(spec)
    masks = source.fixed_set(size, size, count, seed)
    areas = np.array([mask.mean() for mask in masks])
    bands = [hole_area_band(mask) for mask in masks]
    return {
        "masks": source.describe(),
        "size": size,
        "count": count,
        "mean": float(areas.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(areas, q)) for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)},
        "bands": {band: bands.count(band) / count for band in HOLE_AREA_BANDS},
        "areas": areas,
        "examples": masks[:_EXAMPLES],
    }


def plot_hole_areas(stats: Mapping[str, Any]) -> bytes:
    """A PNG of `hole_area_stats`: a histogram of the areas above examples of the masks."""
    from pipelines.plots.panels import BLUE, LINE_COLOR, PanelFigure, set_panel_title, with_plot_style

    @with_plot_style
    def draw() -> bytes:
        size = stats["size"]
        figure = PanelFigure([1.7, 1.75], f"{stats['count']} masks of {size} x {size} pixels.")
        histogram, examples = figure.axes
        histogram.hist(100 * stats["areas"], bins=np.linspace(0, 100, 51).tolist(), color=BLUE)
        histogram.set_xlim(0, 100)
        histogram.set_xticks(range(0, 101, 10))  # the bands for which scores are reported
        histogram.grid(color=LINE_COLOR, lw=0.8)
        histogram.set_axisbelow(True)
        histogram.set_xlabel("hole, per cent of the image")
        histogram.set_ylabel("masks")
        set_panel_title(histogram, stats["masks"], f"mean {stats['mean']:.1%}")
        gap, columns = max(2, size // 16), _EXAMPLES_PER_ROW
        rows = _EXAMPLES // columns
        grid = np.full((rows * (size + gap) + gap, columns * (size + gap) + gap), 128, np.uint8)
        for number, mask in enumerate(stats["examples"]):
            top, left = (gap + n * (size + gap) for n in divmod(number, columns))
            grid[top : top + size, left : left + size] = 255 * mask
        examples.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        examples.axis("off")
        set_panel_title(examples, "Examples", "white = hole")
        return figure.to_png()

    return draw()
