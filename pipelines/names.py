"""Checks the names of registered models, experiments and runs, and finds the word that a misspelt one is nearest to.
Imports nothing large: called before anything runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

MODEL_NAME = re.compile(r"[A-Za-z0-9_.-]+")
MAX_MODEL_CHARS = 256  # of MLflow's columns for the names of models and experiments
MAX_RUN_BYTES = 200  # file names have at most 255 bytes, and a run's name is part of several


def check_model_name(name: str) -> str:
    """Return the name. ValueError: MLflow cannot register a model under it, or cannot load it by it."""
    problem = f"{_abbreviate(name)!r} is not a valid name for a registered model"
    if not MODEL_NAME.fullmatch(name):
        ascii_only = "" if name.isascii() else " (a to z, without accents)"
        raise ValueError(f"{problem}: use letters, digits, '_', '-' and '.'{ascii_only}")
    if len(name) > MAX_MODEL_CHARS:
        raise ValueError(f"{problem}: it has {len(name)} characters, the maximum is {MAX_MODEL_CHARS}")
    if name == "." or name.startswith(".."):
        raise ValueError(f"{problem}: it would be a path")
    if name.lower() == "none":
        raise ValueError(f"{problem}: `none`, in lower case, trains without registering")
    return name


def check_experiment_name(name: str) -> str:
    """Return the name. ValueError: it is not valid in MLflow."""
    if not name.strip() or len(name) > MAX_MODEL_CHARS:
        raise ValueError(
            f"{_abbreviate(name)!r} is not a valid name for an experiment: it has {len(name)} characters, "
            f"allowed are 1 to {MAX_MODEL_CHARS}"
        )
    return name


def check_run_name(name: str) -> str:
    """Return the name. ValueError: it cannot be part of the names of the run's status files."""
    problem = f"{_abbreviate(name)!r} is not a valid name for a run"
    if not name.strip() or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{problem}: it is part of file names")
    if not name.isprintable():
        raise ValueError(f"{problem}: it has characters that cannot be printed")
    size = len(name.encode(errors="surrogateescape"))
    if size > MAX_RUN_BYTES:
        raise ValueError(f"{problem}: it has {size} bytes, the maximum is {MAX_RUN_BYTES}")
    return name


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` with the closest known word; '' if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _abbreviate(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
