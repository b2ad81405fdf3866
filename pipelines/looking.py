"""Looking at data: contact sheets of shards, checks and repairs of them, and what masks cover."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.canny import canny_edges, decode_edges, load_edges
from data_prep.checking import Checked, Finding, check_edges, check_photographs
from data_prep.masks import open_masks
from data_prep.reading import Tars
from data_prep.shards import ShardOptions, load_manifest, sample_decoder
from data_prep.storage import Storage
from pipelines.figures import Grid, edges_picture, encode_png, masked_picture, sample_grid
from pipelines.metrics import BANDS, band_of

ACROSS = 3  # samples in a row of a sheet


def known_sigmas(shards: Storage) -> dict[float, Storage]:
    """The edge sets beside a folder of shards, as `inpaint edges` lays them."""
    names = sorted({key.split("/")[0] for key, _ in shards.sub("edges").list()})
    found = {}
    for name in names:
        if shards.exists(f"edges/{name}/edges.json"):
            edges = shards.sub(f"edges/{name}")
            found[float(json.loads(edges.read("edges.json"))["sigma"])] = edges
    return dict(sorted(found.items()))


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
        "sigmas": list(known_sigmas(shards)),
    }


def contact_sheet(
    shards: Storage, split: str, count: int, sigma: float | None, masks: str, seed: int
) -> tuple[bytes, str]:
    """(PNG, a line about its edges): photographs drawn by `seed`, each with a mask and edges at its whole size.

    Edges are the stored ones of `sigma` (None: of the first that is there), or computed where there are none.
    ValueError when the split is empty.
    """
    manifest = load_manifest(shards)
    entries = [entry for entry in manifest["shards"] if entry["split"] == split]
    if not entries:
        raise ValueError(f"the split {split} of {shards.uri} holds no photographs")
    there = known_sigmas(shards)
    sigma = next(iter(there), 2.0) if sigma is None else sigma
    stored = None
    if sigma in there:
        known = {entry["name"]: entry for entry in load_edges(there[sigma], manifest["digest"])["shards"]}
        stored = Tars(there[sigma], [known[entry["name"]] for entry in entries])
    source, rng = open_masks(masks), np.random.default_rng(seed)
    photos, decode = Tars(shards, entries), sample_decoder(manifest)
    ends = np.cumsum([entry["count"] for entry in entries])
    cells: list[np.ndarray | None] = []
    for number in np.sort(rng.choice(int(ends[-1]), min(count, int(ends[-1])), replace=False)):
        shard = int(np.searchsorted(ends, number, side="right"))
        row = int(number - (ends[shard - 1] if shard else 0))
        photo = decode(photos.read(shard, row)[1])
        edges = decode_edges(stored.read(shard, row)[1]) if stored else canny_edges(photo, sigma)
        mask = source.draw(photo.shape[0], photo.shape[1], rng)
        cells += [photo, masked_picture(photo, mask), edges_picture(edges, np.zeros_like(mask))]
    across = min(ACROSS, len(cells) // 3)
    cells += [None] * (-len(cells) % (3 * across))
    rows = tuple(tuple(cells[at : at + 3 * across]) for at in range(0, len(cells), 3 * across))
    sheet = sample_grid(Grid(split, ("photograph", "mask", "edges") * across, rows))
    made = "stored" if stored else "computed now: none of this sigma are stored"
    return encode_png(sheet), f"edges of sigma {sigma:g}, {made}"


@dataclass(frozen=True)
class Check:
    """What a check of a folder of shards looks at."""

    shards: Storage
    manifest: Mapping[str, Any]
    edges: Mapping[float, tuple[Storage, Mapping[str, Mapping[str, Any]]]]
    """sigma -> its folder, and its entries by name"""

    @classmethod
    def of(cls, shards: Storage) -> Check:
        """All of a folder: its photographs and every sigma beside them. ValueError when it is none."""
        manifest = load_manifest(shards)
        edges = {}
        for sigma, folder in known_sigmas(shards).items():
            listed = json.loads(folder.read("edges.json"))["shards"]
            edges[sigma] = (folder, {entry["name"]: entry for entry in listed})
        return cls(shards, manifest, edges)

    def tar(self, entry: Mapping[str, Any]) -> tuple[list[Finding], list[str]]:
        """What is wrong with one tar and its edges; and its photographs' keys."""
        photographs: Checked = check_photographs(self.shards, entry, sample_decoder(self.manifest))
        findings = list(photographs.findings)
        for sigma, (folder, entries) in self.edges.items():
            made = check_edges(folder, entries.get(entry["name"]), entry, photographs, sigma)
            findings += made.findings
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


def damaged(findings: Sequence[Finding]) -> tuple[set[str], dict[float, set[str]]]:
    """The tars to make again: of photographs, and of edges by sigma."""
    photos = {finding.shard for finding in findings if finding.sigma is None}
    edges: dict[float, set[str]] = {}
    for finding in findings:
        if finding.sigma is not None:
            edges.setdefault(finding.sigma, set()).add(finding.shard)
    return photos, edges


def repair(check: Check, findings: Sequence[Finding], progress: Any, root: str | None = None) -> None:
    """Remove what is damaged and have the steps that made it make it again; nothing else is touched.

    Raises ValueError when the photographs' source is not what it was.
    """
    from data_prep.tars import index_name
    from pipelines.fanout import make_edges, shard_photographs

    photos, edges = damaged(findings)
    if photos:
        options = ShardOptions(**check.manifest["options"])
        for name in photos:
            check.shards.delete(name)
        manifest = shard_photographs(
            check.manifest["source"], check.shards, options, 1000, progress, root=root
        )
        if manifest["digest"] != check.manifest["digest"]:
            raise ValueError(
                f"the photographs in {check.manifest['source']} have changed: the shards are whole, but others than "
                "they were; make the edges again with `inpaint edges`"
            )
    for sigma, names in edges.items():
        folder = check.edges[sigma][0]
        for name in names:
            folder.delete(index_name(name))
        make_edges(check.shards, {sigma: folder}, progress)


def hole_areas(spec: str | Mapping[str, Any], size: int, count: int, seed: int) -> dict[str, Any]:
    """The shares of hole of `count` masks of `size` x `size` pixels: mean, quantiles, and the share in each band."""
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
    from pipelines.sweep_drawing import BLUE, LINE, Sheet, styled, titled

    @styled
    def draw() -> bytes:
        sheet = Sheet([1.7, 1.75], f"{found['count']} masks of {found['size']} x {found['size']} pixels.")
        bars, examples = sheet.axes
        bars.hist(100 * found["areas"], bins=np.linspace(0, 100, 51).tolist(), color=BLUE)
        bars.set_xlim(0, 100)
        bars.grid(axis="y", color=LINE, lw=0.8)
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
