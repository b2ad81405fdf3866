"""Texts as pages may show them: without absolute paths, file URIs and passwords in URLs."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.uris import path_from_sqlite_url

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SCHEMES = re.compile(r"\b(?:file|sqlite(?:\+\w+)?):/+(?=/)", re.IGNORECASE)
_DOUBLE_SLASH = re.compile(r"(?<![:\w/])//+(?=\w)")
_QUOTED = re.compile(r"(['\"`])(/(?!/)[^'\"`\n]*)\1")
_PATH = re.compile(r"(?<![\w.\-/…~*<>\])%}])(?<!models:)(?<!runs:)/(?!/)[^\s'\"`<>|,;()\[\]{}]*[\w…]")


def shown(value: Any, keep: str = "") -> str:
    """The text with each absolute path cut to its last component, `…/name`; paths that `keep`, a recipe's text, names
    stay whole. file:// and sqlite:// URIs count as paths; user and password are cut from URLs."""
    text = _CREDENTIALS.sub("", "" if value is None else str(value))
    text = _DOUBLE_SLASH.sub("/", _SCHEMES.sub("", text))
    text = _QUOTED.sub(lambda match: f"{match[1]}{_short(match[2], keep)}{match[1]}", text)
    return _PATH.sub(lambda match: _short(match[0], keep), text)


def _short(path: str, keep: str) -> str:
    core = path.rstrip("/:.")
    tail = path[len(core) :]
    if len(core) < 3 or (keep and re.search(rf"{re.escape(core)}(?![\w.-])", keep)):
        return path
    # messages append positions: /a/recipe.yaml:3:5
    return f"…/{core.rsplit('/', 1)[1]}{tail}"


def shown_address(uri: str) -> str:
    """A storage's or a registry's address: relative to the working directory if it is inside it."""
    path = path_from_sqlite_url(uri) if uri.startswith("sqlite") else None
    if path is None and uri.startswith("file:"):
        path = Path(re.sub(r"^file:/+", "/", uri))
    if path is None and "://" not in uri:
        path = Path(uri)
    if path is None:
        return _CREDENTIALS.sub("", uri)
    relative = os.path.relpath(path)
    return f"…/{path.name}" if relative.startswith("..") else relative


def age(value: datetime | float | int | str | None) -> str:
    """The time since a moment (datetime, ISO 8601 text or seconds since 1970) as `3 min ago`; '' for None."""
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, int | float):
        value = datetime.fromtimestamp(value, UTC)
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    seconds = (datetime.now(UTC) - value).total_seconds()
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < limit:
            return "now" if seconds < 5 else f"{int(seconds // unit)} {name} ago"
    return f"{int(seconds // 86400)} days ago"
