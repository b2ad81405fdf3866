"""`inpaint cluster leave` against a head that is not there: which nodes it announces, until when, and what it says."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import services
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from pipelines.__main__ import main
from pipelines.cluster import leaving, loopback
from pipelines.cluster.leaving import LeaveError, leave

HEAD, HERE, ELSEWHERE = (ray.NodeID(bytes([number]) * 28) for number in (1, 2, 3))


class Head:
    """Stands for Ray's client of the head: three nodes, of which the head and one worker are on this machine."""

    refuses = ""

    def __init__(self) -> None:
        self.drained: list[tuple[Any, ...]] = []
        self.nodes = {node: SimpleNamespace(is_head_node=node == HEAD) for node in (HEAD, HERE, ELSEWHERE)}

    def get_all_node_info(self, **options: Any) -> dict[Any, Any]:
        return self.nodes

    def drain_node(self, *arguments: Any, timeout: float) -> tuple[bool, str]:
        self.drained.append(arguments)
        return not self.refuses, self.refuses


@pytest.fixture
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    found = Head()
    monkeypatch.setattr(services.ray_constants, "ENABLE_RAY_CLUSTER", False)  # 127.0.0.1 stays what it is
    for key, value in loopback.SETTINGS.items():  # which `leave` sets for an address on loopback
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: found)
    monkeypatch.setattr(services, "find_node_ids", lambda: {HEAD.hex(), HERE.hex(), "ab" * 28})
    return found


def test_the_workers_of_this_machine_leave_and_no_other_node(head: Head, address: str) -> None:
    before = time.time()
    assert leave(90, address) == 1
    ((node, reason, message, deadline),) = head.drained
    assert (node, reason) == (HERE.hex(), DRAIN_NODE_REASON_PREEMPTION)
    assert message
    assert deadline / 1000 == pytest.approx(before + 90, abs=5)


def test_waiting_ends_with_the_node(head: Head, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([{HERE.hex()}, {HERE.hex()}, {HERE.hex()}, set()])
    monkeypatch.setattr(services, "find_node_ids", lambda: next(looks))
    monkeypatch.setattr(leaving, "POLL", 0.01)
    assert leave(60, address, wait=True) == 1
    assert next(looks, None) is None


def test_waiting_ends_with_the_seconds(head: Head, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "POLL", 0.01)
    began = time.monotonic()
    assert leave(1, address, wait=True) == 1
    assert 0.9 < time.monotonic() - began < 5


def test_a_machine_without_a_worker_is_told(head: Head, address: str) -> None:
    head.nodes.pop(HERE)
    with pytest.raises(LeaveError, match=f"no node of the cluster at {address} runs here"):
        leave(90, address)
    assert not head.drained


def test_a_head_that_refuses_is_quoted(head: Head, address: str) -> None:
    head.refuses = "the node is busy"
    with pytest.raises(LeaveError, match="the node is busy"):
        leave(90, address)


def test_the_command_says_it_in_one_line(
    head: Head, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SystemExit) as end:
        main(["cluster", "leave", "--seconds", "30"])
    assert end.value.code == 0
    assert "1 node of this machine" in capsys.readouterr().out
    assert len(head.drained) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(SystemExit) as end:
        main(["cluster", "leave", "--address", f"127.0.0.1:{free}"])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no cluster answers at 127.0.0.1:{free}" in line
