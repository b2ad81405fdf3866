"""Loopback ports for test servers."""

from __future__ import annotations

from pipelines.cluster.loopback import free_ports


def free_port() -> int:
    """A port on which nothing listens."""
    return free_ports()[0]
