"""Routes of jobs: their progress, and to cancel them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request

from pipelines.studio.jobs import Job
from pipelines.studio.security import Writer
from pipelines.studio.sessions import Session
from pipelines.studio.state import Studio, studio_of

router = APIRouter()


def find_job(studio: Studio, session: Session, job_id: str) -> Job:
    """The session's job of either runner, or 404."""
    for runner in (studio.fills, studio.comparisons):
        if job := runner.get(session.id, job_id):
            return job
    raise HTTPException(404, "there is no such job: the studio was restarted, or it was long ago")


@router.get("/api/jobs/{job_id}")
def get_job(job_id: str, request: Request, session: Writer) -> dict[str, Any]:
    return find_job(studio_of(request), session, job_id).as_json()


@router.post("/api/jobs/{job_id}/cancel")
def cancel_job(job_id: str, request: Request, session: Writer) -> dict[str, Any]:
    studio = studio_of(request)
    for runner in (studio.fills, studio.comparisons):
        if job := runner.cancel(session.id, job_id):
            return job.as_json()
    return find_job(studio, session, job_id).as_json()
