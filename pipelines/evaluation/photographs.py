"""The photographs of an evaluation: those of a split, or the centre squares of any folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import cv2
import numpy as np

from data_prep.frozen_masks import frozen_sets
from data_prep.images import PhotoError, decode_photo
from data_prep.left_out import LeftOut, left_out_lines, printable
from data_prep.manifest import MANIFEST, load_manifest
from data_prep.shards import empty_split_message
from data_prep.sources import open_source
from data_prep.storage import BadKey, DeniedKey, MissingKey, Storage, open_storage
from data_prep.stream import read_split


def split_photographs(shards: Storage, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """(key, uint8 [S,S,3]) of a split, at the training size. Raises ValueError if the split is empty."""
    manifest = load_manifest(shards)
    if not manifest.splits.get(split):
        raise ValueError(empty_split_message(split, manifest.source))
    return read_split(shards, split, manifest.options.size)


def load_photographs(
    uri: str, size: int, count: int | None, split: str = "test"
) -> list[tuple[str, np.ndarray]]:
    """(name, uint8 [size,size,3]) of a folder: short side resized to `size`, centre square; of shards, the centre crops
    of the split. Raises ValueError if no photograph is readable.
    """
    if uri != "bundled" and (shards := open_storage(uri)).exists(MANIFEST):
        return list(islice(read_split(shards, split, size), count))
    source = open_source(uri, tile_size=min(size, 256))
    photos: list[tuple[str, np.ndarray]] = []
    unreadable = []
    left_out = LeftOut()
    for name in [name for name, _ in source.list_photos(left_out)]:
        if len(photos) == count:
            break
        try:
            photos.append((name, center_crop_resize(decode_photo(source.read(name), short_side=size), size)))
        except (PhotoError, MissingKey, DeniedKey, BadKey) as error:
            unreadable.append(printable(f"{name}: {error}"))
    for line in unreadable:
        print(f"  skipped {line}", file=sys.stderr)
    for line in left_out_lines(left_out.entries()):
        print(f"  left out of {uri}: {line}", file=sys.stderr)
    if not photos:
        suffix = f"; left out: {left_out}" if left_out.total else ""
        raise ValueError(f"{uri} holds no readable photograph ({len(unreadable)} files skipped{suffix})")
    return photos


def resolve_size(size: int | None, masks: Sequence[str], model_size: int | None = None) -> int:
    """Side of the photographs in pixels: as given, else that of a frozen mask set, else that of the models. Raises
    ValueError if there is none of them."""
    frozen_sizes = [frozen.manifest.size for frozen in frozen_sets(masks).values()]
    resolved = size or next(iter(frozen_sizes), None) or model_size
    if resolved is None:
        raise ValueError("--size is missing: without a model, the side of the photographs in pixels")
    return resolved


def center_crop_resize(photo: np.ndarray, size: int) -> np.ndarray:
    """The centre square, resized to `size`."""
    height, width = photo.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = photo[top : top + side, left : left + side]
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cropped.copy() if side == size else cv2.resize(cropped, (size, size), interpolation=method)
