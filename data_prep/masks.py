"""Masks by kind, from folders of mask images, or mixed; always uint8 [H,W] with 1 = hole."""

from __future__ import annotations

import difflib
import functools
import inspect
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data_prep.mask_shapes import SHAPES
from data_prep.sources import PhotoError, decode_image, has_alpha, to_rgb
from data_prep.storage import Storage, open_storage

MASK_KINDS: tuple[str, ...] = tuple(SHAPES)
MIN_SIDE = 8  # pixels
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
_POLARITY_SAMPLE = 25  # masks of a folder that are looked at to tell black from white


def make_mask(kind: str, height: int, width: int, rng: np.random.Generator, **options: Any) -> np.ndarray:
    """A mask uint8 [height, width], 1 = hole, as one paper draws it; everything random comes from `rng`.

    kinds: center, box, block, region, brush, box_and_brush, half. The options are the keywords of the function of
    that name in mask_shapes.py. Raises ValueError for an unknown kind or option (naming the nearest) and for
    images under 8 pixels.
    """
    check_kind(kind, options)
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"mask of {height} x {width}: at least {MIN_SIDE} pixels a side")
    return SHAPES[kind](height, width, rng, **options)


def check_kind(kind: str, options: Mapping[str, Any]) -> None:
    """ValueError when there is no such kind, or it has no such option; the nearest one is named."""
    if kind not in SHAPES:
        raise ValueError(
            f"unknown mask kind {kind!r}{_nearest(kind, MASK_KINDS)}; kinds: {', '.join(MASK_KINDS)}"
        )
    known = dict(list(inspect.signature(SHAPES[kind]).parameters.items())[3:])
    _check_options(f"mask kind {kind}", options, {name: known[name].default for name in known})


