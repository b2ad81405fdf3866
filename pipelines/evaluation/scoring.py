"""Scores of registered models or checkpoint folders on any folder of photographs: `inpaint evaluate`, and comparisons."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from data_prep.sources import PhotoError, decode_photo, open_source
from data_prep.storage import open_storage
from data_prep.stream import read_split
from pipelines import registry
from pipelines.cli.progress import Show
from pipelines.evaluation.completers import LoadedCompleter
from pipelines.evaluation.evaluate import Completer, EvaluationSpec, baselines, evaluate
from pipelines.evaluation.figures import encode_png, sample_grid
from pipelines.evaluation.scores import Evaluation
from pipelines.evaluation.tables import table_markdown, table_text
from pipelines.filling.loading import LoadedModel
from pipelines.report import ReportData, write_report


def score_models(
    uris: Sequence[str],
    *,
    images: str,
    masks: Sequence[str],
    tracking_uri: str,
    size: int | None = None,
    count: int = 200,
    seed: int = 0,
    split: str = "test",
    classical: bool = True,
    samples: int = 6,
    out: Path | None = None,
) -> Evaluation:
    """Print the table of the models and, when `classical`, the baselines; with `out`, also table.md, report.html, grids.

    Photographs are cut to squares of `size` pixels (None: the largest training size of the models); of a folder that
    `inpaint shard` made, those of `split`. Unreadable ones are listed and passed over. ValueError in one line: no such
    model, no photographs.
    """
    methods: dict[str, Completer] = baselines() if classical else {}
    models = {
        uri.removeprefix("models:/"): registry.load_model(uri, tracking_uri=tracking_uri) for uri in uris
    }
    size = size or usual_size(models.values())
    methods |= {label: LoadedCompleter(model) for label, model in models.items()}
    photos = read_photographs(images, size, count, split)
    found = score(methods, photos, EvaluationSpec(tuple(masks), seed, samples=samples))
    print(table_text(found))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        found.save(lambda key, data: _write(out / key, data))
        (out / "table.md").write_text(table_markdown(found), encoding="utf-8")
        for grid in found.grids():
            (out / f"{grid.title}.png".replace(" ", "-")).write_bytes(encode_png(sample_grid(grid)))
        print(f"report: {write_report(out / 'report.html', ReportData('Evaluation', evaluation=found))}")
    return found


def usual_size(models: Iterable[LoadedModel]) -> int:
    """The largest training size of the models, in pixels."""
    return max((model.size or 0 for model in models), default=0) or 256


def score(
    methods: Mapping[str, Completer],
    photos: Sequence[tuple[str, np.ndarray]],
    spec: EvaluationSpec,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate, showing where it is unless `quiet`."""
    if quiet:
        return evaluate(methods, photos, spec)
    with Show() as show:
        report = lambda done, total, note: show("evaluate", "running", done, total, note)  # noqa: E731
        found = evaluate(methods, photos, spec, progress=report)
        show("evaluate", "finished", note=f"{len(photos)} photographs of {photos[0][1].shape[0]} px")
    return found


def read_photographs(uri: str, size: int, count: int, split: str = "test") -> list[tuple[str, np.ndarray]]:
    """(name, uint8 [size,size,3]): short side resized to `size`, centre square; of shards, the split's centre crops.

    ValueError when none is readable.
    """
    if uri != "bundled" and (shards := open_storage(uri)).exists("manifest.json"):
        return list(islice(read_split(shards, split, size), count))
    source = open_source(uri, tile=min(size, 256))
    photos: list[tuple[str, np.ndarray]] = []
    rejected = []
    for name in source.names():
        if len(photos) == count:
            break
        try:
            photos.append((name, square(decode_photo(source.read(name), short_side=size), size)))
        except PhotoError as error:
            rejected.append(f"{name}: {error}")
    for line in rejected:
        print(f"  passed over {line}", file=sys.stderr)
    if not photos:
        raise ValueError(f"{uri} holds no readable photograph ({len(rejected)} files passed over)")
    return photos


def square(photo: np.ndarray, size: int) -> np.ndarray:
    """The centre square, resized."""
    height, width = photo.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    cut = photo[top : top + short, left : left + short]
    method = cv2.INTER_AREA if short > size else cv2.INTER_CUBIC
    return cut.copy() if short == size else cv2.resize(cut, (size, size), interpolation=method)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
