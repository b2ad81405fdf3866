"""A client of the studio's application, in this process, as a browser with the token."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from pipelines.studio.app import create_app
from pipelines.studio.settings import StudioSettings

ORIGIN = "http://127.0.0.1:8266"


def studio_settings(folder: Path, tracking_uri: str = "", **changes: Any) -> StudioSettings:
    """A studio of `folder`, without a registry unless `tracking_uri` names one."""
    return StudioSettings(tracking_uri or f"sqlite:///{folder}/mlflow.db", str(folder), **changes)


@contextmanager
def running_app(settings: StudioSettings) -> Iterator[FastAPI]:
    app = create_app(settings)
    with TestClient(app, base_url=ORIGIN):
        yield app


def reader(app: FastAPI) -> TestClient:
    """A browser without the token."""
    return TestClient(app, base_url=ORIGIN)


def writer(app: FastAPI) -> TestClient:
    """A browser that opened the link; its requests carry Origin and the CSRF token."""
    client = reader(app)
    client.get(f"/token?token={app.state.studio.settings.token}")
    client.headers.update({"Origin": ORIGIN, "X-CSRF-Token": csrf_token(client)})
    return client


def csrf_token(client: TestClient) -> str:
    found = re.search(r'name="csrf-token" content="([^"]*)"', client.get("/token").text)
    assert found
    return found[1]


def wait_for_job(client: TestClient, job: dict[str, Any], seconds: float = 60) -> dict[str, Any]:
    """The job when it has ended."""
    end = time.monotonic() + seconds
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < end, job
        time.sleep(0.05)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def encoded(pixels: np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()
