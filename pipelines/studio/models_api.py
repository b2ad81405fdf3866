"""What the pages about models change and compute: comparisons, promotions, rollbacks and aliases."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from data_prep.masks import MASK_KINDS
from pipelines.evaluation.comparison import PairedDifference
from pipelines.registry import aliases
from pipelines.registry.alias_moves import AliasState
from pipelines.registry.client import registry_client
from pipelines.registry.promotion import PromotionPlan, carry_out, needs_comparison
from pipelines.studio.job_api import find_job
from pipelines.studio.models_pages import MAX_COMPARED_PHOTOGRAPHS, find_model, find_version
from pipelines.studio.registry_snapshot import REGISTRY_LOCK, ModelSummary
from pipelines.studio.score_views import compared_scores, difference_row
from pipelines.studio.security import Writer
from pipelines.studio.sessions import Session
from pipelines.studio.state import Studio, studio_of

MAX_REASON_CHARS = 500
MAX_KEPT_COMPARISONS = 8  # of a session: the pictures of earlier ones are removed
JOBS = "pipelines.studio.comparison_jobs"

router = APIRouter(prefix="/api/models")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Seen(_Body):
    """The alias as the page showed it."""

    version: str | None
    moves: int = Field(ge=0)


class ComparisonRequest(_Body):
    a: str
    b: str
    photographs: str = "bundled"
    masks: list[str] = Field(default=["center"], min_length=1, max_length=4)
    count: int = Field(default=50, ge=1, le=MAX_COMPARED_PHOTOGRAPHS)


class PlanRequest(_Body):
    alias: str


class PromotionRequest(_Body):
    alias: str
    reason: str = Field(default="", max_length=MAX_REASON_CHARS)
    force: bool = False
    job: str | None = None
    """Of the comparison, if one was needed."""
    seen: Seen | None = None


class RollbackRequest(_Body):
    alias: str
    reason: str = Field(default="", max_length=MAX_REASON_CHARS)
    seen: Seen


@router.post("/compare")
def start_comparison(body: ComparisonRequest, request: Request, session: Writer) -> dict[str, Any]:
    """Start the comparison of two versions; returns its job."""
    studio = studio_of(request)
    snapshot = studio.registry.get()
    for version_id in (body.a, body.b):
        if snapshot.find(version_id) is None:
            raise HTTPException(404, f"there is no version {version_id!r}: choose one from the list")
    if body.a == body.b:
        raise HTTPException(400, "A and B are the same version: choose two")
    if body.photographs not in ("bundled", "scored"):
        raise HTTPException(400, "photographs: bundled or scored")
    for kind in body.masks:
        if kind not in MASK_KINDS:
            raise HTTPException(400, f"masks: there is no kind {kind!r}; kinds: {', '.join(MASK_KINDS)}")
    old = sorted(session.folder.glob("comparison-*"), key=lambda folder: folder.stat().st_mtime)
    for folder in old[: len(old) - MAX_KEPT_COMPARISONS + 1]:
        shutil.rmtree(folder, ignore_errors=True)
    arguments = {
        **body.model_dump(),
        "tracking_uri": studio.settings.tracking_uri,
        "folder": str(session.folder / f"comparison-{secrets.token_hex(8)}"),
    }
    return studio.comparisons.submit(session.id, "comparison", f"{JOBS}:compare", arguments).as_json()


@router.get("/comparisons/{job_id}")
def comparison_result(job_id: str, request: Request, session: Writer) -> dict[str, Any]:
    """A finished comparison as a part of the page."""
    studio = studio_of(request)
    job = find_job(studio, session, job_id)
    if job.kind != "comparison" or job.state != "finished":
        raise HTTPException(409, "the comparison has not finished: wait for it, or start it again")
    return {"html": _fragment(studio, "model_compared.html", job=job.id, result=job.result)}


@router.get("/comparisons/{job_id}/{index}.png")
def comparison_picture(job_id: str, index: int, request: Request, session: Writer) -> Response:
    """A picture of a finished comparison."""
    job = find_job(studio_of(request), session, job_id)
    known = {cell["index"] for entry in (job.result or {}).get("pictures", ()) for cell in entry["cells"]}
    if job.kind != "comparison" or index not in known:
        raise HTTPException(404, "there is no such picture")
    path = Path(job.arguments["folder"], f"{index}.png")
    if not path.is_file():
        raise HTTPException(404, "the pictures of earlier comparisons are removed: compare again")
    data = path.read_bytes()
    return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


@router.post("/{name}/{number}/plan")
def plan_promotion(
    name: str, number: str, body: PlanRequest, request: Request, session: Writer
) -> dict[str, Any]:
    """What a promotion would change: the job of the comparison that the registry asks for, or `html`, what to confirm."""
    studio, (model, _) = studio_of(request), find_version(request, name, number)
    state = _state(studio, name, body.alias)
    if state.version == number:
        raise HTTPException(409, f"{name} version {number} is {body.alias} already")
    answer: dict[str, Any] = {"job": None, "seen": {"version": state.version, "moves": len(state.moves)}}
    if needs_comparison(body.alias, state.version, number):
        arguments = {
            "name": name,
            "version": number,
            "alias": body.alias,
            "tracking_uri": studio.settings.tracking_uri,
        }
        job = studio.comparisons.submit(session.id, "promotion", f"{JOBS}:plan", arguments)
        return answer | {"job": job.as_json()}
    scores = _scores(model, state.version, number)
    plan = PromotionPlan(name, number, body.alias, state)
    return answer | {"html": _fragment(studio, plan=plan, row=None, scores=scores), "objection": False}


@router.get("/plans/{job_id}")
def planned_promotion(job_id: str, request: Request, session: Writer) -> dict[str, Any]:
    """What to confirm after the comparison of a promotion."""
    studio = studio_of(request)
    plan = _finished_plan(studio, session, job_id)
    model = find_model(request, plan.name)
    html = _fragment(
        studio,
        plan=plan,
        row=plan.comparison and difference_row(plan.comparison),
        scores=_scores(model, plan.expected.version, plan.version),
    )
    return {"html": html, "objection": bool(plan.objection)}


@router.post("/{name}/{number}/promote")
def promote(
    name: str, number: str, body: PromotionRequest, request: Request, session: Writer
) -> dict[str, Any]:
    """Set the alias as the person confirmed it. 409: the registry objects, or somebody else moved the alias."""
    studio, _ = studio_of(request), find_version(request, name, number)
    if body.job is not None:
        plan = _finished_plan(studio, session, body.job)
        if (plan.name, plan.version, plan.alias) != (name, number, body.alias):
            raise HTTPException(409, "the comparison is of another version or alias: compare again")
    else:
        plan = PromotionPlan(name, number, body.alias, _expected(studio, name, body.alias, body.seen))
        if needs_comparison(body.alias, plan.expected.version, number):
            raise HTTPException(
                409, f"compare it with version {plan.expected.version}, the {body.alias}, first"
            )
    if plan.objection and not body.force:
        raise HTTPException(409, plan.objection)
    try:
        with REGISTRY_LOCK:
            promotion = carry_out(
                plan, force=body.force, reason=_reason(body.reason), tracking_uri=studio.settings.tracking_uri
            )
    finally:
        studio.registry.refresh()
    before = promotion.previous_version
    text = f"{name} version {number} is now {body.alias}"
    return {"text": f"{text}; before: version {before}" if before and before != number else text}


@router.post("/{name}/rollback-plan")
def plan_rollback(name: str, body: PlanRequest, request: Request, session: Writer) -> dict[str, Any]:
    """The version that a rollback returns to, with the comparison on record and the stored scores of both."""
    studio, model = studio_of(request), find_model(request, name)
    state = _state(studio, name, body.alias)
    previous = state.previous_version
    if previous is None:
        raise HTTPException(409, f"{name} has no earlier {body.alias} on record to go back to")
    html = _fragment(
        studio,
        "model_rollback.html",
        name=name,
        alias=body.alias,
        current=state.version,
        previous=previous,
        move=state.moves[-1] if state.moves and state.moves[-1].to == state.version else None,
        row=_recorded_row(state),
        scores=_scores(model, state.version, previous),
    )
    return {"previous": previous, "seen": {"version": state.version, "moves": len(state.moves)}, "html": html}


@router.post("/{name}/rollback")
def rollback(name: str, body: RollbackRequest, request: Request, session: Writer) -> dict[str, Any]:
    """Move the alias back to the version that had it before. 409: it was moved meanwhile."""
    studio, _ = studio_of(request), find_model(request, name)
    expected = _expected(studio, name, body.alias, body.seen)
    try:
        with REGISTRY_LOCK:
            version = aliases.rollback(
                name,
                body.alias,
                reason=_reason(body.reason) or "by hand",
                expected=expected,
                tracking_uri=studio.settings.tracking_uri,
            )
    finally:
        studio.registry.refresh()
    return {"text": f"{name}: {body.alias} is version {version} again"}


def _fragment(studio: Studio, template: str = "model_confirm.html", **context: Any) -> str:
    """A part of a page, escaped by its template."""
    return studio.templates.get_template(template).render(**context)


def _finished_plan(studio: Studio, session: Session, job_id: str) -> PromotionPlan:
    job = find_job(studio, session, job_id)
    if job.kind != "promotion" or job.state != "finished":
        raise HTTPException(409, "the comparison has not finished: wait for it, or start it again")
    return PromotionPlan.from_record(job.result["plan"])


def _state(studio: Studio, name: str, alias: str) -> AliasState:
    """The alias's state in the registry now. RegistryError: an invalid alias, or no such model."""
    with REGISTRY_LOCK, registry_client(studio.settings.tracking_uri) as client:
        return aliases.find_alias_state(client, name, alias)


def _expected(studio: Studio, name: str, alias: str, seen: Seen | None) -> AliasState:
    """The state that the page showed, which the registry compares with the state at the time of the move."""
    state = _state(studio, name, alias)
    return AliasState(seen.version, state.moves[: seen.moves]) if seen else state


def _scores(model: ModelSummary, current: str | None, previous: str) -> list[dict[str, Any]]:
    a, b = model.version(current or ""), model.version(previous)
    return compared_scores(a, b) if a and b else []


def _recorded_row(state: AliasState) -> dict[str, Any] | None:
    """The comparison on record of the move that a rollback takes back; None: it was moved without one."""
    record = state.moves[-1].comparison if state.moves and state.moves[-1].to == state.version else None
    if not record:
        return None
    try:
        return difference_row(PairedDifference.from_record(record))
    except (KeyError, TypeError, ValueError):  # of an earlier release
        return None


def _reason(text: str) -> str:
    """One line without control characters."""
    return re.sub(r"\s+", " ", "".join(c for c in text if c.isprintable() or c.isspace())).strip()
