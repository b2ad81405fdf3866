"""The page on which a browser without the link enters the studio's token."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import JSONResponse, Response

from pipelines.studio.security import read_json, set_session_cookie
from pipelines.studio.state import render, studio_of

router = APIRouter()


@router.get("/token")
def token_page(request: Request) -> Response:
    wrong = bool(request.scope["state"].get("wrong_token"))
    return render(request, "token.html", section="", status=403 if wrong else 200, wrong=wrong)


@router.post("/token")
async def enter_token(request: Request) -> Response:
    """Exchange {"token": ...} for a session."""
    sessions = studio_of(request).sessions
    if sessions.is_blocked():
        raise HTTPException(429, "too many wrong tokens: wait a minute")
    token = (await read_json(request)).get("token")
    if not isinstance(token, str) or not sessions.is_token(token.strip()):
        sessions.count_failure()
        raise HTTPException(
            403, "this is not the token of this studio: its terminal shows the link with the token"
        )
    response = JSONResponse({})
    set_session_cookie(response, request.scope["state"]["cookie_name"], sessions.open())
    return response
