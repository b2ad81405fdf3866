"""The state of a local cluster's nodes, where their processes and the head's list differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.cluster.cluster_state import LocalCluster, Node

STARTED_AT = psutil.Process().create_time()


def cluster(alive: list[str], monkeypatch: pytest.MonkeyPatch, head_lives: bool = True) -> LocalCluster:
    """Four nodes of which the process of the third has ended. alive: the names of those that the head counts."""
    nodes = [Node(name, os.getpid(), STARTED_AT) for name in ("head", "node-1", "node-2", "node-3")]
    nodes[2] = Node("node-2", os.getpid(), STARTED_AT - 1)
    if not head_lives:
        nodes[0] = Node("head", os.getpid(), STARTED_AT - 1)
    entries: list[dict[str, Any]] = [{"nodeName": name, "resourcesTotal": {"CPU": 2.0}} for name in alive]
    monkeypatch.setattr(LocalCluster, "alive_nodes", lambda self: entries)
    return LocalCluster("local", Path("x"), Path("x"), 1, 2, nodes, 4, 2)


def test_a_node_is_alive_if_its_process_runs_and_the_head_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head counts a killed node for some seconds more, and one whose place was taken under another name."""
    local = cluster(["head", "node-1", "node-2", "node-0"], monkeypatch)
    states = [(state.node.name, state.state, state.cpus) for state in local.node_states()]
    assert states == [
        ("head", "alive", 2.0),
        ("node-1", "alive", 2.0),
        ("node-2", "dead", 0.0),
        ("node-3", "not in the cluster", 0.0),
    ]
    assert local.alive_count() == 2


def test_no_node_of_a_cluster_without_a_head_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    local = cluster(["head", "node-1"], monkeypatch, head_lives=False)
    outside = "not in the cluster"
    assert [state.state for state in local.node_states()] == ["dead", outside, "dead", outside]
    assert local.alive_count() == 0
