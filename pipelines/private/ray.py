"""Private APIs of Ray 2.60, imported when they are used; the base classes of ours are in ray_train.py."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PRIVATE_APIS: dict[str, tuple[str, str]] = {
    "ray._private.ray_constants.ENABLE_RAY_CLUSTER": (
        "Ray reads RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER once, at import, and uses this constant afterwards",
        "if Ray was imported before, its servers listen on all networks of the machine instead of on loopback",
    ),
    "ray._private.services.get_node_ip_address": (
        "`ray start --address` calls it for the node's own address",
        "a local cluster's second node cannot join on loopback: `inpaint cluster up --nodes 2` fails",
    ),
    "ray._private.services.find_node_ids": (
        "the ids of the nodes whose raylets run on this machine",
        "`inpaint cluster leave` does not know which nodes leave",
    ),
    "ray._raylet.setproctitle": (
        "names a trial's process; Ray Tune's own name is that of its class",
        "`ps` shows every trial of a sweep as ray::ImplicitFunc.train",
    ),
    "ray._raylet.GcsClient": (
        "a client of the head that is not a driver, so that it does not join the cluster",
        "`inpaint cluster leave` cannot announce a node's shutdown",
    ),
    "ray._raylet.InnerGcsClient.get_all_node_info": ("the cluster's living nodes", "as without GcsClient"),
    "ray._raylet.InnerGcsClient.drain_node": ("the announcement itself", "as without GcsClient"),
    "ray.core.generated.autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION": (
        "the drain reason that Ray passes on to training workers",
        "training writes no checkpoint before its node shuts down",
    ),
    "ray.core.generated.gcs_pb2.GcsNodeInfo": (
        "the state of a node: alive or dead",
        "`inpaint cluster leave` announces dead nodes, and Ray refuses",
    ),
    "ray._private.services.find_gcs_addresses": (
        "the heads that run on this machine, from its list of processes",
        "for RAY_ADDRESS=auto, none, one and several clusters cannot be told apart",
    ),
    "ray._private.services.find_gcs_addresses.cache_clear": (
        "it caches its first result",
        "a process that called it before a cluster started never finds that cluster",
    ),
    "ray._private.services.find_bootstrap_address": (
        "the address that the last `ray start` wrote to a file, which RAY_ADDRESS=auto means",
        "RAY_ADDRESS=auto is refused when two clusters run, though Ray would join the last one",
    ),
    "ray._private.authentication.authentication_token_setup.maybe_enable_token_auth_if_token_available": (
        "Ray's own rule for `auto`: authenticate if there is a token",
        "a cluster with a token in ~/.ray/auth_token refuses RAY_ADDRESS=auto",
    ),
    "ray._private.authentication.authentication_token_setup.logger": (
        "the log of that rule",
        "lines of Ray's log before our first line",
    ),
    "ray._private.grpc_utils.init_grpc_channel": (
        "a channel with the token and the certificates that Ray itself uses",
        "a cluster with a token or TLS cannot be pinged, and is taken for no Ray at all",
    ),
    "ray.core.generated.gcs_service_pb2.GetAllNodeInfoRequest": (
        "a ping within seconds: ray.init tries a dead head for minutes and logs each attempt",
        "a wrong RAY_ADDRESS costs minutes, and a cluster on loopback cannot be told from another",
    ),
    "ray.core.generated.gcs_service_pb2_grpc.NodeInfoGcsServiceStub": ("the same", "the same"),
    "ray.core.generated.ray_client_pb2.ClusterInfoRequest": (
        "a ping of a ray:// server",
        "a wrong ray:// address costs minutes",
    ),
    "ray.core.generated.ray_client_pb2.ClusterInfoType": ("the same", "the same"),
    "ray.core.generated.ray_client_pb2_grpc.RayletDriverStub": ("the same", "the same"),
    "ray.train.torch.config.TorchConfigContextManager": (
        "the context in which TorchTrainer runs the training loop: it sets the worker's device",
        "of several workers on one machine, all compute on the first GPU",
    ),
    "ray.train.torch.config._set_torch_distributed_env_vars": (
        "sets the environment variables that torchrun would set",
        "workers do not know their local rank",
    ),
    "ray.train.torch.config._setup_torch_process_group": (
        "joins the process group with Ray's timeouts and NCCL settings",
        "a lost worker blocks the others for torch's timeout of half an hour",
    ),
    "ray.train.torch.config._shutdown_torch": (
        "leaves the process group and empties the GPU's memory cache",
        "the next worker group on the machine finds the memory in use",
    ),
    "ray.init(_temp_dir)": (
        "the folder of a Ray started here: its socket paths may have at most 107 bytes, and no other user owns it",
        "a private Ray uses /tmp/ray, which another user may own, or fails in a long TMPDIR",
    ),
    "ray._private.ray_logging.stdout_deduplicator.skip_re": (
        "the pattern of RAY_DEDUP_LOGS_SKIP_REGEX, which Ray reads once, at import: lines that a driver does not print",
        "when a node dies, a page of its raylet's log, with [state-dump] lines, appears among the run's progress",
    ),
    "ray._private.runtime_env.packaging": (
        "the name of a logger that reports every upload",
        "lines of Ray's log before the first line of a submitted job",
    ),
    "ray.dashboard.modules.job.sdk": ("the same, of the Jobs API", "the same"),
    "ray.dashboard.modules.dashboard_sdk": ("the same", "the same"),
}


@contextmanager
def loopback_node_address() -> Iterator[None]:
    """Inside this context, Ray's nodes have the address 127.0.0.1, whatever the environment was when Ray was imported."""
    from ray._private import ray_constants

    previous = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = previous


