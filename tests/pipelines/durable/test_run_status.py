"""Records of runs, and `inpaint status` with the storage alone: no photographs, MLflow, Ray or recipe."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.records import to_json
from data_prep.storage import Storage, open_storage
from pipelines.cli.arguments import command_line
from pipelines.cli.status import status_command as show_status
from pipelines.contracts import EdgesOutputs, ShardOutputs, StepKind
from pipelines.durable import lease, run_status
from pipelines.durable.run_status import StatusWriter
from pipelines.durable.steps import Step, StepEvent, StepId, step_key
from pipelines.durable.workflow import Workflow, read_manifest
from pipelines.pipeline import build_workflow
from pipelines.recipe.load import load_recipe

SHARD, TRAIN = StepId("shard"), StepId("train", "one")


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(
        tmp_path / "runs" if request.param == "folder" else f"{request.getfixturevalue('s3')}/runs"
    )


def workflow(storage: Storage, sigma: float = 1.5, name: str = "mine") -> Workflow:
    """Two steps, the first of them finished. Its `still_valid` cannot be resolved, and must not be called."""
    config = {"listing_digest": "abc", "crops": (1, 2)}
    shard = Step(SHARD, "no:where", config, outputs_type=dict, version=2, still_valid="no.module:there")
    train = Step(TRAIN, "no:where", {"sigma": sigma}, {"shards": SHARD, "more": (SHARD,)}, dict, dict)
    run = Workflow(name, [shard, train], storage)
    key = step_key(shard, {})
    manifest = {"step": "shard", "key": key, "version": 2, "config": {}, "inputs": {}, "value": {"n": 1}}
    manifest |= {
        "outputs": [],
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "attempt": 1,
        "host": "h",
    }
    storage.write(f"manifests/{key}.json", json.dumps(manifest).encode())
    return run


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(
    capsys: pytest.CaptureFixture[str], storage: Storage, recipe: str | None = None, *changes: str
) -> str:
    args = argparse.Namespace(recipe=recipe, storage=storage.uri, tracking=None, set=list(changes))
    assert show_status(args) == 0
    return capsys.readouterr().out


def test_the_record_is_that_of_the_last_run(storage: Storage) -> None:
    run_status.save_workflow(workflow(storage))
    last = workflow(storage, sigma=2.5)
    run_status.save_workflow(last)
    run_status.save_workflow(workflow(storage, name="other"))
    assert run_status.list_runs(storage) == ["mine", "other"]
    loaded = run_status.load_workflow(storage, "mine")
    assert [step_key(step, {}) for step in loaded.steps[:1]] == [step_key(last.steps[0], {})]
    assert [(s.name, s.state) for s in loaded.status()] == [("shard", "finished"), ("train-one", "to run")]
    inputs = {SHARD: read_manifest(storage, step_key(last.steps[0], {}))}
    assert loaded.keys()[TRAIN] == step_key(last.steps[1], inputs)


def test_a_repeated_run_writes_nothing(storage: Storage) -> None:
    run_status.save_workflow(workflow(storage))
    before = storage.read_with_etag("status/mine.json")
    run_status.save_workflow(workflow(storage))
    after = storage.read_with_etag("status/mine.json")
    assert (before.etag, before.modified) == (after.etag, after.modified)


def test_a_run_of_the_first_steps_keeps_the_record_of_all(storage: Storage) -> None:
    complete = workflow(storage)
    run_status.save_workflow(complete)
    run_status.save_workflow(Workflow("mine", complete.steps[:1], storage))
    assert [step.name for step in run_status.load_workflow(storage, "mine").steps] == ["shard", "train-one"]
    run_status.save_workflow(Workflow("mine", workflow(storage, sigma=3.0).steps, storage))
    run_status.save_workflow(Workflow("mine", complete.steps, storage))
    assert run_status.load_workflow(storage, "mine").steps[1].config == {"sigma": 1.5}


def test_a_record_of_an_earlier_release_has_an_error_of_its_own(storage: Storage) -> None:
    step = {"name": "shard", "config": {}, "needs": [], "version": 2}
    storage.write("status/mine.json", json.dumps({"given": {}, "steps": [step]}).encode())
    with pytest.raises(
        ValueError, match=r"^status/mine.json was written by an earlier release, .*inpaint run`$"
    ):
        run_status.load_workflow(storage, "mine")
    assert run_status.find_run(workflow(storage)) is None
    run_status.save_workflow(workflow(storage))
    assert run_status.find_run(workflow(storage)) is not None


def test_the_record_has_the_command_and_the_recipe(storage: Storage) -> None:
    """They change neither its digest nor what counts as the same run; a record that lacks them gets them."""
    run = workflow(storage)
    run_status.save_workflow(run)
    names = [key for key, _ in storage.list("status")]
    run_status.save_workflow(run, "inpaint run mine.yaml", "name: mine\n")
    assert [key for key, _ in storage.list("status")] == names
    record = run_status.parse_record(storage.read("status/mine.json"), "")
    assert (record.command, record.recipe) == ("inpaint run mine.yaml", "name: mine\n")
    run_status.save_workflow(run)
    assert run_status.parse_record(storage.read("status/mine.json"), "") == record
    run_status.save_workflow(workflow(storage, sigma=2.5), "inpaint run other.yaml")
    assert run_status.parse_record(storage.read("status/mine.json"), "").command == "inpaint run other.yaml"
    assert len(list(storage.list("status/mine"))) == 2


def test_the_command_line_is_as_typed() -> None:
    args = argparse.Namespace(
        command="sweep", recipe="my recipe.yaml", set=["seed=1", "data.source=a b"], storage="runs"
    )
    args.tracking_uri, args.register = None, True
    assert command_line(args) == (
        "inpaint sweep 'my recipe.yaml' --set seed=1 --set 'data.source=a b' --storage runs --register"
    )


def test_a_damaged_record_is_replaced(storage: Storage) -> None:
    storage.write("status/mine.json", b"{")
    run_status.save_workflow(workflow(storage))
    assert len(run_status.load_workflow(storage, "mine").steps) == 2


def test_status_shows_the_progress_of_a_running_step(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workflow(storage)
    run_status.save_workflow(run)
    key = run_status.load_workflow(storage, "mine").keys()[TRAIN]
    with StatusWriter(run, write_seconds=0.02) as status_writer, lease.acquire(storage, key):
        status_writer(StepEvent(TRAIN, "running"))
        status_writer(StepEvent(TRAIN, "running", 100, 400, "edge"))
        status_writer(StepEvent(TRAIN, "running", 1, 2, substep="trial-1"))
        status_writer(StepEvent(TRAIN, "running", 200, 400, "joint"))
        wait_until(
            lambda: (
                [progress.done for progress in run_status.load_progress(storage, "mine").values()] == [200]
            )
        )
        out = status(capsys, storage, "mine")
        assert list(run_status.load_progress(storage, "mine")) == ["train-one"]
    assert re.search(
        r"train-one +running .* 200/400 \(50%\), ETA 0:0\d, joint, \d s ago; process \d+ on", out
    )
    assert re.search(r"shard +finished", out)


def test_status_shows_the_last_notes_of_a_running_step(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the step ends: a note may come before the first progress, and between two reports."""
    run = workflow(storage)
    run_status.save_workflow(run)
    key = run_status.load_workflow(storage, "mine").keys()[TRAIN]
    with StatusWriter(run, write_seconds=0.02) as status_writer, lease.acquire(storage, key):
        for number in range(6):
            status_writer(StepEvent(TRAIN, "note", note=f"loss {number}"))
        status_writer(StepEvent(TRAIN, "running", 100, 400))
        status_writer(StepEvent(TRAIN, "note", note="resuming from step 80 with 2 workers"))
        wait_until(lambda: "resuming" in str(run_status.load_progress(storage, "mine")))
        notes = re.findall(r"^train-one: (.*) \(\d s ago\)$", status(capsys, storage, "mine"), re.MULTILINE)
        assert notes == [
            *(f"loss {number}" for number in range(1, 6)),
            "resuming from step 80 with 2 workers",
        ]
        status_writer(StepEvent(TRAIN, "finished"))
        status_writer(StepEvent(TRAIN, "running", 100, 400))
        wait_until(lambda: "resuming" not in str(run_status.load_progress(storage, "mine")))


