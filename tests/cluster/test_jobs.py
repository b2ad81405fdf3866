"""`inpaint submit`, plain `ray job submit`, `cluster` and `services`: a real cluster, MLflow server and S3 gateway."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from harness import clean_environment, family, kill, wait_for
from mlflow import MlflowClient
from mlflow_server import acting_as
from ports import free_port

from pipelines.cluster import local_cluster
from pipelines.cluster.services import read_environment

ROOT = Path(__file__).parents[2]
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-8c1f",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-77ab",
    "HF_TOKEN": "planted-token-0d2e",
}
RECIPE = [
    "data.size=32",
    "data.margin=4",
    "data.shard_photos=24",
    "data.max_rejects=0.2",
    "data.source=photos",
    "edges=none",
    "train.checkpoint_every=20",
    "train.log_every=5",
    "evaluate={count: 8, distance: null, samples: 3}",
    "models={context_encoder: {name: context_encoder, size: 32, width: 0.1, overlap: 0, train: {steps: {train: 20}}}}",
]
SETS = [argument for value in RECIPE for argument in ("--set", value)]
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@dataclass(frozen=True)
class Place:
    """Where the cluster stands that the tests submit to, and what it knows."""

    folder: Path
    cluster: local_cluster.LocalCluster
    submitter: dict[str, str]  # the environment of a person who submits
    secrets: dict[str, str]  # what nobody may find in a log or file
    server: dict[str, str]  # MLflow's address and administrator
    bucket: dict[str, str]  # the keys of S3

    def inpaint(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.submitter | more,
            cwd=self.folder,
            start_new_session=True,
        )

    def call(self, *arguments: str, **more: str) -> tuple[int, str]:
        process = self.inpaint(*arguments, **more)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def submit(self, *arguments: str, **more: str) -> tuple[int, str]:
        return self.call("submit", *arguments, "--address", self.cluster.jobs, **more)

    @property
    def s3(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.bucket["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.bucket["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.bucket["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    @property
    def where(self) -> list[str]:
        """The arguments that say where the chain keeps what it makes."""
        return ["--storage", "s3://inpaint/runs", "--tracking", self.server["MLFLOW_TRACKING_URI"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "photos").symlink_to(photographs)
    base = clean_environment() | {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    base |= {
        "PYTHONPATH": f"{ROOT}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    servers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", base["XDG_STATE_HOME"])
        try:
            for name in ("mlflow", "s3"):
                port = free_port()
                command = [sys.executable, "-m", "pipelines", "services", name, "--port", str(port)]
                with open(folder / f"{name}.log", "w") as log:
                    servers.append(
                        subprocess.Popen(
                            command, cwd=folder, env=base, stdout=log, stderr=log, start_new_session=True
                        )
                    )
            files = [folder / "mlflow" / "mlflow.env", folder / "s3" / "s3.env"]
            wait_for(lambda: all(file.exists() for file in files), "the services' keys", servers[0])
            assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
            server, bucket = map(read_environment, files)
            command = [sys.executable, "-m", "pipelines", "cluster", "up", "--nodes", "2"]
            subprocess.run(command, env=base | server | bucket, cwd=folder, check=True, timeout=120)
            wait_for(lambda: _status(f"{server['MLFLOW_TRACKING_URI']}/health") == 200, "MLflow", servers[0])
            cluster = local_cluster.find("local")
            assert cluster is not None
            secrets = PLANTED | {
                "s3": bucket["AWS_SECRET_ACCESS_KEY"],
                "mlflow": server["MLFLOW_TRACKING_PASSWORD"],
                "ray": cluster.token.read_text(),
            }
            yield Place(folder, cluster, base | PLANTED, secrets, server, bucket)
        finally:
            for name in ("local", "doomed"):
                if (cluster := local_cluster.find(name)) is not None:
                    local_cluster.end(cluster)
            for process in servers:
                kill(family(process.pid))
                process.wait()


@pytest.fixture(scope="module")
def submitted(place: Place) -> tuple[int, str, set[str]]:
    """A whole run that was submitted: exit status, output, and who listened beyond loopback meanwhile."""
    process = place.inpaint(
        "submit", "demo", "--address", place.cluster.jobs, *SETS, *place.where, "--set", "scaling.workers=2"
    )
    beyond: set[str] = set()
    while process.poll() is None:
        beyond |= listening_beyond(place.cluster.processes())
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert process.stdout is not None
    return process.returncode, process.stdout.read(), beyond


def listening_beyond(processes: list[psutil.Process]) -> set[str]:
    """Who of them listens on another address than loopback."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in LOOPBACK:
                    found.add(f"{process.name()} {connection.laddr.ip}")
    return found


