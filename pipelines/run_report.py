"""The report of a run: one self-contained HTML page without scripts and external resources."""

from __future__ import annotations

import base64
import math
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

from pipelines.durations import format_duration
from pipelines.evaluation.metrics import (
    EDGE_COLUMNS,
    FEATURE_COLUMNS,
    METRIC_COLUMNS,
    METRIC_DEFINITIONS,
    OPTIONAL_DEFINITIONS,
    SET_DEFINITIONS,
)
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.tables import band_tables, edge_tables, feature_tables, main_tables
from pipelines.plots.images import Grid, encode_png
from pipelines.plots.svg import Points, StepNode, curve_svg, graph_svg


@dataclass(frozen=True)
class TrainingCurves:
    """The training curves of one model."""

    metrics: Mapping[str, Points]
    """Metric -> [(step, value)]."""
    phases: Sequence[tuple[float, str]] = ()
    """(first step, name) of each phase."""
    url: str = ""
    """Page of the training run in MLflow, or ''."""
    warnings: Sequence[str] = ()
    """What the curves say that needs attention."""


@dataclass(frozen=True)
class CurveGroup:
    """The charts of one kind of metric."""

    title: str
    charts: Sequence[tuple[str, str, Markup]]
    """(metric, last value, SVG)"""


@dataclass(frozen=True)
class ReportData:
    """The contents of a report. Empty fields have no section."""

    title: str
    summary: Sequence[str] = ()
    """Sentences that say what came out, most important first."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """The head's rows: date, recipe, source... A value may be a `link`."""
    evaluation: EvaluationResult | None = None
    grids: Sequence[Grid] = ()
    """Sample grids besides the evaluation's."""
    curves: Mapping[str, TrainingCurves] = field(default_factory=dict)
    steps: Sequence[StepNode] = ()
    versions: Sequence[Mapping[str, Any]] = ()
    """Rows with `name`, `version` and further columns (aliases, run, score...). A value may be a `link`."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Packages and machine of the run."""
    recipe: str = ""
    """YAML."""
    photographs: Mapping[str, Any] = field(default_factory=dict)
    """The source and its counts: splits, rejected and left-out files."""


def link(text: str, url: str) -> str:
    """A value of the report with a link; plain text if there is no URL."""
    return Markup('<a href="{}">{}</a>').format(url, text) if url else text


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page atomically; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False
    ) as file:
        file.write(report_html(data))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def report_html(data: ReportData) -> str:
    """The page as text. Images are data URIs; all values are escaped."""
    evaluation = data.evaluation
    grids = [*(evaluation.sample_grids() if evaluation else ()), *data.grids]
    return _template().render(
        data=data,
        tables=main_tables(evaluation) if evaluation else [],
        feature_tables=feature_tables(evaluation) if evaluation else [],
        edge_tables=edge_tables(evaluation) if evaluation else [],
        band_tables=band_tables(evaluation) if evaluation else [],
        definitions=_definitions(evaluation) if evaluation else {},
        protocol=_flatten(evaluation.protocol.to_dict()) if evaluation else {},
        distances=_distance_rows(evaluation) if evaluation else [],
        grids=[_grid_context(grid) for grid in grids],
        curves={name: (curves.url, *curve_groups(curves)) for name, curves in data.curves.items()},
        graph=graph_svg(data.steps),
        total=format_duration(sum(step.seconds or 0.0 for step in data.steps)),
        version_columns=list(dict.fromkeys(key for row in data.versions for key in row)),
        environment=_flatten(data.environment),
        photographs=_flatten(data.photographs),
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
    """Allow line breaks after underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _grid_context(grid: Grid) -> dict[str, Any]:
    rows = [
        [
            None if cell is None else {"uri": _data_uri(cell), "drawing": grid.is_drawing(column)}
            for column, cell in enumerate(row)
        ]
        for row in grid.rows
    ]
    return {"title": grid.title, "note": grid.note, "columns": grid.columns, "rows": rows}


def _data_uri(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


CURVE_GROUPS = (  # title, beginnings of the metrics' names; the first group also takes those that no other does
    ("Losses", ("loss/",)),
    ("Validation", ("val/", "psnr")),
    ("Speed", ("seconds_per_step", "data_wait", "seconds_to_start", "workers")),
    ("Data", ("data/",)),
)
CHECKSUMS = ("data/samples_sum",)  # curves that say nothing to the eye


def curve_groups(curves: TrainingCurves) -> tuple[list[CurveGroup], list[str]]:
    """The charts in the order losses, validation, speed, data; and what is not drawn, as `workers 2`.

    A line needs two points, and one that is 0 throughout says no more than a word. A group without charts is left out.
    """
    members: dict[str, list[str]] = {title: [] for title, _ in CURVE_GROUPS}
    for name in sorted(curves.metrics):
        titles = [title for title, prefixes in CURVE_GROUPS if name.startswith(prefixes)]
        if name not in CHECKSUMS:
            members[titles[0] if titles else CURVE_GROUPS[0][0]].append(name)
    groups, not_drawn = [], []
    for title, names in members.items():
        charts = []
        for name in names:
            points = [(step, value) for step, value in curves.metrics[name] if math.isfinite(value)]
            if len(points) == 1 or (points and not any(value for _, value in points)):
                not_drawn.append(f"{name} {points[-1][1]:.4g}")
            elif points:
                charts.append((name, f"{points[-1][1]:.4g}", curve_svg(name, points, curves.phases)))
        if charts:
            groups.append(CurveGroup(title, charts))
    return groups, not_drawn


def _definitions(evaluation: EvaluationResult) -> dict[str, str]:
    """Heading -> definition, of the columns that the tables have."""
    definitions = METRIC_DEFINITIONS | OPTIONAL_DEFINITIONS | SET_DEFINITIONS
    tables = [*feature_tables(evaluation), *edge_tables(evaluation)]
    shown = {heading for table in tables for heading in table.headings}
    columns = [*METRIC_COLUMNS, *(c for c in (*FEATURE_COLUMNS, *EDGE_COLUMNS) if c[0] in shown)]
    return {heading: definitions[metric] for heading, metric, _ in columns}


def _distance_rows(evaluation: EvaluationResult) -> list[dict[str, Any]]:
    """One row per method: its Frechet and kernel distances, and the kernel distance's standard deviation over subsets."""
    return [
        {"masks": masks, "method": method, **entry}
        for masks, methods in evaluation.distances.items()
        for method, entry in methods.items()
        if "fd" in entry
    ]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names; without `metrics`, whose definitions are elsewhere on the page."""
    flat = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if name == "metrics":
            continue
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{name}."))
        elif isinstance(value, (list, tuple)):
            flat[name] = ", ".join(map(str, value)) or "none"
        else:
            flat[name] = "none" if value is None else str(value)
    return flat
