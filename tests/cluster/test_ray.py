"""Starting and joining Ray: listening addresses, a cluster on the network address, a long TMPDIR."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.cluster_harness import (
    clean_environment,
    find_exposed_listeners,
    find_listeners,
    kill_processes,
    process_tree,
    wait_for,
)
from support.ports import free_port

# A notebook that imported Ray before this package. It prints one line per session and one afterwards.
NOTEBOOK = """
import json, os, sys
import ray, ray.tune
from ray._private import ray_constants
from pipelines.cluster.loopback import LOOPBACK_ENV_VARS
from pipelines.cluster.session import ray_session

def variables():
    return {key: os.environ.get(key) for key in LOOPBACK_ENV_VARS} | {"clusters": ray_constants.ENABLE_RAY_CLUSTER}

def session():
    worker = ray.get(ray.remote(lambda: {key: os.environ.get(key) for key in LOOPBACK_ENV_VARS}).remote())
    nodes = [node["NodeManagerAddress"] for node in ray.nodes()]
    print(json.dumps({"driver": variables(), "worker": worker, "nodes": nodes}), flush=True)
    sys.stdin.readline()

with ray_session():
    session()
os.environ["RAY_ADDRESS"] = sys.argv[1]
with ray_session():
    session()
print(json.dumps(variables()), flush=True)
"""

# A driver that is terminated. It prints the seconds until its abort (0: none) and whether its handler is back.
TERMINATED_DRIVER = """
import os, signal, sys
import ray
from pipelines.cluster.session import ray_session

if sys.argv[1] == "own":
    signal.signal(signal.SIGTERM, lambda number, frame: (print("called"), sys.exit()))
handler = signal.getsignal(signal.SIGTERM)
try:
    with ray_session():
        process = os.getpid()
        never = ray.remote(resources={"none": 1})(lambda: None).remote()
        ray.remote(lambda: os.kill(process, signal.SIGTERM)).remote()
        try:
            ray.wait([never])
        finally:
            print(signal.getitimer(signal.ITIMER_REAL)[0])
finally:
    print(signal.getsignal(signal.SIGTERM) == handler)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster started by hand on the network address with a token: its address, and its members' variables."""
    address = next(
        (
            entry.address
            for name, addresses in psutil.net_if_addrs().items()
            for entry in addresses
            if entry.family == socket.AF_INET and not entry.address.startswith(("127.", "169.254."))
        ),
        None,
    )
    if address is None:
        pytest.skip("this machine has no address besides loopback")
    (tmp_path / "token").write_text(secrets.token_hex(32))
    member = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    short = Path("/tmp") / f"test-ray-{secrets.token_hex(4)}"
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
    command += [
        f"--node-ip-address={address}",
        f"--port={port}",
        f"--temp-dir={short}",
        "--disable-usage-stats",
    ]
    command += ["--include-dashboard=false", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--ray-client-server-port={free_port()}", f"--object-store-memory={100 * 2**20}"]
    with open(tmp_path / "head.log", "w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment() | member)
    try:
        wait_for(
            lambda: any("raylet" in name for name, _ in find_listeners(process_tree(head.pid))),
            "a raylet",
            head,
        )
        yield f"{address}:{port}", member
    finally:
        kill_processes(process_tree(head.pid))
        head.wait()
        subprocess.run(["rm", "-rf", str(short)], check=True)


def test_a_notebook_is_on_loopback_only_for_its_own_ray(elsewhere: tuple[str, dict[str, str]]) -> None:
    """Its own Ray listens on loopback only; for the cluster on the network no variables are set."""
    address, member = elsewhere
    notebook = subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment() | member,
        start_new_session=True,
    )
    assert notebook.stdin is not None
    assert notebook.stdout is not None
    try:
        private = json.loads(notebook.stdout.readline())
        processes = process_tree(notebook.pid)
        names = {name for name, _ in find_listeners(processes)}
        assert {"gcs_server", "raylet"} <= names
        assert find_exposed_listeners(processes) == set()
        assert private["worker"] == {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GLOO_SOCKET_IFNAME": "lo"}
        assert private["driver"] == private["worker"] | {"clusters": False}
        assert private["nodes"] == ["127.0.0.1"]
        notebook.stdin.write("\n")
        notebook.stdin.flush()
        joined = json.loads(notebook.stdout.readline())
        no_variables = dict.fromkeys(private["worker"])
        assert (joined["driver"], joined["worker"]) == (no_variables | {"clusters": True}, no_variables)
        assert joined["nodes"] == [address.rpartition(":")[0]]
        notebook.stdin.write("\n")
        notebook.stdin.flush()
        assert json.loads(notebook.stdout.readline()) == no_variables | {"clusters": True}
        assert notebook.wait(60) == 0
    finally:
        kill_processes(process_tree(notebook.pid))
        notebook.wait()


@pytest.mark.parametrize("handler", ["Ray's", "own"])
def test_sigterm_does_not_abort_a_driver_before_it_has_ended_its_steps(handler: str) -> None:
    """Ray's handler in C++ would after 3 s."""
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED_DRIVER, handler],
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("called\n" * (handler == "own") + "0.0\nTrue\n", "")
    assert done.returncode == 1  # of ray.wait, whatever the handler said


def test_a_long_tmpdir_is_replaced(photographs: Path, tmp_path: Path) -> None:
    """Also with an empty RAY_ADDRESS, as compose's ${RAY_ADDRESS:-} sets it."""
    long = tmp_path / ("slurm_jobdir_" * 6)
    long.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pipelines",
            "shard",
            str(photographs),
            str(tmp_path / "shards"),
            "--size",
            "32",
        ],
        env=clean_environment() | {"TMPDIR": str(long), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *_, note = done.stderr.splitlines()
    assert first == f"looking for photographs in {photographs} ..."
    assert note.startswith(f"note: TMPDIR={long} has ")
    assert (tmp_path / "shards" / "manifest.json").exists()
