"""Which nodes of the Ray cluster were lost since the last look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

EXPECTED_TERMINATION, AUTOSCALER_DRAIN_IDLE = 1, 4
"""Death reasons of nodes that were shut down in order, which is no loss: numbers of Ray's NodeDeathInfo.Reason."""


class LostNodes:
    """Compares the entries of `ray.nodes()` with those of the call before. Nodes that died before the first call are old."""

    def __init__(self) -> None:
        self._known: set[str] | None = None

    def describe_new(self, nodes: Iterable[Mapping[str, Any]]) -> str:
        """One line about the nodes that died since the last call; '' if none did."""
        entries = list(nodes)
        dead = {node["NodeID"]: node for node in entries if not node["Alive"]}
        known = dead.keys() if self._known is None else self._known
        self._known = set(dead)
        lost = [
            node
            for id, node in dead.items()
            if id not in known
            and node.get("DeathReason") not in (EXPECTED_TERMINATION, AUTOSCALER_DRAIN_IDLE)
        ]
        if not lost:
            return ""
        names = ", ".join(sorted(map(node_name, lost)))
        alive = len(entries) - len(dead)
        subject = f"node {names} was lost" if len(lost) == 1 else f"nodes {names} were lost"
        return f"{subject}; the cluster now has {alive} node{'' if alive == 1 else 's'}"


def node_name(node: Mapping[str, Any]) -> str:
    """A node's address, after its name if it has one of its own."""
    name, address = node.get("NodeName") or "", node["NodeManagerAddress"]
    return f"{name} ({address})" if name not in ("", address) else str(address)
