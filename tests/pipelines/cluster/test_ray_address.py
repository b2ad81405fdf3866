"""Resolving the address of a Ray head, and the errors if none answers: with real sockets and gRPC servers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
import pytest
from ray._private import services
from ray.core.generated import (
    gcs_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    ray_client_pb2,
    ray_client_pb2_grpc,
)

from pipelines.cli.main import main
from pipelines.cluster import ray_address
from pipelines.cluster.ray_address import Head, HeadError, resolve_head
from support.ports import free_port

pytestmark = pytest.mark.slow  # servers

ALIVE, DEAD = gcs_pb2.GcsNodeInfo.ALIVE, gcs_pb2.GcsNodeInfo.DEAD


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers here require no token, except one."""
    for name in ("RAY_AUTH_MODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pipelines.private.ray.enable_token_auth", lambda: None)


class FakeNodeInfoServicer(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    def __init__(self, nodes: list[tuple[str, Any]] | None) -> None:
        self.nodes = nodes

    def GetAllNodeInfo(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.nodes is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        listed = [
            gcs_pb2.GcsNodeInfo(node_id=b"1" * 28, node_manager_address=address, state=state)
            for address, state in self.nodes or []
        ]
        return gcs_service_pb2.GetAllNodeInfoReply(node_info_list=listed)


class FakeClientServicer(ray_client_pb2_grpc.RayletDriverServicer):
    def ClusterInfo(self, request: Any, context: grpc.ServicerContext) -> Any:
        return ray_client_pb2.ClusterInfoResponse(json="{}")


@contextmanager
def running_head(nodes: list[tuple[str, Any]] | None) -> Iterator[int]:
    """The port of a head with these nodes, or None if it requires a token; also a Ray Client server."""
    server = grpc.server(ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(FakeNodeInfoServicer(nodes), server)
    ray_client_pb2_grpc.add_RayletDriverServicer_to_server(FakeClientServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


@pytest.mark.parametrize("text", [None, "", "  ", "\n", "local", " local "])
def test_none_and_blanks_mean_a_ray_of_this_machine(text: str | None) -> None:
    head = resolve_head(text)
    assert head == Head("local", on_loopback=True)
    assert head.starts_ray


@pytest.mark.parametrize(
    ("nodes", "on_loopback"),
    [
        ([("127.0.0.1", ALIVE)], True),
        ([("127.0.0.1", ALIVE), ("10.0.0.7", DEAD)], True),
        ([("192.0.2.2", ALIVE)], False),  # `ray start --head` by hand, asked on loopback
        ([("127.0.0.1", ALIVE), ("10.0.0.7", ALIVE)], False),
        ([], True),  # its first node has not registered yet
    ],
)
def test_a_cluster_is_on_loopback_if_all_its_nodes_are(nodes: Any, on_loopback: bool) -> None:
    with running_head(nodes) as port:
        for host in ("127.0.0.1", "localhost"):
            assert resolve_head(f" {host}:{port} ") == Head(f"{host}:{port}", on_loopback)


def test_a_ray_client_server_is_accepted() -> None:
    with running_head([]) as port:
        assert resolve_head(f"ray://127.0.0.1:{port}") == Head(f"ray://127.0.0.1:{port}", on_loopback=False)


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_dead_head_is_reported_at_once(prefix: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    address = f"{prefix}127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main(["shard", "bundled", str(tmp_path / "out")])
    assert end.value.code == 1
    assert time.monotonic() - started < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == f"inpaint shard: no Ray cluster answers at {address} (RAY_ADDRESS): start it, or unset RAY_ADDRESS"
    )


def test_a_silent_head_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_address.CONNECT_SECONDS + 1 + ray_address.ANSWER_SECONDS < 10
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for text in (address, f"ray://{address}"):
            with pytest.raises(
                HeadError, match=rf"^no Ray cluster answers at {text} \(RAY_ADDRESS\): start it, or"
            ):
                resolve_head(text)


def test_the_lookup_of_a_name_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "CONNECT_SECONDS", -0.8)
    never = Event()

    def resolve(*_: Any) -> Any:
        never.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", resolve)
    with pytest.raises(HeadError, match=r"no Ray cluster answers at head\.example:6379"):
        resolve_head("head.example:6379")
    never.set()


def test_an_unknown_host_name() -> None:
    with pytest.raises(
        HeadError, match=r"at head\.invalid:6379 \(RAY_ADDRESS; the host name head\.invalid cannot"
    ):
        resolve_head("head.invalid:6379")


def test_another_server_is_not_a_head() -> None:
    """A dashboard, or a head's port with ray://."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server, running_head([]) as port:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(
            HeadError, match="not a Ray head: the default port is 6379, 8265 is the dashboard's"
        ):
            resolve_head(f"127.0.0.1:{server.server_port}")
        server.shutdown()
        bare = grpc.server(ThreadPoolExecutor(1))
        port = bare.add_insecure_port("127.0.0.1:0")
        bare.start()
        with pytest.raises(HeadError, match="not a Ray head"):
            resolve_head(f"ray://127.0.0.1:{port}")
        bare.stop(None)


def test_a_cluster_that_requires_a_token() -> None:
    with (
        running_head(None) as port,
        pytest.raises(HeadError, match="refuses this command's token, or got none: set RAY_AUTH_M"),
    ):
        resolve_head(f"127.0.0.1:{port}")


@pytest.mark.parametrize("variable", ["RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID"])
def test_a_submitted_job_does_not_probe_its_cluster(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "{}")
    monkeypatch.setattr(ray_address, "_probe_head", lambda *_: pytest.fail("probed"))
    assert resolve_head("127.0.0.1:1") == Head("127.0.0.1:1", on_loopback=True)
    assert resolve_head("10.0.0.7:6379") == Head("10.0.0.7:6379", on_loopback=False)
    assert resolve_head("") == Head("local", on_loopback=True)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("foo", "foo:6379"),
        ("foo:", "foo:6379"),
        (":6379", "127.0.0.1:6379"),
        ("6379", "127.0.0.1:6379"),
        ("10.0.0.7", "10.0.0.7:6379"),
        ("foo:port", "foo:6379"),
        ("foo:99999", "foo:6379"),
        ("foo:0", "foo:6379"),
        ("http://head:8265", "head:6379"),
        ("https://user:secret@head/", "head:6379"),
        ("ray://head", "ray://head:10001"),
        ("ray:head:10001", "[ray:head]:10001"),
        ("redis://head:6379", "head:6379"),
        ("head:6379/", "head:6379"),
        ("user:secret@head:6379", "head:6379"),
        ("::1:6379", "[::1]:6379"),
        ("Auto", "auto"),
        ("LOCAL", "local"),
    ],
)
def test_an_invalid_address_is_reported_with_a_suggestion(text: str, suggestion: str) -> None:
    with pytest.raises(HeadError) as error:
        resolve_head(text)
    assert str(error.value).startswith("RAY_ADDRESS=")
    assert f"did you mean {suggestion}?" in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


class TestAuto:
    @pytest.fixture(autouse=True)
    def _hide_other_clusters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hides other clusters of this machine and the address that `ray start` stored."""
        self.running: set[str] = set()
        self.last: str | None = None
        running = lambda: frozenset(self.running)  # noqa: E731
        running.cache_clear = lambda: None  # type: ignore[attr-defined]
        monkeypatch.setattr(services, "find_gcs_addresses", running)
        monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: self.last)

    def test_no_cluster_runs(self) -> None:
        with pytest.raises(
            HeadError, match=r"^no Ray cluster runs on this machine \(RAY_ADDRESS=auto\): start one, or unset"
        ):
            resolve_head("auto")

    def test_the_only_cluster(self) -> None:
        with running_head([("127.0.0.1", ALIVE)]) as port:
            self.running = {f"127.0.0.1:{port}"}
            assert resolve_head("auto") == Head(f"127.0.0.1:{port}", on_loopback=True)

    def test_the_cluster_started_last_by_hand(self) -> None:
        with running_head([("10.0.0.7", ALIVE)]) as port:
            self.running, self.last = {"127.0.0.1:1", "127.0.0.1:2"}, f"127.0.0.1:{port}"
            assert resolve_head("auto") == Head(f"127.0.0.1:{port}", on_loopback=False)

    def test_several_clusters(self) -> None:
        self.running = {"127.0.0.1:1", "127.0.0.1:2"}
        with pytest.raises(
            HeadError, match=r"several Ray clusters run .* give one of 127\.0\.0\.1:1, 127\.0\.0\.1:2"
        ):
            resolve_head("auto")

    def test_a_dead_cluster(self) -> None:
        self.last = f"127.0.0.1:{free_port()}"
        with pytest.raises(
            HeadError, match=rf"^no Ray cluster answers at {self.last} \(RAY_ADDRESS=auto\): start it"
        ):
            resolve_head("auto")
