"""Ray on loopback: 2.60 takes 127.0.0.1 for "this machine" and listens on its network address, unless told as here."""

from __future__ import annotations

import socket
import sys
from typing import Any

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost", "::1", "[::1]")

SETTINGS = {
    # Where Ray does not expect clusters (its words for Windows and macOS) its nodes are 127.0.0.1, and all of its
    # servers listen there and nowhere else. Drivers need it too: they would look for 127.0.0.1 elsewhere.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
}


def is_loopback(address: str) -> bool:
    """Whether host:port, or an URL, is on loopback."""
    return address.rpartition("://")[2].partition("/")[0].rpartition(":")[0] in HOSTS


def free_ports(count: int = 1) -> list[int]:
    """Ports of loopback that nobody listens at, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def join_on_loopback(parameters: Any, head: bool) -> None:
    """A RAY_START_HOOK for `ray start --address`, which refuses to join a cluster under the setting above."""
    from ray._private import ray_constants, services

    ray_constants.ENABLE_RAY_CLUSTER = True
    services.get_node_ip_address = lambda address=None: LOOPBACK
