"""The FastAPI application: routes of all pages, static files, templates and the shared state."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.studio import job_api, runs_pages, token_page, try_api
from pipelines.studio.cached import Cached, database_check
from pipelines.studio.errors import add_error_handlers
from pipelines.studio.imports import import_alone
from pipelines.studio.jobs import JobRunner
from pipelines.studio.runs_cache import cached_runs
from pipelines.studio.security import SecurityMiddleware
from pipelines.studio.sessions import Sessions
from pipelines.studio.settings import StudioSettings
from pipelines.studio.state import HERE, Studio, open_templates

if TYPE_CHECKING:  # imports MLflow, which takes two seconds: the first page does not wait for it
    from pipelines.studio.registry_snapshot import RegistrySnapshot

SLOW_PAGES = ("models_pages", "models_api")
"""Modules whose routes are added when MLflow is imported."""
SLOW_PATHS = ("/models", "/api/models")
"""Beginnings of their routes: requests there wait for the import."""


def create_app(settings: StudioSettings) -> FastAPI:
    """The application. Its worker processes start with the first job and end with the application."""
    studio = Studio(
        settings,
        open_templates(),
        Sessions(settings.token),
        Cached(
            lambda: _load_registry(settings.tracking_uri),
            settings.refresh_seconds,
            database_check(settings.tracking_uri),
        ),
        cached_runs(settings.storage_uri, settings.refresh_seconds),
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
    app.include_router(job_api.router)
    app.include_router(token_page.router)
    app.include_router(try_api.router)
    app.include_router(runs_pages.router)
    add_error_handlers(app)
    app.add_middleware(SlowPagesMiddleware, pages=slow_pages)
    app.add_middleware(
        SecurityMiddleware, sessions=studio.sessions, max_upload_bytes=settings.max_upload_bytes
    )
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
                self._app.include_router(import_alone(f"pipelines.studio.{name}").router)
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
    """Import and load what the pages show, while the person looks at the first one.

    Without Python's garbage collection, which would look through all that the imports create again and again: a
    quarter of the time.
    """
    gc.disable()
    try:
        pages.add()
        for cached in (studio.registry, studio.runs):
            with suppress(ValueError):  # the pages show it
                cached.get()
    finally:
        gc.enable()


def _load_registry(tracking_uri: str) -> RegistrySnapshot:
    import_alone("pipelines.studio.registry_snapshot")
    from pipelines.studio.registry_snapshot import load_registry

    return load_registry(tracking_uri)
