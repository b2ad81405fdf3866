"""Summary printed at the end of a run: scores, registered versions, path of the report, suggested commands."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.uris import path_from_sqlite_url, quote_for_shell
from pipelines.contracts import (
    EvaluateOutputs,
    RegisterOutputs,
    ShardOutputs,
    StepKind,
    SweepOutputs,
    TrainOutputs,
)
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.tables import table_text
from pipelines.provenance import describe_environment

if TYPE_CHECKING:
    from rich.table import Table

    from data_prep.left_out import LeftOutEntry
    from data_prep.manifest import Manifest
    from data_prep.storage import Storage
    from pipelines.durable.workflow import RunResults, Workflow
    from pipelines.recipe import Recipe
    from pipelines.run_report import TrainingCurves
    from pipelines.sweeps.results import SweepResult
    from pipelines.tracking_address import Tracking


def print_summary(recipe: Recipe, workflow: Workflow, results: RunResults, tracking: Tracking) -> None:
    """Print scores, versions, report and suggested commands; write the report if it does not exist."""
    (evaluated,) = results.of_kind(StepKind.EVALUATE, EvaluateOutputs).values()
    evaluation = EvaluationResult.load(workflow.storage.subfolder(evaluated.folder).read)
    versions = list(results.of_kind(StepKind.REGISTER, RegisterOutputs).values())
    report = write_report_once(recipe, workflow, results, evaluation)
    print()
    print(table_text(evaluation))
    print()
    for version in versions:
        rank = "champion" if version.champion else "candidate"
        print(f"registered models:/{version.name}/{version.version} ({rank}: {version.reason})")
    print(f"report: {report}")
    if versions:
        print("\ntry next:")
        for command in suggested_commands(recipe, workflow, versions[-1].name, tracking):
            print(f"  {command}")


def print_sweep_summary(workflow: Workflow, outputs: SweepOutputs) -> None:
    """Print a table of a sweep's settings, best first, and the paths of its report and its best recipe."""
    from rich.console import Console

    from pipelines.sweeps.results import SweepResult

    storage = workflow.storage
    result = SweepResult.from_json(storage.read(outputs.result))
    Console(highlight=False).print(sweep_table(result))
    report, recipe = (_display_path(storage, key) for key in (outputs.report, outputs.best_recipe))
    print(f"report: {report}\nbest recipe: {recipe}\n\ntry next:\n  inpaint run {shlex.quote(recipe)}")


def sweep_table(result: SweepResult, max_rows: int = 12) -> Table:
    """A table of the best settings; its caption lists the trials that did not finish."""
    from rich.table import Table

    from pipelines.sweeps.results import FINISHED

    table = Table(box=None, pad_edge=False)
    for path in result.fields:
        if path != "seed":
            table.add_column(path.rpartition(".")[2], justify="right")
    table.add_column("trials", justify="right")
    for metric in result.metrics:
        table.add_column(metric, justify="right")
    for group in result.ranked_groups[:max_rows]:
        cells = [
            f"{value:.4g}" if isinstance(value, float) else str(value) for value in group.values.values()
        ]
        scores = [_format_score(group.mean(m), group.std(m), len(group.trials)) for m in result.metrics]
        table.add_row(*cells, str(len(group.trials)), *scores)
    hidden = len(result.ranked_groups) - max_rows
    unfinished = [trial for trial in result.trials if trial.state != FINISHED]
    notes = [f"and {hidden} more settings"] if hidden > 0 else []
    notes += [f"trial {t.number} {t.state}: {t.reason}" for t in unfinished[:max_rows]]
    table.caption = "\n".join(notes) or None
    return table


def _format_score(mean: float, std: float, n: int) -> str:
    if not math.isfinite(mean):
        return "n/a"
    return f"{mean:.3f} ± {std:.3f}" if n > 1 else f"{mean:.3f}"


def write_report_once(
    recipe: Recipe, workflow: Workflow, results: RunResults, evaluation: EvaluationResult
) -> str:
    """Write the report for the keys of these steps if it does not exist; return its path or URL."""
    storage, steps = workflow.storage, workflow.plan()
    digest = hashlib.sha256(json.dumps([step.key for step in steps]).encode()).hexdigest()[:8]
    key = f"reports/{recipe.name}-{digest}.html"
    if not storage.exists(key):
        from data_prep.manifest import load_manifest
        from pipelines.plots.svg import StepNode
        from pipelines.run_report import ReportData, report_html

        needs = {step.id: tuple(id.name for id in step.needs) for step in workflow.steps}
        trained = results.of_kind(StepKind.TRAIN, TrainOutputs)
        versions = results.of_kind(StepKind.REGISTER, RegisterOutputs).values()
        (shards,) = results.of_kind(StepKind.SHARD, ShardOutputs).values()
        data = ReportData(
            title=f"inpaint: {recipe.name}",
            recipe=recipe.to_yaml(),
            evaluation=evaluation,
            curves={
                f"{StepKind.TRAIN}-{key}": load_curves(storage, outputs) for key, outputs in trained.items()
            },
            steps=[
                StepNode(s.name, needs[s.id], s.seconds, s.state, s.key or "", s.id.kind, s.id.subject)
                for s in steps
            ],
            versions=[
                {"name": v.name, "version": v.version, "champion": v.champion, "reason": v.reason}
                for v in versions
            ],
            environment=describe_environment(),
            photographs=describe_photographs(load_manifest(storage.subfolder(shards.folder))),
        )
        storage.write(key, report_html(data).encode())
    return _display_path(storage, key)