def _check_options(owner: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Names and types against the defaults; a default of None or a tuple checks itself elsewhere."""
    for name, value in options.items():
        if name not in known:
            listed = f"options: {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"{owner} has no option {name!r}{_nearest(name, known)}; {listed}")
        default = known[name]
        if isinstance(default, int | float | str):
            kinds = (int, float) if type(default) is float else type(default)
            if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
                raise ValueError(
                    f"{owner}: option {name} is {value!r}; a {type(default).__name__} such as {default!r}"
                )


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_mask(data: bytes | Path, invert: bool | None = None, dilate: int = 0) -> np.ndarray:
    """A mask image of any mode as uint8 [H,W], 1 = hole; grey is cut at half, the hole grown by `dilate` pixels.

    White is the hole, black with `invert`. None is as False: ask `looks_inverted`, and warn. In an image with
    transparency, strokes on a clear ground are the hole; of a photograph partly erased, the erased part is.
    Raises PhotoError when it is no readable image.
    """
    mask = decode_image(data.read_bytes() if isinstance(data, Path) else data, _to_mask)
    if invert:
        mask = 1 - mask
    if dilate > 0:
        reach = np.arange(-dilate, dilate + 1) ** 2
        mask = cv2.dilate(mask, (reach[:, None] + reach <= dilate**2).astype(np.uint8))
    return mask


def _to_mask(image: Image.Image) -> np.ndarray:
    if has_alpha(image):
        rgba = np.asarray(image.convert("RGBA"))
        opaque = rgba[..., 3] >= 128
        if opaque.any() and not opaque.all():
            grey = rgba[..., :3].mean(2)
            shown = grey[opaque]
            if np.ptp(shown) < 64:  # one colour: strokes
                return opaque.astype(np.uint8)
            if np.mean(np.abs(shown - 127.5) < 95) > 0.1:  # many tones: a photograph
                return (~opaque).astype(np.uint8)
            return (opaque & (grey >= 128)).astype(np.uint8)
        image = image.convert("RGBA").convert("RGB")
    grey = to_rgb(image)[..., 0] if image.mode[0] in "IF" else np.asarray(image.convert("L"))
    return (grey >= (128 if grey.max() > 1 else 1)).astype(np.uint8)  # some tools write 0 and 1


def looks_inverted(mask: np.ndarray) -> bool:
    """Whether a mask's hole is most of the image and of its border: then black was probably meant."""
    ring = max(1, min(mask.shape) // 32)
    inside = mask[ring:-ring, ring:-ring]
    border = (int(mask.sum()) - int(inside.sum())) / max(1, mask.size - inside.size)
    return bool(mask.mean() > 0.5 and border > 0.6)


class MaskSource(ABC):
    """Where a run's masks come from. Picklable."""

    constant = False
    """whether every mask of a size is the same"""

    @abstractmethod
    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """A mask uint8 [height, width], 1 = hole."""

    @abstractmethod
    def describe(self) -> str:
        """One line for reports."""

    def fixed(self, height: int, width: int, count: int, seed: int) -> list[np.ndarray]:
        """`count` masks that are a pure function of the arguments."""
        return [self.draw(height, width, np.random.default_rng((seed, number))) for number in range(count)]


def open_masks(spec: str | Mapping[str, Any]) -> MaskSource:
    """Masks by kind ("brush"), from a folder or bucket ("photos/masks"), or mixed.

    A mapping gives each kind or folder its share, or its options and share:
    {"block": 1, "half": 1} or {"brush": {"max_width": 20, "share": 2}, "photos/masks": {"band": [0.1, 0.2]}}.
    A folder's options are the fields of FolderMasks. ValueError names what is unknown or empty.
    """
    if isinstance(spec, str):
        spec = {spec: 1}
    if not spec:
        raise ValueError(f"masks name no kind and no folder; kinds: {', '.join(MASK_KINDS)}")
    sources, shares = [], []
    for name, value in spec.items():
        options = {"share": value} if not isinstance(value, Mapping) else dict(value)
        share = options.pop("share", 1)
        if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
            raise ValueError(f"masks: {name} has share {share!r}; a number above 0")
        sources.append(_open_one(str(name), options))
        shares.append(float(share))
    return sources[0] if len(sources) == 1 else MixedMasks(tuple(sources), tuple(shares))


def _open_one(name: str, options: dict[str, Any]) -> MaskSource:
    if name not in SHAPES and ("/" in name or Path(name).is_dir()):
        _check_options(
            f"mask folder {name}", options, {"invert": None, "dilate": 0, "band": None, "augment": False}
        )
        if "band" in options:
            options["band"] = tuple(options["band"])
        return FolderMasks(open_storage(name), **options)
    source = DrawnMasks(name, tuple(sorted(options.items())))
    source.draw(64, 64, np.random.default_rng(0))  # bad values show now, not in the middle of a training
    return source


def fixed_masks(
    spec: str | Mapping[str, Any], height: int, width: int, count: int, seed: int
) -> list[np.ndarray]:
    """`count` masks for evaluation, a pure function of the arguments; a folder's repeat only after all were taken."""
    return open_masks(spec).fixed(height, width, count, seed)


@dataclass(frozen=True)
class DrawnMasks(MaskSource):
    """One kind, with options."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_kind(self.kind, dict(self.options))  # once, not at every mask

    @property
    def constant(self) -> bool:  # type: ignore[override]
        return self.kind == "center"

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        return SHAPES[self.kind](height, width, rng, **dict(self.options))

    def describe(self) -> str:
        listed = ", ".join(f"{name} {value}" for name, value in self.options)
        return f"{self.kind} ({listed})" if listed else self.kind


@dataclass(frozen=True)
class MixedMasks(MaskSource):
    """Each mask from one of several sources, in proportion to their shares."""

    sources: tuple[MaskSource, ...]
    shares: tuple[float, ...]

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        bounds = np.cumsum(self.shares) / sum(self.shares)
        chosen = min(int(np.searchsorted(bounds, rng.random(), side="right")), len(self.sources) - 1)
        return self.sources[chosen].draw(height, width, rng)

    def describe(self) -> str:
        total = sum(self.shares)
        return ", ".join(f"{s.describe()} {share / total:.0%}" for s, share in zip(self.sources, self.shares))


@dataclass(frozen=True)
class FolderMasks(MaskSource):
    """Mask images, resized to the photograph by nearest neighbour."""

    storage: Storage
    invert: bool | None = None
    """True: black is the hole; None: told from the masks themselves, see `looks_inverted`"""
    dilate: int = 0
    """pixels of the mask image by which each hole grows"""
    band: tuple[float, float] | None = None
    """only masks whose hole is more than the first and at most the second share of the image"""
    augment: bool = False
    """also turned by quarters and mirrored, eight ways (EdgeConnect)"""
    names: tuple[str, ...] = field(init=False, repr=False)
    opened: str = field(init=False, repr=False, compare=False, default_factory=lambda: uuid.uuid4().hex)
    """marks what is cached for this opening of the folder: the files may change before the next"""

    def __post_init__(self) -> None:
        found = tuple(key for key, _ in self.storage.list() if key.lower().endswith(_SUFFIXES))
        if not found:
            kinds = ", ".join(MASK_KINDS)
            raise ValueError(f"{self.storage.uri} holds no mask images; kinds that need no folder: {kinds}")
        if self.invert is None:
            sample = found[:: max(1, len(found) // _POLARITY_SAMPLE)]
            votes = sum(looks_inverted(_read(self.storage, name, False, 0)) for name in sample)
            object.__setattr__(self, "invert", votes * 2 > len(sample))
        if self.band:
            low, high = self.band
            found = tuple(name for name in found if low < self._native(name).mean() <= high)
            if not found:
                raise ValueError(f"{self.storage.uri} holds no mask with a hole of {low:.0%} to {high:.0%}")
        object.__setattr__(self, "names", found)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        name = self.names[rng.integers(len(self.names))]
        return self._sized(name, height, width, int(rng.integers(8)) if self.augment else 0)

    def fixed(self, height: int, width: int, count: int, seed: int) -> list[np.ndarray]:
        order = np.random.default_rng(seed).permutation(len(self.names))
        return [self._sized(self.names[order[n % len(order)]], height, width, 0) for n in range(count)]

    def describe(self) -> str:
        colour = "black" if self.invert else "white"
        band = f", hole {self.band[0]:.0%} to {self.band[1]:.0%}" if self.band else ""
        return f"{len(self.names)} masks of {self.storage.uri} ({colour} = hole{band})"

    def _native(self, name: str) -> np.ndarray:
        return _read(self.storage, name, bool(self.invert), self.dilate)

    def _sized(self, name: str, height: int, width: int, turn: int) -> np.ndarray:
        return _sized(self, self.opened, name, height, width, turn).copy()


def _read(storage: Storage, name: str, invert: bool, dilate: int) -> np.ndarray:
    try:
        return read_mask(storage.read(name), invert, dilate)
    except PhotoError as error:
        raise ValueError(f"mask {name} in {storage.uri}: {error}; repair or remove it") from error


@functools.lru_cache(maxsize=1024)
def _sized(masks: FolderMasks, opened: str, name: str, height: int, width: int, turn: int) -> np.ndarray:
    mask = np.rot90(masks._native(name), turn % 4)
    mask = np.ascontiguousarray(mask[:, ::-1] if turn >= 4 else mask)
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
