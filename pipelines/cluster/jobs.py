"""`inpaint submit`: submit a recipe with this package's source as a Ray job, and follow its log."""

from __future__ import annotations

import asyncio
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

from data_prep.network import bypass_proxy_for_loopback, describe_proxy
from data_prep.uris import is_s3_uri, normalize_storage_uri, normalize_tracking_uri, path_from_sqlite_url
from pipelines.cluster import local_cluster, loopback
from pipelines.cluster.session import JOB_NAME, SESSION_ENV_VARS
from pipelines.private.ray import silence_job_logging
from pipelines.provenance import CODE_FILE, USER_FILE, code_version, user_name
from pipelines.recipe import Recipe
from pipelines.recipe.load import has_credentials

CONNECT_TIMEOUT = 5.0  # seconds for a connection to the head and its first answer
MAX_RECONNECTS = 5  # reconnections in a row while following a log
MAX_PACKAGE_BYTES = 5 * 2**20  # this project's source has a tenth of it
ENTRYPOINT = "python -m pipelines run recipe.yaml"
PACKAGES = ("data_prep", "models", "pipelines")
EXCLUDED = ("__pycache__", "results")
TOKEN_SOURCES = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"


class SubmitError(RuntimeError):
    """A job that failed, or that cannot be submitted or followed; one line."""


JOB_ENV_VARS = {
    "PYTHONUNBUFFERED": "1",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # not Ray's 3: ending the steps takes 6 on an idle machine
}


def submit(recipe: Recipe, client: Any) -> str:
    """Submit the recipe with this package's source by a client of `connect`; returns the submission id."""
    with package_source(recipe) as folder:
        return client.submit_job(
            entrypoint=ENTRYPOINT,
            submission_id=submission_id(recipe),
            runtime_env={"working_dir": str(folder), "env_vars": SESSION_ENV_VARS | JOB_ENV_VARS},
            metadata={JOB_NAME: recipe.name, "recipe": recipe.name, "digest": recipe.digest},
        )


