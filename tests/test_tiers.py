"""Checks that fast tests start no Ray and no servers, and that slow ones are reported."""

from __future__ import annotations

import http.server
import subprocess
from types import SimpleNamespace

import pytest
import ray

from support.tiers import MAX_FAST_SECONDS, SlowTestLog


def test_a_fast_test_cannot_start_ray() -> None:
    with pytest.raises(AssertionError, match=r"test_tiers.py::test_a_fast.* starts gcs_server: mark it slow"):
        ray.init(address="local", include_dashboard=False)
    assert not ray.is_initialized()


def test_a_fast_test_cannot_start_a_server() -> None:
    with pytest.raises(AssertionError, match="starts mlflow: mark it slow"):
        subprocess.run(["/usr/bin/mlflow", "server"], check=True)
    with pytest.raises(AssertionError, match="listens on a TCP port"):
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)


def test_a_test_with_a_server_fixture_is_not_fast(request: pytest.FixtureRequest, s3: str) -> None:
    assert request.node.get_closest_marker("fast") is None
    assert request.node.get_closest_marker("slow")


@pytest.mark.parametrize("storage", ["folder", "bucket"])
def test_a_test_with_an_indirect_server_fixture_is_not_fast(
    storage: str, request: pytest.FixtureRequest
) -> None:
    assert (request.node.get_closest_marker("slow") is not None) == (storage == "bucket")


def test_a_fast_test_that_takes_long_is_reported() -> None:
    clock = SlowTestLog()
    for name, mark, seconds in (
        ("a", "fast", MAX_FAST_SECONDS + 1),
        ("b", "fast", 1.0),
        ("c", "slow", MAX_FAST_SECONDS + 1),
    ):
        report = SimpleNamespace(nodeid=name, keywords={mark: 1}, duration=seconds, when="call")
        clock.record(report)  # type: ignore[arg-type]
    assert clock.lines() == [f"{MAX_FAST_SECONDS + 1:.1f} s  a (call)"]


@pytest.mark.soak_for("second")
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_parameter_covered_by_another_runs_in_the_soak_tier(
    name: str, request: pytest.FixtureRequest
) -> None:
    assert (request.node.get_closest_marker("soak") is not None) == (name == "second")
    assert (request.node.get_closest_marker("fast") is not None) == (name == "first")
