"""The settings of a studio."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

DEFAULT_PORT = 8266


@dataclass(frozen=True)
class StudioSettings:
    """What `inpaint studio` was started with, and its limits."""

    tracking_uri: str
    """Of the MLflow registry."""
    storage_uri: str
    """A folder or a bucket with the runs."""
    port: int = DEFAULT_PORT
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    """Secret: who has it may write."""
    max_upload_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    """Of an uploaded photograph, by its header, before it is decoded."""
    refresh_seconds: float = 4.0
    """Age at which the cached registry and storage are read again."""
