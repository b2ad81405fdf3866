"""Provenance of a run: user, code version, packages, machine and cluster."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("inpaint-pipelines", "torch", "ray", "mlflow", "opencv-python", "numpy", "webdataset")
PROVENANCE_TAG = "inpaint.made_by"  # of a run in MLflow
CODE_FILE, USER_FILE = (
    "CODE",
    "SUBMITTED_BY",
)  # in the package of a submitted job: `COMMIT DIRTY`, and a user's name


def code_version(root: Path = Path(__file__).parent) -> dict[str, str]:
    """The git commit, and whether there are uncommitted changes; empty if the code in `root` is not a git checkout.

    For a job, `inpaint submit` writes both to the file CODE in its package.
    """
    with suppress(OSError, ValueError):
        commit, dirty = (root / CODE_FILE).read_text().split()
        return {"commit": commit, "dirty": dirty}
    try:
        # an installed copy may lie in the repository of another project, whose commit says nothing about this code
        _git(root, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(root, "rev-parse", "HEAD")
        is_dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": str(is_dirty).lower()}


def user_name(root: Path = Path(__file__).parent) -> str:
    """Who started this run: the user who submitted the job, else MLflow's user, else the user of this process."""
    with suppress(OSError):
        return (root / USER_FILE).read_text(encoding="utf-8").strip()
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user entry
        return "unknown"


def source_tags(command: str) -> dict[str, str]:
    """MLflow's tags of a run: who started it, and with which command."""
    kind = "JOB" if (Path(__file__).parent / USER_FILE).exists() else "LOCAL"
    return {"mlflow.user": user_name(), "mlflow.source.name": command, "mlflow.source.type": kind}


def git_tags() -> dict[str, str]:
    """MLflow's tags of the code of this process; empty if its commit is unknown."""
    code = code_version()
    if not code:
        return {}
    return {"mlflow.source.git.commit": code["commit"], "mlflow.source.git.dirty": code["dirty"]}


def describe_environment() -> dict[str, str]:
    """Package versions, machine and git commit, for reports."""
    environment = package_versions() | {"machine": f"{platform.system()} {platform.machine()}"}
    return environment | {f"git {key}": value for key, value in code_version().items()}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def ray_job_info() -> dict[str, Any]:
    """The Ray job of this process (`submission`: its id in `ray job submit`) and its cluster's resources; {} outside."""
    ray: Any = sys.modules.get("ray")  # takes seconds to import; if it is not imported there is no job
    if ray is None or not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = {key: sum(resources.get(key, 0) for resources in alive) for key in ("CPU", "GPU")}
    info = {
        "job": context.get_job_id(),
        "nodes": len(alive),
        "cpus": total["CPU"],
        "gpus": total["GPU"],
    }
    with suppress(AttributeError, KeyError):  # Ray has no public API for it
        info["submission"] = context.worker.core_worker.get_job_config().metadata["job_submission_id"]
    return {key: value for key, value in info.items() if value != ""}


def collect_provenance() -> dict[str, Any]:
    """Code, packages and Ray job; stored in PROVENANCE_TAG when training starts."""
    return {"code": code_version(), "packages": package_versions(), "ray": ray_job_info()}


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
