"""Trainings on a cluster of three Ray nodes under real kills: they end well, with the bits of an undisturbed one.

`make soak` runs twenty random schedules of faults.
"""

from __future__ import annotations

import os
import random
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
from faulty_proxy import faulty_proxy
from harness import Run, clean_environment, family, kill, wait_for
from mlflow_server import Server

from data_prep.storage import open_storage
from data_prep.stream import Stream
from pipelines.cluster import local_cluster
from pipelines.reading import parse_recipe
from pipelines.training.bookkeeping import SUM, samples_sum

pytestmark = pytest.mark.timeout(900)

STEPS, EVERY, LOG, MODEL = 300, 10, 5, "context_encoder"
SOAK = int(os.environ.get("INPAINT_SOAK", "20"))  # schedules


class Nodes:
    """Three nodes of one CPU each; they can be lost, and started again."""

    def __init__(self) -> None:
        self.cluster = local_cluster.start("faults", nodes=3, cpus=1)

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.cluster.address, **local_cluster.environment(self.cluster)}

    def workers(self) -> list[psutil.Process]:
        """The training's, in the order of their start."""
        return [p for p in self.cluster.processes() if "RayTrainWorker" in _command(p)]

    def homes(self) -> list[local_cluster.Node]:
        """The nodes without the head that training workers are on."""
        pids = {process.pid for process in self.workers()}
        return [n for n in self.cluster.nodes[1:] if pids & {member.pid for member in family(n.pid)}]

    def lose(self, node: local_cluster.Node) -> None:
        kill(family(node.pid))
        wait_for(lambda: not node.alive, "the node's end")

    def drain(self, node: local_cluster.Node, seconds: int) -> None:
        """What a cloud's notice makes Ray's autoscaler say of a spot machine."""
        (number,) = [one["nodeId"] for one in self.cluster.raylets() if one["nodeName"] == node.name]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--address", self.cluster.address, "--node-id", number]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=clean_environment() | self.environment, check=True, timeout=60)

    def begin_anew(self) -> None:
        """Everything killed, the head first, and another cluster in its place."""
        kill(family(self.cluster.nodes[0].pid))
        kill(self.cluster.processes())
        local_cluster.end(self.cluster)
        self.cluster = local_cluster.start("faults", nodes=3, cpus=1)


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        for key, value in clean_environment().items():
            patch.setenv(key, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        running = Nodes()
        try:
            yield running
        finally:
            local_cluster.end(running.cluster)


def _training(
    make_run: Callable[..., Run], nodes: Nodes, name: str, scaling: dict, steps: int = STEPS
) -> Run:
    run = make_run(name, scaling=scaling, edges="none")
    run.command = "train"
    model = run.recipe["models"][MODEL] | {"train": {"steps": {"train": steps}}}
    run.recipe["models"] = {MODEL: model}
    run.recipe["train"] = run.recipe["train"] | {"checkpoint_every": EVERY, "log_every": LOG}
    run.environment = nodes.environment
    return run


@pytest.fixture(scope="module")
def undisturbed(
    nodes: Nodes, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Run]:
    """The run of a number of ranks that nothing happened to."""

    @cache
    def of(ranks: int) -> Run:
        def make(name: str, **changes: object) -> Run:
            run = Run(tmp_path_factory.mktemp(name))
            run.recipe["data"]["source"] = str(photographs)
            run.recipe |= changes
            return run

        run = _training(make, nodes, f"undisturbed-{ranks}", {"workers": ranks})
        assert run.finish() == 0, run.output
        return run

    return of


def total(run: Run) -> int:
    return run.recipe["models"][MODEL]["train"]["steps"]["train"]


def reached(run: Run) -> int:
    """The step of the last checkpoint."""
    return int(run.latest(MODEL).removeprefix("step-") or 0)


def curves(run: Run, metric: str) -> list[tuple[int, float]]:
    return run.rows(f"select step, value from metrics where key = '{metric}' order by step, timestamp")


def expected_samples(run: Run) -> list[tuple[int, float]]:
    """What a single reader of the shards would see between the log points of the whole training."""
    recipe = parse_recipe({"name": "small", **run.recipe})
    stream = Stream(
        open_storage(run.storage).sub(run.value("shard")["shards"]),
        "train",
        size=recipe.data.size,
        batch=recipe.train.batch,
        masks="center",
        seed=recipe.seed,
        streams=recipe.data.streams,
    )
    sums = [samples_sum(stream.batch(step)["keys"]) for step in range(total(run))]
    return [(end, float(sum(sums[end - LOG : end]) % SUM)) for end in range(LOG, total(run) + 1, LOG)]


def check(run: Run) -> None:
    """Every sample once an epoch, and every point once."""
    assert curves(run, "data/samples_sum") == expected_samples(run)
    assert run.rows("select run_uuid, key, step from metrics group by 1, 2, 3 having count(*) > 1") == []
    assert [step for step, _ in curves(run, "loss/rec")] == list(range(LOG, total(run) + 1, LOG))
    assert run.leftovers() == []


# -- schedules -------------------------------------------------------------------------------------------------


@dataclass
class Schedule:
    """Faults of a random order at random steps, and what they are done to."""

    seed: int
    kinds: list[str]
    nodes: Nodes
    run: Run
    mlflow: Server | None = None

    def play(self) -> None:
        dice = random.Random(self.seed)
        driver = self.start()
        at, room = 0, STEPS // EVERY // (len(self.kinds) + 1)
        for kind in self.kinds:
            at += dice.randint(1, room)
            reached = f"step-{at * EVERY:08d}"
            wait_for(
                lambda reached=reached: self.run.latest(MODEL) >= reached and self.nodes.workers(),
                f"{kind} at {reached}",
                driver,
            )
            time.sleep(dice.uniform(0, 0.3))  # in the middle of some step
            driver = getattr(self, f"lose_{kind}")(dice, driver)
        assert self.run.finish(driver) == 0, f"{self.kinds}: {self.run.output}"

    def start(self) -> subprocess.Popen[str]:
        return self.run.start(*(("--tracking", self.mlflow.uri) if self.mlflow else ()))

    def lose_worker(self, dice: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        kill([dice.choice(found)] if (found := self.nodes.workers()) else [])
        return driver

    def lose_node(self, dice: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        if homes := self.nodes.homes():
            self.nodes.lose(dice.choice(homes))
            local_cluster.replenish(self.nodes.cluster)
        return driver

    def lose_driver(self, dice: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        driver.kill()
        driver.wait()
        return self.start()

    def lose_everything(self, dice: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        driver.kill()
        driver.wait()
        self.nodes.begin_anew()
        self.run.environment = self.nodes.environment
        return self.start()

    def lose_mlflow(self, dice: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        assert self.mlflow is not None
        self.mlflow.stop()
        return driver

    def lose_nothing(self, dice: random.Random, driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """And get MLflow back."""
        assert self.mlflow is not None
        self.mlflow.start()
        return driver


KINDS = ("worker", "node", "driver", "everything")


@pytest.mark.parametrize(
    ("ranks", "kinds"), [(2, ["mlflow", "node", "nothing", "driver"]), (3, ["worker", "everything"])]
)
def test_whatever_is_killed_the_weights_are_those_of_an_undisturbed_training(
    ranks: int,
    kinds: list[str],
    nodes: Nodes,
    undisturbed: Callable[[int], Run],
    make_run: Callable[..., Run],
) -> None:
    quiet = undisturbed(ranks)
    check(quiet)
    run = _training(make_run, nodes, f"disturbed-{ranks}", {"workers": ranks, "max_failures": 10})
    run.storage.mkdir()
    with Server(run.storage) as server:
        Schedule(ranks, kinds, nodes, run, server).play()
    assert run.weights(MODEL) == quiet.weights(MODEL)
    check(run)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SOAK))
def test_any_schedule_of_faults_ends_with_the_same_bits(
    seed: int, nodes: Nodes, undisturbed: Callable[[int], Run], make_run: Callable[..., Run]
) -> None:
    dice = random.Random(1000 + seed)
    ranks = dice.choice((2, 3))
    kinds = [dice.choice(KINDS) for _ in range(dice.randint(2, 5))]
    quiet = undisturbed(ranks)
    run = _training(make_run, nodes, f"soak-{seed}", {"workers": ranks, "max_failures": 10})
    Schedule(seed, kinds, nodes, run).play()
    assert run.weights(MODEL) == quiet.weights(MODEL), kinds
    check(run)


# -- what goes away, and comes back ----------------------------------------------------------------------------


@pytest.mark.soak
def test_elastic_workers_go_and_come_back_while_mlflow_is_away_for_a_minute(
    nodes: Nodes, make_run: Callable[..., Run]
) -> None:
    """From two to one, as a spot machine that announces its end and one that does not are lost, and to two again.

    Every sample once an epoch, and every point once.
    """
    local_cluster.replenish(nodes.cluster)
    elastic = {"workers": [1, 2], "max_failures": 10, "resize_every": 1}
    run = _training(make_run, nodes, "elastic", elastic, steps=5000)
    every = 500
    run.recipe["train"]["checkpoint_every"] = every
    run.storage.mkdir()
    with Server(run.storage) as server:
        driver = run.start("--tracking", server.uri)
        wait_for(lambda: run.latest(MODEL) and len(nodes.workers()) == 2, "two workers", driver)
        server.stop()
        away = time.monotonic()
        nodes.drain(nodes.homes()[0], 30)
        wait_for(lambda: reached(run) % every, "a checkpoint before leaving", driver)
        before = run.latest(MODEL)
        for node in nodes.cluster.nodes[1:]:
            nodes.lose(node)
        wait_for(lambda: run.latest(MODEL) > before and len(nodes.workers()) == 1, "one", driver)
        local_cluster.replenish(nodes.cluster)
        wait_for(lambda: len(nodes.workers()) == 2, "two again", driver)
        before = run.latest(MODEL)
        wait_for(lambda: run.latest(MODEL) > before, "going on", driver)
        time.sleep(max(0, away + 60 - time.monotonic()))
        server.start()
        assert run.finish(driver) == 0, run.output
    check(run)
    workers = [int(value) for _, value in curves(run, "workers")]  # at each start
    assert (workers[0], min(workers), workers[-1]) == (2, 1, 2)


def test_a_bucket_that_is_away_for_20_seconds_costs_no_worker(s3: str, make_run: Callable[..., Run]) -> None:
    """Checkpoints wait, while the training goes on up to the next one."""
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        run = make_run("no-bucket", edges="none", scaling={"max_failures": 0})
        run.command = "train"
        model = run.recipe["models"][MODEL] | {"train": {"steps": {"train": 200}}}
        run.recipe |= {"models": {MODEL: model}, "storage": f"{s3}/runs"}
        run.recipe["tracking"] = f"sqlite:///{run.folder}/mlflow.db"
        run.environment = {"AWS_ENDPOINT_URL": proxy.uri}
        client = boto3.client("s3")
        bucket = s3.removeprefix("s3://")

        def keys(part: str) -> list[str]:
            listed = client.list_objects_v2(Bucket=bucket, Prefix="runs/").get("Contents", [])
            return [item["Key"] for item in listed if part in item["Key"]]

        driver = run.start(storage=False)
        wait_for(lambda: keys("/step-00000040/state.pt"), "two checkpoints", driver)
        proxy.down(20)
        assert run.finish(driver) == 0, run.output
        (attempt,) = [key for key in keys("attempts/") if "-train-" in key]
        assert attempt.endswith("/1.json")


@pytest.mark.soak
def test_a_machine_that_announces_its_end_leaves_a_checkpoint(
    nodes: Nodes, undisturbed: Callable[[int], Run], make_run: Callable[..., Run]
) -> None:
    """As a spot machine's: the work since the last checkpoint is not lost."""
    local_cluster.replenish(nodes.cluster)
    run = _training(make_run, nodes, "spot", {"workers": 2})
    run.recipe["train"]["checkpoint_every"] = STEPS
    driver = run.start()
    wait_for(lambda: len(nodes.workers()) == 2 and nodes.homes(), "two workers", driver)
    leave = [sys.executable, "-m", "pipelines", "cluster", "leave", "--seconds", "30"]
    leave += ["--address", nodes.cluster.address]
    told = subprocess.run(
        leave, env=clean_environment() | nodes.environment, capture_output=True, text=True, timeout=60
    )
    assert told.stdout == "2 nodes of this machine will end within 30 s: announced\n", told.stderr
    wait_for(lambda: run.latest(MODEL), "a checkpoint", driver)
    assert reached(run) < STEPS
    for node in nodes.cluster.nodes[1:]:
        nodes.lose(node)
    local_cluster.replenish(nodes.cluster)
    assert run.finish(driver) == 0, run.output
    assert run.weights(MODEL) == undisturbed(2).weights(MODEL)


@pytest.mark.soak
def test_a_worker_that_ray_ends_for_its_memory_says_what_to_change(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that may use two gigabytes more than are in use now."""
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + 2e9) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{share:.3f}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = make_run("memory", edges="none", scaling={"max_failures": 0})
    run.command, run.recipe["models"] = (
        "train",
        {MODEL: {"size": 32, "width": 3, "train": {"steps": {"train": 20}}}},
    )
    cluster = local_cluster.start("memory", nodes=1, cpus=2)
    try:
        run.environment = {"RAY_ADDRESS": cluster.address, **local_cluster.environment(cluster)}
        assert run.finish() == 1
    finally:
        local_cluster.end(cluster)
    assert "a worker ran out of memory with 8 photographs of 32 px at once (train.batch = 8" in run.output
    assert "set scaling.at_once = 4" in run.output
