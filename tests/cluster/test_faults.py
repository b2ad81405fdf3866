"""Training on a multi-node Ray cluster with killed processes: it ends with the bits of an undisturbed run.

`make soak` runs twenty random schedules of faults.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import boto3
import psutil
import pytest

from data_prep.storage import open_storage
from data_prep.stream import BatchStream
from pipelines.cluster import local_cluster
from pipelines.recipe.load import parse_recipe
from pipelines.training.monitoring import CHECKSUM_MODULUS, sample_checksum
from support.cluster_harness import CliRun, clean_environment, kill_processes, process_tree, wait_for
from support.faulty_proxy import faulty_proxy
from support.mlflow_curves import check_curves, check_not_ahead_of_checkpoints
from support.mlflow_server import MlflowServer

pytestmark = pytest.mark.timeout(900)

STEPS, CHECKPOINT_EVERY, LOG_EVERY, MODEL = 300, 10, 5, "context_encoder"
SOAK_SCHEDULES = int(os.environ.get("INPAINT_SOAK", "20"))


class Nodes:
    """A cluster of one-CPU nodes that can be killed and restarted."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.cluster = local_cluster.start("faults", nodes=count, cpus_per_node=1)

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.cluster.address, **local_cluster.cluster_env_vars(self.cluster)}

    def workers(self) -> list[psutil.Process]:
        """The training workers, in the order of their start."""
        return [p for p in self.cluster.processes() if "RayTrainWorker" in _command(p)]

    def worker_nodes(self) -> list[local_cluster.Node]:
        """The nodes, except the head, that have training workers."""
        pids = {process.pid for process in self.workers()}
        return [n for n in self.cluster.nodes[1:] if pids & {member.pid for member in process_tree(n.pid)}]

    def lose(self, node: local_cluster.Node) -> None:
        kill_processes(process_tree(node.pid))
        wait_for(lambda: not node.is_alive, "the node's end")

    def drain(self, node: local_cluster.Node, seconds: int) -> None:
        """Drain a node as Ray's autoscaler does after a preemption notice."""
        (node_id,) = [
            entry["nodeId"] for entry in self.cluster.alive_nodes() if entry["nodeName"] == node.name
        ]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--address", self.cluster.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=clean_environment() | self.environment, check=True, timeout=60)

    def restart_cluster(self) -> None:
        """Kill all processes, the head first, and start a new cluster."""
        kill_processes(process_tree(self.cluster.nodes[0].pid))
        kill_processes(self.cluster.processes())
        local_cluster.stop(self.cluster)
        self.cluster = local_cluster.start("faults", nodes=self.count, cpus_per_node=1)


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Three nodes: two workers still fit if one node is lost, and three have a node each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        for key, value in clean_environment().items():
            patch.setenv(key, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        running = Nodes(3)
        try:
            yield running
        finally:
            local_cluster.stop(running.cluster)


def _training(
    make_run: Callable[..., CliRun], nodes: Nodes, name: str, scaling: dict, steps: int = STEPS
) -> CliRun:
    run = make_run(name, scaling=scaling, edges="none")
    run.command = "train"
    model = run.recipe["models"][MODEL] | {"train": {"steps": {"train": steps}}}
    run.recipe["models"] = {MODEL: model}
    run.recipe["train"] = run.recipe["train"] | {"checkpoint_every": CHECKPOINT_EVERY, "log_every": LOG_EVERY}
    run.environment = nodes.environment
    return run


@pytest.fixture(scope="module")
def undisturbed(
    nodes: Nodes, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., CliRun]:
    """Runs without faults, cached by number of ranks and steps."""

    @cache
    def of(ranks: int, steps: int = STEPS) -> CliRun:
        def make(name: str, **changes: object) -> CliRun:
            run = CliRun(tmp_path_factory.mktemp(name))
            run.recipe["data"]["source"] = str(photographs)
            run.recipe |= changes
            return run

        run = _training(make, nodes, f"undisturbed-{ranks}", {"workers": ranks}, steps)
        assert run.finish() == 0, run.output
        return run

    return of


def total_steps(run: CliRun) -> int:
    return run.recipe["models"][MODEL]["train"]["steps"]["train"]


def last_checkpoint_step(run: CliRun) -> int:
    """The step of the last checkpoint."""
    return int(run.latest_checkpoint(MODEL).removeprefix("step-") or 0)


def curves(run: CliRun, metric: str) -> list[tuple[int, float]]:
    return run.query_mlflow(
        f"select step, value from metrics where key = '{metric}' order by step, timestamp"
    )


def expected_samples(run: CliRun) -> list[tuple[int, float]]:
    """(step, checksum of the sample keys) that one reader of the shards gets between the log points."""
    recipe = parse_recipe({"name": "small", **run.recipe})
    stream = BatchStream(
        open_storage(run.storage).subfolder(run.step_outputs("shard")["folder"]),
        "train",
        size=recipe.data.size,
        batch_size=recipe.train.batch,
        masks="center",
        seed=recipe.seed,
        streams=recipe.data.streams,
    )
    sums = [sample_checksum(stream.batch_at(step).keys) for step in range(total_steps(run))]
    return [
        (end, float(sum(sums[end - LOG_EVERY : end]) % CHECKSUM_MODULUS))
        for end in range(LOG_EVERY, total_steps(run) + 1, LOG_EVERY)
    ]


def check(run: CliRun) -> None:
    """Every sample once per epoch and every curve point once, in MLflow and in the storage."""
    assert check_curves(run.storage) == 1
    assert curves(run, "data/samples_sum") == expected_samples(run)
    assert (
        run.query_mlflow("select run_uuid, key, step from metrics group by 1, 2, 3 having count(*) > 1") == []
    )
    assert [step for step, _ in curves(run, "loss/rec")] == list(
        range(LOG_EVERY, total_steps(run) + 1, LOG_EVERY)
    )
    assert run.unpublished_files() == []


# -- schedules -------------------------------------------------------------------------------------------------


@dataclass
class Schedule:
    """Faults at random steps, and the nodes, run and MLflow server that they are applied to."""

    seed: int
    kinds: list[str]
    nodes: Nodes
    run: CliRun
    mlflow: MlflowServer | None = None
    output: str = ""  # of all its drivers

    def play(self) -> None:
        rng = random.Random(self.seed)
        driver = self.start()
        step_index, max_gap = 0, total_steps(self.run) // CHECKPOINT_EVERY // (len(self.kinds) + 1)
        for kind in self.kinds:
            step_index += rng.randint(1, max_gap)
            checkpoint = f"step-{step_index * CHECKPOINT_EVERY:08d}"
            wait_for(
                lambda checkpoint=checkpoint: (
                    self.run.latest_checkpoint(MODEL) >= checkpoint and self.nodes.workers()
                ),
                f"{kind} at {checkpoint}",
                driver,
            )
            time.sleep(rng.uniform(0, 0.3))  # in the middle of a step
            driver = getattr(self, f"lose_{kind}")(rng, driver)
        assert self.run.finish(driver) == 0, f"{self.kinds}: {self.run.output}"
        self.output += self.run.output

    def start(self) -> subprocess.Popen[str]:
        return self.run.start(*(("--tracking-uri", self.mlflow.uri) if self.mlflow else ()))

    def lose_worker(self, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        kill_processes([rng.choice(workers)] if (workers := self.nodes.workers()) else [])
        return driver

    def lose_node(self, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        if nodes := self.nodes.worker_nodes():
            self.nodes.lose(rng.choice(nodes))
            local_cluster.start_missing_nodes(self.nodes.cluster)
        return driver

    def lose_driver(self, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        self.kill(driver)
        return self.start()

    def kill(self, driver: subprocess.Popen[str]) -> None:
        driver.kill()
        driver.wait()
        assert driver.stdout is not None
        self.output += driver.stdout.read()

    def lose_everything(self, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        self.kill(driver)
        self.nodes.restart_cluster()
        check_not_ahead_of_checkpoints(self.run.storage)
        self.run.environment = self.nodes.environment
        return self.start()

    def lose_mlflow(self, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        assert self.mlflow is not None
        self.mlflow.stop()
        return driver

    def lose_nothing(self, rng: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """Only restart MLflow, with the workers suspended.

        On a busy machine a server's start takes longer than the remaining training: later faults would come too late.
        """
        assert self.mlflow is not None
        workers = self.nodes.workers()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
        self.mlflow.start()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.resume()
        return driver


KINDS = ("worker", "node", "driver", "everything")


@pytest.mark.parametrize(
    ("ranks", "steps", "kinds"),
    [
        (2, STEPS // 2, ["mlflow", "node", "nothing", "everything"]),
        pytest.param(2, STEPS, ["mlflow", "worker", "nothing", "driver"], marks=pytest.mark.soak),
        pytest.param(3, STEPS, ["worker", "everything"], marks=pytest.mark.soak),
    ],
)
def test_killed_processes_do_not_change_the_weights(
    ranks: int,
    steps: int,
    kinds: list[str],
    nodes: Nodes,
    undisturbed: Callable[..., CliRun],
    make_run: Callable[..., CliRun],
) -> None:
    expected = undisturbed(ranks, steps)
    check(expected)
    run = _training(make_run, nodes, f"disturbed-{ranks}", {"workers": ranks, "max_failures": 10}, steps)
    run.storage.mkdir()
    with MlflowServer(run.storage) as server:
        schedule = Schedule(ranks, kinds, nodes, run, server)
        schedule.play()
    check_announcements(schedule, ranks)
    assert run.weights_digest(MODEL) == expected.weights_digest(MODEL)
    check(run)


def check_announcements(schedule: Schedule, ranks: int) -> None:
    """The person who follows the run reads what was lost and where training resumed, and none of Ray's logs."""
    output, kinds = schedule.output, schedule.kinds
    resumed = re.findall(rf"train-{MODEL}: resuming from step (\d+) with {ranks} workers", output)
    assert len(resumed) >= len(set(kinds) & set(KINDS)), output
    assert all(int(step) % CHECKPOINT_EVERY == 0 < int(step) for step in resumed)
    lost = re.findall(rf"train-{MODEL}: (a worker was|\d workers were) lost \(", output)
    assert len(lost) >= len(set(kinds) & {"worker", "node"}), output
    nodes = re.findall(r"node node-\d \(127.0.0.1\) was lost; the cluster now has \d nodes", output)
    assert len(nodes) == kinds.count("node"), output
    assert not re.search(r"\[state-dump\]|Raylet is terminated|marked dead", output), output


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SOAK_SCHEDULES))
def test_any_schedule_of_faults_ends_with_the_same_bits(
    seed: int, nodes: Nodes, undisturbed: Callable[..., CliRun], make_run: Callable[..., CliRun]
) -> None:
    rng = random.Random(1000 + seed)
    ranks = rng.choice((2, 3))
    kinds = [rng.choice(KINDS) for _ in range(rng.randint(2, 5))]
    expected = undisturbed(ranks)
    run = _training(make_run, nodes, f"soak-{seed}", {"workers": ranks, "max_failures": 10})
    Schedule(seed, kinds, nodes, run).play()
    assert run.weights_digest(MODEL) == expected.weights_digest(MODEL), kinds
    check(run)


# -- nodes and servers that are lost for some time -------------------------------------------------------------


@pytest.mark.soak
def test_elastic_workers_are_lost_and_restored_while_mlflow_is_down(
    nodes: Nodes, make_run: Callable[..., CliRun]
) -> None:
    """From two workers to one, after a drained node and a killed node, and back to two.

    Every sample is read once per epoch and every point is logged once. MLflow is down for a minute.
    """
    local_cluster.start_missing_nodes(nodes.cluster)
    elastic = {"workers": [1, 2], "max_failures": 10, "resize_interval_s": 1}
    run = _training(make_run, nodes, "elastic", elastic, steps=5000)
    checkpoint_every = 500
    run.recipe["train"]["checkpoint_every"] = checkpoint_every
    run.storage.mkdir()
    with MlflowServer(run.storage) as server:
        driver = run.start("--tracking-uri", server.uri)
        wait_for(lambda: run.latest_checkpoint(MODEL) and len(nodes.workers()) == 2, "two workers", driver)
        server.stop()
        stopped_at = time.monotonic()
        nodes.drain(nodes.worker_nodes()[0], 30)
        wait_for(lambda: last_checkpoint_step(run) % checkpoint_every, "a checkpoint before leaving", driver)
        checkpoint = run.latest_checkpoint(MODEL)
        for node in nodes.cluster.nodes[1:]:
            nodes.lose(node)
        wait_for(
            lambda: run.latest_checkpoint(MODEL) > checkpoint and len(nodes.workers()) == 1, "one", driver
        )
        local_cluster.start_missing_nodes(nodes.cluster)
        wait_for(lambda: len(nodes.workers()) == 2, "two again", driver)
        checkpoint = run.latest_checkpoint(MODEL)
        wait_for(lambda: run.latest_checkpoint(MODEL) > checkpoint, "a later checkpoint", driver)
        time.sleep(max(0, stopped_at + 60 - time.monotonic()))
        server.start()
        assert run.finish(driver) == 0, run.output
    check(run)
    workers = [int(value) for _, value in curves(run, "workers")]  # at each start
    assert (workers[0], min(workers), workers[-1]) == (2, 1, 2)


def test_a_bucket_outage_of_20_seconds_costs_no_worker(s3: str, make_run: Callable[..., CliRun]) -> None:
    """Uploads of checkpoints wait, while training continues up to the next checkpoint."""
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        run = make_run("no-bucket", edges="none", scaling={"max_failures": 0})
        run.command = "train"
        model = run.recipe["models"][MODEL] | {"train": {"steps": {"train": 100}}}
        run.recipe |= {"models": {MODEL: model}, "storage": f"{s3}/runs"}
        run.recipe["tracking_uri"] = f"sqlite:///{run.folder}/mlflow.db"
        run.environment = {"AWS_ENDPOINT_URL": proxy.uri}
        client = boto3.client("s3")
        bucket = s3.removeprefix("s3://")

        def keys(part: str) -> list[str]:
            listed = client.list_objects_v2(Bucket=bucket, Prefix="runs/").get("Contents", [])
            return [item["Key"] for item in listed if part in item["Key"]]

        driver = run.start(storage=False)
        wait_for(lambda: keys("/step-00000040/state.pt"), "two checkpoints", driver)
        proxy.take_down(20)
        assert run.finish(driver) == 0, run.output
        (attempt,) = [key for key in keys("attempts/") if "-train-" in key]
        assert attempt.endswith("/1.json")
        assert check_curves(f"{s3}/runs", run.folder / "mlflow.db") == 1


@pytest.mark.soak
def test_a_drained_node_leaves_a_checkpoint(
    nodes: Nodes, undisturbed: Callable[..., CliRun], make_run: Callable[..., CliRun]
) -> None:
    """After `inpaint cluster leave`, as on a spot instance, no step is lost."""
    local_cluster.start_missing_nodes(nodes.cluster)
    run = _training(make_run, nodes, "spot", {"workers": 2})
    run.recipe["train"]["checkpoint_every"] = STEPS
    driver = run.start()
    wait_for(lambda: len(nodes.workers()) == 2 and nodes.worker_nodes(), "two workers", driver)
    leave = [sys.executable, "-m", "pipelines", "cluster", "leave", "--seconds", "30"]
    leave += ["--address", nodes.cluster.address]
    process = subprocess.run(
        leave, env=clean_environment() | nodes.environment, capture_output=True, text=True, timeout=60
    )
    assert process.stdout == "announced: 2 node(s) on this machine will shut down within 30 s\n", (
        process.stderr
    )
    wait_for(lambda: run.latest_checkpoint(MODEL), "a checkpoint", driver)
    assert last_checkpoint_step(run) < STEPS
    for node in nodes.cluster.nodes[1:]:
        nodes.lose(node)
    local_cluster.start_missing_nodes(nodes.cluster)
    assert run.finish(driver) == 0, run.output
    assert run.weights_digest(MODEL) == undisturbed(2).weights_digest(MODEL)


@pytest.mark.soak
def test_an_out_of_memory_worker_suggests_a_micro_batch_size(
    make_run: Callable[..., CliRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that may use two gigabytes more than now."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 2e9) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.3f}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = make_run("memory", edges="none", scaling={"max_failures": 0})
    run.command, run.recipe["models"] = (
        "train",
        {MODEL: {"size": 32, "width": 3, "train": {"steps": {"train": 20}}}},
    )
    cluster = local_cluster.start("memory", nodes=1, cpus_per_node=2)
    try:
        run.environment = {"RAY_ADDRESS": cluster.address, **local_cluster.cluster_env_vars(cluster)}
        assert run.finish() == 1
    finally:
        local_cluster.stop(cluster)
    assert "a worker ran out of memory with 8 photographs of 32 px at once (train.batch = 8" in run.output
    assert "set scaling.micro_batch_size = 4" in run.output
