"""The environment variables of a session: for a Ray on loopback, for clusters elsewhere, and afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._private import ray_constants, services

from pipelines.cluster import session
from pipelines.cluster.loopback import LOOPBACK_ENV_VARS
from pipelines.cluster.ray_address import Head
from pipelines.cluster.session import SINGLE_NODE_ENV_VARS, SessionError, ray_session


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options and environment variables of each ray.init."""
    ray_calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        ray_calls.append(
            options | {"settings": settings(), "expects clusters": ray_constants.ENABLE_RAY_CLUSTER}
        )
        ray_calls[-1]["this node"] = services.get_node_ip_address()

    for key in session.SESSION_ENV_VARS:  # so that monkeypatch restores them
        monkeypatch.setenv(key, os.environ.get(key, session.SESSION_ENV_VARS[key]))
    for key in {**LOOPBACK_ENV_VARS, **SINGLE_NODE_ENV_VARS}:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(
        ray_constants, "ENABLE_RAY_CLUSTER", True
    )  # ray was imported before, without the settings
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have started
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    yield ray_calls
    assert ray_constants.ENABLE_RAY_CLUSTER
    assert set(settings().values()) <= {None, "eth7"}


def settings() -> dict[str, str | None]:
    return {key: os.environ.get(key) for key in {**LOOPBACK_ENV_VARS, **SINGLE_NODE_ENV_VARS}}


def open_session(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "resolve_head", lambda text: head)
    with ray_session():
        pass


def test_a_ray_of_this_machine_is_on_loopback(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")  # for another cluster that this shell uses
    open_session(Head("local", on_loopback=True), monkeypatch)
    (call,) = calls
    assert call["settings"] == {**LOOPBACK_ENV_VARS, **SINGLE_NODE_ENV_VARS}
    assert not call["expects clusters"]
    assert call["this node"] == "127.0.0.1"
    assert call["include_dashboard"] is False
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_cluster_on_loopback_is_joined_on_loopback(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    open_session(Head("127.0.0.1:6379", on_loopback=True), monkeypatch)
    (call,) = calls
    assert call["settings"] == {**LOOPBACK_ENV_VARS, **dict.fromkeys(SINGLE_NODE_ENV_VARS)}
    assert not call["expects clusters"]
    assert "_temp_dir" not in call


def test_a_cluster_elsewhere_gets_no_loopback_variables(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    open_session(Head("local", on_loopback=True), monkeypatch)
    for address in ("10.0.0.7:6379", "ray://127.0.0.1:10001"):
        open_session(Head(address, on_loopback=False), monkeypatch)
    for call in calls[1:]:
        assert call["settings"] == dict.fromkeys({**LOOPBACK_ENV_VARS, **SINGLE_NODE_ENV_VARS})
        assert call["expects clusters"]


def test_the_variables_are_restored_after_a_failed_session(
    calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise OSError("no space\nleft")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(SessionError, match=r"^Ray could not be started on this machine: no space left$"):
        open_session(Head("local", on_loopback=True), monkeypatch)
    with pytest.raises(
        SessionError, match=r"^Ray could not join the cluster at 10\.0\.0\.7:6379: no space left$"
    ):
        open_session(Head("10.0.0.7:6379", on_loopback=False), monkeypatch)


def test_a_second_session_in_a_process_is_an_error(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(SessionError, match=r"ray\.shutdown\(\)"):
        open_session(Head("local", on_loopback=True), monkeypatch)
    assert calls == []


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no space\n left", "no space left"),
        ("", "OSError"),
        (
            "Failure from server:\nTraceback (most recent call last):\n  File x\nRuntimeError: it is gone\n",
            "Failure from server: RuntimeError: it is gone",
        ),
    ],
)
def test_rays_message_becomes_one_line(message: str, line: str) -> None:
    assert session._error_line(OSError(message)) == line


RAYLET_REPORT = """Raylet is terminated. Termination is unexpected. Possible reasons include: (1) SIGKILL by the user [...]
Last 20 lines of the Raylet logs:
    [state-dump] NodeManager:
    [state-dump] - num async plasma notifications: 0
"""


@pytest.mark.parametrize("debug", [False, True])
def test_rays_reports_of_dead_nodes_are_only_printed_with_debug(
    debug: bool, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come beside the workers' logs, whatever log_to_driver says. Other messages are printed."""
    from ray._private.ray_logging import stdout_deduplicator

    def printed(line: str) -> list[str]:
        batches = stdout_deduplicator.deduplicate({"lines": [line], "pid": "raylet", "is_err": False})
        return [line for batch in batches for line in batch["lines"]]

    monkeypatch.setattr(session, "resolve_head", lambda text: Head("local", on_loopback=True))
    other = f"no memory is left ({debug})"
    with ray_session(debug):
        assert printed(RAYLET_REPORT) == ([RAYLET_REPORT] if debug else [])
        assert printed(other) == [other]
    assert stdout_deduplicator.skip_re is None
    stdout_deduplicator.flush()


def test_a_drivers_job_has_a_name(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "resolve_head", lambda text: Head("10.0.0.1:6379", on_loopback=False))
    with ray_session(job_name="demo"):
        pass
    assert calls[0]["job_config"].metadata == {"job_name": "demo"}
