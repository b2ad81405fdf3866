"""A Ray cluster of several real nodes on this machine: on loopback, behind a token, and ended without a trace."""

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
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.cluster import loopback, session
from pipelines.cluster.services import write_private

START = 90.0  # seconds that a cluster may take to start
GRACE = 8.0  # seconds that its processes have to end by themselves
OBJECTS = 256 * 2**20  # bytes of a node's object store: all nodes share one machine's memory
HEALTH = {"RAY_health_check_period_ms": "1000"}  # a dead node is noticed after 5 s instead of 15
MARK = "INPAINT_CLUSTER"  # in the environment of every process that descends from a node


class ClusterError(RuntimeError):
    """A local cluster that cannot be started, found or ended; one line."""


@dataclass(frozen=True)
class Node:
    """One `ray start --block`: its process id, and when that began, as ids are used again."""

    name: str
    pid: int
    began: float

    @property
    def alive(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return process.create_time() == self.began and process.status() != psutil.STATUS_ZOMBIE
        return False


@dataclass
class LocalCluster:
    """What is known of a cluster: kept in `folder`/cluster.json, from before its first process runs."""

    name: str
    folder: Path
    temporary: Path  # Ray's own files; short, as its sockets' paths may have 107 characters
    port: int  # of the head
    dashboard: int  # port of the dashboard and the Jobs API
    nodes: list[Node]
    wanted: int
    cpus: int  # of each node

    @property
    def address(self) -> str:
        return f"{loopback.LOOPBACK}:{self.port}"

    @property
    def jobs(self) -> str:
        return f"http://{loopback.LOOPBACK}:{self.dashboard}"

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def up(self) -> bool:
        return bool(self.nodes) and self.nodes[0].alive

    def processes(self) -> list[psutil.Process]:
        """Every process that descends from a node, whatever became of its parents."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == str(self.temporary):
                    found.append(process)
        return found

    def counted(self) -> int:
        """How many alive nodes the head counts."""
        return len(self.raylets())

    def raylets(self) -> list[dict[str, Any]]:
        """What the head says of its alive nodes (nodeName, nodeId...); nothing when it does not answer."""
        request = urllib.request.Request(
            f"{self.jobs}/nodes?view=summary",
            headers={"Authorization": f"Bearer {self.token.read_text()}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                found = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
        except (OSError, ValueError, KeyError):
            return []
        return [raylet for raylet in found if raylet.get("state") == "ALIVE"]

    def save(self) -> None:
        body = asdict(self) | {"folder": str(self.folder), "temporary": str(self.temporary)}
        (self.folder / "cluster.tmp").write_text(json.dumps(body, indent=1))
        os.replace(self.folder / "cluster.tmp", self.folder / "cluster.json")


def state_folder() -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "inpaint" / "clusters"


def find(name: str) -> LocalCluster | None:
    """The cluster of this name, running or not; None when there is none."""
    try:
        raw = json.loads((state_folder() / name / "cluster.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    nodes = [Node(**node) for node in raw.pop("nodes")]
    folder, temporary = Path(raw.pop("folder")), Path(raw.pop("temporary"))
    return LocalCluster(**raw, nodes=nodes, folder=folder, temporary=temporary)


def of_address(jobs: str) -> LocalCluster | None:
    """The running cluster of this machine whose Jobs API has this address."""
    for path in sorted(state_folder().glob("*/cluster.json")):
        cluster = find(path.parent.name)
        if (
            cluster
            and cluster.up
            and cluster.jobs == jobs.rstrip("/").replace("localhost", loopback.LOOPBACK)
        ):
            return cluster
    return None


@contextmanager
def hold(name: str) -> Iterator[None]:
    """One `up` or `down` of a cluster at a time."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", name):
        raise ClusterError(f"--name {name}: give up to 32 letters, digits, - and _")
    state_folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(state_folder() / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"cluster {name} is being started or ended by another process; wait for it"
            ) from None
        yield


