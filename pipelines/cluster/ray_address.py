"""Resolve the address of a Ray head and check that it answers; Ray itself retries a dead one for minutes."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.cluster.loopback import LOOPBACK, is_loopback, is_loopback_host
from pipelines.private import ray as ray_internals

CONNECT_SECONDS = 4.0  # for a connection to the head; the lookup of its name gets one more
ANSWER_SECONDS = 4.0  # for an answer of the head
HEAD_PORT, CLIENT_PORT, DASHBOARD_PORT = 6379, 10001, 8265  # Ray's defaults


class HeadError(RuntimeError):
    """No Ray cluster at the given address; one line with the address and the remedy."""


@dataclass(frozen=True)
class Head:
    """An address for `ray.init`, and whether the cluster's nodes are on loopback."""

    address: str  # local, host:port or ray://host:port
    on_loopback: bool

    @property
    def starts_ray(self) -> bool:
        """Whether there is no head yet, so that Ray is started on this machine."""
        return self.address == "local"


def resolve_head(text: str | None, source: str = "RAY_ADDRESS", remedy: str = "unset RAY_ADDRESS") -> Head:
    """The head at an address, once it has answered, which takes at most 10 s. Raises HeadError.

    text: host:port, ray://host:port, auto or local; None and blanks mean local. source: where the address comes from,
    and remedy: what else to do, both for messages. A submitted job does not check: its cluster may be busy for minutes,
    and Ray waits for it.
    """
    text = (text or "").strip()
    if not is_cluster_address(text):
        return Head("local", on_loopback=True)
    if text == "auto":
        source = f"{source}=auto"
        address = _find_local_head(source, remedy)
        ray_internals.enable_token_auth()
    else:
        address = check_address(text, source)
    is_client = "://" in address
    if is_ray_job(os.environ):
        return Head(address, is_loopback(address) and not is_client)
    nodes = _probe_head(address, source, remedy)
    if is_client:
        return Head(address, on_loopback=False)  # this process only talks to a driver on the cluster
    return Head(address, all(map(is_loopback_host, nodes)) if nodes else is_loopback(address))


def is_cluster_address(text: str | None) -> bool:
    """Whether the address is of a cluster to join: None, blanks and `local` are not."""
    return (text or "").strip() not in ("", "local")


def is_ray_job(environ: Mapping[str, str]) -> bool:
    """Whether this process belongs to a submitted job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environ or "RAY_JOB_ID" in environ


def check_address(text: str, source: str) -> str:
    """The address, if it is valid. Raises HeadError with a suggestion."""

    def error(suggestion: str, problem: str = "is not an address of a Ray head") -> HeadError:
        remedy = "write HOST:6379" if re.search(r"\s", suggestion) else f"did you mean {suggestion}?"
        return HeadError(f"{source}={text.rpartition('@')[2]} {problem}: {remedy}")

    scheme, separator, remainder = text.rpartition("://")
    scheme = scheme.lower()
    host, colon, port = remainder.rstrip("/").partition("/")[0].rpartition("@")[2].rpartition(":")
    if not colon:
        host, port = (LOOPBACK, port) if port.isdigit() else (port, "")
    host = host or LOOPBACK
    if not separator and remainder.lower() in ("auto", "local"):
        raise error(remainder.lower())
    if scheme in ("http", "https"):
        problem = "is the address of a dashboard (for `inpaint submit --address`), not of a Ray head"
        raise error(f"{host}:{HEAD_PORT}", problem)
    default_port = CLIENT_PORT if scheme == "ray" else HEAD_PORT
    prefix = "ray://" if scheme == "ray" else ""
    port_number = int(port) if re.fullmatch("[0-9]{1,5}", port) else 0
    if not 0 < port_number < 65536:
        raise error(
            f"{prefix}{host}:{default_port}",
            f"is not an address of a Ray head: it has no port{_port_hint(port)}",
        )
    normalized = f"{prefix}{host}:{port}"
    if ":" in host.strip("[]") and not host.startswith("["):
        normalized = f"{prefix}[{host}]:{port}"
    if text.lower() != normalized.lower():
        raise error(normalized)
    return normalized


def _port_hint(port: str) -> str:
    return f" from 1 to 65535 (given: {port!r})" if port else ""


def _find_local_head(source: str, remedy: str) -> str:
    """The address of the cluster last started here by `ray start`, or else of the only one on this machine."""
    addresses, last = ray_internals.local_head_addresses()
    if last is not None:
        return last
    if not addresses:
        raise HeadError(f"no Ray cluster runs on this machine ({source}): start one, or {remedy}")
    if len(addresses) > 1:
        raise HeadError(
            f"several Ray clusters run on this machine ({source}): give one of {', '.join(addresses)}"
        )
    return addresses[0]


def _probe_head(address: str, source: str, remedy: str) -> list[str]:
    """The addresses of the cluster's alive nodes; none from a Ray Client server (ray://). Raises HeadError."""
    scheme, _, host_port = address.rpartition("://")
    host, _, port = host_port.rpartition(":")
    host = host.strip("[]")
    if host == "::1":  # a server on loopback may listen on 127.0.0.1 only
        host, host_port = "localhost", f"localhost:{port}"
    if failure := _connection_error(host, int(port)):
        reason = f"; the host name {host} cannot be resolved" if isinstance(failure, socket.gaierror) else ""
        raise HeadError(f"no Ray cluster answers at {address} ({source}{reason}): start it, or {remedy}")

    import grpc

    try:
        return _ping_client_server(host_port) if scheme else _alive_nodes(host_port)
    except grpc.RpcError as error:
        code = error.code()  # type: ignore[attr-defined]
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise HeadError(
                f"the Ray cluster at {address} ({source}) refuses this command's token, or got none: set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
            ) from None
        hint = (
            ""
            if code == grpc.StatusCode.DEADLINE_EXCEEDED
            else (
                f"; the server there is not a Ray head: the default port is {HEAD_PORT}, {DASHBOARD_PORT} is the "
                f"dashboard's, {CLIENT_PORT} needs ray://, and TLS needs RAY_USE_TLS=1"
            )
        )
        raise HeadError(
            f"no Ray cluster answers at {address} ({source}{hint}): start it, or {remedy}"
        ) from None


def _connection_error(host: str, port: int) -> OSError | None:
    """Why the connection fails, or None. In a thread, as the lookup of a name has no timeout."""
    outcome: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)
        except UnicodeError:
            outcome.append(socket.gaierror())

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    return outcome[0] if outcome else TimeoutError()


def _alive_nodes(host_port: str) -> list[str]:
    return ray_internals.alive_node_addresses(host_port, ANSWER_SECONDS)


def _ping_client_server(host_port: str) -> list[str]:
    ray_internals.ping_client_server(host_port, ANSWER_SECONDS)
    return []
