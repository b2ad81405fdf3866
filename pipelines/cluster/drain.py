"""`inpaint cluster leave`: announce this machine's shutdown to its cluster, so that trainings write a checkpoint first."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext

from pipelines.cluster import loopback
from pipelines.cluster.ray_address import is_cluster_address, resolve_head
from pipelines.private import ray as ray_internals

ANSWER_SECONDS = 5.0  # for an answer of the head
POLL_SECONDS = 1.0  # interval between checks whether the nodes have ended


class DrainError(RuntimeError):
    """A shutdown that cannot be announced; one line."""


def drain_local_nodes(seconds: int, address: str | None = None, wait: bool = False) -> int:
    """Announce that this machine's worker nodes of the cluster at HOST:PORT end within `seconds`; returns their number.

    Ray then starts nothing new on them, and trainings write a checkpoint. The head node is never drained. With `wait`,
    return when the nodes have ended (Ray ends them once nothing runs there) or after `seconds`. Raises DrainError, and
    HeadError if no cluster answers.
    """
    given, source = (address or "").strip(), "--address"
    if not given:
        given, source = os.environ.get("RAY_ADDRESS", "").strip(), "RAY_ADDRESS"
    if not is_cluster_address(given):
        given, source = "auto", "--address"
    head = resolve_head(given, source, "give --address HOST:6379")
    if "://" in head.address:
        raise DrainError(
            f"{source}={given} is not the head's own address, which is needed here: give --address HOST:6379"
        )
    with loopback.ray_on_loopback() if head.on_loopback else nullcontext():
        return _drain(head.address, seconds, wait)


def _drain(head: str, seconds: int, wait: bool) -> int:
    client = ray_internals.HeadClient(head, ANSWER_SECONDS)
    node_ids = client.worker_ids() & ray_internals.local_node_ids()
    if not node_ids:
        raise DrainError(f"no worker node of the cluster at {head} runs on this machine")
    deadline = time.time() + seconds
    for node_id in node_ids:
        accepted, reason = client.drain_node(node_id, "the machine shuts down", deadline)
        if not accepted:
            raise DrainError(f"the head at {head} refuses to drain node {node_id}: {reason}")
    while wait and time.time() < deadline and node_ids & ray_internals.local_node_ids():
        time.sleep(POLL_SECONDS)
    return len(node_ids)
