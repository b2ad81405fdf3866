"""MLflow servers: a quick check that a server responds, and one-line explanations of MLflow's errors with a hint."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_prep.network import (
    FIRST_RESPONSE_SECONDS,
    bypass_proxy_for_loopback,
    call_with_timeout,
    describe_proxy,
    long_retries_enabled,
    proxy_hint,
)
from data_prep.uris import path_from_sqlite_url, quote_for_shell, redact_uri
from pipelines.errors import MAX_MESSAGE_CHARS, error_text, known_cause, sqlite_cause
from pipelines.private import mlflow as mlflow_internals

PROBE_PATH = "/api/2.0/mlflow/experiments/search"
PROBE_VALID_SECONDS = 60.0  # for which a successful probe counts
FAILURE_VALID_SECONDS = 5.0  # for which a failed one counts: a command that checks several steps waits once
RETRY_SECONDS = 0.5  # between probes of a server that responds but is not ready

_last_success: dict[str, float] = {}
_last_failure: dict[str, tuple[float, str]] = {}
_lock = threading.Lock()


class TrackingError(RuntimeError):
    """MLflow cannot be used. One line with the URI (without password), the reason and a hint."""


def check_server(uri: str) -> None:
    """Raise TrackingError unless an MLflow server responds at the URI within FIRST_RESPONSE_SECONDS.

    Does nothing for databases, nor in a process with long retries, which relies on MLflow's own.
    """
    if not uri.startswith(("http://", "https://")) or long_retries_enabled():
        return
    with _lock:
        if time.monotonic() - _last_success.get(uri, float("-inf")) < PROBE_VALID_SECONDS:
            return
        failed_at, message = _last_failure.get(uri, (float("-inf"), ""))
        if time.monotonic() - failed_at < FAILURE_VALID_SECONDS:
            raise TrackingError(message)
    bypass_proxy_for_loopback(uri)
    deadline = time.monotonic() + FIRST_RESPONSE_SECONDS
    try:
        call_with_timeout(FIRST_RESPONSE_SECONDS, lambda: _probe_until(uri, deadline))
    except (TrackingError, TimeoutError) as error:
        timeout = isinstance(error, TimeoutError)
        message = _no_answer(uri, f"within {FIRST_RESPONSE_SECONDS:g} s") if timeout else str(error)
        with _lock:
            _last_failure[uri] = time.monotonic(), message
        raise TrackingError(message) from None
    with _lock:
        _last_success[uri] = time.monotonic()


def _probe_until(uri: str, deadline: float) -> None:
    """Probe until the server is ready; for example, a load balancer returns 503 while a server starts."""
    while True:
        try:
            # One second more than the caller waits: it reports the timeout.
            return _probe(uri, max(1.0, deadline - time.monotonic()) + 1)
        except _NotReady as error:
            if time.monotonic() + RETRY_SECONDS >= deadline - 1:
                raise TrackingError(str(error)) from None
        time.sleep(RETRY_SECONDS)


class _NotReady(Exception):
    pass


def _probe(uri: str, timeout: float) -> None:
    try:
        response = mlflow_internals.rest_get(uri, PROBE_PATH, timeout, max_results=1)
    except Exception as error:  # from requests, maybe wrapped by MLflow
        raise TrackingError(_connection_error(error, uri)) from None
    status = response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    if status == 200 and isinstance(body, dict):
        return
    code = body.get("error_code", "") if isinstance(body, dict) else ""
    text = error_text(ValueError(response.text))
    if status == 401 or "Invalid Host" in text or (status == 403 and code):
        raise TrackingError(explain_mlflow_error(text, uri, "UNAUTHENTICATED" if status == 401 else code))
    if status in (429, 500, 502, 503, 504):
        raise _NotReady(
            f"the MLflow server at {redact_uri(uri)} answers {status} ({response.reason}){describe_proxy(uri)}: "
            f"{_join_advice(proxy_hint(uri), 'try again, and see its log')}"
        )
    if status == 407:
        raise TrackingError(
            f"the MLflow server at {redact_uri(uri)} is not reachable{describe_proxy(uri)}, which requires a user and a "
            f"password: {proxy_hint(uri)}"
        )
    if status == 403 and "<html" not in text[:500].lower():
        raise TrackingError(
            f"the MLflow server at {redact_uri(uri)} refuses (403){describe_proxy(uri)}: see MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    kind = "a web page" if "<html" in text[:500].lower() else f"{status} {response.reason}"
    https_hint = " (or is it https://?)" if status == 400 and uri.startswith("http:") else ""
    raise TrackingError(
        f"there is no MLflow server at {redact_uri(uri)}{https_hint}: the response{describe_proxy(uri)} is {kind}; "
        f"{_join_advice(proxy_hint(uri), 'set --tracking-uri or MLFLOW_TRACKING_URI to the address of one')}"
    )


def explain_mlflow_error(error: BaseException | str, uri: str, error_code: str = "") -> str:
    """An error of MLflow, its database or its server as one line with a hint, without passwords. `error` may be its
    text."""
    text = error if isinstance(error, str) else error_text(error)
    text = _redact_password(text, uri)
    error_code = error_code or getattr(error, "error_code", "")
    shown_uri = redact_uri(uri)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or (urlsplit(uri).username if "://" in uri else None)
    if any(words in text for words in CONNECTION_ERRORS):
        if uri.startswith("http"):
            return _connection_error(text, uri)
        return (
            f"MLflow's database {shown_uri} does not answer: start it, or set MLFLOW_TRACKING_URI to another"
        )
    if error_code == "UNAUTHENTICATED" or "Not Authenticated" in text:
        server = f"the MLflow server at {shown_uri}"
        if user:
            return f"{server} does not know {user!r} with this password: see MLFLOW_TRACKING_PASSWORD"
        return f"{server} refuses: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if "Invalid Host header" in text:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return (
            f"the MLflow server at {shown_uri} accepts other host names only: start it with --allowed-hosts {host}, or "
            "use one of its names"
        )
    if error_code == "PERMISSION_DENIED":
        who = user or "this user"
        return f"{who} may not do that in the MLflow at {shown_uri}: ask its administrator for the permission"
    not_writable = "readonly database" in text or "unable to open database file" in text
    if not_writable and (path := path_from_sqlite_url(uri)) and _is_on_read_only_system(path):
        return (
            f"MLflow's database {shown_uri} is on a read-only file system: copy its storage, and use the copy"
        )
    if cause := sqlite_cause(text, f"MLflow's database {shown_uri}"):
        return cause
    if revision := SCHEMA_REVISION.search(text):
        if mlflow_internals.knows_revision(revision[1] or revision[2]):
            return (
                f"MLflow's database {shown_uri} was made by an older MLflow than the installed one: copy it, then run "
                f"mlflow db upgrade {quote_for_shell(uri)}"
            )
        return (
            f"MLflow's database {shown_uri} was made by a newer MLflow than the installed one: install that one, or name "
            "another database"
        )
    cause = "" if isinstance(error, str) else known_cause(error)
    return f"MLflow at {shown_uri}: {cause or text[:MAX_MESSAGE_CHARS]}"


def _is_on_read_only_system(path: Path) -> bool:
    return path.exists() and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


SCHEMA_REVISION = re.compile(
    r"database schema \(found version (\w+)|Can't locate revision identified by '(\w+)'"
)


CONNECTION_ERRORS = (
    "HTTPConnectionPool",
    "HTTPSConnectionPool",
    "Max retries",
    "Connection refused",
    "ConnectionPool(",
)


def _connection_error(error: BaseException | str, uri: str) -> str:
    text = error if isinstance(error, str) else error_text(error)
    shown_uri = redact_uri(uri)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        match = re.search(r"certificate verify failed: ([^(]+)", text)
        reason = match[1].strip() if match else "TLS"
        return (
            f"the certificate of the MLflow server at {shown_uri} is not trusted ({reason}): set "
            "MLFLOW_TRACKING_SERVER_CERT_PATH to its authority's file, or use the host name in the certificate"
        )
    unknown_host = any(
        words in text for words in ("Name or service not known", "name resolution", "NameResolution")
    )
    if unknown_host and not describe_proxy(uri):
        host = urlsplit(uri).hostname
        return f"there is no host {host} of the MLflow server at {shown_uri}: correct the address"
    if "SSLError" in text or "SSL:" in text:
        return f"the server at {shown_uri} does not use TLS: probably http://{shown_uri.partition('://')[2]}"
    if "Connection refused" in text:
        return _no_answer(uri, "(connection refused)")
    if "timed out" in text or "Timeout" in text:
        return _no_answer(uri, "in time")
    if "Connection aborted" in text or "Connection reset" in text or "RemoteDisconnected" in text:
        return _no_answer(uri, "like MLflow (it closes the connection)")
    return _no_answer(uri, "")


def _no_answer(uri: str, how: str) -> str:
    problem = f"the MLflow server at {redact_uri(uri)} does not answer {how}".rstrip() + describe_proxy(uri)
    return f"{problem}: {_join_advice(proxy_hint(uri), 'start it, or set MLFLOW_TRACKING_URI to another')}"


def _join_advice(first: str, second: str) -> str:
    return f"{first}; else {second}" if first else second


def _redact_password(text: str, uri: str) -> str:
    text = text.replace(uri, redact_uri(uri))
    parts: Any = urlsplit(uri) if "://" in uri else None
    for secret in (parts.password, unquote(parts.password)) if parts and parts.password else ():
        text = text.replace(secret, "***")
    return text
