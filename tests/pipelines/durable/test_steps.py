"""Durable steps: finished steps are cached; steps whose config changed, that failed, or whose output was lost run again."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest
import ray
from moto.server import ThreadedMotoServer
from ray.exceptions import WorkerCrashedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from data_prep.records import to_json
from data_prep.storage import Storage, open_storage
from pipelines.durable.lease import LeaseHeld
from pipelines.durable.runner import run_workflow
from pipelines.durable.steps import NoOutputs, Step, StepEvent, StepFailed, StepId, StepManifest, step_key
from pipelines.durable.task import to_attempt_error
from pipelines.durable.workflow import Workflow
from support.durable_steps import (
    DEADLINE_SECONDS,
    FailConfig,
    MarkerOutputs,
    MeetConfig,
    NoConfig,
    Number,
    OwnerSettings,
    PathConfig,
    SumInputs,
    SumOutputs,
    TimeOutputs,
    add_step,
    make_step,
    wait_for,
)

A, B, C, D = map(StepId, "abcd")
S = StepId("s")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster with two CPUs, whose processes can reach an S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the workers find support.durable_steps
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


class EventLog(list):
    """An event callback that records its events."""

    def __call__(self, event: StepEvent) -> None:
        self.append(event)

    def states(self, name: str) -> list[str]:
        states = [event.state for event in self if event.step == name]
        return [state for i, state in enumerate(states) if i == 0 or states[i - 1] != state]


def diamond(storage: Storage, **changed: int) -> Workflow:
    n = {"a": 1, "b": 2, "c": 3, "d": 4} | changed
    needs = {"a": "", "b": "a", "c": "a", "d": "bc"}
    return Workflow("diamond", [add_step(x, n[x], *needs[x]) for x in n], storage)


def manifest(key: str, value: dict) -> StepManifest:
    return StepManifest("", key, 1, {}, {}, value, (), started="", seconds=0.0, attempt=1)


def write_manifest(workflow: Workflow, name: str, *files: str) -> str:
    """Write a step's manifest in its documented form; returns its key."""
    step = next(step for step in workflow.steps if step.name == name)
    key = workflow.keys()[step.id]
    value = {"files": files, "folder": "", "sum": 1}
    record = {"step": name, "key": key, "version": step.version, "config": step.config_json, "inputs": {}}
    record |= {"value": value, "outputs": [{"key": file, "bytes": 3} for file in files]}
    record |= {"started": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "attempt": 1, "host": "h"}
    workflow.storage.write(f"manifests/{key}.json", json.dumps(record).encode())
    return key


# Keys and plans: without Ray.


@dataclass(frozen=True)
class Options:
    options: dict[str, float | list[float] | None]
    ratio: float = 2


def test_a_key_depends_on_everything_that_affects_the_outputs():
    up = StepId("up")

    def key(id=S, config=None, version=1, upstream="k1", value=None, settings=None, field="up"):
        config, inputs = config or {"x": 1}, {field: up}
        step = Step(id, "no:where", config, inputs, dict, dict, version=version, settings=settings)
        return step_key(step, {up: manifest(upstream, value or {"v": 1})})

    base = key()
    assert re.fullmatch(r"[0-9a-f]{16}-s", base)
    assert key() == base
    others = [key(StepId("t")), key(StepId("s", "t")), key(config={"x": 2}), key(version=2)]
    others += [key(upstream="k2"), key(value={"v": 2}), key(field="down")]
    assert len({base, *others}) == 8
    assert key(settings=OwnerSettings("elsewhere")) == base
    assert key(config={"y": (1, 2), "x": {"b": 1, "a": 2}}) == key(
        config={"x": {"a": 2, "b": 1}, "y": [1, 2]}
    )
    assert key(config=Options({"b": 1, "a": 2})) == key(config=Options({"a": 2.0, "b": 1.0}, 2.0))


def test_a_key_depends_on_the_order_and_names_of_inputs():
    one, two = StepId("one"), StepId("two")
    manifests = {one: manifest("1-one", {}), two: manifest("2-two", {})}

    def key(inputs):
        return step_key(Step(S, "no:where", {}, inputs, dict, dict), manifests)

    keys = [key({"up": (one, two)}), key({"up": (two, one)}), key({"up": {"a": one, "b": two}})]
    keys += [key({"up": {"a": two, "b": one}}), key({"a": one, "b": two})]
    assert len(set(keys)) == 5
    assert key({"up": {0: one}}) == key({"up": {"0": one}})