def submission_id(recipe: Recipe) -> str:
    """A new id with the recipe's name and digest, unique per submission."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", recipe.name)[:40]
    return f"{name}-{recipe.digest[:12]}-{secrets.token_hex(3)}"


@contextmanager
def package_source(recipe: Recipe) -> Iterator[Path]:
    """A temporary folder with the files of the job: the source and the recipe, and nothing else."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory(prefix="inpaint-job-") as temporary:
        folder = Path(temporary)
        for name in PACKAGES:
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns(*EXCLUDED))
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        if code := code_version():
            (folder / "pipelines" / CODE_FILE).write_text(f"{code['commit']} {code['dirty']}\n")
        (folder / "pipelines" / USER_FILE).write_text(f"{user_name()}\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        if size > MAX_PACKAGE_BYTES:
            raise SubmitError(
                f"{root} has {size / 1e6:.0f} MB of source, "
                f"more than the {MAX_PACKAGE_BYTES / 1e6:.0f} MB that a job may carry"
            )
        yield folder


def make_portable(recipe: Recipe, address: str) -> tuple[Recipe, list[str]]:
    """The recipe in a form that runs on the cluster, and notes for the user. Raises SubmitError.

    For a cluster of this machine relative paths become absolute. For others a relative path is an error that names the
    field, and an absolute path a note: the folder must be shared. A password in an address is always an error.
    """
    body = recipe.model_dump(mode="json", exclude_defaults=True) | {"storage": recipe.storage}
    is_local = local_cluster.find_by_address(address) is not None
    notes: list[str] = []

    def map_path(field: str, value: str) -> str:
        scheme, separator, _ = value.partition("://")
        if has_credentials(value):
            raise SubmitError(
                f"{field} has a user's name or password in it, which would be written to logs; give the plain address, "
                "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the AWS variables, on the cluster"
            )
        if field == "tracking_uri":
            address = normalize_tracking_uri(value, field)
            if path_from_sqlite_url(address) is None:
                return address
            is_relative = not re.match(r"[\w+]+:////", value)
            value = address if is_local else value
        else:
            if separator and scheme in ("http", "https") and field.endswith(".weights"):
                return value
            address = normalize_storage_uri(value, field)
            if is_s3_uri(address):
                return address
            is_relative = not value.startswith(("/", "file:"))
            value = str(Path(address).resolve()) if is_local else value
        if is_local:
            return value
        if is_relative:
            raise SubmitError(
                f"{field} = {value} is a path of this machine, which does not exist on the cluster; give s3://bucket/"
                "prefix, or the absolute path of a folder that all nodes share"
            )
        notes.append(f"{field} = {value} must be a folder that all nodes of the cluster share")
        return value

    _map_paths(body, map_path)
    return Recipe.model_validate(body), notes


def _map_paths(body: dict[str, Any], map_path: Any) -> None:
    """Replace each path of a recipe by map_path(field, path)."""
    for section, name in (("", "storage"), ("", "tracking_uri"), ("data", "source"), ("data", "root")):
        mapping = body.get(section, {}) if section else body
        value = mapping.get(name)
        if value and value != "bundled":
            mapping[name] = map_path(f"{section}.{name}".strip("."), value)
    _map_mask_kinds(body, "", map_path)
    for key, model in body.get("models", {}).items():
        _map_mask_kinds(model, f"models.{key}.", map_path)
        _map_weights(model.get("features"), f"models.{key}.features", map_path)
    evaluate = body.get("evaluate", {})
    if "masks" in evaluate:
        evaluate["masks"] = [_map_mask_kind(kind, "evaluate.masks", map_path) for kind in evaluate["masks"]]
    _map_weights(evaluate.get("distance"), "evaluate.distance", map_path)


def _map_mask_kinds(section: dict[str, Any], prefix: str, map_path: Any) -> None:
    if isinstance(masks := section.get("masks"), dict):
        section["masks"] = {
            _map_mask_kind(kind, f"{prefix}masks", map_path): value for kind, value in masks.items()
        }


def _map_mask_kind(kind: str, field: str, map_path: Any) -> str:
    is_path = "/" in kind or kind.endswith(".tar") or Path(kind).is_dir()
    return map_path(field, kind) if is_path else kind


def _map_weights(section: Any, field: str, map_path: Any) -> None:
    if isinstance(section, dict) and section.get("weights"):
        section["weights"] = map_path(f"{field}.weights", section["weights"])


def connect(address: str) -> Any:
    """A client of the head's Jobs API. Raises SubmitError in one line: unreachable, not Ray, or a token is missing."""
    if not re.match(r"https?://[^/]+", address):
        raise SubmitError(f"--address {address}: give the dashboard's, for example http://head:8265")
    bypass_proxy_for_loopback(address)
    if cluster := local_cluster.find_by_address(address):
        for key, value in local_cluster.cluster_env_vars(cluster).items():
            if key not in loopback.LOOPBACK_ENV_VARS:  # a client of the Jobs API does not need these
                os.environ.setdefault(key, value)
    if _first_status(address) in (401, 403):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported: it reads this once
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # takes precedence over RAY_ADDRESS
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    silence_job_logging()
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        if "Authentication failed" in str(error):
            raise SubmitError(
                f"{address} refuses the token from {_token_source()}: it is another cluster's"
            ) from None
        raise SubmitError(f"{address} requires a token (401): put it in {TOKEN_SOURCES}") from None


def _first_status(address: str) -> int:
    """The HTTP status of the head's answer to a request without a token."""
    import requests

    try:
        response = requests.get(f"{address.rstrip('/')}/api/version", timeout=CONNECT_TIMEOUT)
    except requests.RequestException as error:
        problem = "does not answer" if isinstance(error, requests.Timeout) else "cannot be reached"
        raise SubmitError(
            f"the head at {address} {problem}{describe_proxy(address)} ({type(error).__name__}); is the cluster up, and "
            "its port 8265 open or forwarded?"
        ) from None
    if response.status_code not in (200, 401, 403) or (response.ok and "ray_version" not in response.text):
        raise SubmitError(
            f"{address} is not a Ray dashboard (HTTP status {response.status_code}); give http://HEAD:8265"
        )
    return response.status_code


def _token_source() -> str:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C sets the event and is not raised, as libraries can swallow it (in an import, say)."""
    interrupted = threading.Event()

    def on_interrupt(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous_handler = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def follow_logs(job: str, address: str, interrupted: threading.Event) -> None:
    """Print the job's log until it ends. Raises SubmitError if the job did not succeed, KeyboardInterrupt if interrupted.

    Reconnects after a lost connection, without printing anything twice.
    """
    client = connect(address)
    try:
        status, last_line = asyncio.run(_run_unless(interrupted, _print_logs(client, job, address)))
    except RuntimeError as error:
        if "404" in str(error):
            raise SubmitError(f"there is no job {job} at {address}; `ray job list` names them") from None
        raise
    if status == "SUCCEEDED":
        return
    if not last_line:
        message = client.get_job_info(job).message or ""
        last_line = next((line for line in reversed(message.splitlines()) if line.strip()), "no output")
    raise SubmitError(f"job {job} {'was stopped' if status == 'STOPPED' else 'failed'}: {last_line.strip()}")


async def _run_unless(
    interrupted: threading.Event, coroutine: Coroutine[Any, Any, tuple[str, str]]
) -> tuple[str, str]:
    task = asyncio.ensure_future(coroutine)
    while not task.done():
        if interrupted.is_set():
            raise KeyboardInterrupt
        await asyncio.wait({task}, timeout=0.2)
    return task.result()


async def _print_logs(client: Any, job: str, address: str) -> tuple[str, str]:
    """The job's final status, and the last line of its log."""
    import aiohttp

    printed_chars, tail, failures = 0, "", 0
    while True:
        received_chars = 0
        try:
            async for text in client.tail_job_logs(job):
                new_text = text[max(printed_chars - received_chars, 0) :]
                received_chars += len(text)
                if new_text:
                    sys.stdout.write(new_text)
                    sys.stdout.flush()
                    printed_chars, tail, failures = received_chars, (tail + new_text)[-2000:], 0
            status = client.get_job_status(job)
            if status.is_terminal():
                lines = [line for line in tail.splitlines() if line.strip()]
                return str(status.value), lines[-1] if lines else ""
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            # Ray's error if the connection ends without a closing handshake, as when the head dies
            if isinstance(error, RuntimeError) and not str(error).startswith("WebSocket"):
                raise
            failures += 1
            if failures > MAX_RECONNECTS:
                raise SubmitError(
                    f"lost the connection to the head at {address} ({type(error).__name__}); "
                    f"the job may still run: {attach_command(job, address)}"
                ) from None
        await asyncio.sleep(min(0.2 * 2**failures, 5))


def attach_command(job: str, address: str) -> str:
    return f"inpaint submit --attach {job} --address {address}"
