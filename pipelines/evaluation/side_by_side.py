"""`inpaint models compare`: two models on the same photographs and masks, as a table with intervals and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines.evaluation.comparing import METHOD, Difference, differences
from pipelines.evaluation.completers import LoadedCompleter
from pipelines.evaluation.evaluate import Completer, EvaluationSpec
from pipelines.evaluation.figures import encode_png, sample_grid
from pipelines.evaluation.scores import Evaluation, masks_title
from pipelines.evaluation.scoring import read_photographs, score, usual_size
from pipelines.evaluation.tables import COLUMNS
from pipelines.filling.loading import load_model
from pipelines.registry.versions import connected, find_version, version_uri
from pipelines.training.weights import DESCRIPTION


def compare_models(
    a: str,
    b: str,
    *,
    images: str,
    masks: Sequence[str],
    count: int = 100,
    seed: int = 0,
    size: int | None = None,
    samples: int = 6,
    out: Path | None = None,
    tracking_uri: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score two models, versions or checkpoint folders, on the same photographs and masks.

    Keys: a, b (what they are), photographs, size, protocol, differences (every metric, kind of masks and band), distances,
    picture (where `out` is), text (for a terminal). ValueError in one line: no such model, both the same, no photographs,
    a hole that one of them cannot complete.
    """
    labels = [_label(given, tracking_uri) for given in (a, b)]
    if len(set(labels)) < 2:
        raise ValueError(f"{a} and {b} are the same, {labels[0]}: there is nothing to compare")
    one, other = labels
    loaded = {
        label: load_model(label if _is_folder(label) else version_uri(label), tracking_uri=tracking_uri)
        for label in labels
    }
    size = size or usual_size(loaded.values())
    photos = read_photographs(images, size, count)
    methods: dict[str, Completer] = {label: LoadedCompleter(model) for label, model in loaded.items()}
    found = score(methods, photos, EvaluationSpec(tuple(masks), seed, samples=samples), quiet)
    rows = differences(found, one, other)
    if out:
        grids = found.grids()
        together = replace(grids[0], rows=tuple(row for grid in grids for row in grid.rows))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode_png(sample_grid(together)))
    text = comparison_text(found, rows, one, other)
    return {
        "a": one,
        "b": other,
        "photographs": len(photos),
        "size": size,
        "protocol": found.protocol,
        "differences": [asdict(row) | {"verdict": row.verdict} for row in rows],
        "distances": found.distances,
        "picture": str(out) if out else None,
        "text": f"{text}\nside by side: {out}" if out else text,
    }


def _is_folder(text: str) -> bool:
    return Path(text, DESCRIPTION).is_file()


def _label(text: str, tracking_uri: str | None) -> str:
    """A checkpoint folder as it is, a version as NAME/VERSION."""
    if _is_folder(text):
        return text
    with connected(tracking_uri) as client:
        version = find_version(client, version_uri(text))
        return f"{version.name}/{version.version}"


def comparison_text(evaluation: Evaluation, rows: Sequence[Difference], a: str, b: str) -> str:
    """The table for a terminal of 100 columns: the metrics of the main table in every band, and the distances."""
    lines = [f"A: {a}", f"B: {b}", METHOD]
    for masks in evaluation.bands:
        of_masks = [row for row in rows if row.masks == masks]
        heading = f"{'hole %':<8}{'n':>5}  {'':<10}{'A':>9}{'B':>9}{'B - A':>10}  {'interval':<22}B is"
        lines += ["", f"{masks_title(masks)}, {len(evaluation.photos)} photographs", heading]
        last = ""
        for row, name, digits in _main(of_masks):
            lead = " " * 13 if row.band == last else f"{row.band:<8}{row.n:>5}"
            figures = f"{row.a:>9.{digits}f}{row.b:>9.{digits}f}{row.difference:>+10.{digits}f}"
            lines.append(f"{lead}  {name:<10}{figures}  {row.interval:<22}{row.verdict}")
            last = row.band
        if left_out := max((row.left_out for row in of_masks), default=0):
            lines.append(f"{left_out} photographs with an exact result, whose PSNR is infinite, are left out")
        apart = [evaluation.distances.get(masks, {}).get(method, {}) for method in (a, b)]
        if all("fd" in entry for entry in apart):
            one, other = (f"{entry['fd']:.2f}" for entry in apart)
            lines.append(
                f"Frechet distance on {apart[0]['name']}: A {one}, B {other} (of the whole set: no pairs)"
            )
        elif reason := next((entry["reason"] for entry in apart if "reason" in entry), ""):
            lines.append(f"no Frechet distance: {reason}")
    return "\n".join(line.rstrip() for line in lines)


def _main(rows: Sequence[Difference]) -> list[tuple[Difference, str, int]]:
    """The rows of the main table's metrics by band, with heading and decimals; there is no better total variation."""
    places = {metric: place for place, (_, metric, _) in enumerate(COLUMNS) if not metric.startswith("tv")}
    bands = list(dict.fromkeys(row.band for row in rows))
    kept = [row for row in rows if row.metric in places]
    kept.sort(key=lambda row: (bands.index(row.band), places[row.metric]))
    return [(row, COLUMNS[places[row.metric]][0], COLUMNS[places[row.metric]][2]) for row in kept]
