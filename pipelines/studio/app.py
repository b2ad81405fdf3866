"""The FastAPI application: routes of all pages, static files, templates and the shared state."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.types import ASGIApp, Receive, Scope, Send

from data_prep.uris import path_from_sqlite_url
from pipelines.studio import jobs, token_page
from pipelines.studio.cached import Cached, database_check
from pipelines.studio.errors import add_error_handlers
from pipelines.studio.jobs import JobRunner
from pipelines.studio.security import SecurityMiddleware, session_of
from pipelines.studio.sessions import Sessions
from pipelines.studio.settings import StudioSettings
from pipelines.studio.shown import age, shown, shown_address

if TYPE_CHECKING:  # imports MLflow, which takes two seconds: the first page does not wait for it
    from pipelines.studio.registry_snapshot import RegistrySnapshot

HERE = Path(__file__).parent
SLOW_PAGES = ("models_pages", "models_api", "runs_pages")
"""Modules whose routes are added when MLflow is imported."""
SLOW_PATHS = ("/models", "/runs", "/api/models", "/api/runs", "/api/snapshot")
"""Beginnings of their routes: requests there wait for the import."""


@dataclass
class Studio:
    """The state that all requests share; `request.app.state.studio`."""

    settings: StudioSettings
    templates: Environment
    sessions: Sessions
    registry: Cached[RegistrySnapshot]
    runs: Cached[Any]
    fills: JobRunner
    comparisons: JobRunner

    def close(self) -> None:
        """End the worker processes and remove the sessions' files."""
        self.fills.close()
        self.comparisons.close()
        self.sessions.close()


def create_app(settings: StudioSettings) -> FastAPI:
    """The application. Its worker processes start with the first job and end with the application."""
    studio = Studio(
        settings,
        _templates(),
        Sessions(settings.token),
        Cached(
            lambda: _load_registry(settings.tracking_uri),
            settings.refresh_seconds,
            database_check(settings.tracking_uri),
        ),
        Cached(lambda: _load("runs_snapshot:load_runs", settings.storage_uri), settings.refresh_seconds),
        JobRunner("fills", settings.tracking_uri),
        JobRunner("comparisons", settings.tracking_uri),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        before = os.environ.get("MLFLOW_TRACKING_URI")
        os.environ["MLFLOW_TRACKING_URI"] = settings.tracking_uri
        threading.Thread(target=_warm_up, args=(slow_pages, studio), name="studio start", daemon=True).start()
        try:
            yield
        finally:
            await run_in_threadpool(studio.close)
            if before is None:
                del os.environ["MLFLOW_TRACKING_URI"]
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before

    app = FastAPI(title="inpaint studio", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    slow_pages = SlowPages(app)
    app.state.studio = studio
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    app.include_router(jobs.router)
    app.include_router(token_page.router)
    from pipelines.studio import try_api  # uses this module

    app.include_router(try_api.router)
    add_error_handlers(app)
    app.add_middleware(SlowPagesMiddleware, pages=slow_pages)
    app.add_middleware(SecurityMiddleware, studio=studio)
    return app


class SlowPages:
    """Adds the routes whose modules import MLflow, once."""

    def __init__(self, app: FastAPI) -> None:
        self._app, self._lock = app, threading.Lock()
        self.added = False

    def add(self) -> None:
        with self._lock:
            if self.added:
                return
            for name in SLOW_PAGES:
                if importlib.util.find_spec(f"pipelines.studio.{name}"):
                    self._app.include_router(importlib.import_module(f"pipelines.studio.{name}").router)
            self.added = True


class SlowPagesMiddleware:
    """Lets requests to pages that need MLflow wait until they are there."""

    def __init__(self, app: ASGIApp, pages: SlowPages) -> None:
        self._app, self._pages = app, pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._pages.added and scope["path"].startswith(SLOW_PATHS):
            await run_in_threadpool(self._pages.add)
        await self._app(scope, receive, send)


def _warm_up(pages: SlowPages, studio: Studio) -> None:
    """Import and load what the pages show, while the person looks at the first one."""
    pages.add()
    for cached in (studio.registry, studio.runs):
        with suppress(ValueError):  # the pages show it
            cached.get()


def _load_registry(tracking_uri: str) -> RegistrySnapshot:
    """The registry; empty if there is no database yet: the pages then say how to get models."""
    from pipelines.studio.registry_snapshot import RegistrySnapshot, load_registry

    path = path_from_sqlite_url(tracking_uri)
    return load_registry(tracking_uri) if path is None or path.exists() else RegistrySnapshot()


def _load(name: str, address: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"pipelines.studio.{module}"), function)(address)


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, age=age, shown_address=shown_address)
    return environment


def studio_of(request: Request) -> Studio:
    """The studio that serves a request."""
    studio: Studio = request.app.state.studio
    return studio


def render(
    request: Request, template: str, *, section: str, status: int = 200, **context: Any
) -> HTMLResponse:
    """A page from a template. `section` (try, models or runs) is marked in the navigation."""
    studio, session = studio_of(request), session_of(request)
    cached = {"models": studio.registry, "runs": studio.runs}.get(section)
    text = studio.templates.get_template(template).render(
        section=section,
        csrf_token=session.csrf if session else "",
        may_write=session is not None,
        snapshot_id=cached.id if cached else "",
        **context,
    )
    return HTMLResponse(text, status_code=status)
