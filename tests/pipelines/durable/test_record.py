"""A run that is looked at with nothing but its storage: no photographs, no MLflow, no Ray, no recipe."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.storage import Storage, open_storage
from pipelines.cli import commands
from pipelines.durable import lease, record
from pipelines.durable.record import Diary
from pipelines.durable.steps import Step, Workflow, step_key


def nothing(context: object) -> dict[str, object]:
    return {}


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(
        tmp_path / "runs" if request.param == "folder" else f"{request.getfixturevalue('s3')}/runs"
    )


def workflow(storage: Storage, sigma: float = 1.5, name: str = "mine") -> Workflow:
    """Its first step is finished, as far as it made what it made outside the storage, where nobody can look."""
    listed = Step("shard", nothing, {"listing": "abc", "crops": (1, 2)}, version=2, outside="no.module:there")
    steps = [listed, Step("train-one", nothing, {"sigma": sigma}, needs=("shard",))]
    found = Workflow(name, steps, storage)
    key = step_key(listed, {})
    manifest = {"step": "shard", "key": key, "version": 2, "config": {}, "inputs": {}, "value": {"n": 1}}
    manifest |= {
        "outputs": [],
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "attempt": 1,
        "host": "h",
    }
    storage.write(f"manifests/{key}.json", json.dumps(manifest).encode())
    return found


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(capsys: pytest.CaptureFixture[str], storage: Storage, recipe: str | None = None) -> str:
    where = argparse.Namespace(recipe=recipe, storage=storage.uri, tracking=None, set=[])
    assert commands.status(where) == 0
    return capsys.readouterr().out


def test_a_run_is_kept_as_it_was_begun_last(storage: Storage) -> None:
    record.keep(workflow(storage))
    began = workflow(storage, sigma=2.5)
    record.keep(began)
    record.keep(workflow(storage, name="other"))
    assert record.names(storage) == ["mine", "other"]
    found = record.kept(storage, "mine")
    assert [step_key(step, {}) for step in found.steps[:1]] == [step_key(began.steps[0], {})]
    assert [(s.name, s.state) for s in found.status()] == [("shard", "finished"), ("train-one", "to run")]
    inputs = {"shard": json.loads(storage.read(f"manifests/{step_key(began.steps[0], {})}.json"))}
    assert found.keys()["train-one"] == step_key(began.steps[1], inputs)
    with pytest.raises(RuntimeError, match="for looking only"):
        found.steps[0].run(argparse.Namespace(name="shard"))  # type: ignore[arg-type]


def test_the_same_run_again_writes_nothing(storage: Storage) -> None:
    record.keep(workflow(storage))
    before = storage.read_tagged("status/mine.json")
    record.keep(workflow(storage))
    after = storage.read_tagged("status/mine.json")
    assert (before.etag, before.modified) == (after.etag, after.modified)


def test_the_beginning_of_a_chain_does_not_hide_the_rest(storage: Storage) -> None:
    whole = workflow(storage)
    record.keep(whole)
    record.keep(Workflow("mine", whole.steps[:1], storage))
    assert [step.name for step in record.kept(storage, "mine").steps] == ["shard", "train-one"]
    record.keep(Workflow("mine", workflow(storage, sigma=3.0).steps, storage))
    record.keep(Workflow("mine", whole.steps, storage))
    assert record.kept(storage, "mine").steps[1].config == {"sigma": 1.5}


def test_a_damaged_record_is_written_anew(storage: Storage) -> None:
    storage.write("status/mine.json", b"{")
    record.keep(workflow(storage))
    assert len(record.kept(storage, "mine").steps) == 2


def test_a_running_step_says_how_far_it_is(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    run = workflow(storage)
    record.keep(run)
    key = record.kept(storage, "mine").keys()["train-one"]
    with Diary(run, every=0.02) as diary, lease.take(storage, key):
        diary("train-one", "running", 0, 0, "")
        diary("train-one", "running", 100, 400, "edge")
        diary("train-one/trial-1", "running", 1, 2, "")
        diary("train-one", "running", 200, 400, "joint")
        until(lambda: [one.done for one in record.reported(storage, "mine").values()] == [200])
        out = status(capsys, storage, "mine")
        assert list(record.reported(storage, "mine")) == ["train-one"]
    assert re.search(
        r"train-one +running .* 200/400 \(50%\), ETA 0:0\d, joint, \d s ago; process \d+ on", out
    )
    assert re.search(r"shard +finished", out)


def test_what_has_ended_is_no_longer_said_to_run(storage: Storage) -> None:
    run = workflow(storage)
    with Diary(run, every=0.02) as diary:
        diary("train-one", "running", 200, 400, "joint")
        until(lambda: record.reported(storage, "mine"))
        diary("train-one", "finished", 0, 0, "")
        until(lambda: not record.reported(storage, "mine"))


def test_without_a_name_all_runs_of_the_storage_are_shown(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"no run of mine was begun in .*: it has none at all"):
        status(capsys, storage, "mine")
    for name in ("mine-sweep", "mine", "other"):
        record.keep(workflow(storage, name=name))
    assert re.findall("^(?:mine|other).*", status(capsys, storage), re.MULTILINE) == [
        "mine",
        "mine-sweep",
        "other",
    ]
    assert "other" not in status(capsys, storage, "mine")
    with pytest.raises(ValueError, match=r"no run of yours .*: it has mine, mine-sweep, other"):
        status(capsys, storage, "yours")