def test_an_ended_step_has_no_progress(storage: Storage) -> None:
    run = workflow(storage)
    with StatusWriter(run, write_seconds=0.02) as status_writer:
        status_writer(StepEvent(TRAIN, "running", 200, 400, "joint"))
        wait_until(lambda: run_status.load_progress(storage, "mine"))
        status_writer(StepEvent(TRAIN, "finished"))
        wait_until(lambda: not run_status.load_progress(storage, "mine"))


def test_status_without_a_name_shows_all_runs(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"no run of mine was started in .*: it has no runs"):
        status(capsys, storage, "mine")
    for name in ("mine-sweep", "mine", "other"):
        run_status.save_workflow(workflow(storage, name=name))
    assert re.findall("^(?:mine|other).*", status(capsys, storage), re.MULTILINE) == [
        "mine",
        "mine-sweep",
        "other",
    ]
    assert "other" not in status(capsys, storage, "mine")
    with pytest.raises(ValueError, match=r"no run of yours .*: it has mine, mine-sweep, other"):
        status(capsys, storage, "yours")


def record_run(storage: Storage, *changes: str, listing_digest: str = "abc") -> None:
    """Record a run of the demo recipe whose photographs are unavailable and whose training steps failed."""
    recipe = load_recipe("demo", ["data.source=/nowhere/photos", f"storage={storage.uri}", *changes])
    run = build_workflow(recipe, None, listing_digest=listing_digest)
    run_status.save_workflow(run)
    values = {
        StepKind.SHARD: ShardOutputs((), "shards", "digest", {"train": 9}, 0),
        StepKind.EDGES: EdgesOutputs((), "edges", 2.0, "digest"),
    }
    for step in run.steps:
        key, kind = run.keys().get(step.id), step.id.kind
        if key and kind == StepKind.TRAIN:
            driver, error = {"host": "h", "pid": 1}, f"{' '.join(changes)} {listing_digest}"
            attempt = {"attempt": 1, "key": key, "started": "2026", "driver": driver, "error": error}
            storage.write(f"attempts/{key}/1.json", json.dumps(attempt).encode())
        elif key:
            manifest = {"step": step.name, "key": key, "version": 3, "config": step.config_json, "inputs": {}}
            manifest |= {
                "value": to_json(values[StepKind(kind)]),
                "outputs": [],
                "started": f"2026-{listing_digest}",
            }
            storage.put_if_absent(
                f"manifests/{key}.json", json.dumps(manifest | {"seconds": 1, "attempt": 1}).encode()
            )


