"""Durable steps: what is done once stays done; what changed, failed or was lost is done again, and says why."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
import ray
from moto.server import ThreadedMotoServer
from ray.exceptions import WorkerCrashedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from data_prep.storage import Storage, open_storage
from pipelines.durable.attempt import failure
from pipelines.durable.steps import Step, StepFailed, StorageBusy, Workflow, step_key

DEADLINE = 120.0


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs, whose processes know an S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker can import this file
        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        yield
        ray.shutdown()
    server.stop()


@pytest.fixture
def folder(tmp_path) -> Storage:
    return open_storage(tmp_path / "runs")


@pytest.fixture(params=["folder", "bucket"])
def storage(request, cluster, folder) -> Storage:
    if request.param == "folder":
        return folder
    name = f"bucket-{os.urandom(4).hex()}"
    boto3.client("s3").create_bucket(Bucket=name)
    return open_storage(f"s3://{name}/runs")


class Seen(list):
    """A progress callback that remembers."""

    def __call__(self, *event):
        self.append(event)

    def states(self, name: str) -> list[str]:
        found = [event[1] for event in self if event[0] == name]
        return [state for index, state in enumerate(found) if index == 0 or found[index - 1] != state]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def write(ctx):
    text = json.dumps([ctx.name, ctx.config, ctx.inputs, ctx.local], sort_keys=True)
    ctx.storage.write(f"{ctx.work}/out.json", text.encode())
    return {
        "outputs": [f"{ctx.work}/out.json"],
        "where": ctx.work,
        "sum": ctx.config["n"] + sum(v["sum"] for v in ctx.inputs.values()),
    }


def diamond(storage: Storage, **changed: int) -> Workflow:
    n = {"a": 1, "b": 2, "c": 3, "d": 4} | changed
    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    return Workflow("diamond", [Step(x, write, {"n": n[x]}, needs[x]) for x in n], storage)


def finish(workflow: Workflow, name: str, value: dict) -> str:
    """Write the manifest of a step by hand, as it is documented."""
    step = next(step for step in workflow.steps if step.name == name)
    key = workflow.keys()[name]
    outputs = [{"key": output, "bytes": 3} for output in value.get("outputs", ())]
    manifest = {"step": name, "key": key, "version": step.version, "config": dict(step.config), "inputs": {}}
    manifest |= {"value": value, "outputs": outputs, "started": "2026-01-01T00:00:00+00:00", "seconds": 1.5}
    workflow.storage.write(
        f"manifests/{key}.json", json.dumps(manifest | {"attempt": 1, "host": "h"}).encode()
    )
    return key


# Keys and plans: no Ray, only the storage.


def test_a_key_depends_on_all_that_a_result_depends_on():
    def key(name="s", config=None, version=1, local=None, upstream="k1", value=None):
        step = Step(name, write, config or {"x": 1}, ("up",), version, local=local or {})
        return step_key(step, {"up": {"key": upstream, "value": value or {"v": 1}}})

    base = key()
    assert re.fullmatch(r"[0-9a-f]{16}-s", base)
    assert key() == base
    others = [key("t"), key(config={"x": 2}), key(version=2), key(upstream="k2"), key(value={"v": 2})]
    assert len({base, *others}) == 6
    assert key(local={"uri": "elsewhere"}) == base
    assert key(config={"y": (1, 2), "x": {"b": 1, "a": 2}}) == key(
        config={"x": {"a": 2, "b": 1}, "y": [1, 2]}
    )


def test_a_key_does_not_depend_on_the_attempt_that_made_an_input():
    step = Step("s", write, {}, ("up",))
    keys = {
        step_key(step, {"up": {"key": "0123-up", "value": {"at": f"work/0123-up/a{n}/x"}}})
        for n in (1, 2, 11)
    }
    assert len(keys) == 1


def test_a_key_is_the_hash_of_one_text():
    """No order of dicts, no hash randomisation: this very text on every machine."""
    step = Step("s", write, {"ü": [1, 2.5, None, True], "a": {"c": 1, "b": "x"}}, ("up",), version=3)
    text = (
        '{"config":{"a":{"b":"x","c":1},"ü":[1,2.5,null,true]},'
        '"inputs":{"up":["0-up","{\\"at\\":\\"work/0-up/x\\"}"]},"name":"s","version":3}'
    )
    found = step_key(step, {"up": {"key": "0-up", "value": {"at": "work/0-up/a1/x"}}})
    assert found == hashlib.sha256(text.encode()).hexdigest()[:16] + "-s"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("a", write, {}), Step("a", write, {})], "'a'.*unique"),
        ([Step("a/../b", write, {})], "letters"),
        ([Step("a", write, {}, ("b",)), Step("b", write, {})], "'a' needs 'b'"),
        ([Step("a", write, {"path": Path("x")})], "'a'.*JSON"),
    ],
)
def test_a_chain_that_is_none_is_refused_in_one_line(folder, steps, message):
    with pytest.raises(ValueError, match=message):
        Workflow("w", steps, folder)


def test_the_plan_says_what_and_why(folder):
    def said(workflow):
        return {status.name: (status.state, status.why) for status in workflow.plan()}

    workflow = diamond(folder)
    assert said(workflow) == {
        "a": ("to run", "never ran"),
        "b": ("waiting", "after a"),
        "c": ("waiting", "after a"),
        "d": ("waiting", "after b, c"),
    }
    assert not Path(folder.uri).exists()  # looking makes nothing
    key = finish(workflow, "a", {"outputs": ["work/out"]})
    folder.write("work/out", b"abc")
    assert said(workflow)["a"] == ("finished", "")
    assert said(workflow)["b"] == ("to run", "never ran")
    assert workflow.plan()[0].seconds == 1.5
    assert set(workflow.keys()) == {"a", "b", "c"}
    assert workflow.finished() is None
    assert said(diamond(folder, a=7))["a"] == ("to run", "changed since 2026-01-01T00:00:00+00:00: n")
    folder.write("work/out", b"abcd")
    assert said(workflow)["a"] == ("to run", "output work/out has 4 bytes instead of 3")
    folder.delete("work/out")
    assert said(workflow)["a"] == ("to run", "output work/out is missing")
    folder.write(f"manifests/{key}.json", b'{"half')
    assert said(workflow)["a"] == ("to run", "its manifest is unreadable")


def test_a_finished_workflow_is_known_at_once_and_without_ray(folder):
    steps = [Step(f"s{n}", write, {"n": n}, (f"s{n - 1}",) if n else ()) for n in range(8)]
    workflow = Workflow("long", steps, folder)
    for n in range(8):
        outputs = [f"work/{workflow.keys()[f's{n}']}/a1/{i:03d}.tar" for i in range(40)]
        for output in outputs:
            Path(folder.uri, output).parent.mkdir(parents=True, exist_ok=True)
            Path(folder.uri, output).write_bytes(b"abc")
        finish(workflow, f"s{n}", {"outputs": outputs})
    script = f"""