def set_node_address(address: str) -> None:
    """For the rest of this process, a `ray start --address`: give the node this address and let it join."""
    from ray._private import ray_constants, services

    ray_constants.ENABLE_RAY_CLUSTER = True
    services.get_node_ip_address = lambda _=None: address


def local_node_ids() -> set[str]:
    """Ids (hexadecimal) of the nodes whose raylets run on this machine."""
    from ray._private.services import find_node_ids

    return set(find_node_ids())


class HeadClient:
    """A client of the head at HOST:PORT; `timeout`: seconds per request."""

    def __init__(self, head: str, timeout: float) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        self._client, self._timeout = GcsClient(address=head), timeout

    def worker_ids(self) -> set[str]:
        """Ids (hexadecimal) of the alive nodes without the head."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

        alive = self._client.get_all_node_info(timeout=self._timeout, state_filter=GcsNodeInfo.ALIVE)
        return {number.hex() for number, node in alive.items() if not node.is_head_node}

    def drain_node(self, node: str, message: str, deadline: float) -> tuple[bool, str]:
        """Announce that a node shuts down at `deadline` (seconds since 1970); returns (accepted, reason if not)."""
        from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
            DRAIN_NODE_REASON_PREEMPTION,
        )

        accepted, reason = self._client.drain_node(
            node, DRAIN_NODE_REASON_PREEMPTION, message, int(deadline * 1000), timeout=self._timeout
        )
        return accepted, reason


def local_head_addresses() -> tuple[list[str], str | None]:
    """Addresses of the heads that run on this machine, and of the one that `ray start` started last, if it runs."""
    from ray._private import services

    services.find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]
    heads = sorted(services.find_gcs_addresses())
    last = services.find_bootstrap_address(None)
    return heads, None if last is None else str(last)


def enable_token_auth() -> None:
    """Authenticate with a token if there is one, as Ray does for the address `auto` only."""
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.logger.setLevel("ERROR")
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def alive_node_addresses(head: str, timeout: float) -> list[str]:
    """Addresses of the alive nodes of the cluster whose head is at HOST:PORT. Raises grpc.RpcError."""
    from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    request = gcs_service_pb2.GetAllNodeInfoRequest()  # type: ignore[attr-defined]
    alive = gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
    with _channel(head) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        answer = stub.GetAllNodeInfo(request, timeout=timeout)
    return [node.node_manager_address for node in answer.node_info_list if node.state == alive]


def ping_client_server(server: str, timeout: float) -> None:
    """Ping the ray:// server at HOST:PORT. Raises grpc.RpcError."""
    from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

    request = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)  # type: ignore[attr-defined]
    with _channel(server) as channel:
        ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(request, timeout=timeout)


def _channel(address: str) -> Any:
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])


RAYLET_REPORTS = "|".join(
    (
        r"Raylet is terminated",
        r"\[state-dump\]",
        r"A worker died or was killed while",
        r"has been marked dead because",
        r"worker processes have been started on node",
    )
)
"""Of dead processes and nodes, with the ends of their logs, and of busy nodes: printed whatever log_to_driver says."""


@contextmanager
def hidden_raylet_reports() -> Iterator[None]:
    """Inside this context, drivers do not print Ray's reports of dead or busy nodes and of dead workers."""
    from ray._private.ray_logging import stdout_deduplicator

    previous = stdout_deduplicator.skip_re
    patterns = [RAYLET_REPORTS, *([previous.pattern] if previous else [])]
    stdout_deduplicator.skip_re = re.compile("|".join(patterns))
    try:
        yield
    finally:
        stdout_deduplicator.skip_re = previous


def set_process_title(title: str) -> None:
    """The name of this Ray worker process in `ps`, until Ray sets that of its next task."""
    import ray._raylet

    ray._raylet.setproctitle(title)  # type: ignore[attr-defined]


def temp_dir_option(folder: str) -> dict[str, Any]:
    """Option of ray.init: the folder for the files and sockets of a Ray that is started here."""
    return {"_temp_dir": folder}


def silence_job_logging() -> None:
    """Log only warnings and errors while a job is submitted."""
    for name in (
        "ray.dashboard.modules.job.sdk",
        "ray.dashboard.modules.dashboard_sdk",
        "ray._private.runtime_env.packaging",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)


def torch_worker_context() -> Any:
    """The class of the context manager in which a torch worker runs its loop."""
    from ray.train.torch.config import TorchConfigContextManager

    return TorchConfigContextManager


def set_torchrun_env() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE and the other variables of torchrun for this worker."""
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()


def init_process_group(backend: str, rank: int, world_size: int) -> None:
    """Join the process group at MASTER_ADDR and MASTER_PORT; returns when all ranks have joined."""
    from ray.train.torch.config import _setup_torch_process_group

    _setup_torch_process_group(backend, rank, world_size, "env://")


def shutdown_torch(destroy_process_group: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group)
