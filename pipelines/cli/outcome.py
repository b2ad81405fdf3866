"""What a person sees when a run has ended: the table, the versions, where the report is, what to try next."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.scores import Evaluation
from pipelines.evaluation.tables import table_text
from pipelines.provenance import environment

if TYPE_CHECKING:
    from rich.table import Table

    from data_prep.storage import Storage
    from pipelines.durable.steps import Workflow
    from pipelines.recipe import Recipe
    from pipelines.report import Curves
    from pipelines.sweeps.result import SweepResult
    from pipelines.tracking import Tracking

Values = dict[str, dict[str, Any]]


def show_outcome(recipe: Recipe, workflow: Workflow, values: Values, tracking: Tracking) -> None:
    """Print it; write the report unless it is there."""
    storage = workflow.storage
    evaluation = Evaluation.load(storage.sub(values["evaluate"]["evaluation"]).read)
    versions = [value for name, value in values.items() if name.startswith("register-")]
    report = write_report_once(recipe, workflow, values, evaluation)
    print()
    print(table_text(evaluation))
    print()
    for version in versions:
        rank = "champion" if version["champion"] else "candidate"
        print(f"registered models:/{version['name']}/{version['version']} ({rank}: {version['reason']})")
    print(f"report: {report}")
    if versions:
        print("\ntry next:")
        for command in next_commands(recipe, workflow, versions, tracking):
            print(f"  {command}")


def show_sweep(workflow: Workflow, found: dict[str, Any]) -> None:
    """A sweep's settings, best first, as a table; where its report and its best recipe are."""
    from rich.console import Console

    from pipelines.sweeps.result import SweepResult, best_name

    storage = workflow.storage
    result = SweepResult.from_json(storage.read(found["result"]))
    Console(highlight=False).print(sweep_table(result))
    folder = found["result"].rpartition("/")[0]
    report, recipe = (_place(storage, f"{folder}/{name}") for name in ("sweep.html", best_name(result.name)))
    print(f"report: {report}\nbest recipe: {recipe}\n\ntry next:\n  inpaint run {recipe}")


def sweep_table(result: SweepResult, most: int = 12) -> Table:
    """The best settings and the trials that did not finish, no wider than a terminal needs."""
    from rich.table import Table

    from pipelines.sweeps.result import FINISHED

    table = Table(box=None, pad_edge=False)
    for path in result.fields:
        if path != "seed":
            table.add_column(path.rpartition(".")[2], justify="right")
    table.add_column("trials", justify="right")
    for metric in result.metrics:
        table.add_column(metric, justify="right")
    for group in result.ranked[:most]:
        cells = [
            f"{value:.4g}" if isinstance(value, float) else str(value) for value in group.values.values()
        ]
        scores = [_with_spread(group.mean(m), group.spread(m), len(group.trials)) for m in result.metrics]
        table.add_row(*cells, str(len(group.trials)), *scores)
    left = len(result.ranked) - most
    unfinished = [trial for trial in result.trials if trial.state != FINISHED]
    notes = [f"and {left} more settings"] if left > 0 else []
    notes += [f"trial {t.number} {t.state}: {t.reason}" for t in unfinished[:most]]
    table.caption = "\n".join(notes) or None
    return table


def _with_spread(mean: float, spread: float, n: int) -> str:
    if not math.isfinite(mean):
        return "n/a"
    return f"{mean:.3f} ± {spread:.3f}" if n > 1 else f"{mean:.3f}"


def write_report_once(recipe: Recipe, workflow: Workflow, values: Values, evaluation: Evaluation) -> str:
    """The report of exactly these steps, made if it is not there yet; returns where it is."""
    storage, steps = workflow.storage, workflow.plan()
    digest = hashlib.sha256(json.dumps([step.key for step in steps]).encode()).hexdigest()[:8]
    key = f"reports/{recipe.name}-{digest}.html"
    if not storage.exists(key):
        from pipelines.charts import StepBox
        from pipelines.report import ReportData, report_html

        needs = {step.name: tuple(step.needs) for step in workflow.steps}
        data = ReportData(
            title=f"inpaint: {recipe.name}",
            recipe=recipe.to_yaml(),
            evaluation=evaluation,
            curves={
                name: read_curves(storage, value) for name, value in values.items() if "weights" in value
            },
            steps=[StepBox(s.name, needs[s.name], s.seconds, s.state, s.key or "") for s in steps],
            versions=[
                {key: row[key] for key in ("name", "version", "champion", "reason")}
                for name, row in values.items()
                if name.startswith("register-")
            ],
            environment=environment(),
        )
        storage.write(key, report_html(data).encode())
    return _place(storage, key)


def _place(storage: Storage, key: str) -> str:
    path = storage.path(key)
    return f"{storage.uri}/{key}" if path is None else _near(path)


def read_curves(storage: Storage, value: dict[str, Any]) -> Curves:
    """A training's journal, turned from points of all metrics to a line a metric."""
    from pipelines.report import Curves

    journal = json.loads(storage.read(f"{value['weights']}/curves.json"))
    lines: dict[str, list[tuple[float, float]]] = {}
    for step, values in journal["points"]:
        for name, number in values.items():
            lines.setdefault(name, []).append((step, number))
    return Curves(lines, [(start, name) for name, start, _ in journal["phases"]])


def next_commands(
    recipe: Recipe, workflow: Workflow, versions: list[dict[str, Any]], tracking: Tracking
) -> list[str]:
    """Three commands that work when pasted here."""
    from pipelines.tracking import shown

    inpaint = _near(Path(sys.argv[0]).absolute()) if Path(sys.argv[0]).name == "inpaint" else "inpaint"
    best = versions[-1]
    default = Path(recipe.storage).resolve() == Path("runs").resolve() and not os.environ.get(
        "MLFLOW_TRACKING_URI"
    )
    where = "" if default and recipe.tracking is None else f" --tracking {shown(tracking.uri)}"
    commands = [f"{inpaint} models show {best['name']}@champion{where}"]
    example = example_files(workflow)
    if example:
        photo, mask = (_near(path) for path in example)
        commands.append(
            f"{inpaint} fill models:/{best['name']}@champion {photo} {mask} --out filled.png{where}"
        )
    if tracking.uri.startswith("sqlite:"):
        mlflow = str(Path(inpaint).with_name("mlflow")) if "/" in inpaint else "mlflow"
        commands.append(f"{mlflow} ui --backend-store-uri {tracking.uri}")
    return commands


def example_files(workflow: Workflow) -> tuple[Path, Path] | None:
    """A photograph and a mask to try `fill` on, beside a folder storage."""
    import cv2
    import numpy as np

    from data_prep.sources import decode_photo, open_source

    folder = workflow.storage.path("example")
    if folder is None:
        return None
    photo, mask = folder / "photo.png", folder / "mask.png"
    if not (photo.is_file() and mask.is_file()):
        source = open_source("bundled", tile=256)
        picture = decode_photo(source.read(source.names()[0]))[..., ::-1]
        hole = np.zeros(picture.shape[:2], np.uint8)
        hole[104:152, 112:160] = 255
        for path, pixels in ((photo, picture), (mask, hole)):
            workflow.storage.write(f"example/{path.name}", cv2.imencode(".png", pixels)[1].tobytes())
    return photo, mask


def _near(path: Path) -> str:
    """As a person would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