def test_submit_follows_a_run_to_its_registered_model(
    submitted: tuple[int, str, set[str]], place: Place
) -> None:
    status, output, _ = submitted
    assert status == 0, output
    job = re.search(r"job (demo-[0-9a-f]{12}-[0-9a-f]{6}) is submitted", output)
    assert job, output
    assert "finished in" in output
    assert "registered models:/context_encoder/1" in output
    with acting_as(place.server):
        client = MlflowClient(place.server["MLFLOW_TRACKING_URI"])
        version = client.get_model_version("context_encoder", "1")
        runs = client.search_runs(["1"])
    assert version.aliases == ["champion"] or client
    made_by = [
        json.loads(run.data.tags["inpaint.made_by"]) for run in runs if "inpaint.made_by" in run.data.tags
    ]
    assert {(made["ray"]["submission"], made["ray"]["nodes"]) for made in made_by} == {(job[1], 2)}
    assert all(re.fullmatch("[0-9a-f]{40}", made["code"]["commit"]) for made in made_by)


def test_nothing_listens_beyond_loopback(submitted: tuple[int, str, set[str]]) -> None:
    assert submitted[2] == set()


def test_status_needs_only_the_storage(submitted: tuple[int, str, set[str]], place: Place) -> None:
    """As the submission says it, from a folder without photographs, where neither Ray nor MLflow could be had."""
    told = re.search("how far it is, from anywhere: inpaint (status .*)", submitted[1])
    assert told, submitted[1]
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *shlex.split(told[1])],
        cwd=elsewhere,
        env=place.submitter | place.bucket | {"RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    states = dict(re.findall(r"^(\S+) +(\S+)", done.stdout, re.MULTILINE))
    chain = ("shard", "train-context_encoder", "evaluate", "register-context_encoder")
    assert states == {"step": "state"} | dict.fromkeys(chain, "finished")


def test_no_secret_is_in_package_logs_storage_or_mlflow(
    submitted: tuple[int, str, set[str]], place: Place
) -> None:
    found: list[str] = []

    def look(where: str, content: bytes) -> None:
        found.extend(
            f"{name} in {where}" for name, secret in place.secrets.items() if secret.encode() in content
        )

    look("the submitter's output", submitted[1].encode())
    files = [path for path in place.cluster.temporary.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "recipe.yaml" for path in files)  # the package, as it arrived
    assert any(path.name.startswith("job-driver-") for path in files)
    for path in [*files, *place.cluster.folder.glob("*.log"), *place.folder.glob("*.log")]:
        look(str(path), path.read_bytes())
    keys = stored(place).keys()
    assert any(key.endswith("model.safetensors") for key in keys)
    for key in keys:
        look(key, place.s3.get_object(Bucket="inpaint", Key=key)["Body"].read())
    with acting_as(place.server):
        client = MlflowClient(place.server["MLFLOW_TRACKING_URI"])
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        versions = client.search_model_versions()
    assert any(run.data.params for run in runs)
    look("MLflow", repr([run.to_dictionary() for run in runs]).encode())
    look("MLflow", repr([dict(version) for version in versions]).encode())
    assert found == []


def test_plain_ray_job_submit_from_a_checkout(submitted: tuple[int, str, set[str]], place: Place) -> None:
    """Finds what is in the bucket finished, leaves it as it is, and evaluates otherwise."""
    was, not_again = stored(place), "models.context_encoder.register_as=none"
    absolute = f"data.source={(place.folder / 'photos').resolve()}"  # as `inpaint submit` made it
    before = set(packages(place))
    command = [
        *shlex.split("ray job submit --working-dir . --submission-id plain -- inpaint run demo"),
        *SETS,
    ]
    done = subprocess.run(
        [*command, *place.where, "--set", absolute, "--set", "evaluate.count=6", "--set", not_again],
        cwd=ROOT,
        env=place.submitter
        | local_cluster.environment(place.cluster)
        | {"RAY_API_SERVER_ADDRESS": place.cluster.jobs},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"train-context_encoder +found finished", done.stdout)
    assert was.items() <= stored(place).items()
    asked = urllib.request.Request(
        f"{place.cluster.jobs}/api/jobs/plain",
        headers={"Authorization": f"Bearer {place.cluster.token.read_text()}"},
    )
    with urllib.request.urlopen(asked) as answer:
        assert json.load(answer)["job_id"]  # which a job has when its driver joined this cluster
    (package,) = set(packages(place)) - before
    assert sum(path.stat().st_size for path in package.rglob("*")) < 5e6
    names = {path.name for path in package.iterdir() if path.suffix != ".yaml"} - {"__pycache__"}
    assert names == {"data_prep", "models", "pipelines", "pyproject.toml"}


def stored(place: Place) -> dict[str, Any]:
    """When each object of the bucket was written, but for what says how far its runs are."""
    return {
        item["Key"]: item["LastModified"]
        for page in place.s3.get_paginator("list_objects_v2").paginate(Bucket="inpaint")
        for item in page["Contents"]
        if "/status/" not in item["Key"]
    }


def packages(place: Place) -> list[Path]:
    """The packages of jobs, as they were unpacked on the head."""
    found = place.cluster.temporary.glob("head/session_*/runtime_resources/working_dir_files/_ray_pkg_*")
    return [path.resolve() for path in found if path.is_dir()]


def test_a_job_that_fails_and_one_that_is_left(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # which the job waits for
        tracking = f"http://127.0.0.1:{silent.getsockname()[1]}"
        where = ["--storage", str(place.folder / "failed"), "--tracking", tracking]
        process = place.inpaint("submit", "demo", *where, "--address", place.cluster.jobs)
        assert process.stdout is not None
        assert " is submitted to " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        left, _ = process.communicate(timeout=60)
        assert process.returncode == 130, left
        again = re.search(r"inpaint (submit --attach \S+ --address \S+)", left)
        assert again, left
        status, other = place.submit("demo", *where, "--no-wait")
        assert status == 0, other
        assert " is submitted to " in other
        assert "follow it: inpaint submit --attach demo-" in other

    # from a home that knows no cluster, with the token where Ray looks for it
    from_afar = {"RAY_AUTH_TOKEN": place.cluster.token.read_text(), **nowhere(place)}
    status, output = place.call(*again[1].split(), **from_afar)
    assert status == 1
    last = output.strip().splitlines()[-1]
    assert re.match(rf"inpaint submit: job demo-\S+ failed: .*{tracking}", last), output


def nowhere(place: Place) -> dict[str, str]:
    """The environment of somebody who did not start the cluster."""
    return {"XDG_STATE_HOME": str(place.folder / "none"), "HOME": str(place.folder / "none")}


def test_a_job_that_is_stopped_leaves_no_lease(place: Place) -> None:
    """So that the next one need not wait for it to go stale, and its attempt says how it ended."""
    steps = ["--set", "models.context_encoder.train.steps={train: 100000}"]
    status, output = place.submit(
        "demo", *SETS, *steps, *place.where[2:], "--storage", "s3://inpaint/stopped", "--no-wait"
    )
    assert status == 0, output
    (job,) = re.findall("job (demo-[^ ]+) is submitted", output)
    wait_for(lambda: "/step-00000020/state.pt" in " ".join(objects(place, "stopped/work")), "a checkpoint")
    assert objects(place, "stopped/leases")
    token = {"RAY_AUTH_TOKEN": place.cluster.token.read_text(), "RAY_AUTH_MODE": "token"}
    command = ["ray", "job", "stop", job, "--address", place.cluster.jobs]
    done = subprocess.run(command, env=place.submitter | token, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert objects(place, "stopped/leases") == []
    (record,) = [key for key in objects(place, "stopped/attempts") if "-train-" in key]
    told = json.loads(place.s3.get_object(Bucket="inpaint", Key=record)["Body"].read())
    assert told["error"] == "interrupted: its driver was told to end"


def objects(place: Place, prefix: str) -> list[str]:
    listed = place.s3.list_objects_v2(Bucket="inpaint", Prefix=f"{prefix}/").get("Contents", [])
    return [item["Key"] for item in listed]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_job_whose_whole_cluster_dies_goes_on_where_it_was_on_another(place: Place) -> None:
    """With nothing left but the bucket and MLflow. Every point of its curves is there, and once."""
    steps = ["--set", "models.context_encoder.train.steps={train: 400}", "--set", "scaling.workers=2"]
    steps += ["--set", "models.context_encoder.register_as=none"]
    what = ["submit", "demo", *SETS, *steps, *place.where[2:], "--storage", "s3://inpaint/lost"]

    def begin() -> local_cluster.LocalCluster:
        status, output = place.call(
            "cluster", "up", "--nodes", "2", "--name", "lost", **(place.server | place.bucket)
        )
        assert status == 0, output
        cluster = local_cluster.find("lost")
        assert cluster is not None
        return cluster

    def keys(part: str) -> list[str]:
        return [key for key in objects(place, "lost") if part in key]

    cluster = begin()
    try:
        status, output = place.call(*what, "--address", cluster.jobs, "--no-wait")
        assert status == 0, output
        wait_for(lambda: keys("/step-00000040/state.pt"), "two checkpoints")
        everything = cluster.processes()
        kill(family(cluster.nodes[0].pid))
        kill(everything)
        local_cluster.end(cluster)
        cluster = begin()
        status, output = place.call(*what, "--address", cluster.jobs)
        assert status == 0, output
    finally:
        local_cluster.end(cluster)
    (manifest,) = keys("-train-context_encoder.json")
    run = json.loads(place.s3.get_object(Bucket="inpaint", Key=manifest)["Body"].read())["value"]["run"]
    with acting_as(place.server):
        client = MlflowClient(place.server["MLFLOW_TRACKING_URI"])
        points = [metric.step for metric in client.get_metric_history(run, "loss/rec")]
        starts = [metric.step for metric in client.get_metric_history(run, "workers")]
    assert points == list(range(5, 401, 5))
    assert len(starts) == 2
    assert starts[1] > 20  # the first log point after a checkpoint that was committed


def test_without_the_token(place: Place) -> None:
    storage = ["--storage", "s3://inpaint/runs"]
    status, output = place.submit("demo", *storage, **nowhere(place))
    assert (status, output.count("\n")) == (1, 2), output
    assert "wants a token (401): put it in RAY_AUTH_TOKEN, " in output
    status, output = place.submit("demo", *storage, RAY_AUTH_TOKEN="0" * 64, **nowhere(place))
    assert status == 1
    assert "refuses the token from RAY_AUTH_TOKEN" in output
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary"):
        assert _status(place.cluster.jobs + path) == 401
    body = json.dumps({"entrypoint": "true"}).encode()
    assert _status(f"{place.cluster.jobs}/api/jobs/", body) == 401


def test_down_ends_what_it_started_and_nothing_else(place: Place) -> None:
    name = ["--name", "doomed"]
    status, output = place.call("cluster", "up", "--nodes", "2", *name)
    assert status == 0, output
    doomed = local_cluster.find("doomed")
    assert doomed is not None
    assert doomed.token.stat().st_mode & 0o777 == 0o600
    assert doomed.token.read_text() not in output
    assert "is up already" in place.call("cluster", "up", *name)[1]
    os.kill(doomed.nodes[1].pid, signal.SIGKILL)
    wait_for(lambda: not doomed.nodes[1].alive, "the node's end")
    status, output = place.call("cluster", "status", *name)
    assert status == 1
    assert re.search(r"head +alive", output)
    assert re.search(r"node-1 +dead", output)
    status, output = place.call("cluster", "down", *name)
    assert status == 0, output
    assert doomed.processes() == []
    assert not doomed.temporary.exists()
    assert not doomed.folder.exists()
    assert place.call("cluster", "down", *name) == (0, "cluster doomed is not up\n")
    assert place.cluster.counted() == 2  # the other cluster on this machine


def test_a_private_ray_stays_on_loopback(place: Place) -> None:
    """What every command starts when no cluster is named."""
    program = (
        "import sys\nfrom pipelines.cluster.session import ray_session\n"
        "with ray_session():\n import ray\n print(ray.get(ray.remote(lambda: 1).remote()), flush=True)\n sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=place.submitter,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        mine = family(process.pid)
        assert any("raylet" in member.name() for member in mine)
        assert listening_beyond(mine) == set()
    finally:
        kill(family(process.pid))
        process.wait()


def test_workers_find_the_head_of_their_own_cluster(place: Place) -> None:
    """And not that of another Ray, which may have left its address in /tmp/ray: Ray Train asks it at the end."""
    program = (
        "import ray\nfrom ray.util.state import list_nodes\nray.init(log_to_driver=False)\n"
        "found = ray.remote(num_cpus=0)(lambda: [node.state for node in list_nodes(timeout=20)]).remote()\n"
        "print(ray.get(found, timeout=60))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=place.submitter
        | local_cluster.environment(place.cluster)
        | {"RAY_ADDRESS": place.cluster.address},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "['ALIVE', 'ALIVE']\n", done.stderr


def _status(url: str, body: bytes | None = None) -> int:
    """Of the answer to a GET, or to a POST of JSON; 0 without an answer."""
    headers = {"Content-Type": "application/json"} if body else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
