"""Which dead nodes of a cluster are announced as lost."""

from __future__ import annotations

from typing import Any

from ray.core.generated.common_pb2 import NodeDeathInfo

from pipelines.durable.lost_nodes import LostNodes, node_name


def node(number: int, alive: bool = True, reason: str = "UNEXPECTED_TERMINATION") -> dict[str, Any]:
    """An entry of ray.nodes()."""
    death = {} if alive else {"DeathReason": NodeDeathInfo.Reason.Value(reason)}
    address = f"10.0.0.{number}"
    return {
        "NodeID": str(number),
        "Alive": alive,
        "NodeManagerAddress": address,
        "NodeName": address,
        **death,
    }


def test_a_node_is_announced_once_when_it_dies_during_the_run() -> None:
    lost = LostNodes()
    assert lost.describe_new([node(1), node(2), node(3), node(4, alive=False)]) == ""  # died before the run
    assert lost.describe_new([node(1), node(2, alive=False), node(3), node(4, alive=False)]) == (
        "node 10.0.0.2 was lost; the cluster now has 2 nodes"
    )
    assert lost.describe_new([node(1), node(2, alive=False), node(3), node(4, alive=False)]) == ""
    joined = [node(1), node(2, alive=False), node(3, alive=False), node(5, alive=False), node(6)]
    assert lost.describe_new(joined) == "nodes 10.0.0.3, 10.0.0.5 were lost; the cluster now has 2 nodes"


def test_nodes_that_are_shut_down_in_order_are_not_lost() -> None:
    """By an autoscaler that finds them idle, or by `ray stop`."""
    lost = LostNodes()
    lost.describe_new([node(1), node(2), node(3)])
    ended = [
        node(1),
        node(2, alive=False, reason="AUTOSCALER_DRAIN_IDLE"),
        node(3, alive=False, reason="EXPECTED_TERMINATION"),
    ]
    assert lost.describe_new(ended) == ""
    preempted = [*ended[1:], node(1, alive=False, reason="AUTOSCALER_DRAIN_PREEMPTED")]
    assert lost.describe_new(preempted) == "node 10.0.0.1 was lost; the cluster now has 0 nodes"


def test_a_name_of_its_own_precedes_the_address() -> None:
    assert node_name({"NodeName": "node-1", "NodeManagerAddress": "127.0.0.1"}) == "node-1 (127.0.0.1)"
    assert node_name({"NodeName": "10.0.0.1", "NodeManagerAddress": "10.0.0.1"}) == "10.0.0.1"
