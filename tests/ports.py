"""Ports of loopback for the servers of tests."""

from __future__ import annotations

from pipelines.cluster.loopback import free_ports


def free_port() -> int:
    """One that nobody listens at."""
    return free_ports()[0]
