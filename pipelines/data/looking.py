"""Looking at data: contact sheets of shards, checks of them, and what masks cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_prep.canny import canny_edges, decode_edges, load_edges
from data_prep.checking import (
    EDGES,
    Checked,
    EdgeSet,
    Finding,
    check_edges,
    check_manifest,
    check_photographs,
    edge_sets,
)
from data_prep.masks import MIN_SIDE, open_masks
from data_prep.order import locate
from data_prep.preparing import sample_decoder
from data_prep.reading import Tars
from data_prep.shards import load_manifest
from data_prep.storage import Storage
from pipelines.evaluation.figures import DRAWN_EDGE, GAP, edges_picture, encode_png
from pipelines.evaluation.metrics import BANDS, band_of

ACROSS = 3  # samples in a row of a sheet
SIDE = 128  # pixels of a picture there


def known_sigmas(shards: Storage, manifest: Mapping[str, Any]) -> dict[float, Storage]:
    """The finished edge sets of these shards that lie beside them."""
    sets = edge_sets(shards, manifest["digest"])
    return {edges.sigma: edges.folder for edges in sets if not edges.problem}


def facts(shards: Storage) -> dict[str, Any]:
    """What a folder of shards holds."""
    manifest = load_manifest(shards)
    return {
        "shards": shards.uri,
        "source": manifest["source"],
        "photographs": manifest["splits"],
        "tars": len(manifest["shards"]),
        "bytes": sum(entry["bytes"] for entry in manifest["shards"]),
        "options": manifest["options"],
        "rejects": len(manifest["rejects"]),
        "duplicates": len(manifest["duplicates"]),
        "sigmas": list(known_sigmas(shards, manifest)),
    }


class ContactSheet(NamedTuple):
    """A picture of samples, what its edges are, and the samples' keys in its order."""

    png: bytes
    edges: str
    keys: list[str]


def contact_sheet(
    shards: Storage, split: str, count: int, sigma: float | None, masks: str, seed: int
) -> ContactSheet:
    """Photographs drawn by `seed`, each with a mask over it and edges at its whole size, above its key.

    Edges are the stored ones of `sigma` (None: of the first that is there), or computed where there are none.
    ValueError when the split is empty or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count {count}: a sheet shows 1 photograph or more")
    manifest = load_manifest(shards)
    entries = [entry for entry in manifest["shards"] if entry["split"] == split]
    if not entries:
        raise ValueError(f"the split {split} of {shards.uri} holds no photographs")
    there = known_sigmas(shards, manifest)
    sigma = next(iter(there), 2.0) if sigma is None else sigma
    stored = None
    if sigma in there:
        known = {entry["name"]: entry for entry in load_edges(there[sigma], manifest["digest"])["shards"]}
        if lacking := [entry["name"] for entry in entries if entry["name"] not in known]:
            raise ValueError(
                f"edges.json in {there[sigma].uri} does not name {lacking[0]}: make the edges again"
            )
        stored = Tars(there[sigma], [known[entry["name"]] for entry in entries])
    source, rng = open_masks(masks), np.random.default_rng(seed)
    photos, decode = Tars(shards, entries), sample_decoder(manifest)
    ends = np.cumsum([entry["count"] for entry in entries])
    samples: dict[str, tuple[np.ndarray, ...]] = {}
    for number in np.sort(rng.choice(int(ends[-1]), min(count, int(ends[-1])), replace=False)):
        shard, row = locate(ends, number)
        key, data = photos.read(shard, row)
        photo = decode(data)
        edges = decode_edges(stored.read(shard, row)[1]) if stored else canny_edges(photo, sigma)
        mask = source.draw(photo.shape[0], photo.shape[1], rng)
        samples[key] = photo, overlaid(photo, mask), edges_picture(edges, np.zeros_like(mask))
    made = "stored" if stored else "computed now: none of this sigma are stored"
    return ContactSheet(encode_png(_board(samples)), f"edges of sigma {sigma:g}, {made}", list(samples))


def overlaid(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph uint8 [H,W,3] with its hole (mask [H,W], 1 = hole) tinted: what it hides stays to be seen."""
    tint = cv2.addWeighted(photo, 0.3, np.full_like(photo, DRAWN_EDGE), 0.7, 0)
    return np.where(mask[..., None] != 0, tint, photo)


