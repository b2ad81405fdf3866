"""The report of a run: one self-contained HTML page that needs no network and no script."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from pipelines.charts import Points, StepBox, curve_svg, duration, graph_svg
from pipelines.evaluation.figures import Grid, encode_png
from pipelines.evaluation.metrics import DEFINITIONS
from pipelines.evaluation.scores import Evaluation
from pipelines.evaluation.tables import COLUMNS, band_tables, tables


@dataclass(frozen=True)
class Curves:
    """The training curves of one model: metric -> [(step, value)], and (first step, name) of each phase."""

    metrics: Mapping[str, Points]
    phases: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class ReportData:
    """What a report shows; whatever is empty has no section.

    grids: more sample grids than the evaluation's own. versions: rows with `name`, `version` and whatever else is
    known (aliases, run, score...). environment: what it ran on. recipe: the YAML text.
    """

    title: str
    summary: Sequence[str] = ()
    evaluation: Evaluation | None = None
    grids: Sequence[Grid] = ()
    curves: Mapping[str, Curves] = field(default_factory=dict)
    steps: Sequence[StepBox] = ()
    versions: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page, whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False
    ) as file:
        file.write(report_html(data))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def report_html(data: ReportData) -> str:
    """The page as text: pictures are data URIs, and everything that comes from outside is escaped."""
    evaluation = data.evaluation
    grids = [*(evaluation.grids() if evaluation else ()), *data.grids]
    return _template().render(
        data=data,
        tables=tables(evaluation) if evaluation else [],
        band_tables=band_tables(evaluation) if evaluation else [],
        definitions=_definitions() if evaluation else {},
        protocol=_flat(evaluation.protocol) if evaluation else {},
        distances=_distances(evaluation) if evaluation else [],
        grids=[_grid(grid) for grid in grids],
        curves={name: _curves(curves) for name, curves in data.curves.items()},
        graph=graph_svg(data.steps),
        total=duration(sum(step.seconds or 0.0 for step in data.steps)),
        version_columns=list(dict.fromkeys(key for row in data.versions for key in row)),
        environment=_flat(data.environment),
    )


@cache
def _template() -> Template:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html")


def _breakable(name: str) -> Markup:
    """Long names may break after an underscore."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _grid(grid: Grid) -> dict[str, Any]:
    rows = [
        [
            None if cell is None else {"uri": _uri(cell), "drawing": grid.is_drawing(j)}
            for j, cell in enumerate(row)
        ]
        for row in grid.rows
    ]
    return {"title": grid.title, "note": grid.note, "columns": grid.columns, "rows": rows}


def _uri(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def _curves(curves: Curves) -> list[tuple[str, str, Any]]:
    """(name, last value, chart), scores of held-out photographs first, then losses by name."""
    found = []
    for name in sorted(curves.metrics, key=lambda name: (not name.startswith(("val", "psnr")), name)):
        chart = curve_svg(name, curves.metrics[name], curves.phases)
        if chart:
            found.append((name, f"{curves.metrics[name][-1][1]:.4g}", chart))
    return found


def _definitions() -> dict[str, str]:
    return {heading: DEFINITIONS[metric] for heading, metric, *_ in COLUMNS}


def _distances(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A line a method with its Frechet and kernel distances, and the kernel distance's spread over subsets."""
    return [
        {"masks": masks, "method": method, **entry}
        for masks, methods in evaluation.distances.items()
        for method, entry in methods.items()
        if "fd" in entry
    ]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names; the metrics' definitions stand elsewhere on the page."""
    found = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if name == "metrics":
            continue
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{name}."))
        elif isinstance(value, (list, tuple)):
            found[name] = ", ".join(map(str, value)) or "none"
        else:
            found[name] = "none" if value is None else str(value)
    return found
