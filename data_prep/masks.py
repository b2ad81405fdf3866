"""Masks of the papers' kinds, from folders of mask images, or mixed; always uint8 [H,W] with 1 = hole."""

from __future__ import annotations

import difflib
import functools
import inspect
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_prep.frozen_masks import is_frozen_set, load_frozen_set
from data_prep.hole_areas import HOLE_AREA_BANDS as HOLE_AREA_BANDS
from data_prep.hole_areas import hole_area_band as hole_area_band
from data_prep.mask_folder import MaskFolder, list_mask_files
from data_prep.mask_folder import looks_inverted as looks_inverted
from data_prep.mask_reading import HoleValue, parse_hole_values
from data_prep.mask_reading import read_mask as read_mask
from data_prep.mask_shapes import MASK_GENERATORS
from data_prep.mask_source import MaskSource as MaskSource
from data_prep.storage import Storage, open_storage

MASK_KINDS: tuple[str, ...] = tuple(MASK_GENERATORS)
MIN_MASK_SIDE = 8  # pixels


def make_mask(kind: str, height: int, width: int, rng: np.random.Generator, **options: Any) -> np.ndarray:
    """A random mask uint8 [height, width], 1 = hole, as in one of the papers. `rng` is the only source of randomness.

    kinds: center, box, block, region, brush, box_and_brush, half, lama_thin, lama_medium, lama_thick, mat_small,
    mat_large. The options are the keywords of the function of that name in mask_shapes.py or mask_benchmarks.py.
    Raises ValueError for an unknown kind or option (with the nearest known name) and for images under 8 pixels.
    """
    check_kind(kind, options)
    if min(height, width) < MIN_MASK_SIDE:
        raise ValueError(f"mask of {height} x {width}: each side needs at least {MIN_MASK_SIDE} pixels")
    return MASK_GENERATORS[kind](height, width, rng, **options)


