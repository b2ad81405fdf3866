"""The state that all requests share, and the pages made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.studio.cached import Cached
from pipelines.studio.jobs import JobRunner
from pipelines.studio.security import session_of
from pipelines.studio.sessions import Sessions
from pipelines.studio.settings import StudioSettings
from pipelines.studio.shown import age, shown, shown_address

if TYPE_CHECKING:  # imports MLflow, which takes two seconds: the first page does not wait for it
    from pipelines.studio.registry_snapshot import RegistrySnapshot
    from pipelines.studio.run_views import RunsSnapshot

HERE = Path(__file__).parent


@dataclass
class Studio:
    """The state that all requests share; `request.app.state.studio`."""

    settings: StudioSettings
    templates: Environment
    sessions: Sessions
    registry: Cached[RegistrySnapshot]
    runs: Cached[RunsSnapshot]
    fills: JobRunner
    comparisons: JobRunner

    def close(self) -> None:
        """End the worker processes and remove the sessions' files."""
        self.fills.close()
        self.comparisons.close()
        self.sessions.close()


def open_templates() -> Environment:
    """The templates, with the filters that pages use."""
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
    """The studio that serves a request. Routes call it before they read a cached value: the page's id is taken now, so
    that a page with an old value never has the id of a newer one."""
    studio: Studio = request.app.state.studio
    if not hasattr(request.state, "snapshot_ids"):
        request.state.snapshot_ids = {"models": studio.registry.id, "runs": studio.runs.id}
    return studio


def render(
    request: Request, template: str, *, section: str, status: int = 200, **context: Any
) -> HTMLResponse:
    """A page from a template. `section` (try, models or runs) is marked in the navigation."""
    studio, session = studio_of(request), session_of(request)
    text = studio.templates.get_template(template).render(
        section=section,
        csrf_token=session.csrf if session else "",
        may_write=session is not None,
        snapshot_id=request.state.snapshot_ids.get(section, ""),
        **context,
    )
    return HTMLResponse(text, status_code=status)
