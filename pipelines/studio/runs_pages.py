"""The pages of runs and sweeps, their reports, and the ids by which open pages see that something changed."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, Response

from data_prep.storage import MissingKey, open_storage
from data_prep.uris import redact_uri
from pipelines.durations import format_duration
from pipelines.plots.svg import StepNode, graph_svg
from pipelines.report_files import REPORTS_FOLDER
from pipelines.studio.cached import Cached, NotLoaded
from pipelines.studio.run_views import STATES, RunsSnapshot, RunView, StepView
from pipelines.studio.runs_snapshot import storage_option
from pipelines.studio.state import Studio, render, studio_of
from pipelines.tracking.pages import version_page

router = APIRouter()
REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
)
"""Content-Security-Policy of reports: they are shown as stored, and contain texts and pictures but no scripts."""
WAIT_SECONDS = 1.0  # that an answer about changes waits for a refresh, so that it is about the present
CHIPS = {
    "running": "accent",
    "waiting": "accent",
    "finished": "good",
    "failed": "bad",
    "interrupted": "warn",
    "unreadable": "bad",
    "stopped": "warn",
}
"""State of a run, step or trial -> class of its chip."""
STEP_CHIPS = CHIPS | {"waiting": ""}


@router.get("/runs")
def runs_page(request: Request) -> HTMLResponse:
    """All runs and sweeps of the storage."""
    studio = studio_of(request)
    snapshot = studio.runs.get()
    return render(
        request,
        "runs.html",
        section="runs",
        snapshot=snapshot,
        states=[state for state in STATES if any(run.state == state for run in snapshot.runs)],
        problem=studio.runs.error,
        **_helpers(studio),
    )


@router.get("/runs/{name}")
def run_page(request: Request, name: str) -> HTMLResponse:
    """One run or sweep: state, steps, trials, what came out, and how to repeat it."""
    studio = studio_of(request)
    run = _find(studio, name)
    return render(
        request,
        "run.html",
        section="runs",
        run=run,
        graph=graph_svg([_node(step) for step in run.steps]),
        trial_fields=sorted({path for trial in run.trials for path in trial.record.values}),
        problem=studio.runs.error,
        mlflow={
            version: version_page(studio.settings.tracking_uri, version.name, version.version)
            for version in run.versions
        },
        **_helpers(studio),
    )


@router.get("/runs/{name}/recipe.yaml")
def recipe_file(request: Request, name: str) -> Response:
    """The run's recipe with its overrides, as a file to download."""
    run = _find(studio_of(request), name)
    if not run.recipe:
        raise HTTPException(
            404, f"the recipe of {run.name} was not recorded: its run was started by an earlier release"
        )
    headers = {"Content-Disposition": 'attachment; filename="recipe.yaml"'}
    return Response(run.recipe, media_type="application/yaml", headers=headers)


@router.get("/runs/{name}/report/{file}")
def report_page(request: Request, name: str, file: str) -> Response:
    """A report as it is stored. `file` is looked up among the run's reports."""
    studio = studio_of(request)
    run = _find(studio, name)
    if file not in {report.file for report in run.reports}:
        raise HTTPException(404, f"{run.name} has no such report: its page lists those that there are")
    try:
        page = open_storage(studio.settings.storage_uri).read(f"{REPORTS_FOLDER}/{file}")
    except MissingKey:
        raise HTTPException(404, f"this report of {run.name} is no longer in the storage") from None
    return Response(
        page, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": REPORT_POLICY}
    )


@router.get("/api/snapshot")
def snapshot(
    request: Request, section: Annotated[Literal["try", "models", "runs"], Query()]
) -> dict[str, str]:
    """An id that changes when the section's pages would. Old values are read again, which this waits for shortly."""
    studio = studio_of(request)
    return {"snapshot": _current_id(studio.runs if section == "runs" else studio.registry)}


def _current_id(cached: Cached[Any]) -> str:
    with suppress(NotLoaded):  # the page says why; the id changes once it is loaded
        cached.get(WAIT_SECONDS)
    return cached.id


def _find(studio: Studio, name: str) -> RunView:
    snapshot: RunsSnapshot = studio.runs.get()
    run = snapshot.by_name.get(name)
    if run is None:
        raise HTTPException(
            404, f"the storage has no run {name[:100]!r}: the page Runs lists those that there are"
        )
    return run


def _helpers(studio: Studio) -> dict[str, Any]:
    return {
        "chips": CHIPS,
        "step_chips": STEP_CHIPS,
        "duration": format_duration,
        "storage_address": redact_uri(studio.settings.storage_uri),
        "demo_command": f"inpaint run demo{storage_option(studio.settings.storage_uri)}",
        "short_field": lambda path: path.rpartition(".")[2],
        "number": _number,
        "score": lambda value: "" if value is None else f"{value:#.4g}",
    }


def _node(step: StepView) -> StepNode:
    state, seconds = step.state, step.seconds
    if step.progress and step.progress.total:
        state += f" {100 * step.fraction:.0f} %"
    return StepNode(step.name, step.needs, seconds, state, step.key, step.kind, step.subject)


def _number(value: object) -> str:
    """A swept value or a score as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