PHOTOS = "data.source=/nowhere/photos"


@pytest.mark.slow
def test_options_select_the_run(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(storage, "train.log_every=10")
    record_run(storage, "train.log_every=40")
    record_run(storage, "train.log_every=50", "name=mine")
    record_run(storage, "train.log_every=100")
    for change in ("train.log_every=10", "train.log_every=40", "train.log_every=100"):
        out = status(
            capsys, storage, "demo", PHOTOS, change, "scaling.workers=3", "tracking_uri=http://other"
        )
        assert f"attempt 1: {change} abc" in out
        assert out.count("attempt 1") == 2
        assert "register-edge_connect" in out
    assert "attempt 1: train.log_every=100 abc" in status(capsys, storage, "demo")  # the last run
    out = status(capsys, storage, "demo", PHOTOS, "train.log_every=50", "name=mine")
    assert "attempt 1: train.log_every=50 name=mine abc" in out
    with pytest.raises(
        ValueError, match=r"no run of demo with these options .* differs in train-context_enc"
    ) as error:
        status(capsys, storage, "demo", PHOTOS, "train.log_every=25")
    assert "train-edge_connect (train)" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"differs in shard \(source\)"):
        status(capsys, storage, "demo", "train.log_every=100")
    for changes in (["name=yours"], ["name=yours", "train.log_every=10"]):
        with pytest.raises(ValueError, match=r"no run of yours was started in .*: it has demo, mine"):
            status(capsys, storage, "demo", PHOTOS, *changes)


def test_another_name_is_another_run(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(storage, "train.log_every=10", "name=mine")
    record_run(storage, "train.log_every=40")
    out = status(capsys, storage, "demo", "name=mine")
    assert out.startswith(
        "mine was started with options that differ from the recipe's in shard (source); train-"
    )
    assert "attempt 1: train.log_every=10 name=mine abc" in out
    out = status(capsys, storage, "not-here.yaml", "name=mine")
    assert "attempt 1: train.log_every=10 name=mine abc" in out


def test_of_runs_with_the_same_options_status_shows_the_last(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    record_run(storage, "train.log_every=10", listing_digest="01")
    record_run(storage, "train.log_every=10", listing_digest="02")  # more photographs
    record_run(storage, "train.log_every=40", listing_digest="02")
    assert "attempt 1: train.log_every=10 02" in status(capsys, storage, "demo", PHOTOS, "train.log_every=10")


@pytest.mark.slow
def test_options_need_the_recipe(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(storage, "name=mine")
    with pytest.raises(ValueError, match=r"there is no recipe 'mine.yaml' here"):
        status(capsys, storage, "mine.yaml", "train.log_every=10")
    with pytest.raises(ValueError, match="did you mean size"):
        status(capsys, storage, "demo", "data.sizee=3")
    assert "attempt 1: name=mine abc" in status(capsys, storage, "mine.yaml")
