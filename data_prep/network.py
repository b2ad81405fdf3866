"""Reaching servers: no proxy for loopback, time limits, and long or short retries."""

from __future__ import annotations

import ipaddress
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # it has no stub

from data_prep.uris import redact_uri

FIRST_RESPONSE_SECONDS = 10.0  # time limit for a server's first response to an interactive command
# curl and requests know ::1, urllib and botocore [::1]
LOOPBACK_HOSTS = (
    "127.0.0.1",
    "localhost",
    "::1",
    "[::1]",
)
LONG_RETRIES_VARIABLE = (
    "INPAINT_LONG_RETRIES"  # set for jobs, which start only after the servers were reached
)
_Result = TypeVar("_Result")


def long_retries_enabled() -> bool:
    """Whether to retry an unreachable server for minutes, as in jobs, instead of seconds, as in interactive use."""
    return os.environ.get(LONG_RETRIES_VARIABLE, "") not in ("", "0")


def enable_long_retries() -> None:
    """Make this process retry unreachable servers for minutes: a restart of a server must not lose hours of work."""
    os.environ[LONG_RETRIES_VARIABLE] = "1"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "7"
    os.environ.setdefault("INPAINT_S3_RETRY_SECONDS", "60")


def bypass_proxy_for_loopback(*urls: str) -> None:
    """Make this process and its children reach loopback without a proxy. Does nothing if no proxy is configured.

    Adds the loopback hosts, and those hosts of `urls` that are on loopback, to no_proxy and NO_PROXY.
    """
    if not any(key.lower() in ("http_proxy", "https_proxy", "all_proxy") for key in os.environ):
        return
    hosts = [*LOOPBACK_HOSTS, *filter(is_loopback, (_hostname(url) for url in urls))]
    present = {key: os.environ.get(key) or "" for key in ("no_proxy", "NO_PROXY")}
    for key, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        entries = [host for host in (present[key] or present[other]).replace(" ", ",").split(",") if host]
        if "*" not in entries:
            os.environ[key] = ",".join(dict.fromkeys([*entries, *hosts]))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine: localhost, 127.0.0.0/8, ::1, and 0.0.0.0, which leads there."""
    host = host.strip("[]").lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def describe_proxy(url: str) -> str:
    """ " through the proxy of http_proxy (http://proxy:3128)" if requests to the URL go through one, else "" """
    variable = proxy_variable(url)
    return f" through the proxy of {variable} ({redact_uri(os.environ[variable])})" if variable else ""


def proxy_variable(url: str) -> str:
    """The environment variable with the proxy for requests to the URL; "" if there is none."""
    parts = urlsplit(url)
    if proxy_bypass_environment(parts.netloc.rpartition("@")[2]):
        return ""
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if os.environ.get(variable):
                return variable
    return ""


def proxy_hint(url: str) -> str:
    """What to try if requests to the URL go through a proxy; "" otherwise."""
    variable = proxy_variable(url)
    return f"correct {variable}, or add {_hostname(url)} to no_proxy" if variable else ""


def call_with_timeout(seconds: float, call: Callable[[], _Result]) -> _Result:
    """The call's result or error. Raises TimeoutError after `seconds`; the call may then continue in its thread."""
    outcomes: queue.Queue[tuple[bool, object]] = queue.Queue()

    def run() -> None:
        try:
            outcomes.put((True, call()))
        except BaseException as error:
            outcomes.put((False, error))

    threading.Thread(target=run, name="call-with-timeout", daemon=True).start()
    try:
        succeeded, outcome = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if not succeeded:
        raise outcome  # type: ignore[misc]
    return outcome  # type: ignore[return-value]


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
