"""The runs of a storage as the studio shows them, read from real records, in a folder and in a bucket."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from data_prep.storage import Storage, open_storage
from pipelines.durable import lease, run_status
from pipelines.durable.steps import Step, StepId, step_key
from pipelines.durable.workflow import Workflow, attempt_path, manifest_path
from pipelines.studio.cached import Cached
from pipelines.studio.run_views import RunView
from pipelines.studio.runs_snapshot import RunsReader
from support.studio_storage import (
    ERROR,
    FAILED_RUN,
    FINISHED_RUN,
    REPORT_SENTENCE,
    RUNNING_RUN,
    RUNNING_STEP,
    SWEEP_RUN,
    StudioStorage,
)

SHARD, TRAIN, REGISTER = StepId("shard"), StepId("train", "one"), StepId("register", "one")


@pytest.fixture
def made(tmp_path: Path) -> StudioStorage:
    return StudioStorage.create(tmp_path)


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(
        tmp_path / "runs" if request.param == "folder" else f"{request.getfixturevalue('s3')}/runs"
    )


def read(storage: Storage) -> dict[str, RunView]:
    reader = RunsReader(storage.uri)
    reader.check()
    return reader.load().by_name


def small_run(storage: Storage, name: str = "mine", sigma: float = 1.5, **described: str) -> Workflow:
    shard = Step(SHARD, "no:where", {"size": 64}, outputs_type=dict)
    train = Step(TRAIN, "no:where", {"sigma": sigma}, {"shards": SHARD}, dict, dict)
    register = Step(REGISTER, "no:where", {}, {"trained": TRAIN}, dict, dict)
    workflow = Workflow(name, [shard, train, register], storage)
    run_status.save_workflow(workflow, **described)
    return workflow


def finish(workflow: Workflow, id: StepId, **value: object) -> None:
    key = workflow.keys()[id]
    manifest = {"step": id.name, "key": key, "version": 1, "config": {}, "inputs": {}, "value": value}
    manifest |= {"outputs": [], "started": "2026-11-30T10:00:00+00:00", "seconds": 30.0, "attempt": 1}
    workflow.storage.write(manifest_path(key), json.dumps(manifest).encode())


def attempt(workflow: Workflow, id: StepId, number: int = 1, **record: object) -> None:
    key = workflow.keys()[id]
    entry = {"attempt": number, "key": key, "started": "2026-11-30T11:00:00+00:00", "seconds": 4.0}
    entry |= {"driver": {"host": "node-1", "pid": 1}} | record
    workflow.storage.write(attempt_path(key, number), json.dumps(entry).encode())


def test_states_progress_and_results(made: StudioStorage) -> None:
    with made.running():
        runs = read(made.storage)
    assert {name: run.state for name, run in runs.items()} == {
        SWEEP_RUN: "running",
        RUNNING_RUN: "running",
        FAILED_RUN: "failed",
        FINISHED_RUN: "finished",
    }
    assert list(runs)[-2:] == [FAILED_RUN, FINISHED_RUN], "running ones first, then newest first"
    running = runs[RUNNING_RUN]
    (step,) = running.running_steps
    assert step.name == RUNNING_STEP
    assert (step.fraction, running.eta, running.finished_steps) == (0.25, "15:00", 2)
    assert running.fraction == pytest.approx(2.25 / 7)
    assert "process" in running.holder
    assert step.progress is not None
    assert [note.text for note in step.progress.notes] == ["resuming from step 80 with 2 workers"]
    failed = runs[FAILED_RUN]
    assert failed.last_error == ERROR  # which begins with the step's name
    assert failed.seconds == pytest.approx(3 * 75 + 12.5)
    finished = runs[FINISHED_RUN]
    assert finished.fraction == 1
    assert [(version.name, version.version) for version in finished.versions] == [("edges", "2")] * 2
    assert [report.sentences for report in finished.reports] == [(REPORT_SENTENCE,)]
    assert finished.begun <= finished.ended


def test_a_sweep_has_its_trials_and_the_best_is_marked(made: StudioStorage) -> None:
    with made.running():
        sweep = read(made.storage)[SWEEP_RUN]
    assert (sweep.kind, sweep.metrics[0]) == ("sweep", "psnr_rgb_hole")
    assert [trial.record.state for trial in sweep.trials] == [
        "finished",
        "finished",
        "stopped",
        "failed",
        "running",
    ]
    assert [trial.record.number for trial in sweep.trials if trial.is_best] == [1]
    assert sweep.trial_counts == {"finished": 2, "stopped": 1, "failed": 1, "running": 1}
    assert sweep.command == f"inpaint sweep context_encoder-lambda --storage {os.path.relpath(made.folder)}"
    assert not sweep.is_command_recorded


def test_the_trials_that_a_dead_sweep_was_running_are_interrupted(made: StudioStorage) -> None:
    sweep = read(made.storage)[SWEEP_RUN]
    assert sweep.state == "interrupted"
    assert sweep.trial_counts == {"finished": 2, "stopped": 1, "failed": 1, "interrupted": 1}


def test_a_run_whose_process_died_is_interrupted(made: StudioStorage) -> None:
    """The lock of a killed process is free, though its file and the last progress are still there."""
    reader = RunsReader(str(made.folder))
    with made.running():
        before = reader.check()
        assert reader.load().by_name[RUNNING_RUN].state == "running"
        for name in (made.folder / "leases").iterdir():
            name.with_suffix(".kept").write_bytes(name.read_bytes())
    for name in (made.folder / "leases").glob("*.kept"):
        name.rename(name.with_suffix(".lock"))
    assert reader.check() != before
    run = reader.load().by_name[RUNNING_RUN]
    assert run.state == "interrupted"
    assert run.last_error == f"{RUNNING_STEP}: interrupted: its driver died"
    assert not run.eta


def test_a_run_without_a_running_step_waits(storage: Storage) -> None:
    run = small_run(storage)
    with run.acquire_lease():
        assert read(storage)["mine"].state == "waiting"
        with lease.acquire(storage, step_key(run.steps[0], {})):
            assert read(storage)["mine"].state == "running"
    assert read(storage)["mine"].state == "interrupted"


def test_what_a_run_registered_and_how_it_was_started(storage: Storage) -> None:
    run = small_run(storage, command="inpaint run mine.yaml --set seed=1", recipe="name: mine\n")
    for id in (SHARD, TRAIN):
        finish(run, id)
    finish(run, REGISTER, name="faces", version="7", champion=False, reason="worse than version 6")
    seen = read(storage)["mine"]
    assert seen.state == "finished"
    assert [(version.name, version.version, version.champion) for version in seen.versions] == [
        ("faces", "7", False)
    ]
    assert (seen.command, seen.recipe) == ("inpaint run mine.yaml --set seed=1", "name: mine\n")
    assert seen.is_command_recorded


def test_damaged_files_lose_nothing_else(storage: Storage) -> None:
    run = small_run(storage)
    finish(run, SHARD)
    attempt(run, TRAIN, 1, error="interrupted: its driver died")
    storage.write(attempt_path(run.keys()[TRAIN], 2), b"{torn")
    storage.write("status/mine.progress.json", b"[]")
    storage.write("status/torn.json", b"{")
    storage.write("status/old.json", json.dumps({"given": {}, "steps": []}).encode())
    storage.write("status/mine/0123.json", b"")
    runs = read(storage)
    assert set(runs) == {"mine", "old", "torn"}
    assert runs["torn"].state == "unreadable"
    assert re.fullmatch(
        r"status/torn.json is damaged \(.*\): the next run of this name writes it anew", runs["torn"].problem
    )
    assert "earlier release" in runs["old"].problem
    assert runs["mine"].state == "failed"
    assert "2.json" in runs["mine"].last_error
    storage.write(manifest_path(run.keys()[SHARD]), b"{")
    shard = read(storage)["mine"].steps[0]
    assert (shard.state, shard.reason) == ("to run", "its manifest is unreadable")


def test_earlier_runs_of_the_name_and_what_differs(storage: Storage) -> None:
    small_run(storage, sigma=1.5, command="inpaint run mine --set edges.sigma=1.5")
    small_run(storage, sigma=2.5)
    seen = read(storage)["mine"]
    (earlier,) = seen.earlier
    assert (earlier.differences, earlier.state) == (("train-one (sigma)",), "interrupted")
    assert earlier.command == "inpaint run mine --set edges.sigma=1.5"


class CountingStorage:
    """Counts the reads of a storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.reads = storage, []

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        return self._storage.read(key)


