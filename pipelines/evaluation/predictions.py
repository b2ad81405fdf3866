"""Pictures that another program filled, as a method of an evaluation; and the photographs and masks to give that program.

Both sides use the same names. `export_inputs` writes MASKS/images/NAME.png and MASKS/masks/NAME.png, where MASKS is the
mask set and NAME the photograph's name without its suffix (with it, if two photographs differ in nothing else). The
filled pictures are MASKS/NAME.png, .jpg, .jpeg or .webp, or with a single mask set also NAME.png without a folder.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_prep.images import PhotoError, decode_photo
from data_prep.left_out import printable
from data_prep.storage import Storage, StorageError, open_storage
from pipelines.evaluation.evaluate import make_masks, safe_file_name
from pipelines.evaluation.results import EvaluationResult
from pipelines.plots.images import encode_png
from pipelines.recipe import EvaluationConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PHOTO_SUFFIXES = (*SUFFIXES, ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".jp2")
MAX_LISTED = 10  # names in a line

Photographs = Sequence[tuple[str, np.ndarray]]
"""(name, uint8 [H,W,3])"""


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """Photograph -> its file's name without suffix. Raises ValueError if two photographs have the same name."""
    if len(set(names)) < len(names):
        (name, _), *_ = Counter(names).most_common(1)
        raise ValueError(
            f"{Counter(names)[name]} photographs are called {name}: their files cannot be told apart"
        )
    short = {name: _without_suffix(name, PHOTO_SUFFIXES) for name in names}
    counts = Counter(short.values())
    return {
        name: name if counts[stem] > 1 or stem in short.keys() - {name} else stem
        for name, stem in short.items()
    }


@dataclass(frozen=True)
class FolderPredictions:
    """The pictures of one folder or bucket prefix as a method of an evaluation. Picklable."""

    storage: Storage
    files: Mapping[tuple[str, str], str]
    """(mask set, photograph) -> key of its picture"""
    unmatched: tuple[str, ...] = ()
    """Pictures that belong to no photograph."""
    sigma: None = field(default=None, repr=False)

    def for_photo(self, name: str, masks: str) -> _Prediction:
        """The method for one photograph and mask set."""
        return _Prediction(self.storage, self.files.get((masks, name)))

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        raise ValueError("pictures of a folder belong to photographs by name: use for_photo")


@dataclass(frozen=True)
class _Prediction:
    """The picture of one photograph and mask set; None: there is no file."""

    storage: Storage
    key: str | None

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        if self.key is None:
            raise ValueError("there is no file")
        try:
            picture = decode_photo(self.storage.read(self.key))
        except (PhotoError, StorageError) as error:
            raise ValueError(f"{self.key}: {error}") from error
        if picture.shape != image.shape:
            height, width = picture.shape[:2]
            raise ValueError(
                f"{self.key} is {width}x{height}, the photograph {image.shape[1]}x{image.shape[0]}"
            )
        return picture


def open_predictions(uri: str, photographs: Sequence[str], mask_sets: Sequence[str]) -> FolderPredictions:
    """Match the pictures of a folder with photographs by name.

    Raises ValueError if no picture belongs to a photograph, if two belong to one, or if two photographs have one name.
    """
    storage, stems = open_storage(uri), file_stems(photographs)
    if (folder_path := storage.local_path()) is not None and not folder_path.is_dir():
        raise ValueError(f"{uri} is not a folder: give the one with the filled pictures")
    pictures = [key for key, _ in storage.list_user_files() if key.lower().endswith(SUFFIXES)]
    by_stem = {stem: name for name, stem in stems.items()} | {name: name for name in stems}
    files: dict[tuple[str, str], str] = {}
    used = set()
    folders = _folders(mask_sets)
    for masks, folder in folders.items():
        prefix = f"{folder}/"
        own = [key for key in pictures if key.startswith(prefix)]
        if not own and len(mask_sets) == 1:
            prefix, own = "", pictures
        for key in own:
            stem = _without_suffix(key.removeprefix(prefix), SUFFIXES)
            name = by_stem.get(stem) or by_stem.get(key.removeprefix(prefix))
            if name is None:
                continue
            if other := files.get((masks, name)):
                raise ValueError(f"{uri} has two pictures for the photograph {name}: remove {other} or {key}")
            files[masks, name] = key
            used.add(key)
    if not files:
        start = f"{folders[mask_sets[0]]}/" if len(mask_sets) > 1 else ""
        example = f"{start}{next(iter(stems.values()))}.png"
        raise ValueError(
            f"{uri} has {len(pictures)} pictures, and none belongs to a photograph: the names are those that `inpaint "
            f"evaluate --export` writes, such as {example}"
        )
    return FolderPredictions(storage, files, tuple(key for key in pictures if key not in used))


