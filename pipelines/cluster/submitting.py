"""`inpaint submit`: a recipe and this package as a Ray job, followed to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.cluster import local_cluster
from pipelines.cluster.session import SETTINGS
from pipelines.provenance import code_version
from pipelines.reading import names_a_user
from pipelines.recipe import Recipe

REACH = 5.0  # seconds within which a head accepts a connection and answers
LOST = 5  # times in a row that following a log is taken up again
LIMIT = 5 * 2**20  # bytes of the package; this project's source has a tenth of it
ENTRYPOINT = "python -m pipelines run recipe.yaml"
PARTS = ("data_prep", "models", "pipelines")
LEFT_OUT = ("__pycache__", "results")
TOKEN_PLACES = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"


class SubmitError(RuntimeError):
    """A job that cannot be submitted, followed, or that failed; one line."""


JOB = {
    "PYTHONUNBUFFERED": "1",
    "RAY_JOB_STOP_WAIT_TIME_S": "20",  # of Ray's 3 a stopped run needs more to end its steps and release its leases
}


def submit(recipe: Recipe, address: str) -> str:
    """Send the recipe with this package's source to the head; the job's submission id."""
    client = connect(address)
    with package(recipe) as folder:
        return client.submit_job(
            entrypoint=ENTRYPOINT,
            submission_id=submission_id(recipe),
            runtime_env={"working_dir": str(folder), "env_vars": SETTINGS | JOB},
            metadata={"recipe": recipe.name, "digest": recipe.digest},
        )


def submission_id(recipe: Recipe) -> str:
    """Tells which recipe it is, and one submission of it from the next."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", recipe.name)[:40]
    return f"{name}-{recipe.digest[:12]}-{secrets.token_hex(3)}"


@contextmanager
def package(recipe: Recipe) -> Iterator[Path]:
    """A folder with what travels, and nothing that was not chosen to: the source and the recipe."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory(prefix="inpaint-job-") as temporary:
        folder = Path(temporary)
        for part in PARTS:
            shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        if code := code_version():
            (folder / "pipelines" / "CODE").write_text(f"{code['commit']} {code['dirty']}\n")
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        if size > LIMIT:
            raise SubmitError(
                f"{root} has {size / 1e6:.0f} MB of source, more than the {LIMIT / 1e6:.0f} MB that a job may carry"
            )
        yield folder


def portable(recipe: Recipe, address: str) -> tuple[Recipe, list[str]]:
    """The recipe as it can run elsewhere, and what its reader should know.

    On a cluster of this machine relative paths become absolute. Elsewhere a relative path is an error that names the
    field, and an absolute one a note, as a folder may be shared. A password in an address is an error anywhere.
    """
    body = recipe.model_dump(mode="json", exclude_defaults=True) | {"storage": recipe.storage}
    here = local_cluster.of_address(address) is not None
    notes: list[str] = []

    def local(field: str, value: str) -> str:
        scheme, separator, rest = value.partition("://")
        if names_a_user(value):
            raise SubmitError(
                f"{field} has a user's name or password in it, which would be kept in logs; give the plain address, "
                "and the cluster MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the AWS variables"
            )
        if separator and scheme not in ("file", "sqlite"):
            return value
        path = Path(rest[1:] if scheme == "sqlite" else rest if separator else value)
        if here:
            absolute = str(Path(path).expanduser().resolve())
            return f"{scheme}://{'/' if scheme == 'sqlite' else ''}{absolute}" if separator else absolute
        if not path.is_absolute():
            raise SubmitError(
                f"{field} = {value} is a path of this machine, which the cluster does not have; give s3://bucket/"
                "prefix, or the absolute path of a folder that all nodes share"
            )
        notes.append(f"{field} = {value} has to be a folder that all nodes of the cluster share")
        return value

    _walk(body, local)
    return Recipe.model_validate(body), notes


def _walk(body: dict[str, Any], local: Any) -> None:
    """Put every path of a recipe through local(field, path)."""
    for section, name in (("", "storage"), ("", "tracking"), ("data", "source"), ("data", "root")):
        part = body.get(section, {}) if section else body
        value = part.get(name)
        if value and value != "bundled":
            part[name] = local(f"{section}.{name}".strip("."), value)
    _masks(body, "", local)
    for key, model in body.get("models", {}).items():
        _masks(model, f"models.{key}.", local)
        _weights(model.get("features"), f"models.{key}.features", local)
    evaluate = body.get("evaluate", {})
    if "masks" in evaluate:
        evaluate["masks"] = [_mask(kind, "evaluate.masks", local) for kind in evaluate["masks"]]
    _weights(evaluate.get("distance"), "evaluate.distance", local)


def _masks(section: dict[str, Any], prefix: str, local: Any) -> None:
    if isinstance(masks := section.get("masks"), dict):
        section["masks"] = {_mask(kind, f"{prefix}masks", local): value for kind, value in masks.items()}


def _mask(kind: str, field: str, local: Any) -> str:
    return local(field, kind) if "/" in kind or Path(kind).is_dir() else kind


def _weights(section: Any, field: str, local: Any) -> None:
    if isinstance(section, dict) and section.get("weights"):
        section["weights"] = local(f"{field}.weights", section["weights"])


def connect(address: str) -> Any:
    """A client of the head's Jobs API. Raises SubmitError in one line: unreachable, no Ray, or it wants a token."""
    if not re.match(r"https?://[^/]+", address):
        raise SubmitError(f"--address {address}: give the dashboard's, for example http://head:8265")
    if cluster := local_cluster.of_address(address):
        for key, value in local_cluster.environment(cluster).items():
            os.environ.setdefault(key, value)
    if _first_answer(address) in (401, 403):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported: it looks once
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # or RAY_ADDRESS would win
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in (
        "dashboard.modules.job.sdk",
        "dashboard.modules.dashboard_sdk",
        "_private.runtime_env.packaging",
    ):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        if "Authentication failed" in str(error):
            raise SubmitError(
                f"{address} refuses the token from {_token_place()}: it is another cluster's"
            ) from None
        raise SubmitError(f"{address} wants a token (401): put it in {TOKEN_PLACES}") from None