def describe_photographs(manifest: Manifest, max_listed: int = 10) -> dict[str, str]:
    """Report rows about a source: photographs per split, and the names of rejects, duplicates and left-out files."""
    from data_prep.left_out import left_out_lines, printable

    def list_entries(entries: Sequence[str]) -> str:
        hidden = f"; and {len(entries) - max_listed} more" if len(entries) > max_listed else ""
        names = "; ".join(entries[:max_listed])
        return f"{len(entries)}{f' ({names}{hidden})' if entries else ''}"

    facts = {
        "source": manifest.source,
        "photographs": ", ".join(f"{count} {split}" for split, count in manifest.splits.items()),
        "rejects": list_entries([f"{reject.name}: {reject.reason}" for reject in manifest.rejects]),
        "duplicates": list_entries(
            [f"{duplicate.name}: {duplicate.duplicate_of}" for duplicate in manifest.duplicates]
        ),
    }
    if manifest.left_out is not None:
        facts["left out"] = "; ".join(left_out_lines(manifest.left_out, max_listed)) or "0"
    return {name: printable(text) for name, text in facts.items()}


def print_left_out(left_out: Mapping[str, LeftOutEntry]) -> None:
    from data_prep.left_out import left_out_lines

    for line in left_out_lines(left_out):
        print(f"  left out of the source: {line}", flush=True)


def _display_path(storage: Storage, key: str) -> str:
    path = storage.local_path(key)
    return f"{storage.uri}/{key}" if path is None else _relative_path(path)


def load_curves(storage: Storage, trained: TrainOutputs) -> TrainingCurves:
    """The stored curves of a training run, one line per metric."""
    from pipelines.run_report import TrainingCurves
    from pipelines.training.curves import read_curves

    curves = read_curves(storage, trained.weights)
    lines: dict[str, list[tuple[float, float]]] = {}
    for step, values in curves.points:
        for name, number in values.items():
            lines.setdefault(name, []).append((step, number))
    return TrainingCurves(lines, [(start, name) for name, start, _ in curves.phases])


def suggested_commands(recipe: Recipe, workflow: Workflow, name: str, tracking: Tracking) -> list[str]:
    """Two or three commands that can be pasted in this shell; `name`: a registered model."""
    program = Path(sys.argv[0])
    inpaint = shlex.quote(_relative_path(program.absolute())) if program.name == "inpaint" else "inpaint"
    folder = workflow.storage.local_path()
    is_default_folder = folder is not None and folder.resolve() == Path("runs").resolve()
    is_default_tracking = (
        is_default_folder and recipe.tracking_uri is None and not os.environ.get("MLFLOW_TRACKING_URI")
    )
    tracking_option = "" if is_default_tracking else f" --tracking-uri {quote_for_shell(tracking.uri)}"
    commands = [f"{inpaint} models show {name}@champion{tracking_option}"]
    example = write_example_files(workflow)
    if example:
        photo, mask = (shlex.quote(_relative_path(path)) for path in example)
        commands.append(
            f"{inpaint} fill models:/{name}@champion {photo} {mask} --out filled.png{tracking_option}"
        )
    if path_from_sqlite_url(tracking.uri):
        is_in_venv = program.name == "inpaint" and "/" in inpaint
        mlflow = (
            shlex.quote(_relative_path(program.absolute().with_name("mlflow"))) if is_in_venv else "mlflow"
        )
        commands.append(f"{mlflow} ui --backend-store-uri {quote_for_shell(tracking.uri)}")
    return commands


def write_example_files(workflow: Workflow) -> tuple[Path, Path] | None:
    """Write an example photograph and mask for `fill` into a folder storage; None for a bucket."""
    import cv2
    import numpy as np

    from data_prep.images import decode_photo
    from data_prep.sources import open_source

    folder = workflow.storage.local_path("example")
    if folder is None:
        return None
    photo, mask = folder / "photo.png", folder / "mask.png"
    if not (photo.is_file() and mask.is_file()):
        source = open_source("bundled", tile_size=256)
        photo_pixels = decode_photo(source.read(source.names()[0]))[..., ::-1]
        hole = np.zeros(photo_pixels.shape[:2], np.uint8)
        hole[104:152, 112:160] = 255
        for path, pixels in ((photo, photo_pixels), (mask, hole)):
            workflow.storage.write(f"example/{path.name}", cv2.imencode(".png", pixels)[1].tobytes())
    return photo, mask


def _relative_path(path: Path) -> str:
    """The path relative to the working directory if it is below it, as a command-line argument."""
    try:
        relative = str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
    return f"./{relative}" if relative.startswith("-") else relative  # else it would be parsed as an option
