"""A multi-node Ray cluster on this machine: loopback only, token-protected, removed completely by `stop`."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipelines import notices
from pipelines.cluster import loopback, session
from pipelines.cluster.cluster_state import PROCESS_MARK, Node, state_folder
from pipelines.cluster.cluster_state import LocalCluster as LocalCluster
from pipelines.cluster.cluster_state import find_by_address as find_by_address
from pipelines.cluster.cluster_state import load as load
from pipelines.cluster.folders import cluster_folder, forkserver_variables
from pipelines.cluster.services import write_private_file

START_SECONDS = 90.0  # for a cluster to start
SETTLE_SECONDS = 10.0  # for nodes that end or join
GRACE_SECONDS = 8.0  # for its processes to end before they are killed
OBJECT_STORE_BYTES = 256 * 2**20  # per node: all nodes share one machine's memory
HEALTH_ENV_VARS = {"RAY_health_check_period_ms": "1000"}  # a dead node is detected after 5 s instead of 15


class ClusterError(RuntimeError):
    """A local cluster that cannot be started or stopped; one line."""


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Lock a cluster for one `up` or `down` at a time. Raises ClusterError if it is locked or the name is invalid."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", name):
        raise ClusterError(f"--name {name}: give up to 32 letters, digits, - and _")
    state_folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(state_folder() / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"cluster {name} is being started or stopped by another process; wait for it"
            ) from None
        yield


def start(name: str, nodes: int, cpus_per_node: int, progress: Any = lambda *_: None) -> LocalCluster:
    """Start `nodes` nodes of `cpus_per_node` CPUs each and wait until the head counts them all.

    Raises ClusterError in one line, after it has stopped whatever was started.
    """
    folder = state_folder() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    ray_folder, note = cluster_folder()
    if note:
        notices.note(note)
    port, dashboard_port, client_port = loopback.free_ports(3)
    cluster = LocalCluster(name, folder, ray_folder, port, dashboard_port, [], nodes, cpus_per_node)
    write_private_file(cluster.token_file, secrets.token_hex(32))
    cluster.save()
    arguments = [
        "--head",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        "--include-dashboard=true",
    ]
    arguments += [f"--dashboard-host={loopback.LOOPBACK}", f"--dashboard-port={dashboard_port}"]
    deadline = time.monotonic() + START_SECONDS
    try:
        _start_node(cluster, "head", arguments)
        while not _accepts_connections(port):
            _check_startup(cluster, deadline, "the head does not answer")
        start_missing_nodes(cluster, progress)
    except BaseException:
        stop(cluster)
        raise
    return cluster


def repair(cluster: LocalCluster, nodes: int | None = None, progress: Any = lambda *_: None) -> int:
    """Start the nodes that a running cluster lacks, also for a larger number of `nodes`; returns how many it started.

    A node that is about to end or to join is waited for. Raises ClusterError.
    """
    _wait_until(
        lambda: all(state.state != "not in the cluster" for state in cluster.node_states()), SETTLE_SECONDS
    )
    cluster.target_nodes = max(cluster.target_nodes, nodes or 0)
    return start_missing_nodes(cluster, progress)


def start_missing_nodes(cluster: LocalCluster, progress: Any = lambda *_: None) -> int:
    """Start a node for each that is missing or has died, and wait until the head counts `target_nodes` living ones.

    Returns how many it started. Each gets a new name: the head counts a node that was killed for some seconds more.
    """
    for node in cluster.nodes:
        if not node.is_alive:
            shutil.rmtree(cluster.ray_folder / node.name, ignore_errors=True)
    cluster.nodes = [node for node in cluster.nodes if node.is_alive]
    names = (f"node-{number}" for number in itertools.count(1))
    new_names = (name for name in names if not (cluster.folder / f"{name}.log").exists())
    missing = cluster.target_nodes - len(cluster.nodes)
    for _ in range(missing):
        _start_node(cluster, next(new_names), [f"--address={cluster.address}"])
    deadline = time.monotonic() + START_SECONDS
    while (alive := cluster.alive_count()) < cluster.target_nodes:
        progress(alive, cluster.target_nodes)
        _check_startup(cluster, deadline, f"{alive} of {cluster.target_nodes} nodes are up")
    return missing


def stop(cluster: LocalCluster) -> int:
    """End all processes of the cluster, and no others, and delete its files; returns the number of processes."""
    count = len(cluster.processes())
    for node in cluster.nodes:
        if node.is_alive:
            os.kill(node.pid, signal.SIGTERM)  # `ray start` ends its children in order
    _wait_until(lambda: not any(node.is_alive for node in cluster.nodes), GRACE_SECONDS)

    def kill_remaining() -> bool:
        remaining = cluster.processes()
        for process in remaining:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return not remaining

    if not _wait_until(kill_remaining, GRACE_SECONDS):
        raise ClusterError(f"process {cluster.processes()[0].pid} of cluster {cluster.name} does not end")
    shutil.rmtree(cluster.ray_folder, ignore_errors=True)
    shutil.rmtree(cluster.folder, ignore_errors=True)
    return count


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def cluster_env_vars(cluster: LocalCluster) -> dict[str, str]:
    """The environment variables of a node, a driver or a Jobs API client of the cluster."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_file),
        **{
            key: loopback.LOOPBACK_ENV_VARS[key]
            for key in loopback.LOOPBACK_ENV_VARS
            if key.startswith("RAY_")
        },
    }


def _start_node(cluster: LocalCluster, name: str, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    command += [
        f"--node-ip-address={loopback.LOOPBACK}",
        f"--node-name={name}",
        f"--num-cpus={cluster.cpus_per_node}",
    ]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    # Ray makes its folder writable by all users; the parent is not.
    command += [f"--temp-dir={cluster.ray_folder}/{name}"]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")
    }
    bin_folder = str(Path(sys.executable).parent)
    environment |= (
        session.SESSION_ENV_VARS
        | HEALTH_ENV_VARS
        | loopback.LOOPBACK_ENV_VARS
        | cluster_env_vars(cluster)
        | {PROCESS_MARK: str(cluster.ray_folder)}
    )
    environment |= forkserver_variables(cluster.ray_folder)
    environment |= {"PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    # Otherwise its workers try the address that another Ray of this machine left behind, for 12 s per training.
    environment["RAY_API_SERVER_ADDRESS"] = cluster.jobs_url
    if name != "head":
        environment["RAY_START_HOOK"] = f"{loopback.__name__}.{loopback.join_on_loopback.__name__}"
    with open(cluster.folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=cluster.ray_folder,
            start_new_session=True,
        )
    cluster.nodes.append(Node(name, process.pid, psutil.Process(process.pid).create_time()))
    cluster.save()


def _check_startup(cluster: LocalCluster, deadline: float, problem: str) -> None:
    """Wait 0.2 s. Raises ClusterError if a node has died or the deadline has passed."""
    for node in cluster.nodes:
        if not node.is_alive:
            last = _last_line(cluster.folder / f"{node.name}.log")
            raise ClusterError(f"{node.name} of cluster {cluster.name} ended: {last}")
    if time.monotonic() > deadline:
        raise ClusterError(f"cluster {cluster.name}: {problem} after {START_SECONDS:.0f} s; try fewer nodes")
    time.sleep(0.2)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _accepts_connections(port: int) -> bool:
    try:
        with socket.create_connection((loopback.LOOPBACK, port), timeout=1):
            return True
    except OSError:
        return False
