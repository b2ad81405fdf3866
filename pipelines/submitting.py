"""A recipe given to a cluster as a Ray job: what travels, and following its log until it ends or the follower leaves."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.recipe import Recipe
from pipelines.session import SETTINGS

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("data_prep", "models", "pipelines")
LEFT_OUT = ("__pycache__", "*.pyc", "results", "RESULTS.md")
TOKEN = "RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token, with RAY_AUTH_MODE=token"


class SubmitError(RuntimeError):
    """One line: what kept the job from being submitted or followed, and the mend."""


def check_reach(recipe: Recipe) -> None:
    """SubmitError for places that are this machine's alone: a cluster's nodes do not see a relative path."""
    places = {"storage": recipe.storage, "data.source": recipe.data.source, "data.root": recipe.data.root}
    for field, value in places.items():
        if value and value != "bundled" and "://" not in value and not Path(value).is_absolute():
            raise SubmitError(
                f"{field} is {value!r}, a folder of this machine: name a bucket (s3://...) or an absolute path that "
                "every node sees"
            )


@contextmanager
def staged(recipe: Recipe) -> Iterator[Path]:
    """A folder with what the job needs and nothing else: the packages' sources and the recipe, overrides applied."""
    with tempfile.TemporaryDirectory(prefix="inpaint-job-") as temporary:
        folder, home = Path(temporary), Path(__file__).parents[1]
        for package in PACKAGES:
            shutil.copytree(home / package, folder / package, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        yield folder


def connect(address: str) -> JobSubmissionClient:
    """A client of the Jobs API at http://HEAD:8265. SubmitError when nobody answers, or the token is not taken."""
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises what requests does, and RuntimeErrors of its own
        raise _told(error, address) from error


def submit(recipe: Recipe, address: str) -> str:
    """Submit `inpaint run` of the recipe; returns the job's id. Credentials do not travel: they are the cluster's."""
    check_reach(recipe)
    client = connect(address)
    with staged(recipe) as folder:
        try:
            return str(
                client.submit_job(
                    entrypoint="python -m pipelines run recipe.yaml",
                    submission_id=f"inpaint-{recipe.name}-{recipe.digest[:8]}-{secrets.token_hex(3)}",
                    runtime_env={"working_dir": str(folder), "env_vars": SETTINGS},
                    metadata={"recipe": recipe.name, "digest": recipe.digest},
                )
            )
        except Exception as error:
            raise _told(error, address) from error


def follow(address: str, job: str) -> int:
    """Print a job's log as it comes; 0 when it succeeds, 1 when it fails or is stopped."""
    client = connect(address)

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        asyncio.run(tail())
        status, message = client.get_job_status(job), client.get_job_info(job).message
    except KeyboardInterrupt:
        print(f"\ndetached: {job} goes on\n{how_to_attach(address, job)}", file=sys.stderr)
        return 0
    except Exception as error:
        raise _told(error, address) from error
    print(f"job {job}: {status}", flush=True)
    if str(status) == "SUCCEEDED":
        return 0
    print(" ".join((message or "").split())[:500], file=sys.stderr)
    return 1


def how_to_attach(address: str, job: str) -> str:
    return (
        f"follow it:  inpaint submit --attach {job} --address {address}\n"
        f"stop it:    ray job stop {job} --address {address}"
    )


def _told(error: Exception, address: str) -> SubmitError:
    text = " ".join(str(error).split())
    low = text.lower()
    if any(word in low for word in ("401", "unauthorized", "authentication", "token")):
        return SubmitError(f"the cluster at {address} does not take the token; it is looked for in {TOKEN}")
    if any(word in low for word in ("connect", "refused", "timed out", "resolve")):
        return SubmitError(f"no Ray dashboard answers at {address}: is it up, and the port forwarded?")
    return SubmitError(f"the cluster at {address} refused: {text[:300] or type(error).__name__}")