def test_a_refresh_reads_only_what_has_changed(storage: Storage) -> None:
    run = small_run(storage)
    finish(run, SHARD)
    small_run(storage, "other")
    reader = RunsReader(storage.uri)
    counting = CountingStorage(reader.storage)
    reader.files.storage = counting  # type: ignore[assignment]
    reader.check()
    first = reader.load()
    assert counting.reads
    counting.reads.clear()
    state = reader.check()
    assert reader.load() == first
    assert not counting.reads
    attempt(run, TRAIN, error="the loss is nan")
    assert reader.check() != state
    assert reader.load().by_name["mine"].last_error == "train-one: the loss is nan"
    assert set(counting.reads) == {attempt_path(run.keys()[TRAIN], 1)}


def test_the_cache_shows_progress_and_loads_nothing_while_nothing_changes(
    made: StudioStorage,
) -> None:
    reader, loads, now = RunsReader(str(made.folder)), [], [0.0]

    def load() -> object:
        loads.append(1)
        return reader.load()

    cached = Cached(load, 4.0, reader.check, clock=lambda: now[0], start=lambda target: target())
    with made.running():
        cached.get()
        first = cached.id
        for now[0] in (5.0, 10.0, 15.0):
            cached.get()
        assert cached.id == first
        assert len(loads) == 2, "the first check did not know the sweep's trials yet"
        made.report_progress(200)
        now[0] = 20.0
        snapshot = cached.get()
    assert cached.id != first
    assert snapshot.by_name[RUNNING_RUN].running_steps[0].fraction == 0.5  # type: ignore[attr-defined]


def test_an_empty_storage_has_no_runs(tmp_path: Path) -> None:
    assert read(open_storage(tmp_path / "none")) == {}
