"""Scans a folder of masks: reads each of them once, records its hole, and finds those that cannot be used.

The scan is cached as JSON where the caller says, one file per folder and reading options, with the fingerprint of each
mask's file: unchanged masks are not read again, by this or another process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import numpy as np

from data_prep.images import PhotoError
from data_prep.mask_reading import HoleValue, describe_values, read_mask, read_mask_and_matches
from data_prep.mask_shapes import MASK_GENERATORS
from data_prep.mask_values import AmbiguousMask
from data_prep.records import decode
from data_prep.storage import DeniedKey, MissingKey, Storage, StorageError

CACHE_FOLDER = "masks"  # in the storage that holds cached scans
MAX_READ_THREADS = 16  # used for a bucket; a local folder is read with one thread per core
MAX_NAMED_MASKS = 4  # in an error
HOLE_HINT = "say which value is the hole:"
_SCAN_VERSION = 2  # of how masks are read; scans cached by another version are ignored
_POLARITY_SAMPLE = 25  # masks that decide whether black or white is the hole
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")

ProgressCallback = Callable[[int, int], None]
"""(masks read, all masks)"""


@dataclass(frozen=True)
class MaskScan:
    """Results for the masks of a folder."""

    names: tuple[str, ...]
    inverted: bool
    """black is the hole"""
    hole_fractions: Mapping[str, float] = field(default_factory=dict)
    """name -> fraction of the image that is hole, after `invert` and `dilate`"""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """name -> reason"""
    ambiguous: Mapping[str, str] = field(default_factory=dict)
    """name -> reason"""
    absent_values: Sequence[str] = ()
    """values of the option `hole` that occur in no mask"""


@dataclass(frozen=True)
class _CachedMask:
    """One mask in a cached scan; fields that are None are not written."""

    fingerprint: str
    """of its file"""
    hole_fraction: float | None = None
    unreadable: str | None = None
    ambiguous: str | None = None
    hole_values: tuple[int, ...] | None = None
    """indices of the values of the option `hole` that occur in it"""


@dataclass(frozen=True)
class _CachedScan:
    inverted: bool
    masks: dict[str, _CachedMask]

    def to_bytes(self) -> bytes:
        masks = {
            name: {key: value for key, value in vars(mask).items() if value is not None}
            for name, mask in self.masks.items()
        }
        return json.dumps({"inverted": self.inverted, "masks": masks}).encode()


@dataclass(frozen=True)
class MaskFolder:
    """Masks in a folder or bucket and how they are read; the fields are those of masks.FolderMasks."""

    storage: Storage
    hole: tuple[HoleValue, ...] = ()
    invert: bool | None = None
    dilate: int = 0

    @property
    def cache_key(self) -> str:
        """The key of its cached scan."""
        options = [
            _SCAN_VERSION,
            self.storage.uri,
            [asdict(value) for value in self.hole],
            self.invert,
            self.dilate,
        ]
        return f"{CACHE_FOLDER}/{hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]}.json"

    def load_scan(self, scan_cache: Storage) -> MaskScan | None:
        """The cached scan; None if there is none or if a mask was added, removed or changed since."""
        cached = _load_cached_scan(scan_cache, self.cache_key)
        if (
            cached
            and cached.masks
            and self._fingerprints() == {name: mask.fingerprint for name, mask in cached.masks.items()}
        ):
            return self._summarize(cached)
        return None

    def scan(self, scan_cache: Storage | None = None, progress: ProgressCallback | None = None) -> MaskScan:
        """Read all masks that the cached scan does not have, and cache the result if `scan_cache` is writable.

        Raises ValueError if the folder holds no mask images.
        """
        fingerprints = self._fingerprints()
        cached = _load_cached_scan(scan_cache, self.cache_key) if scan_cache else None
        if not cached or fingerprints != {name: mask.fingerprint for name, mask in cached.masks.items()}:
            inverted = self._majority_inverted(list(fingerprints))
            reusable = cached.masks if cached and cached.inverted == inverted else {}
            masks = {
                name: reusable[name]
                for name, fingerprint in fingerprints.items()
                if name in reusable and reusable[name].fingerprint == fingerprint
            }
            changed = {name: value for name, value in fingerprints.items() if name not in masks}
            masks |= self._scan_masks(changed, inverted, progress)
            cached = _CachedScan(inverted, {name: masks[name] for name in fingerprints})
            if scan_cache:
                with suppress(StorageError, OSError):  # the cache only saves time
                    scan_cache.write(self.cache_key, cached.to_bytes())
        return self._summarize(cached)

    def is_inverted(self, names: Sequence[str]) -> bool:
        """Whether black is the hole: as `invert` says, else by the majority of a sample of the masks. Raises ValueError
        that names an unusable mask."""
        if self.invert is not None or self.hole:
            return bool(self.invert)
        sample = names[:: max(1, len(names) // _POLARITY_SAMPLE)]
        return sum(looks_inverted(self.read(name)) for name in sample) * 2 > len(sample)

    def read(self, name: str, inverted: bool = False, dilate: int = 0) -> np.ndarray:
        """`read_mask` of a file. Raises ValueError, in one line, with its name and what to do."""
        try:
            return read_mask(self.storage.read(name), inverted, dilate, self.hole)
        except AmbiguousMask as error:
            raise ValueError(
                f"mask {name} in {self.storage.uri}: {error}; {HOLE_HINT} hole: VALUE"
            ) from error
        except PhotoError as error:
            raise ValueError(f"mask {name} in {self.storage.uri}: {error}; repair or remove it") from error

    def _fingerprints(self) -> dict[str, str]:
        files = self.storage.list_fingerprints()
        return _require_masks(
            {name: fingerprint for name, fingerprint in files if has_image_suffix(name)}, self.storage
        )

    def _majority_inverted(self, names: Sequence[str]) -> bool:
        """`is_inverted`; False if a mask of the sample is unusable, as the scan reports all of these."""
        with suppress(ValueError, StorageError):
            return self.is_inverted(names)
        return False

    def _scan_masks(
        self, fingerprints: Mapping[str, str], inverted: bool, progress: ProgressCallback | None
    ) -> dict[str, _CachedMask]:
        masks: dict[str, _CachedMask] = {}
        is_local = self.storage.local_path() is not None
        threads = min(MAX_READ_THREADS, os.cpu_count() or 1) if is_local else MAX_READ_THREADS
        with ThreadPoolExecutor(threads) as pool:
            try:
                results = pool.map(
                    lambda item: self._scan_mask(item[0], item[1], inverted), fingerprints.items()
                )
                for name, mask in zip(fingerprints, results, strict=True):
                    masks[name] = mask
                    if progress:
                        progress(len(masks), len(fingerprints))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return masks

    def _scan_mask(self, name: str, fingerprint: str, inverted: bool) -> _CachedMask:
        try:
            mask, matches = read_mask_and_matches(self.storage.read(name), inverted, self.dilate, self.hole)
        except AmbiguousMask as error:
            return _CachedMask(fingerprint, ambiguous=str(error))
        except (PhotoError, MissingKey, DeniedKey) as error:
            return _CachedMask(fingerprint, unreadable=str(error))
        hole_values = tuple(sorted(matches)) if self.hole else None
        return _CachedMask(fingerprint, float(mask.mean()), hole_values=hole_values)

    def _summarize(self, cached: _CachedScan) -> MaskScan:
        masks = cached.masks
        present = {index for mask in masks.values() for index in mask.hole_values or ()}
        return MaskScan(
            tuple(masks),
            cached.inverted,
            hole_fractions={n: m.hole_fraction for n, m in masks.items() if m.hole_fraction is not None},
            unreadable={n: m.unreadable for n, m in masks.items() if m.unreadable is not None},
            ambiguous={n: m.ambiguous for n, m in masks.items() if m.ambiguous is not None},
            absent_values=[value.text for index, value in enumerate(self.hole) if index not in present],
        )

    def check_usable(self, scan: MaskScan, band: tuple[float, float] | None, hole_option: str) -> None:
        """Raise ValueError, in one line, that names masks without a hole, unreadable and ambiguous ones, and says what
        to do.

        With `band` only masks within it are used, so the others need no hole. `hole_option` is how the user sets
        the value of the hole, such as "--hole VALUE".
        """
        uri = self.storage.uri
        if scan.absent_values and scan.hole_fractions:
            name = next(iter(scan.hole_fractions))
            raise ValueError(
                f"hole: {', '.join(scan.absent_values)} is in no mask of {uri}: "
                f"{name} has {self._describe_values(name)}"
            )
        empty = [] if band else [name for name, area in scan.hole_fractions.items() if area == 0]
        reasons = dict.fromkeys(empty, "") | {**scan.ambiguous, **scan.unreadable}
        if not reasons:
            return
        names_by_reason: dict[str, list[str]] = {}
        for name in sorted(reasons)[:MAX_NAMED_MASKS]:
            reason = reasons[name] or self._explain_no_hole(name, scan.inverted)
            names_by_reason.setdefault(reason, []).append(name)
        hints = [f"{HOLE_HINT} {hole_option}"] if scan.ambiguous else []
        if len(reasons) == 1:
            ((reason, (name,)),) = names_by_reason.items()
            hints += ["repair or remove it"] if not scan.ambiguous else []
            raise ValueError(f"mask {name} in {uri}: {reason}; {hints[0]}")
        hints += ["repair or remove the others" if hints else "repair or remove them"]
        if len(scan.ambiguous) == len(reasons):
            hints.pop()
        listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items())
        more = f"; and {len(reasons) - MAX_NAMED_MASKS} more" if len(reasons) > MAX_NAMED_MASKS else ""
        raise ValueError(
            f"{len(reasons)} of {len(scan.names)} masks in {uri} cannot be used: {listed}{more}; "
            f"{', and '.join(hints)}"
        )

    def _explain_no_hole(self, name: str, inverted: bool) -> str:
        if self.hole:
            wanted = " or ".join(value.text for value in self.hole)
            return f"no hole: no {wanted} in it, {self._describe_values(name)}"
        if inverted:
            return "no hole: all of it is white, and black is the hole (invert: false turns that round)"
        return "no hole: all of it is black, and white is the hole"

    def _describe_values(self, name: str) -> str:
        with suppress(PhotoError, StorageError):
            return describe_values(self.storage.read(name))
        return "unknown values"


def has_image_suffix(name: str) -> bool:
    """Whether a file's name has the suffix of a mask image."""
    return name.lower().endswith(_SUFFIXES)


def list_mask_files(storage: Storage) -> tuple[str, ...]:
    """The names of a folder's mask images. Raises ValueError if there are none."""
    files = {name: "" for name, _ in storage.list_user_files() if has_image_suffix(name)}
    return tuple(_require_masks(files, storage))


def _require_masks(masks: dict[str, str], storage: Storage) -> dict[str, str]:
    if not masks:
        raise ValueError(
            f"{storage.uri} holds no mask images; kinds that need no folder: {', '.join(MASK_GENERATORS)}"
        )
    return masks


def looks_inverted(mask: np.ndarray) -> bool:
    """Whether the hole covers most of the image and of its border: then black was probably meant."""
    width = max(1, min(mask.shape) // 32)
    inside = mask[width:-width, width:-width]
    border = (int(mask.sum()) - int(inside.sum())) / max(1, mask.size - inside.size)
    return bool(mask.mean() > 0.5 and border > 0.6)


def _load_cached_scan(scan_cache: Storage, key: str) -> _CachedScan | None:
    """None if it is missing, damaged or the storage is unavailable."""
    with suppress(StorageError, OSError, ValueError):
        return decode(_CachedScan, scan_cache.read(key), key)
    return None
