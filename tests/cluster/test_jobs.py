"""Jobs on a real cluster with token authentication: submitted, followed, refused without the token."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from harness import RECIPE, clean_environment, family, kill, wait_for
from ports import free_port

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PLANTED = "planted-secret-4711"


class Cluster:
    """A head on free ports of loopback, which asks for a token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.environment = clean_environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        gcs, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"]
        log = open(folder / "head.log", "w")  # noqa: SIM115
        self.head = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )

    def answers(self) -> bool:
        try:
            return self.ask(self.token) == 200
        except OSError:
            return False

    def ask(self, token: str | None) -> int:
        request = urllib.request.Request(f"{self.address}/api/jobs/")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | {"AWS_SECRET_ACCESS_KEY": PLANTED} | more
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env=environment,
            cwd=self.folder,
        )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        wait_for(cluster.answers, "the dashboard")
        yield cluster
    finally:
        kill(family(cluster.head.pid))
        cluster.head.wait()


def test_a_recipe_runs_as_a_job(cluster: Cluster, photographs: Path) -> None:
    assert cluster.ask(None) == 401
    assert cluster.ask("wrong") in (401, 403)
    folder = cluster.folder
    recipe = RECIPE | {"name": "job", "storage": str(folder / "runs"), "models": {}}
    recipe["data"] = recipe["data"] | {"source": str(photographs)}
    encoder = {"size": 32, "width": 0.1, "overlap": 0, "train": {"steps": {"train": 20}}}
    recipe |= {"models": {"context_encoder": encoder}, "tracking": f"sqlite:///{folder}/mlflow.db"}
    (folder / "job.yaml").write_text(yaml.safe_dump(recipe))
    submit = (
        sys.executable,
        "-m",
        "pipelines",
        "submit",
        str(folder / "job.yaml"),
        "--address",
        cluster.address,
    )

    refused = cluster.run(*submit, RAY_AUTH_TOKEN="x" * 32, PYTHONPATH=str(ROOT))
    assert refused.returncode == 1
    assert "does not take the token; it is looked for in RAY_AUTH_TOKEN" in refused.stderr

    done = cluster.run(*submit, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered models:/context_encoder/1" in done.stdout
    assert "inpaint submit --attach inpaint-job-" in done.stdout
    assert "SUCCEEDED" in done.stdout

    # the same by Ray's own command, from the checkout: everything is found finished
    plain = [RAY, "job", "submit", "--address", cluster.address, "--working-dir", str(ROOT), "--"]
    again = cluster.run(*plain, "python", "-m", "pipelines", "run", str(folder / "job.yaml"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "everything was found finished" in again.stdout

    status = cluster.run(sys.executable, "-m", "pipelines", "status", "job.yaml", PYTHONPATH=str(ROOT))
    assert status.stdout.count("finished") >= 4, status.stdout
    failing = cluster.run(*submit, "--set", "data.source=/nowhere", PYTHONPATH=str(ROOT))
    assert failing.returncode == 1
    assert "data.source /nowhere is no folder" in failing.stdout + failing.stderr

    told = "".join(run.stdout + run.stderr for run in (refused, done, again, status, failing))
    assert PLANTED not in told
    assert cluster.token not in told
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert PLANTED.encode() not in content, path
            assert cluster.token.encode() not in content, path
