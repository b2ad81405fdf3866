"""The state of a local cluster: its nodes, stored while it runs, and which of them are alive."""

from __future__ import annotations

import json
import os
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from data_prep.network import bypass_proxy_for_loopback
from pipelines.cluster import folders, loopback

PROCESS_MARK = "INPAINT_CLUSTER"  # variable in the environment of every process that descends from a node

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


@dataclass(frozen=True)
class NodeState:
    """Whether a node is alive: its process runs, and the head counts it. `cpus`: that it offers now."""

    node: Node
    state: str  # alive, dead, or "not in the cluster": it is starting or ending
    cpus: float


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

    def node_states(self) -> list[NodeState]:
        """The state of each node, from one look at its process and at the head's list."""
        in_cluster = {str(node["nodeName"]): node for node in self.alive_nodes()} if self.is_running else {}
        states = []
        for node in self.nodes:
            entry, is_alive = in_cluster.get(node.name), node.is_alive
            state = ("alive" if entry else "not in the cluster") if is_alive else "dead"
            cpus = float((entry or {}).get("resourcesTotal", {}).get("CPU", 0)) if is_alive else 0.0
            states.append(NodeState(node, state, cpus))
        return states

    def alive_count(self) -> int:
        """The number of nodes whose process runs and that the head counts."""
        return sum(node.state == "alive" for node in self.node_states())

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
    return folders.state_folder("clusters")


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
