"""Summary printed at the end of a run: scores, registered versions, path of the report, suggested commands."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.manifest import count_text, load_manifest
from data_prep.uris import path_from_sqlite_url, quote_for_shell
from pipelines.cli.reporting import display_path, relative_path, store_sweep_report, write_run_report
from pipelines.contracts import EvaluateOutputs, RegisterOutputs, ShardOutputs, StepKind, SweepOutputs
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.tables import table_text

if TYPE_CHECKING:
    from rich.table import Table

    from data_prep.left_out import LeftOutEntry
    from pipelines.durable.workflow import RunResults, Workflow
    from pipelines.recipe import Recipe
    from pipelines.sweeps.results import SweepResult
    from pipelines.tracking_address import Tracking


def print_summary(recipe: Recipe, workflow: Workflow, results: RunResults, tracking: Tracking) -> None:
    """Print photographs, scores, versions, report and suggested commands; write the report if it does not exist."""
    (evaluated,) = results.of_kind(StepKind.EVALUATE, EvaluateOutputs).values()
    evaluation = EvaluationResult.load(workflow.storage.subfolder(evaluated.folder).read)
    versions = list(results.of_kind(StepKind.REGISTER, RegisterOutputs).values())
    report = write_run_report(recipe, workflow, results, evaluation, tracking)
    print()
    print_photographs(workflow, results)
    print()
    print(table_text(evaluation))
    print()
    for sentence in report.sentences:
        print(sentence)
    for version in versions:
        rank = "champion" if version.champion else "candidate"
        print(f"registered models:/{version.name}/{version.version} ({rank}: {version.reason})")
    print(f"report: {display_path(workflow.storage, report.key)}")
    if versions:
        print("\ntry next:")
        for command in suggested_commands(recipe, workflow, versions[-1].name, tracking):
            print(f"  {command}")


def print_photographs(workflow: Workflow, results: RunResults) -> None:
    """Print how many photographs the splits have, and how many files were not used."""
    (shards,) = results.of_kind(StepKind.SHARD, ShardOutputs).values()
    print(f"photographs: {count_text(load_manifest(workflow.storage.subfolder(shards.folder)))}")


def print_sweep_summary(workflow: Workflow, outputs: SweepOutputs) -> None:
    """Print a table of a sweep's settings, best first, and the paths of its report and its best recipe."""
    from rich.console import Console

    from pipelines.sweeps.results import SweepResult

    storage = workflow.storage
    result = SweepResult.from_json(storage.read(outputs.result))
    Console(highlight=False).print(sweep_table(result))
    stored = store_sweep_report(workflow, outputs)
    report, recipe = (display_path(storage, key) for key in (stored.key, outputs.best_recipe))
    for sentence in stored.sentences:
        print(sentence)
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


def print_left_out(left_out: Mapping[str, LeftOutEntry]) -> None:
    from data_prep.left_out import left_out_lines

    for line in left_out_lines(left_out):
        print(f"  left out of the source: {line}", flush=True)


def suggested_commands(recipe: Recipe, workflow: Workflow, name: str, tracking: Tracking) -> list[str]:
    """Three or four commands that can be pasted in this shell; `name`: a registered model."""
    program = Path(sys.argv[0])
    inpaint = shlex.quote(relative_path(program.absolute())) if program.name == "inpaint" else "inpaint"
    folder = workflow.storage.local_path()
    is_default_folder = folder is not None and folder.resolve() == Path("runs").resolve()
    is_default_tracking = (
        is_default_folder and recipe.tracking_uri is None and not os.environ.get("MLFLOW_TRACKING_URI")
    )
    tracking_option = "" if is_default_tracking else f" --tracking-uri {quote_for_shell(tracking.uri)}"
    storage_option = "" if is_default_folder else f" --storage {quote_for_shell(workflow.storage.uri)}"
    commands = [
        f"{inpaint} studio --open{storage_option}{tracking_option}",
        f"{inpaint} models show {name}@champion{tracking_option}",
    ]
    example = write_example_files(workflow)
    if example:
        photo, mask = (shlex.quote(relative_path(path)) for path in example)
        commands.append(
            f"{inpaint} fill models:/{name}@champion {photo} {mask} --out filled.png{tracking_option}"
        )
    if path_from_sqlite_url(tracking.uri):
        is_in_venv = program.name == "inpaint" and "/" in inpaint
        mlflow = (
            shlex.quote(relative_path(program.absolute().with_name("mlflow"))) if is_in_venv else "mlflow"
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
