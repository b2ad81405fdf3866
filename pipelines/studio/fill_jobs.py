"""The job that fills one photograph with one to four versions; runs in the worker process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.errors import explain_error
from pipelines.inference.fill import FillTask, prepare_fill, run_fill
from pipelines.inference.tiles import MIN_TILE_SIZE, TilePlan
from pipelines.studio.photos import for_page, view_of_file
from pipelines.studio.shown import shown
from pipelines.studio.worker import Cancelled, JobContext

FUNCTION = f"{__name__}:fill"
SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "TIFF": "tif",
    "png": "png",
    "jpeg": "jpg",
    "tiff": "tif",
}
"""Format of a photograph, or wanted format -> suffix; PNG for all others, which `inpaint fill` does not write."""


def fill(
    context: JobContext,
    photo: str,
    mask: str,
    lines: str | None,
    frame: int | None,
    name: str,
    versions: Sequence[str],
    sizes: Sequence[int | None],
    blend: bool,
    suffix: str,
    max_tile_size: int,
    folder: str,
) -> dict[str, Any]:
    """Fill the hole of `photo` with each of `versions`; write INDEX.suffix and its view into `folder`.

    `sizes` are the versions' training sizes, for the number of tiles. One version's error does not end the others.
    """
    names = {Path(photo): name, Path(mask): "the mask", Path(folder) / f"0.{suffix}": name}
    if lines:
        names[Path(lines)] = "the drawing"
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        task = prepare_fill(
            *(photo, mask, Path(folder) / f"0.{suffix}"),
            max_tile_size=max_tile_size,
            edges_path=lines,
            frame=frame,
        )
    except ValueError as error:
        raise ValueError(for_page(str(error), names)) from error
    counts = [len(TilePlan(task.hole, size or MIN_TILE_SIZE, max_tile_size).tiles) for size in sizes]
    stem = Path(name).stem or "photograph"
    results = []
    for index, version in enumerate(versions):
        progress = Progress(context, version, sum(counts[:index]), sum(counts))
        started = time.monotonic()
        result: dict[str, Any] = {"version": version, "view": None, "download": None, "error": None}
        result |= {"name": f"{stem}-filled.{suffix}", "notes": [], "warnings": []}
        own_task = replace(task, out_path=Path(folder) / f"{index}.{suffix}")
        try:
            notes, warnings = _fill_version(context, progress, own_task, version, blend)
            result["notes"] = [for_page(text, names) for text in notes]
            result["warnings"] = [for_page(text, names) for text in warnings]
            url = f"/api/jobs/{context.job_id}/results/{index}"
            result |= {"view": f"{url}/view", "download": f"{url}/download"}
        except Cancelled:
            raise
        except Exception as error:
            result["error"] = shown(for_page(explain_error(error), names))
        result["seconds"] = round(time.monotonic() - started, 2)
        results.append(result)
    if all(result["error"] for result in results) and len(results) == 1:
        raise ValueError(results[0]["error"])
    return {"versions": results}


class Progress:
    """Counts the tiles of one version among those of all."""

    def __init__(self, context: JobContext, version: str, first: int, total: int) -> None:
        self._context, self._version, self._first, self._total = context, version, first, total

    def stage(self, text: str) -> None:
        self._context.progress(self._first, self._total, f"{self._version}: {text}")

    def tiles(self, done: int, count: int) -> None:
        text = f"tile {done + 1} of {count}" if done < count else "writing"
        self._context.progress(self._first + done, self._total, f"{self._version}: {text}")


def _fill_version(
    context: JobContext, progress: Progress, task: FillTask, version: str, blend: bool
) -> tuple[list[str], list[str]]:
    """(notes, warnings)"""
    progress.stage("starting" if context.has_model(version) else "loading")
    model = context.load_model(version)
    notes = []
    if task.edges_path and not model.takes_edges:
        task = replace(task, edges_path=None, user_edges=None)
        notes.append("the drawn edges are not used: this model takes none")
    result = run_fill(model, task, blend=blend, progress=progress.tiles)
    view_of_file(task.out_path, task.out_path.with_name(f"{task.out_path.stem}-view"))
    return [*notes, *result.notes], list(result.warnings)