import sys, time
from pipelines.durable.steps import Step, Workflow
from data_prep.storage import open_storage
steps = [Step(f"s{{n}}", print, {{"n": n}}, (f"s{{n - 1}}",) if n else ()) for n in range(8)]
workflow = Workflow("long", steps, open_storage({folder.uri!r}))
begun = time.perf_counter()
assert len(workflow.finished()) == 8
print(time.perf_counter() - begun)
assert not {{"ray", "torch", "boto3", "mlflow", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


@pytest.mark.parametrize(
    ("error", "line", "again"),
    [
        (
            WorkerGroupError("rank 1 failed:\nmuch", {1: ValueError("lr: is negative")}),
            "lr: is negative",
            False,
        ),
        (ControllerError(WorkerGroupError("", {0: KeyError("sigma")})), "KeyError: 'sigma'", False),
        (
            WorkerGroupError("", {0: RuntimeError("CUDA error: out of memory\nmore")}),
            "CUDA error: out of memory",
            True,
        ),
        (WorkerCrashedError(), "its process died: killed, crashed, or out of memory", True),
        (OSError(), "OSError", True),
    ],
)
def test_what_happened_is_found_under_the_wrappings(error, line, again):
    found = failure(error)
    assert (found["error"], found["again"]) == (line, again)


# Runs, on a real Ray.


def test_every_step_runs_once(storage):
    workflow, seen = diamond(storage), Seen()
    values = workflow.run(seen)
    assert {name: value["sum"] for name, value in values.items()} == {"a": 1, "b": 3, "c": 4, "d": 11}
    assert [seen.states(name) for name in "abcd"] == [["running", "finished"]] * 4
    assert json.loads(storage.read(values["d"]["outputs"][0]))[2] == {"b": values["b"], "c": values["c"]}
    before = {key: storage.read_tagged(key).modified for key, _ in storage.list()}
    assert workflow.finished() == values
    again = Seen()
    assert diamond(storage).run(again) == values
    assert [event[:2] for event in again] == [(name, "cached") for name in "abcd"]
    assert {key: storage.read_tagged(key).modified for key, _ in storage.list()} == before
    assert not list(storage.list("leases"))
    assert [(s.state, s.attempts, s.errors) for s in workflow.status()] == [("finished", 1, ())] * 4


def test_only_what_changed_and_what_follows_runs_again(cluster, folder):
    diamond(folder).run()
    seen = Seen()
    assert diamond(folder, b=7).run(seen)["d"]["sum"] == 16
    assert {name: seen.states(name)[-1] for name in "abcd"} == {
        "a": "cached",
        "b": "finished",
        "c": "cached",
        "d": "finished",
    }
    seen = Seen()
    diamond(folder).run(seen)  # and back: the old results are still there
    assert {event[1] for event in seen} == {"cached"}


def test_lost_work_is_done_again_and_what_followed_from_it_is_not(cluster, folder):
    values = diamond(folder).run()
    folder.delete(values["b"]["outputs"][0])
    assert diamond(folder).finished() is None
    seen = Seen()
    again = diamond(folder).run(seen)
    assert {name: seen.states(name)[-1] for name in "abcd"} == {
        "a": "cached",
        "b": "finished",
        "c": "cached",
        "d": "cached",
    }
    assert again["b"]["where"] == values["b"]["where"].replace("/a1", "/a2")
    assert again["d"] == values["d"]


def meet(ctx):
    Path(ctx.config["here"]).touch()
    wait_for(Path(ctx.config["there"]))
    return {}


def test_independent_steps_run_side_by_side(cluster, folder, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    left = Step("left", meet, {"here": one, "there": two})
    right = Step("right", meet, {"here": two, "there": one})
    assert set(Workflow("meet", [left, right], folder).run()) == {"left", "right"}


@ray.remote(num_cpus=1)
def inner(text):
    raise ValueError(text)


def fail(ctx):
    if ctx.config["how"] == "nested":
        ray.get(inner.remote("photos/x y.png: no photograph\nand more"))
    if ctx.config["how"] == "plain":
        raise FloatingPointError("the loss is nan")
    if ctx.config["how"] == "value":
        return {"set": {1, 2}}
    if ctx.config["how"] == "list":
        return [1]
    if ctx.config["how"] == "ghost":
        return {"outputs": [f"{ctx.work}/ghost.bin"]}
    if ctx.config["how"] == "foreign":
        return {"folder": ctx.inputs["first"]["where"]}
    raise ConnectionError("the server is away")


@pytest.mark.parametrize(
    ("how", "message", "attempts"),
    [
        ("nested", r"failed: photos/x y.png: no photograph \(", 1),
        ("plain", r"failed: FloatingPointError: the loss is nan \(", 1),
        ("value", r"failed: TypeError: .*set.* JSON", 1),
        ("list", r"failed: TypeError: a step returns a dict, not list", 1),
        ("ghost", r"failed: its output work/[0-9a-f]+-second/a1/ghost.bin is not in ", 1),
        ("foreign", r"failed: its value names work/[0-9a-f]+-first, another step's folder", 1),
        ("server", r"failed: the server is away \(3 of 3 attempts; ", 3),
    ],
)
def test_a_failure_is_one_line_and_its_traceback_is_kept(cluster, folder, how, message, attempts):
    first = Step("first", write, {"n": 1})
    second = Step("second", fail, {"how": how}, ("first",))
    other = Step("other", write, {"n": 2}, ("first",))
    third = Step("third", write, {"n": 3}, ("second",))
    workflow, seen = Workflow("fails", [first, second, other, third], folder), Seen()
    with pytest.raises(StepFailed, match=message) as failed:
        workflow.run(seen)
    assert "\n" not in str(failed.value)
    assert seen.states("other")[-1] == "finished"  # what does not depend on it goes on
    assert seen.states("third") == []
    assert seen.states("second").count("retry") == attempts - 1
    kept = re.search(r"traceback in (\S+)\)$", str(failed.value)).group(1)
    record = json.loads(Path(kept).read_text())
    assert "Traceback" in record["traceback"]
    status = {s.name: s for s in workflow.status()}["second"]
    assert (status.state, status.attempts) == ("to run", attempts)
    assert status.error == f"attempt {attempts}: {record['error']}" == status.why
    assert not list(folder.list("leases"))


def die_twice(ctx):
    before = {key.removeprefix(f"work/{ctx.key}/") for key, _ in ctx.storage.list(f"work/{ctx.key}")}
    assert before == {f"stable/{n}" for n in range(1, ctx.attempt)}, before
    ctx.storage.write(f"{ctx.work}/left.bin", b"over")
    ctx.storage.write(f"{ctx.stable}/{ctx.attempt}", b"")
    if path := ctx.storage.path(ctx.stable):
        (path / ".tmp-0123").write_bytes(b"half")
    if ctx.attempt < 3:
        os._exit(7)
    return {"outputs": [f"{ctx.work}/left.bin"]}


def test_a_step_whose_process_dies_is_tried_again_in_a_clean_folder(storage):
    workflow, seen = Workflow("dies", [Step("s", die_twice, {})], storage), Seen()
    key = workflow.keys()["s"]
    assert workflow.run(seen)["s"]["outputs"] == [f"work/{key}/a3/left.bin"]
    assert seen.states("s") == ["running", "retry", "running", "retry", "running", "finished"]
    assert [key for key, _ in storage.list(f"work/{key}")] == [
        f"work/{key}/{name}" for name in ("a3/left.bin", "stable/1", "stable/2", "stable/3")
    ]
    (status,) = workflow.status()
    assert status.attempts == 3
    assert status.errors == tuple(
        f"attempt {n}: its process died: killed, crashed, or out of memory" for n in (1, 2)
    )
    assert not status.error
    folder = storage.path()
    assert folder is None or not [path for path in folder.rglob(".tmp-*") if "work" not in path.parts]


def report_much(ctx):
    begun = time.monotonic()
    for n in range(100_000):
        ctx.progress(n, 100_000, "much")
    ctx.progress(100_000, 100_000, "last")
    took = time.monotonic() - begun
    wait_for(Path(ctx.config["seen"]))
    return {"took": took}


def test_reports_cost_a_step_little_and_the_last_one_arrives(cluster, folder, tmp_path):
    events = []

    def see(name, state, done, total, note):
        events.append((state, done, total, note))
        if note == "last":
            (tmp_path / "seen").touch()

    value = Workflow("reports", [Step("s", report_much, {"seen": str(tmp_path / "seen")})], folder).run(see)[
        "s"
    ]
    reports = [event for event in events if event[3]]
    assert reports[-1] == ("running", 100_000, 100_000, "last")
    assert len(reports) <= 5 * value["took"] + 3
    assert value["took"] < 5.0  # 50 microseconds a report on a busy machine


def stay(ctx):
    while True:
        Path(ctx.config["alive"]).touch()
        time.sleep(0.01)


def stay_once(ctx):
    return {} if ctx.attempt > 1 else stay(ctx)


def test_an_interrupt_ends_the_steps_and_leaves_nothing_in_the_way(cluster, folder, tmp_path):
    alive = tmp_path / "alive"
    workflow = Workflow("stays", [Step("s", stay_once, {"alive": str(alive)})], folder)

    def interrupt(name, state, *_):
        if state == "running":
            wait_for(alive)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workflow.run(interrupt)
    deadline, seen = time.monotonic() + DEADLINE, 0
    while alive.stat().st_mtime_ns != seen:  # politely or not, it ends: no sign of life for a second
        assert time.monotonic() < deadline, "the step goes on"
        seen = alive.stat().st_mtime_ns
        time.sleep(1)
    (status,) = workflow.status()
    assert (status.state, status.why) == ("to run", "attempt 1: interrupted: KeyboardInterrupt")
    assert not list(folder.list("leases"))
    assert workflow.run() == {"s": {}}


def test_a_second_driver_is_told_who_is_at_it(storage, tmp_path):
    go, met = tmp_path / "go", []
    step = Step("shared", meet, {"here": str(tmp_path / "here"), "there": str(go)})
    lone = Step("lone", write, {"n": 1})
    first, same = Workflow("first", [step], storage), Workflow("first", [step, lone], storage)
    other = Workflow("other", [step, lone], storage)

    def while_running(name, state, *_):
        if state == "running" and not met:
            wait_for(tmp_path / "here")
            for second in (same, other):
                seen = Seen()
                with pytest.raises(StorageBusy) as busy:
                    second.run(seen)
                met.append((str(busy.value), seen.states("lone")))
            (status,) = first.plan()
            met.append((status.state, status.why))
            go.touch()

    first.run(while_running)
    (same_told, same_lone), (other_told, other_lone), (state, why) = met
    assert same_lone == []  # the same workflow: nothing is begun
    assert other_lone[-1] == "finished"  # another one does what is free
    for told in (same_told, other_told):
        assert f"process {os.getpid()} on " in told
        assert "\n" not in told
    assert state == "running"
    assert why.startswith(f"process {os.getpid()} on ")
    assert other.run(Seen())["shared"] == {}
    assert not list(storage.list("leases"))


def lose_lease(ctx):
    ctx.storage.delete(f"leases/{ctx.key}.lock")
    return {}


@pytest.mark.parametrize("storage", ["bucket"], indirect=True)  # in a folder the kernel keeps the lock
def test_a_driver_that_lost_its_lease_publishes_nothing(storage):
    with pytest.raises(StorageBusy, match="'s' was taken over"):
        Workflow("loses", [Step("s", lose_lease, {})], storage).run()
    assert not list(storage.list("manifests"))


def mark(ctx):
    Path(ctx.config["mark"]).write_text(ctx.key)
    return {"mark": ctx.config["mark"]}


def still_marked(value, key, local):
    path = Path(value["mark"])
    return path.exists() and path.read_text() == key and local == {"who": "test"}


def test_what_a_step_did_outside_the_storage_is_looked_at_too(cluster, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "marks", sys.modules[__name__])
    step = Step(
        "s", mark, {"mark": str(tmp_path / "mark")}, local={"who": "test"}, outside="marks:still_marked"
    )
    workflow = Workflow("marks", [step], folder)
    value = workflow.run()
    assert workflow.finished() == value
    (tmp_path / "mark").unlink()
    assert workflow.finished() is None
    assert workflow.plan()[0].why == "what it did outside the storage is gone (still_marked)"
    assert workflow.run() == value
    assert (tmp_path / "mark").exists()