def method_name(uri: str) -> str:
    """The name of a folder of pictures in tables: its last part."""
    return PurePosixPath(uri.rstrip("/")).name or uri


def describe_predictions(
    evaluation: EvaluationResult, method: str, predictions: FolderPredictions
) -> list[str]:
    """What a user must know about the pictures of a method that was scored: missing and unusable files, known pixels that
    were changed, and files that belong to no photograph. One line each; [] if there is nothing."""
    lines = []
    for masks in evaluation.bands:
        where = f" with {masks} masks" if len(evaluation.bands) > 1 else ""
        failures = evaluation.failures.get(masks, {}).get(method, {})
        missing = [
            evaluation.photos[i] for i in failures if (masks, evaluation.photos[i]) not in predictions.files
        ]
        unusable = [
            reason for i, reason in failures.items() if (masks, evaluation.photos[i]) in predictions.files
        ]
        total = len(evaluation.photos)
        if missing:
            lines.append(
                f"{method}: {len(missing)} of {total} pictures are missing{where}: {_listed(missing)}"
            )
        if unusable:
            lines.append(
                f"{method}: {len(unusable)} of {total} pictures cannot be used{where}: {_listed(unusable)}"
            )
        column = evaluation.values[masks][method].get("l1_percent_known", [])
        changed = [value for value in column if value]
        if changed:
            levels = 255 * math.fsum(changed) / len(changed) / 100
            lines.append(
                f"warning: {method} changed known pixels of {len(changed)} of {total} photographs{where}, by "
                f"{levels:.2g} of 255 levels on average (JPEG does that); scores of the whole picture include it"
            )
    if predictions.unmatched:
        lines.append(
            f"{method}: {len(predictions.unmatched)} pictures belong to no photograph: {_listed(predictions.unmatched)}"
        )
    return [printable(line) for line in lines]


def export_inputs(photos: Photographs, config: EvaluationConfig, uri: str) -> dict[str, Any]:
    """Write the photographs, black in the hole, and the masks, white in the hole, for another program to fill; returns
    the content of protocol.json, which lies beside them."""
    storage, stems = open_storage(uri), file_stems([name for name, _ in photos])
    masks = make_masks(config, [image for _, image in photos])
    folders = _folders(list(masks))
    for mask_set, set_masks in masks.items():
        folder = folders[mask_set]
        for (name, image), mask in zip(photos, set_masks, strict=True):
            known = np.where(mask[..., None] != 0, np.uint8(0), image)
            storage.write(f"{folder}/images/{stems[name]}.png", encode_png(known))
            storage.write(f"{folder}/masks/{stems[name]}.png", encode_png(mask * np.uint8(255)))
    record = {
        "photographs": {stems[name]: name for name, _ in photos},
        "masks": dict(zip(folders.values(), config.masks, strict=True)),
        "seed": config.seed,
        "hole": "black in images, white in masks",
        "filled": "MASKS/NAME.png (or .jpg, .jpeg, .webp) of the same size; with one mask set also NAME.png",
    }
    storage.write("protocol.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    return record


def _folders(mask_sets: Sequence[str]) -> dict[str, str]:
    """Mask set -> the name of its folder. Raises ValueError if two have one name."""
    folders = {masks: safe_file_name(masks) for masks in mask_sets}
    if len(set(folders.values())) < len(folders):
        raise ValueError(
            f"the mask sets {', '.join(mask_sets)} need folders of different names: rename one of them"
        )
    return folders


def _without_suffix(name: str, suffixes: Sequence[str]) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in suffixes else name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