def _first_answer(address: str) -> int:
    """The status of the head's first answer, without any token."""
    import requests

    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=REACH)
    except requests.RequestException as error:
        kind = "does not answer" if isinstance(error, requests.Timeout) else "cannot be reached"
        raise SubmitError(
            f"the head at {address} {kind} ({type(error).__name__}); is the cluster up, and its port 8265 open "
            "or forwarded?"
        ) from None
    if answer.status_code not in (200, 401, 403) or (answer.ok and "ray_version" not in answer.text):
        raise SubmitError(
            f"{address} is no Ray dashboard (it answers {answer.status_code}); give http://HEAD:8265"
        )
    return answer.status_code


def _token_place() -> str:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


@contextmanager
def noted_interrupt() -> Iterator[threading.Event]:
    """Inside, a first Ctrl-C is noted and not raised: libraries can lose it, in the middle of an import, say."""
    left = threading.Event()

    def note(number: int, frame: Any) -> None:
        if left.is_set():
            raise KeyboardInterrupt
        left.set()

    former = signal.signal(signal.SIGINT, note)
    try:
        yield left
    finally:
        signal.signal(signal.SIGINT, former)


def follow(job: str, address: str, left: threading.Event) -> None:
    """Print the job's log until it ends. Raises SubmitError when it did not succeed, KeyboardInterrupt once `left`.

    A connection that is lost is taken up again, and what was printed already is not printed twice.
    """
    client = connect(address)
    try:
        status, last = asyncio.run(_unless(left, _follow(client, job, address)))
    except RuntimeError as error:
        if "404" in str(error):
            raise SubmitError(f"there is no job {job} at {address}; `ray job list` names them") from None
        raise
    if status == "SUCCEEDED":
        return
    if not last:
        message = client.get_job_info(job).message or ""
        last = next((line for line in reversed(message.splitlines()) if line.strip()), "it said nothing")
    raise SubmitError(f"job {job} {'was stopped' if status == 'STOPPED' else 'failed'}: {last.strip()}")


async def _unless(left: threading.Event, following: Coroutine[Any, Any, tuple[str, str]]) -> tuple[str, str]:
    task = asyncio.ensure_future(following)
    while not task.done():
        if left.is_set():
            raise KeyboardInterrupt
        await asyncio.wait({task}, timeout=0.2)
    return task.result()


async def _follow(client: Any, job: str, address: str) -> tuple[str, str]:
    """How the job ended, and the last line of its log."""
    import aiohttp

    printed, tail, lost = 0, "", 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(printed - seen, 0) :]
                seen += len(text)
                if fresh:
                    sys.stdout.write(fresh)
                    sys.stdout.flush()
                    printed, tail, lost = seen, (tail + fresh)[-2000:], 0
            status = client.get_job_status(job)
            if status.is_terminal():
                lines = [line for line in tail.splitlines() if line.strip()]
                return str(status.value), lines[-1] if lines else ""
        except (aiohttp.ClientError, OSError) as error:
            lost += 1
            if lost > LOST:
                raise SubmitError(
                    f"the head at {address} is lost ({type(error).__name__}); the job may go on: {reattach(job, address)}"
                ) from None
        await asyncio.sleep(min(0.2 * 2**lost, 5))


def reattach(job: str, address: str) -> str:
    return f"inpaint submit --attach {job} --address {address}"
