"""Errors of routes as one line: JSON {"error": ...} for scripts, a page for people."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from data_prep.storage import StorageError
from pipelines.errors import explain_error, is_explained
from pipelines.studio.security import wants_json
from pipelines.studio.shown import shown
from pipelines.studio.state import render

STATUS = {"NotRegistered": 404, "RegistryError": 409, "StorageError": 409, "NotLoaded": 503}
TITLES = {
    400: "This cannot be done",
    403: "Not allowed",
    404: "Not found",
    409: "Conflict",
    503: "Not available",
}
NOT_FOUND = "there is no such page: it may have been removed, or its address is mistyped"


def add_error_handlers(app: FastAPI) -> None:
    """Handle what routes raise. What nothing here explains reaches SecurityMiddleware: 500, with one line."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(ValueError, _explained)
    app.add_exception_handler(StorageError, _explained)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        detail = NOT_FOUND
    return reply(request, error.status_code, detail)


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return reply(request, 400, f"{name}: {first['msg']}")


async def _explained(request: Request, error: Exception) -> Response:
    if not is_explained(error):
        raise error
    names = [kind.__name__ for kind in type(error).__mro__]
    status = next((STATUS[name] for name in names if name in STATUS), 400)
    logging.getLogger(__name__).info("%s", error)
    return reply(request, status, explain_error(error))


def reply(request: Request, status: int, text: str) -> Response:
    """An error in one line, without absolute paths."""
    text = shown(text)
    if wants_json(request.scope):
        return JSONResponse({"error": text}, status)
    title = TITLES.get(status, f"Error {status}")
    return render(request, "error.html", section="", status=status, title=title, text=text)
