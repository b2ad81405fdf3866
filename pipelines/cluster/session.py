"""Ray sessions: join the cluster at RAY_ADDRESS, or start Ray on this machine for one command."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from models import MODELS_ENV_VAR
from pipelines import notices
from pipelines.cluster import loopback
from pipelines.cluster.folders import private_ray_folder
from pipelines.cluster.ray_address import resolve_head
from pipelines.environment import set_environment
from pipelines.errors import known_cause
from pipelines.private import ray as ray_internals

SESSION_ENV_VARS = {
    # A reported checkpoint is registered when the controller polls (2 s by default); a crash before that loses it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # How long an elastic training that lost a node waits for its resources, until Ray has noticed: 60 s by default.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # some clouds announce a shutdown only half a minute ahead
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_maximum_startup_concurrency": "8",  # a local Ray warns when it starts a few times as many processes
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Some S3 servers refuse the newest checksums, which MLflow would send with artifacts.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "TQDM_DISABLE": "1",
    "WDS_SECURE": "1",
}


JOB_NAME = "job_name"
"""The key of a job's metadata with the name that Ray's dashboard shows."""


class SessionError(RuntimeError):
    """Ray cannot be started or joined; one line with Ray's message."""


SINGLE_NODE_ENV_VARS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""For a Ray of one node, which ends with its driver."""


@contextmanager
def ray_session(debug: bool = False, job_name: str = "") -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS if it is set; otherwise start Ray on this machine, without a dashboard.

    `job_name`: shown for this driver in Ray's dashboard and by `ray job list`; a submitted job has its own. Without
    `debug`, Ray's reports of dead processes and nodes, with pages of its logs, are not printed.

    Unlike `ray.init()`, never joins a cluster that merely runs on this machine. Ray is on loopback if it is started here
    or if its cluster is; the variables for that are restored afterwards. Raises HeadError if no cluster answers,
    FolderError if there is no folder for Ray's sockets, SessionError for other errors of Ray.
    """
    head = resolve_head(os.environ.get("RAY_ADDRESS"))
    notices.announce(
        "starting Ray on this machine" if head.starts_ray else f"joining the Ray cluster at {head.address}"
    )
    for key, value in SESSION_ENV_VARS.items():
        os.environ.setdefault(key, value)
    import ray
    from ray.job_config import JobConfig

    if ray.is_initialized():
        raise SessionError("this process is already connected to Ray: call ray.shutdown() first")
    options: dict[str, Any] = {"job_config": JobConfig(metadata={JOB_NAME: job_name})}
    if head.starts_ray:
        folder, note = private_ray_folder()
        options |= {"include_dashboard": False, **ray_internals.temp_dir_option(folder)}
        if note:
            notices.note(note)
    elif registered := os.environ.get(MODELS_ENV_VAR):  # a Ray that is started here inherits the environment
        options |= {"runtime_env": {"env_vars": {MODELS_ENV_VAR: registered}}}
    level = logging.INFO if debug else logging.ERROR
    with ExitStack() as stack:
        if head.on_loopback:
            stack.enter_context(loopback.ray_on_loopback())
        if head.starts_ray:
            stack.enter_context(set_environment(SINGLE_NODE_ENV_VARS))
        if not debug:
            stack.enter_context(ray_internals.hidden_raylet_reports())
        previous_handler = signal.getsignal(signal.SIGTERM)
        stack.callback(_set_sigterm_handler, previous_handler)
        try:
            ray.init(address=head.address, log_to_driver=debug, logging_level=level, **options)
        except Exception as error:
            action = (
                "be started on this machine" if head.starts_ray else f"join the cluster at {head.address}"
            )
            raise SessionError(
                f"Ray could not {action}: {known_cause(error) or _error_line(error)}"
            ) from error
        # Ray's handler in C++ aborts the process 3 s after SIGTERM, which is too soon to cancel steps and to release
        # leases. Setting a handler in Python, if need be Ray's own, replaces it.
        is_default = previous_handler in (signal.SIG_DFL, None)
        _set_sigterm_handler(signal.getsignal(signal.SIGTERM) if is_default else previous_handler)
        try:
            yield
        finally:
            ray.shutdown()


def _set_sigterm_handler(handler: Any) -> None:
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and handler is not None:  # None: set by a program that embeds Python
        signal.signal(signal.SIGTERM, handler)


def _error_line(error: Exception) -> str:
    """Ray's message in one line; of a server's traceback, its last line."""
    message, _, traceback = str(error).partition("Traceback (most recent call last):")
    last_line = [line.strip() for line in traceback.splitlines() if line.strip()][-1:]
    return " ".join([*message.split(), *last_line]) or type(error).__name__