def check_kind(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError, with the nearest known name, if the kind or one of its options is unknown."""
    if kind not in MASK_GENERATORS:
        raise ValueError(
            f"unknown mask kind {kind!r}{_suggest(kind, MASK_KINDS)}; kinds: {', '.join(MASK_KINDS)}"
        )
    known = dict(list(inspect.signature(MASK_GENERATORS[kind]).parameters.items())[3:])
    _check_options(f"mask kind {kind}", options, {name: known[name].default for name in known})


def _check_options(owner: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Check names and types against the defaults; values whose default is None or a tuple are checked elsewhere."""
    for name, value in options.items():
        if name not in known:
            listed = f"options: {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"{owner} has no option {name!r}{_suggest(name, known)}; {listed}")
        default = known[name]
        if isinstance(default, int | float | str):
            types = (int, float) if type(default) is float else type(default)
            if not isinstance(value, types) or isinstance(value, bool) != isinstance(default, bool):
                raise ValueError(
                    f"{owner}: option {name} is {value!r}; a {type(default).__name__} such as {default!r}"
                )


def _suggest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


MaskSpec = str | Mapping[str, Any]
"""A kind ("brush"), a folder or bucket ("photos/masks"), a frozen set ("thick.tar", see frozen_masks.py), or several,
each with its weight or its options:
{"block": 1, "half": 1} or {"brush": {"max_width": 20, "weight": 2}, "photos/masks": {"band": [0.1, 0.2]}}."""


def open_masks(spec: MaskSpec, scan_cache: Storage | None = None) -> MaskSource:
    """The mask source of a spec. The options of a folder are the fields of FolderMasks; `scan_cache` holds cached scans
    of folders (mask_folder.py). Raises ValueError for unknown names and for empty or unusable folders."""
    parts = _parse_spec(spec)
    sources = [_open_source(name, options, scan_cache) for name, _, options in parts]
    if len(sources) == 1:
        return sources[0]
    return MixedMasks(tuple(sources), tuple(weight for _, weight, _ in parts))


def check_mask_spec(spec: MaskSpec, size: int) -> None:
    """Raise ValueError for names that `open_masks` does not know and for options that do not work at `size` pixels.
    Reads no mask."""
    for name, _, options in _parse_spec(spec):
        if is_mask_folder(name):
            list_mask_files(open_storage(name))
            _parse_folder_options(name, options)
        elif is_frozen_set(name):
            _open_source(name, options, None).fixed_set(size, size, 1, 0)
        else:
            _open_source(name, options, None).sample(size, size, np.random.default_rng(0))


def check_training_masks(spec: MaskSpec, size: int) -> None:
    """`check_mask_spec`, and ValueError for a frozen set, from which no random masks are drawn."""
    for name, _, options in _parse_spec(spec):
        if is_frozen_set(name):
            _open_source(name, options, None).sample(size, size, np.random.default_rng(0))
    check_mask_spec(spec, size)


def check_frozen_sets(spec: MaskSpec) -> None:
    """Load and verify the frozen sets of a spec. Raises FrozenSetError and StorageError."""
    for name, _, options in _parse_spec(spec):
        if is_frozen_set(name):
            _open_source(name, options, None)


def mask_folders(spec: MaskSpec) -> dict[str, FolderMasks]:
    """{name: source} of the folders of a spec. Reads no mask."""
    return {
        name: FolderMasks(open_storage(name), **_parse_folder_options(name, options), lazy=True)
        for name, _, options in _parse_spec(spec)
        if is_mask_folder(name)
    }


def make_mask_specs(names: Sequence[str], hole: Any) -> list[MaskSpec]:
    """A spec per kind or folder; folders get the option `hole` unless it is None. Raises ValueError if `hole` is given
    without a folder."""
    if hole is None:
        return list(names)
    if not any(is_mask_folder(name) for name in names):
        values = ", ".join(value.text for value in parse_hole_values(hole))
        raise ValueError(f"hole: {values} applies to mask folders only, not to {', '.join(names)}")
    return [{name: {"hole": hole}} if is_mask_folder(name) else name for name in names]


def is_mask_folder(name: str) -> bool:
    """Whether a name in a spec means a folder or bucket."""
    return name not in MASK_GENERATORS and not is_frozen_set(name) and ("/" in name or Path(name).is_dir())


def _parse_spec(spec: MaskSpec) -> list[tuple[str, float, dict[str, Any]]]:
    """(name, weight, options) of each kind or folder."""
    if isinstance(spec, str):
        spec = {spec: 1}
    if not spec:
        raise ValueError(f"masks name no kind and no folder; kinds: {', '.join(MASK_KINDS)}")
    parts = []
    for name, value in spec.items():
        options = {"weight": value} if not isinstance(value, Mapping) else dict(value)
        weight = options.pop("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
            raise ValueError(f"masks: {name} has weight {weight!r}; a number above 0")
        parts.append((str(name), float(weight), options))
    return parts


def _open_source(name: str, options: dict[str, Any], scan_cache: Storage | None) -> MaskSource:
    if is_mask_folder(name):
        return FolderMasks(open_storage(name), **_parse_folder_options(name, options), scan_cache=scan_cache)
    if is_frozen_set(name):
        _check_options(f"frozen mask set {name}", options, {})
        return load_frozen_set(name)
    source = GeneratedMasks(name, tuple(sorted(options.items())))
    source.sample(64, 64, np.random.default_rng(0))  # bad values fail here, not in the middle of training
    return source


def _parse_folder_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a mask folder as fields of FolderMasks. Raises ValueError for unknown ones and wrong values."""
    known = {"invert": None, "dilate": 0, "band": None, "augment": False, "hole": None}
    _check_options(f"mask folder {name}", options, known)
    options = dict(options)
    if "band" in options:
        options["band"] = tuple(options["band"])
    if "hole" in options:
        options["hole"] = parse_hole_values(options["hole"])
    return options


def fixed_masks(
    spec: MaskSpec, height: int, width: int, count: int, seed: int, scan_cache: Storage | None = None
) -> list[np.ndarray]:
    """`count` masks for evaluation, a pure function of the arguments. Masks of a folder repeat only after all were
    used."""
    return open_masks(spec, scan_cache).fixed_set(height, width, count, seed)


@dataclass(frozen=True)
class GeneratedMasks(MaskSource):
    """One kind, with options."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_kind(self.kind, dict(self.options))  # here, not for every mask

    @property
    def is_constant(self) -> bool:  # type: ignore[override]
        return self.kind == "center"

    def sample(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        return MASK_GENERATORS[self.kind](height, width, rng, **dict(self.options))

    def describe(self) -> str:
        listed = ", ".join(f"{name} {value}" for name, value in self.options)
        return f"{self.kind} ({listed})" if listed else self.kind


@dataclass(frozen=True)
class MixedMasks(MaskSource):
    """Samples each mask from one of several sources, with probabilities proportional to the weights."""

    sources: tuple[MaskSource, ...]
    weights: tuple[float, ...]

    def sample(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        cumulative = np.cumsum(self.weights) / sum(self.weights)
        index = min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(self.sources) - 1)
        return self.sources[index].sample(height, width, rng)

    def describe(self) -> str:
        total = sum(self.weights)
        return ", ".join(
            f"{s.describe()} {weight / total:.0%}" for s, weight in zip(self.sources, self.weights)
        )


@dataclass(frozen=True)
class FolderMasks(MaskSource):
    """Mask images, resized to the photograph by nearest neighbour."""

    storage: Storage
    invert: bool | None = None
    """True: black is the hole; None: inferred from the masks, see `looks_inverted`"""
    dilate: int = 0
    """pixels of the mask image by which each hole grows"""
    band: tuple[float, float] | None = None
    """use only masks whose hole covers more than the first and at most the second fraction of the image"""
    augment: bool = False
    """also rotate by quarter turns and mirror, eight orientations (EdgeConnect)"""
    hole: tuple[HoleValue, ...] = ()
    """the values that are the hole; empty: white, or the value that is not black (mask_reading.py)"""
    names: tuple[str, ...] = field(init=False, repr=False, default=())
    cache_token: str = field(init=False, repr=False, compare=False, default_factory=lambda: uuid.uuid4().hex)
    """part of the key of cached masks, unique per instance, as the files may change before the folder is opened again"""
    scan_cache: InitVar[Storage | None] = None
    """holds cached scans; with the folder's, its masks are not read again"""
    lazy: InitVar[bool] = False
    """leave `names` empty and `invert` unchanged"""

    def __post_init__(self, scan_cache: Storage | None, lazy: bool) -> None:
        if lazy:
            return
        scan = self.folder.load_scan(scan_cache) if scan_cache else None
        if scan is None and self.band:
            scan = self.folder.scan()
            self.folder.check_usable(scan, self.band, "hole: VALUE")
        names = scan.names if scan else list_mask_files(self.storage)
        object.__setattr__(self, "invert", scan.inverted if scan else self.folder.is_inverted(names))
        if scan and self.band:
            low, high = self.band
            names = tuple(name for name in names if low < scan.hole_fractions[name] <= high)
            if not names:
                raise ValueError(f"{self.storage.uri} holds no mask with a hole of {low:.0%} to {high:.0%}")
        object.__setattr__(self, "names", names)

    @property
    def folder(self) -> MaskFolder:
        return MaskFolder(self.storage, self.hole, self.invert, self.dilate)

    def sample(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        name = self.names[rng.integers(len(self.names))]
        return self._load_resized(name, height, width, int(rng.integers(8)) if self.augment else 0)

    def iterate_fixed_set(self, height: int, width: int, count: int, seed: int) -> Iterator[np.ndarray]:
        order = np.random.default_rng(seed).permutation(len(self.names))
        names = (self.names[order[n % len(order)]] for n in range(count))
        return (self._load_resized(name, height, width, 0) for name in names)

    def describe(self) -> str:
        hole = f"hole: {', '.join(value.text for value in self.hole)}" if self.hole else "white = hole"
        if self.invert:
            hole = f"all but {hole}" if self.hole else "black = hole"
        band = f", hole {self.band[0]:.0%} to {self.band[1]:.0%}" if self.band else ""
        return f"{len(self.names)} masks of {self.storage.uri} ({hole}{band})"

    def _load_resized(self, name: str, height: int, width: int, orientation: int) -> np.ndarray:
        return _cached_resized(self, self.cache_token, name, height, width, orientation).copy()


@functools.lru_cache(maxsize=1024)
def _cached_resized(
    masks: FolderMasks, cache_token: str, name: str, height: int, width: int, orientation: int
) -> np.ndarray:
    """`orientation`: quarter turns, plus 4 if mirrored. `cache_token` is only part of the cache's key."""
    mask = np.rot90(masks.folder.read(name, bool(masks.invert), masks.dilate), orientation % 4)
    return resize_mask(np.ascontiguousarray(mask[:, ::-1] if orientation >= 4 else mask), height, width)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [height,width] of a mask uint8 [H,W], by nearest neighbour; if no hole is left, it becomes the pixels that
    the hole overlaps."""
    resized = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    if not resized.any() and mask.any():
        coverage = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        resized = (coverage > 0).astype(np.uint8)
    return resized