def test_a_key_does_not_depend_on_an_inputs_attempt_number():
    step = Step(S, "no:where", {}, {"up": StepId("up")}, dict, dict)
    keys = {
        step_key(step, {StepId("up"): manifest("0123-up", {"at": f"work/0123-up/a{n}/x"})})
        for n in (1, 2, 11)
    }
    assert len(keys) == 1


def test_a_key_is_the_hash_of_canonical_json():
    """Independent of the order of dicts and of hash randomisation: the same text on every machine."""
    config = {"ü": [1, 2.5, None, True], "a": {"c": 1, "b": "x"}}
    inputs = {"one": StepId("up"), "more": (StepId("up"),), "by": {7: StepId("up")}}
    step = Step(StepId("s", "x"), "no:where", config, inputs, dict, dict, version=3)
    up = '["0-up","{\\"at\\":\\"work/0-up/x\\"}"]'
    text = (
        '{"config":{"a":{"b":"x","c":1},"ü":[1,2.5,null,true]},'
        f'"inputs":{{"by":{{"7":{up}}},"more":[{up}],"one":{up}}},"name":"s-x","version":3}}'
    )
    key = step_key(step, {StepId("up"): manifest("0-up", {"at": "work/0-up/a1/x"})})
    assert key == hashlib.sha256(text.encode()).hexdigest()[:16] + "-s-x"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([add_step("a", 1), add_step("a", 2)], "'a'.*unique"),
        ([add_step("a-b", 1), replace(add_step("a", 1), id=StepId("a", "b"))], "'a-b'.*unique"),
        ([add_step("a/../b", 1)], "letters"),
        ([add_step("a", 1, "b"), add_step("b", 1)], "'a' needs 'b'"),
        (
            [add_step("b", 1), replace(add_step("a", 1), inputs={"up": (B,)})],
            "'a': SumInputs has no field 'up'",
        ),
        ([replace(add_step("a", 1), inputs_type=MarkerOutputs)], "'a': its input 'mark' is missing"),
    ],
)
def test_an_invalid_workflow_is_refused_in_one_line(folder, steps, message):
    with pytest.raises(ValueError, match=message):
        Workflow("w", steps, folder)


@pytest.mark.parametrize("config", [Number("4"), Number(1.5), {"path": Path("x")}])  # type: ignore[arg-type]
def test_a_config_with_a_wrong_type_is_refused_in_one_line(config):
    if isinstance(config, Number):
        with pytest.raises(ValueError, match=r"^step s, config, n .*whole number$") as wrong:
            make_step("write", config)
        assert "\n" not in str(wrong.value)
    else:  # plain data, as in the record of a run
        assert make_step("write", config).config == {"path": "x"}


def test_the_plan_gives_states_and_reasons(folder):
    def plan(workflow):
        return {status.name: (status.state, status.reason) for status in workflow.plan()}

    workflow = diamond(folder)
    assert plan(workflow) == {
        "a": ("to run", "never ran"),
        "b": ("waiting", "after a"),
        "c": ("waiting", "after a"),
        "d": ("waiting", "after b, c"),
    }
    assert not Path(folder.uri).exists()  # planning creates nothing
    key = write_manifest(workflow, "a", "work/out")
    folder.write("work/out", b"abc")
    assert plan(workflow)["a"] == ("finished", "")
    assert plan(workflow)["b"] == ("to run", "never ran")
    assert workflow.plan()[0].seconds == 1.5
    assert set(workflow.keys()) == {A, B, C}
    assert workflow.finished_outputs() is None
    assert plan(diamond(folder, a=7))["a"] == ("to run", "changed since 2026-01-01T00:00:00+00:00: n")
    folder.write("work/out", b"abcd")
    assert plan(workflow)["a"] == ("to run", "output work/out has 4 bytes instead of 3")
    folder.delete("work/out")
    assert plan(workflow)["a"] == ("to run", "output work/out is missing")
    folder.write("work/out", b"abc")
    text = folder.read(f"manifests/{key}.json").decode()
    folder.write(f"manifests/{key}.json", text.replace('"sum": 1', '"sum": "1"').encode())
    assert plan(workflow)["a"] == (
        "to run",
        "its manifest is not valid: step a, outputs, sum is '1', should be a whole number",
    )
    folder.write(f"manifests/{key}.json", b'{"half')
    assert plan(workflow)["a"] == ("to run", "its manifest is unreadable")


