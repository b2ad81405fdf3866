"""Names of parameters and metrics that MLflow accepts."""

from __future__ import annotations

import hashlib
import re

MAX_NAME_CHARS = 250  # MLflow's limit


def valid_name(name: str) -> str:
    """A name of a parameter or metric that MLflow accepts: a mask folder or a model's key may have other characters."""
    valid = re.sub(r"[^\w ./:-]", "_", name)
    valid = "/".join(part for part in valid.split("/") if part not in ("", ".", ".."))
    if len(valid) <= MAX_NAME_CHARS:
        return valid
    return f"{valid[: MAX_NAME_CHARS - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