def _board(samples: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of ACROSS samples: their pictures, fit into squares of SIDE pixels, side by side, and their keys beneath."""
    font: Any = ImageFont.load_default(12)
    keys, across = list(samples), min(ACROSS, len(samples))
    fitted = {key: [_fitted(picture) for picture in pictures] for key, pictures in samples.items()}
    rows = [keys[at : at + across] for at in range(0, len(keys), across)]
    heights = [max(fitted[key][0].height for key in row) for row in rows]
    wide, foot = 3 * (SIDE + GAP) + 2 * GAP, 24
    board = Image.new("RGB", (across * wide, sum(heights) + len(rows) * (GAP + foot)), "white")
    draw, top = ImageDraw.Draw(board), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, key in enumerate(row):
            left = column * wide + 2 * GAP
            for place, image in enumerate(fitted[key]):
                board.paste(image, (left + place * (SIDE + GAP), top))
            draw.text((left, top + fitted[key][0].height + 2), key, font=font, fill=(60, 60, 67))
        top += height + GAP + foot
    return np.asarray(board)


def _fitted(picture: np.ndarray) -> Image.Image:
    """Its longer side SIDE pixels; each pixel of a small one is seen, as are lines of one pixel."""
    image = Image.fromarray(picture)
    way = Image.Resampling.BOX if max(image.size) >= SIDE else Image.Resampling.NEAREST
    return ImageOps.contain(image, (SIDE, SIDE), way)


@dataclass(frozen=True)
class Check:
    """What a check of a folder of shards looks at."""

    shards: Storage
    manifest: Mapping[str, Any]
    edges: tuple[EdgeSet, ...]

    @classmethod
    def of(cls, shards: Storage, sigmas: Sequence[float] = ()) -> Check:
        """A folder's photographs and the edges of `sigmas` beside them (none given: of all that are there).

        ValueError when it is no folder of shards, or has no such edges.
        """
        manifest = load_manifest(shards)
        sets = edge_sets(shards, manifest["digest"])
        there = {edges.sigma for edges in sets}
        for sigma in sigmas:
            if sigma not in there:
                known = ", ".join(f"{other:g}" for other in sorted(there)) or "none"
                raise ValueError(
                    f"{shards.uri} holds no edges of sigma {sigma:g} (there are: {known}): make them with "
                    f"`inpaint edges {shards.uri} --sigma {sigma:g}`"
                )
        return cls(shards, manifest, tuple(edges for edges in sets if not sigmas or edges.sigma in sigmas))

    def lists(self) -> list[Finding]:
        """What is wrong with the manifests and the records, before any tar is read. ValueError when the photographs'
        manifest is too damaged to check by."""
        found = check_manifest(self.shards, self.manifest)
        return found + [Finding(EDGES, "", made.problem, made.sigma) for made in self.edges if made.problem]

    def tar(self, entry: Mapping[str, Any]) -> tuple[list[Finding], list[str]]:
        """What is wrong with one tar and its edges; and its photographs' keys."""
        photographs: Checked = check_photographs(self.shards, entry, sample_decoder(self.manifest))
        findings = list(photographs.findings)
        for made in self.edges:
            if made.entries is not None:
                told = made.entries.get(entry["name"])
                findings += check_edges(made.folder, told, entry, photographs, made.sigma).findings
        return findings, photographs.keys


def repeated(keys: Sequence[tuple[str, list[str]]]) -> list[Finding]:
    """Photographs that several tars hold; `keys` are (tar, its keys)."""
    first: dict[str, str] = {}
    found = []
    for name, listed in keys:
        for key in listed:
            if first.setdefault(key, name) != name:
                found.append(Finding(name, key, f"is in {first[key]} too"))
    return found


def hole_areas(spec: str | Mapping[str, Any], size: int, count: int, seed: int) -> dict[str, Any]:
    """The shares of hole of `count` masks of `size` x `size` pixels: mean, quantiles, and the share in each band.

    ValueError for what is no kind, folder or option, and for `count` or `size` too small.
    """
    if count < 1 or size < MIN_SIDE:
        raise ValueError(f"count {count}, size {size}: 1 mask or more, of {MIN_SIDE} pixels a side or more")
    masks = open_masks(spec)
    drawn = masks.fixed(size, size, count, seed)
    areas = np.array([mask.mean() for mask in drawn])
    bands = [band_of(mask) for mask in drawn]
    return {
        "masks": masks.describe(),
        "size": size,
        "count": count,
        "mean": float(areas.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(areas, q)) for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)},
        "bands": {band: bands.count(band) / count for band in BANDS},
        "areas": areas,
        "examples": drawn[:24],
    }


def mask_picture(found: Mapping[str, Any]) -> bytes:
    """A histogram of the areas over examples of the masks, PNG."""
    from pipelines.sweeps.drawing import BLUE, LINE, Sheet, styled, titled

    @styled
    def draw() -> bytes:
        sheet = Sheet([1.7, 1.75], f"{found['count']} masks of {found['size']} x {found['size']} pixels.")
        bars, examples = sheet.axes
        bars.hist(100 * found["areas"], bins=np.linspace(0, 100, 51).tolist(), color=BLUE)
        bars.set_xlim(0, 100)
        bars.set_xticks(range(0, 101, 10))  # the bands that scores are told by
        bars.grid(color=LINE, lw=0.8)
        bars.set_axisbelow(True)
        bars.set_xlabel("hole, per cent of the image")
        bars.set_ylabel("masks")
        titled(bars, found["masks"], f"mean {found['mean']:.1%}")
        size, gap = found["size"], max(2, found["size"] // 16)
        board = np.full((3 * (size + gap) + gap, 8 * (size + gap) + gap), 128, np.uint8)
        for number, mask in enumerate(found["examples"]):
            top, left = (gap + place * (size + gap) for place in divmod(number, 8))
            board[top : top + size, left : left + size] = 255 * mask
        examples.imshow(board, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        examples.axis("off")
        titled(examples, "Examples", "white = hole")
        return sheet.png()

    return draw()
