"""Reads every mask of every folder that a command uses before anything expensive starts, so that unusable masks are
reported early. The results are cached: a mask is not read twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from data_prep.masks import MaskSpec, check_frozen_sets, make_mask_specs, mask_folders
from data_prep.storage import Storage, open_storage
from pipelines.downloads import cache_folder
from pipelines.recipe import Recipe
from pipelines.recipe.load import RecipeError

FolderProgressCallback = Callable[[str, int, int], None]
"""(uri of a folder, masks read, all masks of the folder)"""


def check_masks(
    masks: Sequence[str], hole: Sequence[str] | None = None, progress: FolderProgressCallback | None = None
) -> None:
    """Read all masks of the folders among `masks` that this machine has not read before; `masks` and `hole` are a
    command's --masks and --hole.

    Raises ValueError, in one line, that names unusable masks and what to do.
    """
    scan_cache = open_storage(cache_folder())
    for spec in make_mask_specs(masks, hole):
        _check_spec(spec, scan_cache, "--hole VALUE", progress)


def check_recipe_masks(
    recipes: Iterable[Recipe], scan_cache: Storage, progress: FolderProgressCallback | None = None
) -> None:
    """Read all masks of the folders of `recipes` that `scan_cache` does not have; for a sweep, `recipes` are the trials
    that differ in their masks. Raises RecipeError as `check_masks` raises ValueError."""
    for recipe in recipes:
        for key in recipe.models:
            _check_recipe_spec(
                "masks", recipe.masks_for(key), scan_cache, "masks: {FOLDER: {hole: VALUE}}", progress
            )
        for spec in make_mask_specs(recipe.evaluate.masks, recipe.evaluate.hole):
            _check_recipe_spec("evaluate.masks", spec, scan_cache, "evaluate: {hole: VALUE}", progress)


def _check_recipe_spec(
    field: str,
    spec: MaskSpec,
    scan_cache: Storage,
    hole_option: str,
    progress: FolderProgressCallback | None,
) -> None:
    try:
        _check_spec(spec, scan_cache, hole_option, progress)
    except ValueError as error:
        raise RecipeError(f"{field}: {error}") from None


def _check_spec(
    spec: MaskSpec, scan_cache: Storage, hole_option: str, progress: FolderProgressCallback | None
) -> None:
    check_frozen_sets(spec)
    for masks in mask_folders(spec).values():
        callback = partial(progress, masks.storage.uri) if progress else _ignore_progress
        scan = masks.folder.scan(scan_cache, callback)
        masks.folder.check_usable(scan, masks.band, hole_option)


def _ignore_progress(done: int, total: int) -> None:
    pass