def start(name: str, nodes: int, cpus: int, progress: Any = lambda *_: None) -> LocalCluster:
    """Start `nodes` nodes of `cpus` CPUs each and wait until the head counts them all.

    Raises ClusterError in one line; whatever was started by then is ended.
    """
    folder = state_folder() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    temporary = Path(tempfile.mkdtemp(prefix="inpaint-"))
    port, dashboard, client = loopback.free_ports(3)
    cluster = LocalCluster(name, folder, temporary, port, dashboard, [], nodes, cpus)
    write_private(cluster.token, secrets.token_hex(32))
    cluster.save()
    head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=true"]
    head += [f"--dashboard-host={loopback.LOOPBACK}", f"--dashboard-port={dashboard}"]
    deadline = time.monotonic() + START
    try:
        _launch(cluster, "head", head)
        while not _answers(port):
            _check(cluster, deadline, "the head does not answer")
        replenish(cluster, progress)
    except BaseException:
        end(cluster)
        raise
    return cluster


def replenish(cluster: LocalCluster, progress: Any = lambda *_: None) -> None:
    """Start nodes in the place of those that died, and wait until the head counts all that are wanted."""
    cluster.nodes = [node for node in cluster.nodes if node.alive]
    taken = {node.name for node in cluster.nodes}
    free = (name for number in itertools.count(1) if (name := f"node-{number}") not in taken)
    for _ in range(cluster.wanted - len(cluster.nodes)):
        name = next(free)
        shutil.rmtree(cluster.temporary / name, ignore_errors=True)
        _launch(cluster, name, [f"--address={cluster.address}"])
    deadline = time.monotonic() + START
    while (counted := cluster.counted()) < cluster.wanted:
        progress(counted, cluster.wanted)
        _check(cluster, deadline, f"{counted} of {cluster.wanted} nodes are up")


def end(cluster: LocalCluster) -> int:
    """End every process of the cluster, and nothing else, and delete its files; how many processes there were."""
    count = len(cluster.processes())
    for node in cluster.nodes:
        if node.alive:
            os.kill(node.pid, signal.SIGTERM)  # `ray start` ends what it started, in order
    _until(lambda: not any(node.alive for node in cluster.nodes), GRACE)

    def none_left() -> bool:
        left = cluster.processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return not left

    if not _until(none_left, GRACE):
        raise ClusterError(f"process {cluster.processes()[0].pid} of cluster {cluster.name} does not end")
    shutil.rmtree(cluster.temporary, ignore_errors=True)
    shutil.rmtree(cluster.folder, ignore_errors=True)
    return count


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def environment(cluster: LocalCluster) -> dict[str, str]:
    """What a process needs to belong to the cluster, as a node, a driver or a client of its Jobs API."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
        **{key: loopback.SETTINGS[key] for key in loopback.SETTINGS if key.startswith("RAY_")},
    }


def _launch(cluster: LocalCluster, name: str, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    command += [f"--node-ip-address={loopback.LOOPBACK}", f"--node-name={name}", f"--num-cpus={cluster.cpus}"]
    command += [f"--object-store-memory={OBJECTS}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    command += [f"--temp-dir={cluster.temporary}/{name}"]  # which Ray lets everybody write; not so its parent
    own = {key: value for key, value in os.environ.items() if key not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    bin = str(Path(sys.executable).parent)
    own |= (
        session.SETTINGS | HEALTH | loopback.SETTINGS | environment(cluster) | {MARK: str(cluster.temporary)}
    )
    own |= {"PATH": f"{bin}{os.pathsep}{os.environ.get('PATH', '')}"}
    # or its workers look for the head where another Ray of this machine has left its address, for 12 s a training
    own["RAY_API_SERVER_ADDRESS"] = cluster.jobs
    if name != "head":
        own["RAY_START_HOOK"] = f"{loopback.__name__}.{loopback.join_on_loopback.__name__}"
    with open(cluster.folder / f"{name}.log", "w") as log:
        node = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=own,
            cwd=cluster.temporary,
            start_new_session=True,
        )
    cluster.nodes.append(Node(name, node.pid, psutil.Process(node.pid).create_time()))
    cluster.save()


def _check(cluster: LocalCluster, deadline: float, what: str) -> None:
    """Between two looks at a cluster that starts: whether going on makes sense."""
    for node in cluster.nodes:
        if not node.alive:
            last = _last_line(cluster.folder / f"{node.name}.log")
            raise ClusterError(f"{node.name} of cluster {cluster.name} ended: {last}")
    if time.monotonic() > deadline:
        raise ClusterError(f"cluster {cluster.name}: {what} after {START:.0f} s; try fewer nodes")
    time.sleep(0.2)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((loopback.LOOPBACK, port), timeout=1):
            return True
    except OSError:
        return False
