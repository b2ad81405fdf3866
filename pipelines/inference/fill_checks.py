"""Warnings about a fill: holes and tiles that are larger than in training, and a visible seam. One line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.inference.seam import Seam
from pipelines.inference.tiles import MIN_TILE_SIZE, Tile

if TYPE_CHECKING:
    from pipelines.registry.loaded_model import ModelFacts

MAX_HOLE_EXCESS = 1.05  # of the training's largest fraction
# of a tile's side, as the model sees it, to that of the training crops. The demo's edge_connect (64 px) fills a hole of
# 64 px with 16.6 dB in a tile downscaled to 64 px, and with 11.7 dB in one of 128 px; a hole of 128 px with 13.9 dB at
# 64 px, 10.4 dB at 128 px and 8.1 dB at 256 px (means of the hole's PSNR over 18 and 11 crops of bundled photographs)
MAX_TILE_RATIO = 1.5


def hole_warning(model: ModelFacts, fractions: Sequence[float]) -> list[str]:
    """At most one warning; `fractions` are the parts of each tile that are hole."""
    trained_range = model.info.hole_range
    if not trained_range or not fractions or max(fractions) <= MAX_HOLE_EXCESS * float(trained_range[1]):
        return []
    return [
        f"the hole is larger than {model.name} was trained for: {max(fractions):.0%} of its tile, trained up to "
        f"{float(trained_range[1]):.0%}; expect a worse fill"
    ]


def tile_warning(model: ModelFacts, tiles: Sequence[Tile]) -> list[str]:
    """At most one warning; none for a model that resamples the surroundings of a hole to its training size."""
    if not model.size or model.resamples_hole or not tiles:
        return []
    height, width = max((tile.model_size for tile in tiles), key=max)
    if max(height, width) <= max(MAX_TILE_RATIO * model.size, MIN_TILE_SIZE):
        return []
    return [
        f"the tile is larger than {model.name} was trained on: {width}x{height} px, trained on {model.size}x{model.size}; "
        f"expect a worse fill; --max-tile-size {max(model.size, MIN_TILE_SIZE)} downscales it, or train with a larger "
        "data.size"
    ]


def seam_warning(seams: Sequence[Seam]) -> list[str]:
    """At most one warning, about the largest visible seam of all tiles."""
    visible = [seam for seam in seams if seam.is_visible]
    if not visible:
        return []
    seam = max(visible, key=lambda seam: seam.step - seam.around)
    return [
        f"a seam shows at the border of the hole: colours differ by {seam.step:.0f} of 255 levels there, by "
        f"{seam.around:.0f} around it; --blend hides it"
    ]
