"""What made a run: code, packages, machine, cluster."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("inpaint-pipelines", "torch", "ray", "mlflow", "opencv-python", "numpy", "webdataset")
TAG = "inpaint.made_by"  # of a run


def code_version() -> dict[str, str]:
    """git commit and whether the tree was changed since; empty where the code is no git checkout.

    A job's package is none: there `inpaint submit` has left both beside this file.
    """
    root = Path(__file__).parent
    with suppress(OSError, ValueError):
        commit, dirty = (root / "CODE").read_text().split()
        return {"commit": commit, "dirty": dirty}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": str(changed).lower()}


def environment() -> dict[str, str]:
    """Versions and machine, for the report."""
    found = packages() | {"machine": f"{platform.system()} {platform.machine()}"}
    return found | {f"git {key}": value for key, value in code_version().items()}


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that what comes out depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def ray_job() -> dict[str, Any]:
    """The Ray job that this runs in (`submission`: as `ray job submit` names it) and its cluster's shape; {} outside."""
    ray: Any = sys.modules.get("ray")  # seconds to import, and of no use where nobody has
    if ray is None or not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = {key: sum(resources.get(key, 0) for resources in alive) for key in ("CPU", "GPU")}
    found = {
        "job": context.get_job_id(),
        "nodes": len(alive),
        "cpus": total["CPU"],
        "gpus": total["GPU"],
    }
    with suppress(AttributeError, KeyError):  # Ray has no public way from a task to it
        found["submission"] = context.worker.core_worker.get_job_config().metadata["job_submission_id"]
    return {key: value for key, value in found.items() if value != ""}


def made_by() -> dict[str, Any]:
    """Code, packages and Ray job: what a training says of itself, under TAG, when it starts."""
    return {"code": code_version(), "packages": packages(), "ray": ray_job()}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
