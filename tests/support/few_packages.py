"""Runs the programme of tests/gpu in this process with only the packages that it may use, and those that they need."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import runpy
import sys
from collections.abc import Iterable
from typing import Any

PACKAGES = ("torch", "numpy", "opencv-python", "pillow", "pyyaml", "safetensors", "scipy", "scikit-image")
OURS = "inpaint-pipelines"


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def with_requirements(names: Iterable[str]) -> set[str]:
    """These packages and all that they require, without extras."""
    known: set[str] = set()
    waiting = [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        try:
            lines = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue  # for another platform
        if name not in known:
            known.add(name)
            required = (re.match("[A-Za-z0-9._-]+", line) for line in lines if "extra ==" not in line)
            waiting += [canonical(match[0]) for match in required if match]
    return known


class Filtered:
    """A finder that finds no module of another package."""

    def __init__(self, finder: Any, allowed: set[str], distributions: dict[str, list[str]]) -> None:
        self.finder, self.allowed, self.distributions = finder, allowed, distributions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        owners = {canonical(owner) for owner in self.distributions.get(name.partition(".")[0], ())}
        if owners and not owners & self.allowed:
            return None
        return self.finder.find_spec(name, path, target)


if __name__ == "__main__":
    allowed, distributions = with_requirements(PACKAGES) | {OURS}, dict(metadata.packages_distributions())
    sys.meta_path[:] = [Filtered(finder, allowed, distributions) for finder in sys.meta_path]
    runpy.run_module("gpu", run_name="__main__")