@pytest.mark.slow
def test_a_finished_workflow_is_recognised_quickly_and_without_ray(folder):
    steps = [add_step(f"s{n}", n, *([f"s{n - 1}"] if n else [])) for n in range(8)]
    workflow = Workflow("long", steps, folder)
    for n in range(8):
        files = [f"work/{workflow.keys()[StepId(f's{n}')]}/a1/{i:03d}.tar" for i in range(40)]
        for file in files:
            Path(folder.uri, file).parent.mkdir(parents=True, exist_ok=True)
            Path(folder.uri, file).write_bytes(b"abc")
        write_manifest(workflow, f"s{n}", *files)
    script = f"""
import sys, time
from dataclasses import dataclass
from pipelines.durable.steps import Step, StepId
from pipelines.durable.workflow import Workflow
from data_prep.storage import open_storage

@dataclass(frozen=True)
class Number:
    n: int

@dataclass(frozen=True)
class SumOutputs:
    files: tuple[str, ...]
    folder: str
    sum: int

@dataclass(frozen=True)
class SumInputs:
    summands: tuple[SumOutputs, ...] = ()

def inputs(n):
    return {{"summands": (StepId(f"s{{n - 1}}"),)}} if n else {{}}

steps = [
    Step(StepId(f"s{{n}}"), "no:where", Number(n), inputs(n), SumInputs, SumOutputs)
    for n in range(8)
]
workflow = Workflow("long", steps, open_storage({folder.uri!r}))
start = time.perf_counter()
assert len(workflow.finished_outputs()) == 8
print(time.perf_counter() - start)
assert not {{"ray", "torch", "boto3", "mlflow", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


@pytest.mark.parametrize(
    ("error", "message", "retryable"),
    [
        (
            WorkerGroupError("rank 1 failed:\nmuch", {1: ValueError("lr: is negative")}),
            "lr: is negative",
            False,
        ),
        (ControllerError(WorkerGroupError("", {0: KeyError("sigma")})), "KeyError: 'sigma'", False),
        (
            WorkerGroupError("", {0: RuntimeError("CUDA error: out of memory\nmore")}),
            "CUDA error: out of memory more",
            True,
        ),
        (WorkerCrashedError(), "its process died: killed, crashed, or out of memory", True),
        (OSError(), "OSError", True),
    ],
)
def test_the_cause_inside_rays_exceptions_is_reported(error, message, retryable):
    attempt_error = to_attempt_error(error)
    assert (attempt_error.message, attempt_error.retryable) == (message, retryable)


# Runs on Ray.


def test_every_step_runs_once(storage):
    workflow, events = diamond(storage), EventLog()
    values = run_workflow(workflow, events)
    assert {id.name: outputs.sum for id, outputs in values.items()} == {"a": 1, "b": 3, "c": 4, "d": 11}
    assert [events.states(name) for name in "abcd"] == [["running", "finished"]] * 4
    written = json.loads(storage.read(values[D].files[0]))
    assert written == ["d", {"n": 4}, to_json(SumInputs((values[B], values[C]))), None]
    before = {key: storage.read_with_etag(key).modified for key, _ in storage.list()}
    assert workflow.finished_outputs() == values
    cached = EventLog()
    assert run_workflow(diamond(storage), cached) == values
    assert [(event.step, event.state) for event in cached] == [(name, "cached") for name in "abcd"]
    assert {key: storage.read_with_etag(key).modified for key, _ in storage.list()} == before
    assert not list(storage.list("leases"))
    assert [(s.state, s.attempts, s.errors) for s in workflow.status()] == [("finished", 1, ())] * 4


def test_only_changed_steps_and_their_dependents_run_again(cluster, folder):
    run_workflow(diamond(folder))
    events = EventLog()
    assert run_workflow(diamond(folder, b=7), events).of(D, SumOutputs).sum == 16
    assert {name: events.states(name)[-1] for name in "abcd"} == {
        "a": "cached",
        "b": "finished",
        "c": "cached",
        "d": "finished",
    }
    events = EventLog()
    run_workflow(diamond(folder), events)  # unchanged again: the first outputs still exist
    assert {event.state for event in events} == {"cached"}


def test_lost_output_is_recreated_without_running_dependents(cluster, folder):
    values = run_workflow(diamond(folder))
    folder.delete(values[B].files[0])
    assert diamond(folder).finished_outputs() is None
    events = EventLog()
    new_values = run_workflow(diamond(folder), events)
    assert {name: events.states(name)[-1] for name in "abcd"} == {
        "a": "cached",
        "b": "finished",
        "c": "cached",
        "d": "cached",
    }
    assert new_values[B].folder == values[B].folder.replace("/a1", "/a2")
    assert new_values[D] == values[D]


def test_independent_steps_run_in_parallel(cluster, folder, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    left = make_step("meet", MeetConfig(one, two), "left")
    right = make_step("meet", MeetConfig(two, one), "right")
    assert set(run_workflow(Workflow("meet", [left, right], folder))) == {left.id, right.id}


@pytest.mark.parametrize(
    ("how", "message", "attempts"),
    [
        ("nested", r"failed: photos/x y.png: no photograph and more \(", 1),
        ("plain", r"failed: FloatingPointError: the loss is nan \(", 1),
        ("type", r"failed: step second, outputs, sum is '7', should be a whole number \(", 1),
        ("other", r"failed: TypeError: a step of this kind returns SumOutputs, not TimeOutputs \(", 1),
        ("ghost", r"failed: its output work/[0-9a-f]+-second/a1/ghost.bin is not in ", 1),
        ("foreign", r"failed: its outputs name work/[0-9a-f]+-first, another step's folder", 1),
        ("server", r"failed: ConnectionError: the server is away \(3 of 3 attempts; ", 3),
    ],
)
def test_an_error_is_one_line_and_its_traceback_is_stored(cluster, folder, how, message, attempts):
    first, other, third = add_step("first", 1), add_step("other", 2, "first"), add_step("third", 3, "second")
    inputs = {"summands": (first.id,)}
    second = make_step("fail", FailConfig(how), "second", SumOutputs, inputs=inputs, inputs_type=SumInputs)
    workflow, events = Workflow("fails", [first, second, other, third], folder), EventLog()
    with pytest.raises(StepFailed, match=message) as failed:
        run_workflow(workflow, events)
    assert "\n" not in str(failed.value)
    assert events.states("other")[-1] == "finished"  # it does not depend on the failed step
    assert events.states("third") == []
    assert events.states("second").count("retry") == attempts - 1
    path = re.search(r"traceback in (\S+)\)$", str(failed.value)).group(1)
    record = json.loads(Path(path).read_text())
    assert "Traceback" in record["traceback"]
    status = {s.name: s for s in workflow.status()}["second"]
    assert (status.state, status.attempts) == ("to run", attempts)
    assert status.error == f"attempt {attempts}: {record['error']}" == status.reason
    assert not list(folder.list("leases"))


def test_a_failed_check_stops_the_run_after_the_step(cluster, folder):
    """Raised after the step, by the next run before it starts anything, and by Workflow.check; the step stays finished."""

    def check(outputs):
        if outputs.sum < 5:
            raise ValueError("too few")
        return "few"

    def chain(n):
        first = add_step("first", n, check=check)
        return Workflow("checked", [first, add_step("second", 9, "first")], folder)

    for state in (["running", "failed"], ["failed"]):
        events = EventLog()
        with pytest.raises(StepFailed, match=r"^too few$"):
            run_workflow(chain(1), events)
        assert events.states("first") == state
        assert events.states("second") == []
    assert chain(1).plan()[0].state == "finished"
    with pytest.raises(ValueError, match="too few"):
        chain(1).check()
    events = EventLog()
    assert run_workflow(chain(7), events)[StepId("second")]
    assert events.states("first") == ["running", "finished", "note"]
    assert chain(7).check() == ["few"]


def test_a_step_whose_process_dies_is_retried_in_a_clean_folder(storage):
    workflow, events = Workflow("dies", [make_step("die_twice", NoConfig())], storage), EventLog()
    key = workflow.keys()[S]
    assert run_workflow(workflow, events)[S].files == (f"work/{key}/a3/left.bin",)
    assert events.states("s") == ["running", "retry", "running", "retry", "running", "finished"]
    assert [key for key, _ in storage.list(f"work/{key}")] == [
        f"work/{key}/{name}" for name in ("a3/left.bin", "stable/1", "stable/2", "stable/3")
    ]
    (status,) = workflow.status()
    assert status.attempts == 3
    assert status.errors == tuple(
        f"attempt {n}: its process died: killed, crashed, or out of memory" for n in (1, 2)
    )
    assert not status.error
    folder = storage.local_path()
    assert folder is None or not [path for path in folder.rglob(".tmp-*") if "work" not in path.parts]


def test_progress_reports_are_cheap_and_the_last_one_arrives(cluster, folder, tmp_path):
    events = []

    def on_event(event):
        events.append(event)
        if event.note == "last":
            (tmp_path / "events").touch()

    step = make_step("report_much", PathConfig(str(tmp_path / "events")), outputs=TimeOutputs)
    value = run_workflow(Workflow("reports", [step], folder), on_event)[S]
    reports = [event for event in events if event.note]
    assert reports[-1] == StepEvent(S, "running", 100_000, 100_000, "last")
    assert len(reports) <= 5 * value.seconds + 3
    assert value.seconds < 5.0  # 50 microseconds per report on a loaded machine


def test_an_interrupt_cancels_the_steps_and_releases_the_leases(cluster, folder, tmp_path):
    alive = tmp_path / "alive"
    workflow = Workflow("stays", [make_step("stay", PathConfig(str(alive)))], folder)

    def interrupt(event):
        if event.state == "running":
            wait_for(alive)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_workflow(workflow, interrupt)
    deadline, last_touched = time.monotonic() + DEADLINE_SECONDS, 0
    while alive.stat().st_mtime_ns != last_touched:  # until the file was not touched for a second
        assert time.monotonic() < deadline, "the step is still running"
        last_touched = alive.stat().st_mtime_ns
        time.sleep(1)
    (status,) = workflow.status()
    assert (status.state, status.reason) == ("to run", "attempt 1: interrupted: KeyboardInterrupt")
    assert not list(folder.list("leases"))
    assert run_workflow(workflow) == {S: NoOutputs()}


def test_a_second_driver_learns_who_holds_the_lease(storage, tmp_path):
    go, results = tmp_path / "go", []
    step = make_step("meet", MeetConfig(str(tmp_path / "here"), str(go)), "shared")
    lone = add_step("lone", 1)
    first, same = Workflow("first", [step], storage), Workflow("first", [step, lone], storage)
    other = Workflow("other", [step, lone], storage)

    def while_running(event):
        if event.state == "running" and not results:
            wait_for(tmp_path / "here")
            for second in (same, other):
                events = EventLog()
                with pytest.raises(LeaseHeld) as held:
                    run_workflow(second, events)
                results.append((str(held.value), events.states("lone")))
            (status,) = first.plan()
            results.append((status.state, status.reason))
            go.touch()

    run_workflow(first, while_running)
    (same_error, same_states), (other_error, other_states), (state, reason) = results
    assert same_states == []  # the same workflow: nothing is started
    assert other_states[-1] == "finished"  # another workflow runs its other steps
    for error in (same_error, other_error):
        assert f"process {os.getpid()} on " in error
        assert "\n" not in error
    assert state == "running"
    assert reason.startswith(f"process {os.getpid()} on ")
    assert run_workflow(other)[step.id] == NoOutputs()
    assert not list(storage.list("leases"))


@pytest.mark.parametrize("storage", ["bucket"], indirect=True)  # in a folder the kernel keeps the lock
def test_a_driver_that_lost_its_lease_publishes_no_manifest(storage):
    with pytest.raises(LeaseHeld, match="'s' was taken over"):
        run_workflow(Workflow("loses", [make_step("lose_lease", NoConfig())], storage))
    assert not list(storage.list("manifests"))


def test_a_step_whose_result_outside_the_storage_is_gone_runs_again(cluster, folder, tmp_path):
    still = "support.durable_steps:still_marked"
    config, settings = PathConfig(str(tmp_path / "mark")), OwnerSettings("test")
    step = make_step("mark", config, outputs=MarkerOutputs, settings=settings, still_valid=still)
    workflow = Workflow("marks", [step], folder)
    value = run_workflow(workflow)
    assert workflow.finished_outputs() == value
    (tmp_path / "mark").unlink()
    assert workflow.finished_outputs() is None
    assert workflow.plan()[0].reason == "its result outside the storage is gone (still_marked)"
    assert run_workflow(workflow) == value
    assert (tmp_path / "mark").exists()
