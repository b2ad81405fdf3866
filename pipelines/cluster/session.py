"""Where Ray runs: the cluster this process belongs to, or a private one on this machine for the time of a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.cluster import loopback

SETTINGS = {
    # A report becomes a checkpoint when the controller polls: 2 s by default, and a crash inside goes one back.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # An elastic training that lost a node asks for its room until Ray has noticed: 60 s by default.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a notice is of half a minute in some clouds
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_maximum_startup_concurrency": "8",  # a local Ray warns when it starts a few times this many processes
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Not every bucket's server takes the newest checksums, which MLflow would send with artifacts.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "TQDM_DISABLE": "1",
    "WDS_SECURE": "1",
}


PRIVATE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # of a Ray of one node, that ends with its driver


@contextmanager
def ray_session(debug: bool = False) -> Iterator[None]:
    """Joins RAY_ADDRESS when it is set; otherwise starts Ray here, without a dashboard, and ends it.

    Never whatever cluster happens to run on this machine: `ray.init()` alone would join that.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    here = loopback.SETTINGS if address == "local" or loopback.is_loopback(address) else {}
    for key, value in {**SETTINGS, **here}.items():
        os.environ.setdefault(key, value)
    import ray

    if address == "local":
        os.environ.update(PRIVATE)
    level = logging.INFO if debug else logging.ERROR
    dashboard = False if address == "local" else None
    ray.init(address=address, include_dashboard=dashboard, log_to_driver=debug, logging_level=level)
    try:
        yield
    finally:
        ray.shutdown()
