"""`inpaint cluster leave`: a machine that is about to end says so to its cluster, and trainings leave a checkpoint first."""

from __future__ import annotations

import os
import socket
import time

from pipelines.cluster import loopback

REACH = 5.0  # seconds within which a head accepts a connection and answers
POLL = 1.0  # seconds between two looks at whether a node has ended


class LeaveError(RuntimeError):
    """An end that cannot be announced; one line."""


def leave(seconds: int, address: str | None = None, wait: bool = False) -> int:
    """Announce that this machine's nodes of the cluster at HOST:PORT end in so many seconds; how many they are.

    Ray then begins nothing new here, and trainings leave a checkpoint. A head does not leave. `wait` returns when the
    nodes have ended, as Ray ends them once nothing runs there, and at the latest after the seconds. Raises LeaveError.
    """
    if loopback.is_loopback(address or os.environ.get("RAY_ADDRESS", "")):
        for key, value in loopback.SETTINGS.items():
            os.environ.setdefault(key, value)  # before Ray is imported: it looks once
    from ray._private.services import canonicalize_bootstrap_address_or_die, find_node_ids
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    head = canonicalize_bootstrap_address_or_die(address or "auto")
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except OSError as error:  # Ray's own client waits for minutes
        raise LeaveError(f"no cluster answers at {head} ({error}); give --address HOST:6379") from None
    client = GcsClient(address=head)
    alive = client.get_all_node_info(timeout=REACH, state_filter=GcsNodeInfo.ALIVE)
    workers = {number.hex() for number, node in alive.items() if not node.is_head_node}
    leaving = workers & set(find_node_ids())  # of the raylets that run here
    if not leaving:
        raise LeaveError(f"no node of the cluster at {head} runs here, besides its head")
    end = time.time() + seconds
    for number in leaving:
        accepted, reason = client.drain_node(
            number, DRAIN_NODE_REASON_PREEMPTION, "the machine ends", int(end * 1000), timeout=REACH
        )
        if not accepted:
            raise LeaveError(f"the head at {head} does not let node {number} go: {reason}")
    while wait and time.time() < end and leaving & set(find_node_ids()):
        time.sleep(POLL)
    return len(leaving)
