"""`inpaint cluster leave` with a fake head: which nodes it drains, until when, and its messages."""

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

from pipelines.cli.main import main
from pipelines.cluster import drain, ray_address
from pipelines.cluster.drain import DrainError, drain_local_nodes

HEAD, HERE, ELSEWHERE = (ray.NodeID(bytes([number]) * 28) for number in (1, 2, 3))


class FakeGcsClient:
    """Ray's client of a head with three nodes, of which the head and one worker run on this machine."""

    refuses = ""

    def __init__(self) -> None:
        self.drained: list[tuple[Any, ...]] = []
        self.nodes = {node: SimpleNamespace(is_head_node=node == HEAD) for node in (HEAD, HERE, ELSEWHERE)}

    def get_all_node_info(self, **options: Any) -> dict[Any, Any]:
        return self.nodes

    def drain_node(self, *arguments: Any, timeout: float) -> tuple[bool, str]:
        self.drained.append(arguments)
        return not self.refuses, self.refuses


pytestmark = pytest.mark.slow  # a port that listens


@pytest.fixture
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> FakeGcsClient:
    client = FakeGcsClient()
    monkeypatch.setattr(ray_address, "_alive_nodes", lambda host_port: ["127.0.0.1"])
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: client)
    monkeypatch.setattr(services, "find_node_ids", lambda: {HEAD.hex(), HERE.hex(), "ab" * 28})
    return client


def test_only_the_workers_of_this_machine_are_drained(head: FakeGcsClient, address: str) -> None:
    before = time.time()
    assert drain_local_nodes(90, address) == 1
    ((node, reason, message, deadline),) = head.drained
    assert (node, reason) == (HERE.hex(), DRAIN_NODE_REASON_PREEMPTION)
    assert message
    assert deadline / 1000 == pytest.approx(before + 90, abs=5)


def test_waiting_ends_when_the_node_has_ended(
    head: FakeGcsClient, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_ids = iter([{HERE.hex()}, {HERE.hex()}, {HERE.hex()}, set()])
    monkeypatch.setattr(services, "find_node_ids", lambda: next(node_ids))
    monkeypatch.setattr(drain, "POLL_SECONDS", 0.01)
    assert drain_local_nodes(60, address, wait=True) == 1
    assert next(node_ids, None) is None


def test_waiting_ends_after_the_given_seconds(
    head: FakeGcsClient, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "POLL_SECONDS", 0.01)
    started = time.monotonic()
    assert drain_local_nodes(1, address, wait=True) == 1
    assert 0.9 < time.monotonic() - started < 5


def test_a_machine_without_a_worker_is_an_error(head: FakeGcsClient, address: str) -> None:
    head.nodes.pop(HERE)
    with pytest.raises(DrainError, match=f"no worker node of the cluster at {address} runs on this machine"):
        drain_local_nodes(90, address)
    assert not head.drained


def test_the_reason_of_a_refusing_head_is_reported(head: FakeGcsClient, address: str) -> None:
    head.refuses = "the node is busy"
    with pytest.raises(DrainError, match="the node is busy"):
        drain_local_nodes(90, address)


def test_the_command_prints_one_line(
    head: FakeGcsClient, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SystemExit) as end:
        main(["cluster", "leave", "--seconds", "30"])
    assert end.value.code == 0
    assert "1 node(s) on this machine will shut down" in capsys.readouterr().out
    assert len(head.drained) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    with pytest.raises(SystemExit) as end:
        main(["cluster", "leave", "--address", f"127.0.0.1:{free_port}"])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no Ray cluster answers at 127.0.0.1:{free_port} (--address): start it, or give --address" in line
