"""The FastAPI application: routes of all pages, static files, templates and the shared state."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.studio.settings import StudioSettings

HERE = Path(__file__).parent


@dataclass
class Studio:
    """The state that all requests share; `request.app.state.studio`."""

    settings: StudioSettings
    templates: Environment


def create_app(settings: StudioSettings) -> FastAPI:
    """The application. Its worker processes start with the first job and end with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = FastAPI(title="inpaint studio", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.studio = Studio(settings, _templates())
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    return app


def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def studio_of(request: Request) -> Studio:
    """The studio that serves a request."""
    studio: Studio = request.app.state.studio
    return studio


def render(
    request: Request, template: str, *, section: str, status: int = 200, **context: Any
) -> HTMLResponse:
    """A page from a template. `section` (try, models or runs) is marked in the navigation."""
    studio = studio_of(request)
    text = studio.templates.get_template(template).render(
        section=section, csrf_token="", may_write=False, snapshot_id="", **context
    )
    return HTMLResponse(text, status_code=status)
