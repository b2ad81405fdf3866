"""A multi-node Ray cluster on this machine: loopback only, token-protected, removed completely by `stop`."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from data_prep.network import bypass_proxy_for_loopback
from pipelines import notices
from pipelines.cluster import loopback, session
from pipelines.cluster.folders import cluster_folder, forkserver_variables
from pipelines.cluster.services import write_private_file

START_SECONDS = 90.0  # for a cluster to start
GRACE_SECONDS = 8.0  # for its processes to end before they are killed
OBJECT_STORE_BYTES = 256 * 2**20  # per node: all nodes share one machine's memory
HEALTH_ENV_VARS = {"RAY_health_check_period_ms": "1000"}  # a dead node is detected after 5 s instead of 15
PROCESS_MARK = "INPAINT_CLUSTER"  # variable in the environment of every process that descends from a node


class ClusterError(RuntimeError):
    """A local cluster that cannot be started or stopped; one line."""


_STORED = {
    "started_at": "began",
    "ray_folder": "temporary",
    "dashboard_port": "dashboard",
    "target_nodes": "wanted",
    "cpus_per_node": "cpus",
}
"""field of Node or LocalCluster -> its key in cluster.json"""


@dataclass(frozen=True)
class Node:
    """One process `ray start --block`: its id, and its start time, as process ids are reused."""

    name: str
    pid: int
    started_at: float

    @property
    def is_alive(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return process.create_time() == self.started_at and process.status() != psutil.STATUS_ZOMBIE
        return False


@dataclass
class LocalCluster:
    """The state of a cluster, stored in `folder`/cluster.json before its first process starts."""

    name: str
    folder: Path
    ray_folder: Path  # Ray's files; a short path, as sockets' paths have at most 107 bytes
    port: int  # of the head node
    dashboard_port: int  # of the dashboard and the Jobs API
    nodes: list[Node]
    target_nodes: int
    cpus_per_node: int

    @property
    def address(self) -> str:
        return f"{loopback.LOOPBACK}:{self.port}"

    @property
    def jobs_url(self) -> str:
        return f"http://{loopback.LOOPBACK}:{self.dashboard_port}"

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def is_running(self) -> bool:
        return bool(self.nodes) and self.nodes[0].is_alive

    def processes(self) -> list[psutil.Process]:
        """All processes that descend from a node, also those whose parents have ended."""
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(PROCESS_MARK) == str(self.ray_folder):
                    processes.append(process)
        return processes

    def alive_count(self) -> int:
        """The number of alive nodes according to the head."""
        return len(self.alive_nodes())

    def alive_nodes(self) -> list[dict[str, Any]]:
        """The head's entries of its alive nodes (nodeName, nodeId...); empty if it does not answer."""
        bypass_proxy_for_loopback()
        request = urllib.request.Request(
            f"{self.jobs_url}/nodes?view=summary",
            headers={"Authorization": f"Bearer {self.token_file.read_text()}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                raylets = [node["raylet"] for node in json.load(response)["data"]["summary"]]
        except (OSError, ValueError, KeyError):
            return []
        return [raylet for raylet in raylets if raylet.get("state") == "ALIVE"]

    def save(self) -> None:
        values = asdict(self) | {"folder": str(self.folder), "ray_folder": str(self.ray_folder)}
        values["nodes"] = [_stored(node) for node in values["nodes"]]
        (self.folder / "cluster.tmp").write_text(json.dumps(_stored(values), indent=1))
        os.replace(self.folder / "cluster.tmp", self.folder / "cluster.json")


def _stored(values: dict[str, Any]) -> dict[str, Any]:
    return {_STORED.get(field, field): value for field, value in values.items()}


def _from_stored(stored: dict[str, Any]) -> dict[str, Any]:
    fields = {key: field for field, key in _STORED.items()}
    return {fields.get(key, key): value for key, value in stored.items()}


def state_folder() -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "inpaint" / "clusters"


def load(name: str) -> LocalCluster | None:
    """The cluster of this name, running or not; None if there is none."""
    try:
        stored = json.loads((state_folder() / name / "cluster.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    values = _from_stored(stored)
    values["nodes"] = [Node(**_from_stored(node)) for node in values["nodes"]]
    values |= {name: Path(values[name]) for name in ("folder", "ray_folder")}
    return LocalCluster(**values)


def find_by_address(jobs_url: str) -> LocalCluster | None:
    """The running cluster of this machine whose Jobs API has this URL; None if there is none."""
    for path in sorted(state_folder().glob("*/cluster.json")):
        cluster = load(path.parent.name)
        if (
            cluster
            and cluster.is_running
            and cluster.jobs_url == jobs_url.rstrip("/").replace("localhost", loopback.LOOPBACK)
        ):
            return cluster
    return None


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


def start_missing_nodes(cluster: LocalCluster, progress: Any = lambda *_: None) -> None:
    """Start a node for each that is missing or has died, and wait until the head counts `target_nodes`."""
    cluster.nodes = [node for node in cluster.nodes if node.is_alive]
    used_names = {node.name for node in cluster.nodes}
    free_names = (name for number in itertools.count(1) if (name := f"node-{number}") not in used_names)
    for _ in range(cluster.target_nodes - len(cluster.nodes)):
        name = next(free_names)
        shutil.rmtree(cluster.ray_folder / name, ignore_errors=True)
        _start_node(cluster, name, [f"--address={cluster.address}"])
    deadline = time.monotonic() + START_SECONDS
    while (alive := cluster.alive_count()) < cluster.target_nodes:
        progress(alive, cluster.target_nodes)
        _check_startup(cluster, deadline, f"{alive} of {cluster.target_nodes} nodes are up")


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
