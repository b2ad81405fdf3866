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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient

from pipelines.cluster import local_cluster, service_process
from pipelines.cluster.services import read_env_file
from support.cluster_harness import (
    clean_environment,
    find_exposed_listeners,
    kill_processes,
    process_tree,
    wait_for,
)
from support.mlflow_server import acting_as
from support.ports import free_port

ROOT = Path(__file__).parents[2]
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-8c1f",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-77ab",
    "HF_TOKEN": "planted-token-0d2e",
}
RECIPE = [
    "data.size=32",
    "data.margin=4",
    "data.partition_size=24",
    "data.max_reject_fraction=0.2",
    "data.source=photos",
    "edges=none",
    "train.checkpoint_every=20",
    "train.log_every=5",
    "evaluate={max_photos: 8, distance: null, grid_rows: 3}",
    "models={context_encoder: {name: context_encoder, size: 32, width: 0.1, overlap: 0, train: {steps: {train: 20}}}}",
]
SETS = [argument for value in RECIPE for argument in ("--set", value)]


pytestmark = pytest.mark.timeout(600)  # the first test starts a cluster, servers and a whole run


@dataclass(frozen=True)
class Deployment:
    """The cluster to which the tests submit, its servers and its secrets."""

    folder: Path
    cluster: local_cluster.LocalCluster
    submitter: dict[str, str]  # the submitter's environment
    secrets: dict[str, str]  # must not appear in any log or file
    mlflow: dict[str, str]  # MLflow's URI and administrator
    bucket: dict[str, str]  # the S3 keys

    def inpaint(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.submitter | variables,
            cwd=self.folder,
            start_new_session=True,
        )

    def call(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.inpaint(*arguments, **variables)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def submit(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.call("submit", *arguments, "--address", self.cluster.jobs_url, **variables)

    def get(self, path: str) -> Any:
        """An answer of the dashboard."""
        request = urllib.request.Request(
            self.cluster.jobs_url + path,
            headers={"Authorization": f"Bearer {self.cluster.token_file.read_text()}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

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
    def storage_arguments(self) -> list[str]:
        """The arguments for storage and tracking."""
        return ["--storage", "s3://inpaint/runs", "--tracking-uri", self.mlflow["MLFLOW_TRACKING_URI"]]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "photos").symlink_to(photographs)
    base = clean_environment() | {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    base |= {
        "PYTHONPATH": f"{ROOT}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", base["XDG_STATE_HOME"])
        try:
            inpaint = [sys.executable, "-m", "pipelines"]
            for name in ("mlflow", "s3"):
                command = [*inpaint, "services", name, "--port", str(free_port()), "--detach"]
                subprocess.run(command, env=base, cwd=folder, check=True, timeout=180)
            files = [
                folder / name / f"{name}{suffix}" for name in ("mlflow", "s3") for suffix in (".env", ".log")
            ]
            assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
            server, bucket = map(read_env_file, files[::2])
            assert _status(f"{server['MLFLOW_TRACKING_URI']}/health") == 200
            command = [*inpaint, "cluster", "up", "--nodes", "2"]
            subprocess.run(command, env=base | server | bucket, cwd=folder, check=True, timeout=120)
            cluster = local_cluster.load("local")
            assert cluster is not None
            secrets = PLANTED | {
                "s3": bucket["AWS_SECRET_ACCESS_KEY"],
                "mlflow": server["MLFLOW_TRACKING_PASSWORD"],
                "ray": cluster.token_file.read_text(),
            }
            yield Deployment(folder, cluster, base | PLANTED, secrets, server, bucket)
        finally:
            for name in ("local", "doomed"):
                if (cluster := local_cluster.load(name)) is not None:
                    local_cluster.stop(cluster)
            for record in service_process.list_records():
                service_process.stop(record)


@pytest.fixture(scope="module")
def submitted(deployment: Deployment) -> tuple[int, str, set[str]]:
    """A complete submitted run: exit status, output, and the processes that listened beyond loopback meanwhile."""
    process = deployment.inpaint(
        "submit",
        "demo",
        "--address",
        deployment.cluster.jobs_url,
        *SETS,
        *deployment.storage_arguments,
        "--set",
        "scaling.workers=2",
    )
    beyond: set[str] = set()
    while process.poll() is None:
        beyond |= find_exposed_listeners(deployment.cluster.processes())
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert process.stdout is not None
    return process.returncode, process.stdout.read(), beyond


def test_submit_follows_a_run_to_its_registered_model(
    submitted: tuple[int, str, set[str]], deployment: Deployment
) -> None:
    status, output, _ = submitted
    assert status == 0, output
    job = re.search(r"job (demo-[0-9a-f]{12}-[0-9a-f]{6}) is submitted", output)
    assert job, output
    assert "finished in" in output
    assert "registered models:/context_encoder/1" in output
    with acting_as(deployment.mlflow):
        client = MlflowClient(deployment.mlflow["MLFLOW_TRACKING_URI"])
        version = client.get_model_version("context_encoder", "1")
        runs = client.search_runs(["1"])
    assert version.aliases == ["champion"] or client
    provenance = [
        json.loads(run.data.tags["inpaint.made_by"]) for run in runs if "inpaint.made_by" in run.data.tags
    ]
    assert {(entry["ray"]["submission"], entry["ray"]["nodes"]) for entry in provenance} == {(job[1], 2)}
    assert all(re.fullmatch("[0-9a-f]{40}", entry["code"]["commit"]) for entry in provenance)


def test_detached_services_show_no_secret_in_a_command_line_and_stop(deployment: Deployment) -> None:
    """What is stopped is an S3 server in a folder of its own; the deployment's servers continue."""
    status, output = deployment.call("services", "status")
    assert status == 0, output
    pids = {name: int(pid) for name, pid in re.findall(r"^(\w+) +running +http://\S+ +(\d+) ", output, re.M)}
    assert set(pids) == {"mlflow", "s3"}
    lines = [" ".join(process.cmdline()) for pid in pids.values() for process in process_tree(pid)]
    assert not [line for line in lines if any(secret in line for secret in deployment.secrets.values())]
    status, output = deployment.call("services", "s3", "--port", str(free_port()), "--detach")
    assert status == 1
    assert f"runs already at {deployment.bucket['AWS_ENDPOINT_URL']} (process {pids['s3']})" in output
    port = str(free_port())
    status, output = deployment.call("services", "s3", "--folder", "other", "--port", port, "--detach")
    assert status == 0, output
    status, output = deployment.call("services", "stop", "--folder", "other")
    assert status == 0, output
    assert output.endswith(f"the s3 server of {deployment.folder}/other is stopped: 1 process\n")
    assert deployment.call("services", "status")[0] == 0


def test_the_run_is_named_in_the_dashboard_and_its_progress_is_no_task(
    submitted: tuple[int, str, set[str]], deployment: Deployment
) -> None:
    (job,) = re.findall(r"job (demo-\S+) is submitted", submitted[1])
    assert deployment.get(f"/api/jobs/{job}")["metadata"]["job_name"] == "demo"
    tasks = deployment.get("/api/v0/tasks?limit=10000&detail=false")["data"]["result"]["result"]
    names = [task["name"] for task in tasks]
    assert {"shard", "train-context_encoder", "evaluate"} <= set(names)
    polls = ("ProgressActor.", "RayTrainWorker.poll", "SynchronizationActor.broadcast")
    assert not [name for name in names if name.startswith(polls)]


def test_nothing_listens_beyond_loopback(submitted: tuple[int, str, set[str]]) -> None:
    assert submitted[2] == set()


def test_status_needs_only_the_storage(submitted: tuple[int, str, set[str]], deployment: Deployment) -> None:
    """The command that the submission prints, from a folder without photographs and without Ray or MLflow."""
    command = re.search("its status, from any machine: inpaint (status .*)", submitted[1])
    assert command, submitted[1]
    elsewhere = deployment.folder / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *shlex.split(command[1])],
        cwd=elsewhere,
        env=deployment.submitter | deployment.bucket | {"RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    states = dict(re.findall(r"^(\S+) +(\S+)", done.stdout, re.MULTILINE))
    steps = ("shard", "train-context_encoder", "evaluate", "register-context_encoder")
    assert states == {"step": "state"} | dict.fromkeys(steps, "finished")


def test_no_secret_is_in_package_logs_storage_or_mlflow(
    submitted: tuple[int, str, set[str]], deployment: Deployment
) -> None:
    leaks: list[str] = []

    def search(source: str, content: bytes) -> None:
        leaks.extend(
            f"{name} in {source}" for name, secret in deployment.secrets.items() if secret.encode() in content
        )

    search("the submitter's output", submitted[1].encode())
    files = [
        path for path in deployment.cluster.ray_folder.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert any(path.name == "recipe.yaml" for path in files)  # the package, as it arrived
    assert any(path.name.startswith("job-driver-") for path in files)
    for path in [*files, *deployment.cluster.folder.glob("*.log"), *deployment.folder.glob("*/*.log")]:
        search(str(path), path.read_bytes())
    keys = modification_times(deployment).keys()
    assert any(key.endswith("model.safetensors") for key in keys)
    for key in keys:
        search(key, deployment.s3.get_object(Bucket="inpaint", Key=key)["Body"].read())
    with acting_as(deployment.mlflow):
        client = MlflowClient(deployment.mlflow["MLFLOW_TRACKING_URI"])
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        versions = client.search_model_versions()
    assert any(run.data.params for run in runs)
    search("MLflow", repr([run.to_dictionary() for run in runs]).encode())
    search("MLflow", repr([dict(version) for version in versions]).encode())
    assert leaks == []


def test_plain_ray_job_submit_from_a_checkout(
    submitted: tuple[int, str, set[str]], deployment: Deployment
) -> None:
    """Reuses the finished steps in the bucket without changing them, and evaluates with other options."""
    before, no_registration = modification_times(deployment), "models.context_encoder.register_as=none"
    absolute = f"data.source={(deployment.folder / 'photos').resolve()}"  # as `inpaint submit` makes it
    old_packages = set(packages(deployment))
    command = [
        *shlex.split("ray job submit --working-dir . --submission-id plain -- inpaint run demo"),
        *SETS,
    ]
    done = subprocess.run(
        [
            *command,
            *deployment.storage_arguments,
            "--set",
            absolute,
            "--set",
            "evaluate.max_photos=6",
            "--set",
            no_registration,
        ],
        cwd=ROOT,
        env=deployment.submitter
        | local_cluster.cluster_env_vars(deployment.cluster)
        | {"RAY_API_SERVER_ADDRESS": deployment.cluster.jobs_url},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"train-context_encoder +cached", done.stdout)
    assert before.items() <= modification_times(deployment).items()
    assert deployment.get("/api/jobs/plain")[
        "job_id"
    ]  # a job has one once its driver has joined this cluster
    (package,) = set(packages(deployment)) - old_packages
    assert sum(path.stat().st_size for path in package.rglob("*")) < 5e6
    names = {path.name for path in package.iterdir() if path.suffix != ".yaml"} - {"__pycache__"}
    assert names == {"data_prep", "models", "pipelines", "pyproject.toml"}


def modification_times(deployment: Deployment) -> dict[str, Any]:
    """When each object of the bucket was written, except the run status."""
    return {
        item["Key"]: item["LastModified"]
        for page in deployment.s3.get_paginator("list_objects_v2").paginate(Bucket="inpaint")
        for item in page["Contents"]
        if "/status/" not in item["Key"]
    }


def packages(deployment: Deployment) -> list[Path]:
    """The unpacked packages of jobs on the head."""
    folders = deployment.cluster.ray_folder.glob(
        "head/session_*/runtime_resources/working_dir_files/_ray_pkg_*"
    )
    return [path.resolve() for path in folders if path.is_dir()]


def test_detaching_from_a_job_and_attaching_until_it_fails(deployment: Deployment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the job waits for it
        tracking = f"http://127.0.0.1:{silent.getsockname()[1]}"
        storage = ["--storage", str(deployment.folder / "failed"), "--tracking-uri", tracking]
        process = deployment.inpaint("submit", "demo", *storage, "--address", deployment.cluster.jobs_url)
        assert process.stdout is not None
        assert any(" is submitted to " in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        attach = re.search(r"inpaint (submit --attach \S+ --address \S+)", output)
        assert attach, output
        port = silent.getsockname()[1]

    # from a home that knows no cluster, with the token where Ray looks for it
    other_user = {
        "RAY_AUTH_TOKEN": deployment.cluster.token_file.read_text(),
        **other_environment(deployment),
    }
    with ThreadingHTTPServer(("127.0.0.1", port), NotFoundHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        status, output = deployment.call(*attach[1].split(), **other_user)
        server.shutdown()
    assert status == 1
    last = output.strip().splitlines()[-1]
    assert re.match(rf"inpaint submit: job demo-\S+ failed: .*{tracking}", last), output


class NotFoundHandler(BaseHTTPRequestHandler):
    """An answer that ends a job's retries, which last minutes for an unreachable server."""

    def do_GET(self) -> None:
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def other_environment(deployment: Deployment) -> dict[str, str]:
    """The environment of a user who did not start the cluster."""
    return {"XDG_STATE_HOME": str(deployment.folder / "none"), "HOME": str(deployment.folder / "none")}


def test_a_job_that_is_stopped_leaves_no_lease(deployment: Deployment) -> None:
    """So the next run need not wait for it to expire. The attempt record has the reason. The job is not followed."""
    steps = ["--set", "models.context_encoder.train.steps={train: 100000}"]
    status, output = deployment.submit(
        "demo",
        *SETS,
        *steps,
        *deployment.storage_arguments[2:],
        "--storage",
        "s3://inpaint/stopped",
        "--no-wait",
    )
    assert status == 0, output
    assert "follow its logs: inpaint submit --attach demo-" in output
    (job,) = re.findall("job (demo-[^ ]+) is submitted", output)
    wait_for(
        lambda: "/step-00000020/state.pt" in " ".join(objects(deployment, "stopped/work")), "a checkpoint"
    )
    assert objects(deployment, "stopped/leases")
    ray_job(deployment, "stop", job)
    assert "terminated; the same command resumes" in ray_job(deployment, "logs", job)
    assert objects(deployment, "stopped/leases") == []
    (record,) = [key for key in objects(deployment, "stopped/attempts") if "-train-" in key]
    attempt = json.loads(deployment.s3.get_object(Bucket="inpaint", Key=record)["Body"].read())
    assert attempt["error"] == "interrupted: its driver was terminated"


def ray_job(deployment: Deployment, action: str, job: str) -> str:
    """The output of `ray job ACTION JOB`."""
    done = subprocess.run(
        ["ray", "job", action, job, "--address", deployment.cluster.jobs_url],
        env=deployment.submitter
        | {"RAY_AUTH_TOKEN": deployment.cluster.token_file.read_text(), "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def objects(deployment: Deployment, prefix: str) -> list[str]:
    listed = deployment.s3.list_objects_v2(Bucket="inpaint", Prefix=f"{prefix}/").get("Contents", [])
    return [item["Key"] for item in listed]


@pytest.mark.soak
def test_a_job_resumes_on_another_cluster_after_its_cluster_died(deployment: Deployment) -> None:
    """Only the bucket and MLflow remain. Each point of the curves is logged exactly once."""
    steps = ["--set", "models.context_encoder.train.steps={train: 400}", "--set", "scaling.workers=2"]
    steps += ["--set", "models.context_encoder.register_as=none"]
    command = [
        "submit",
        "demo",
        *SETS,
        *steps,
        *deployment.storage_arguments[2:],
        "--storage",
        "s3://inpaint/lost",
    ]

    def begin() -> local_cluster.LocalCluster:
        status, output = deployment.call(
            "cluster", "up", "--nodes", "2", "--name", "lost", **(deployment.mlflow | deployment.bucket)
        )
        assert status == 0, output
        cluster = local_cluster.load("lost")
        assert cluster is not None
        return cluster

    def keys(part: str) -> list[str]:
        return [key for key in objects(deployment, "lost") if part in key]

    cluster = begin()
    try:
        status, output = deployment.call(*command, "--address", cluster.jobs_url, "--no-wait")
        assert status == 0, output
        wait_for(lambda: keys("/step-00000040/state.pt"), "two checkpoints")
        processes = cluster.processes()
        kill_processes(process_tree(cluster.nodes[0].pid))
        kill_processes(processes)
        local_cluster.stop(cluster)
        cluster = begin()
        status, output = deployment.call(*command, "--address", cluster.jobs_url)
        assert status == 0, output
    finally:
        local_cluster.stop(cluster)
    (manifest,) = keys("-train-context_encoder.json")
    run = json.loads(deployment.s3.get_object(Bucket="inpaint", Key=manifest)["Body"].read())["value"][
        "run_id"
    ]
    with acting_as(deployment.mlflow):
        client = MlflowClient(deployment.mlflow["MLFLOW_TRACKING_URI"])
        points = [metric.step for metric in client.get_metric_history(run, "loss/rec")]
        starts = [metric.step for metric in client.get_metric_history(run, "workers")]
    assert points == list(range(5, 401, 5))
    assert len(starts) == 2
    assert starts[1] > 20  # the first log point after a committed checkpoint


def test_without_the_token(deployment: Deployment) -> None:
    storage = ["--storage", "s3://inpaint/runs"]
    status, output = deployment.submit("demo", *storage, **other_environment(deployment))
    assert status == 1
    assert [line.split(":")[0] for line in output.splitlines() if "..." not in line] == ["inpaint submit"]
    assert "requires a token (401): put it in RAY_AUTH_TOKEN, " in output
    status, output = deployment.submit(
        "demo", *storage, RAY_AUTH_TOKEN="0" * 64, **other_environment(deployment)
    )
    assert status == 1
    assert "refuses the token from RAY_AUTH_TOKEN" in output
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary"):
        assert _status(deployment.cluster.jobs_url + path) == 401
    body = json.dumps({"entrypoint": "true"}).encode()
    assert _status(f"{deployment.cluster.jobs_url}/api/jobs/", body) == 401


def test_down_stops_only_its_own_cluster(deployment: Deployment) -> None:
    name = ["--name", "doomed"]
    status, output = deployment.call("cluster", "up", "--nodes", "2", *name)
    assert status == 0, output
    doomed = local_cluster.load("doomed")
    assert doomed is not None
    assert doomed.token_file.stat().st_mode & 0o777 == 0o600
    assert doomed.token_file.read_text() not in output
    assert "is up already" in deployment.call("cluster", "up", *name)[1]
    os.kill(doomed.nodes[1].pid, signal.SIGKILL)
    wait_for(lambda: not doomed.nodes[1].is_alive, "the node's end")
    status, output = deployment.call("cluster", "status", *name)
    assert status == 1
    assert re.search(r"head +alive +\d+ +1$", output, re.M)
    assert re.search(r"node-1 +dead +\d+ +0$", output, re.M)
    assert "1 of 2 nodes are alive, with 1 CPUs; inpaint cluster up --name doomed starts the others" in output
    status, output = deployment.call("cluster", "up", *name)
    assert (status, "is up already, with 2 nodes, 1 of them started now" in output) == (0, True), output
    status, output = deployment.call("cluster", "status", *name)
    assert (status, "2 of 2 nodes are alive, with 2 CPUs\n" in output) == (0, True), output
    status, output = deployment.call("cluster", "down", *name)
    assert status == 0, output
    assert doomed.processes() == []
    assert not doomed.ray_folder.exists()
    assert not doomed.folder.exists()
    assert deployment.call("cluster", "down", *name) == (0, "cluster doomed is not up\n")
    assert deployment.cluster.alive_count() == 2  # the other cluster on this machine


def test_workers_find_the_head_of_their_own_cluster(deployment: Deployment) -> None:
    """Not that of another Ray, which may have left its address in /tmp/ray: Ray Train queries it at the end."""
    program = (
        "import ray\nfrom ray.util.state import list_nodes\nray.init(log_to_driver=False)\n"
        "states = ray.remote(num_cpus=0)(lambda: [node.state for node in list_nodes(timeout=20)]).remote()\n"
        "print(ray.get(states, timeout=60))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=deployment.submitter
        | local_cluster.cluster_env_vars(deployment.cluster)
        | {"RAY_ADDRESS": deployment.cluster.address},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "['ALIVE', 'ALIVE']\n", done.stderr


def _status(url: str, body: bytes | None = None) -> int:
    """The HTTP status of a GET, or of a POST of JSON; 0 without an answer."""
    headers = {"Content-Type": "application/json"} if body else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
