"""Ray on loopback: by default Ray 2.60 takes 127.0.0.1 for "this machine" and listens on its network address."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.environment import set_environment
from pipelines.private import ray as ray_internals

LOOPBACK = "127.0.0.1"
LOOPBACK_HOSTS = (LOOPBACK, "localhost", "::1", "[::1]")

LOOPBACK_ENV_VARS = {
    # Without cluster support, as by default on Windows and macOS, Ray's nodes are 127.0.0.1 and all its servers listen
    # there only. Drivers need it too: otherwise they replace 127.0.0.1 by the network address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
}


def is_loopback(address: str) -> bool:
    """Whether host:port or a URL is on loopback."""
    return address.rpartition("://")[2].partition("/")[0].rpartition(":")[0] in LOOPBACK_HOSTS


def is_loopback_host(host: str) -> bool:
    """Whether a host name or IP address is on loopback."""
    try:
        return host in LOOPBACK_HOSTS or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def free_ports(count: int = 1) -> list[int]:
    """Distinct free ports on loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind((LOOPBACK, 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


@contextmanager
def ray_on_loopback() -> Iterator[None]:
    """Inside, Ray started or joined by this process is on loopback; afterwards Ray's state is restored.

    Ray reads the first variable once, when it is imported, and uses that value whenever it asks for an address; it is
    therefore patched here. Ray's processes and workers inherit the variables.
    """
    # Ray first: if it is imported before the environment changes, its former value can be restored
    with ray_internals.loopback_node_address(), set_environment(LOOPBACK_ENV_VARS):
        yield


def join_on_loopback(parameters: Any, head: bool) -> None:
    """A RAY_START_HOOK for `ray start --address`, which without it refuses to join under the setting above."""
    ray_internals.set_node_address(LOOPBACK)
