"""A storage with runs for the studio's tests, written as runs write it, without Ray:

demo                           finished, with a report
portraits                      running: its context encoder is trained (`StudioStorage.running` holds the lease)
broken                         failed: its edge model ran out of memory twice
context_encoder-lambda-sweep   a running sweep with finished, running, stopped and failed trials
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from data_prep.records import to_json
from data_prep.storage import Storage, open_storage
from pipelines.contracts import (
    BaselinesOutputs,
    EdgesOutputs,
    EvaluateOutputs,
    RegisterOutputs,
    ShardOutputs,
    StepKind,
    SweepOutputs,
    TrainOutputs,
)
from pipelines.durable import lease, run_status
from pipelines.durable.run_status import StepNote, StepProgress
from pipelines.durable.steps import Step
from pipelines.durable.workflow import Workflow, attempt_path, manifest_path
from pipelines.pipeline import build_workflow
from pipelines.plots.svg import StepNode
from pipelines.recipe.load import load_recipe
from pipelines.report_files import keys_digest, report_key
from pipelines.run_report import ReportData, write_report
from pipelines.sweeps.results import FAILED, FINISHED, STOPPED, TrialRecord
from pipelines.sweeps.trial_store import RUNNING, StoredTrial, TrialStore, trial_store_folder
from pipelines.sweeps.workflow import build_sweep

FINISHED_RUN, RUNNING_RUN, FAILED_RUN = "demo", "portraits", "broken"
SWEEP_RUN = "context_encoder-lambda-sweep"
RUNNING_STEP = "train-context_encoder"
ERROR = "train-edge_connect needs 9.1 GB and this machine has 8 GB: lower train.batch or set scaling.micro_batch_size"
REPORT_SENTENCE = "edge_connect fills best: PSNR hole 21.4 dB."

OUTPUTS: dict[StepKind, Any] = {
    StepKind.SHARD: ShardOutputs((), "work/shards", "5" * 64, {"train": 900, "val": 90, "test": 90}, 2),
    StepKind.EDGES: EdgesOutputs((), "work/edges", 2.0, "e" * 64),
    StepKind.TRAIN: TrainOutputs((), "work/weights", "", 400, None, {}),
    StepKind.EVALUATE: EvaluateOutputs((), "work/scores", {"context_encoder": 20.1, "edge_connect": 21.4}),
    StepKind.REGISTER: RegisterOutputs("edges", "2", True, "better"),
    StepKind.BASELINES: BaselinesOutputs((), "work/baselines", "", {}, 90, "too few photographs"),
    StepKind.SWEEP: SweepOutputs((), "", "", "", {}, {}, ""),
}


@dataclass(frozen=True)
class StudioStorage:
    """The folder of the runs. All processes may read it; `running` and the changes are for one process."""

    folder: Path

    @property
    def storage(self) -> Storage:
        return open_storage(self.folder)

    @staticmethod
    def create(folder: Path) -> StudioStorage:
        made = StudioStorage(folder / "runs")
        photos = "data.source=/srv/photographs"
        finished = made.record(FINISHED_RUN, [photos])
        made.finish(finished, [step.name for step in finished.steps])
        made.write_report(finished)
        running = made.record(RUNNING_RUN, [photos, "data.size=128"])
        made.finish(running, ["shard", "edges-sigma-2"])
        made.start_attempt(running, RUNNING_STEP)
        made.report_progress(100)
        failed = made.record(FAILED_RUN, [photos, "data.size=256"])
        made.finish(failed, ["shard", "edges-sigma-2", RUNNING_STEP])
        for number in (1, 2):
            made.start_attempt(failed, "train-edge_connect", number, error=ERROR)
        made._write_sweep()
        return made

    def record(self, name: str, changes: Sequence[str] = ()) -> Workflow:
        """Record a started run of the demo's recipe."""
        recipe = load_recipe("demo", [f"name={name}", f"storage={self.folder}", *changes])
        workflow = build_workflow(recipe, None, listing_digest="a" * 64)
        run_status.save_workflow(workflow)
        return run_status.load_workflow(self.storage, name)

    def finish(self, workflow: Workflow, names: Sequence[str], seconds: float = 75.0) -> None:
        """Write the manifests of these steps, each after those that it needs."""
        for step in workflow.steps:
            if step.name not in names:
                continue
            key = workflow.keys()[step.id]
            inputs = {need.name: workflow.keys()[need] for need in step.needs}
            manifest = {
                "step": step.name,
                "key": key,
                "version": step.version,
                "config": step.config_json,
                "inputs": inputs,
                "value": to_json(OUTPUTS[StepKind(step.id.kind)]),
                "outputs": [],
                "started": utc(-600),
                "seconds": seconds,
                "attempt": 1,
                "host": "node-1",
            }
            self.storage.write(manifest_path(key), json.dumps(manifest).encode())

    def start_attempt(self, workflow: Workflow, step: str, number: int = 1, error: str = "") -> None:
        key = workflow.keys()[step_named(workflow, step).id]
        record = {
            "attempt": number,
            "key": key,
            "started": utc(-300),
            "driver": {"host": "node-1", "pid": 4242},
            "host": "node-1",
            "seconds": 12.5,
        }
        if error:
            traceback = f'  File "pipelines/training/train.py", line 1\nRuntimeError: {error}\n'
            record |= {"error": error, "traceback": traceback}
        self.storage.write(attempt_path(key, number), json.dumps(record).encode())

    def report_progress(self, done: float, total: float = 400, note: str = "phase train") -> None:
        """Write the progress of the running step, as its run does every ten seconds."""
        notes = (StepNote(utc(-60), "resuming from step 80 with 2 workers"),)
        progress = StepProgress(done, total, note, 80, 60.0, utc(), notes)
        records = {RUNNING_STEP: asdict(progress)}
        key = f"{run_status.STATUS_FOLDER}/{RUNNING_RUN}{run_status.PROGRESS_SUFFIX}"
        self.storage.write(key, json.dumps(records).encode())

    def write_report(self, workflow: Workflow) -> None:
        steps = [
            StepNode(step.name, tuple(need.name for need in step.needs), 75.0) for step in workflow.steps
        ]
        digest = keys_digest([status.key for status in workflow.status()])
        data = ReportData(f"{workflow.name}: report", [REPORT_SENTENCE], steps=steps)
        write_report(self.folder / report_key(workflow.name, datetime.now(UTC), digest), data)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, this process holds the leases of the running runs and of their steps."""
        with ExitStack() as stack:
            for name, step in ((RUNNING_RUN, RUNNING_STEP), (SWEEP_RUN, "sweep")):
                workflow = run_status.load_workflow(self.storage, name)
                key = workflow.keys()[step_named(workflow, step).id]
                stack.enter_context(workflow.acquire_lease())
                stack.enter_context(lease.acquire(self.storage, key))
            yield

    def _write_sweep(self) -> None:
        changes = [f"storage={self.folder}", "data.source=/srv/photographs"]
        recipe = load_recipe("context_encoder-lambda", changes)
        workflow = build_sweep(recipe, None, listing_digest="a" * 64)
        run_status.save_workflow(workflow)
        workflow = run_status.load_workflow(self.storage, workflow.name)
        self.finish(workflow, [step.name for step in workflow.steps if step.name != "sweep"])
        self.start_attempt(workflow, "sweep")
        folder = trial_store_folder(workflow.keys()[step_named(workflow, "sweep").id])
        store = TrialStore(self.storage, folder, 800)
        states = (FINISHED, FINISHED, STOPPED, FAILED, RUNNING)
        for number, state in enumerate(states):
            scores = {"psnr_rgb_hole": 20.0 + number, "fd": 30.0} if state == FINISHED else {}
            reason = {STOPPED: "stopped by the scheduler", FAILED: "the loss is nan at step 120"}.get(
                state, ""
            )
            values = {"model.lambda_adv": 10.0 ** (number - 4), "seed": number % 2}
            curve = [(step, 15 + step / 200 + number / 5) for step in range(200, 801, 200)]
            trial = TrialRecord(number, values, state, reason, 800, 63.0, scores, curve)
            store.write(StoredTrial(trial, values))


def step_named(workflow: Workflow, name: str) -> Step:
    return next(step for step in workflow.steps if step.name == name)


def utc(seconds: float = 0.0) -> str:
    """The time in `seconds` from now: UTC, ISO 8601."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds")
