"""One trial: train and score in durable steps, and report the results to Ray Tune.

An interrupted trial resumes: its steps have their own manifests and checkpoints in the storage.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.network import enable_long_retries
from data_prep.storage import Storage
from pipelines.contracts import (
    FolderKey,
    RunSettings,
    ScoreInputs,
    ScoreOutputs,
    StepKind,
    TrainOutputs,
)
from pipelines.durable.lease import LeaseHeld
from pipelines.durable.runner import run_workflow
from pipelines.durable.steps import Step, StepEvent, StepFailed, StepId, StepManifest, canonical_json
from pipelines.durable.task import ProgressReporter
from pipelines.durable.workflow import RunResults, Workflow
from pipelines.pipeline import SHARD_ID, edge_sigmas, edges_id, edges_step, train_step
from pipelines.private.ray import set_process_title
from pipelines.recipe import Recipe
from pipelines.sweeps.results import SEED, FieldValues, Segment, format_values, trial_run_name
from pipelines.sweeps.space import report_steps, sweep_section, swept_model, trial_recipe
from pipelines.sweeps.trial_store import StoredTrial, TrialReport, read_trial
from pipelines.tracking import runs
from pipelines.tracking_address import Tracking
from pipelines.training.curves import read_curves

RETRY_SECONDS = 5.0  # before a retry, while another trial holds the lease of a step that both need
SEGMENTS_FILE = "segments.json"
VALIDATION_METRIC = "val/psnr_rgb_hole"  # of the training curves; schedulers compare it
BASELINES, SCORE = StepId(StepKind.BASELINES), StepId(StepKind.SCORE)


@dataclass(frozen=True)
class SweepContext:
    """What all trials of a sweep share; sent to each trial's process."""

    step_key: str
    """Of the step `sweep`."""
    recipe: Recipe
    storage: Storage
    input_manifests: Mapping[StepId, StepManifest]
    """Of the shared steps: shards, edges, baselines and shared training phases."""
    store_folder: FolderKey
    step_settings: RunSettings
    """For each trial's steps; `parent_run_id` is the sweep's MLflow run."""
    start_step: int
    """The step at which a trial begins; the steps before it are trained once for all trials of a seed."""
    total_steps: int
    progress: ProgressReporter

    @property
    def sweep_run_id(self) -> str:
        """The sweep's MLflow run, or ''."""
        return self.step_settings.parent_run_id or ""

    @property
    def tracking(self) -> Tracking | None:
        return self.step_settings.tracking


@dataclass(frozen=True)
class SegmentResult:
    """The result of a trial's training up to the end of a segment."""

    validation_psnr: float
    curve: Sequence[tuple[int, float]]
    weights: FolderKey


def trial_title(number: int, values: Mapping[str, Any]) -> str:
    """The title of a trial in the progress display."""
    return f"trial {number} {format_values(_short_names(values))}"


def run_trial(config: dict[str, Any], context: SweepContext) -> None:
    """The trainable of Ray Tune. An error is reported as the trial's result; Ray Tune restarts a killed process."""
    from ray import tune

    name = tune.get_context().get_trial_name()  # population-based training copies configs, but not names
    trial = TrialRunner(context, int(name.rpartition("-")[2]), dict(config["values"]))
    segments = _read_segments(tune.get_checkpoint()) or trial.saved_segments()
    began = time.monotonic()
    enable_long_retries()
    steps = segments[-1][0] if segments else context.start_step
    if steps >= context.total_steps:  # population-based training restarts its trials after their last report
        return
    try:
        with trial.mlflow_run(segments):
            for until in report_steps(sweep_section(context.recipe), context.start_step, context.total_steps):
                if until <= steps:
                    continue
                set_process_title(f"ray::{trial.title}")  # Ray Tune's next task has reset it
                segments = [*segments, (until, trial.values)]
                result = trial.train_segment(segments)
                scored = trial.score(segments) if until == context.total_steps else None
                steps = until
                report = TrialReport(
                    steps=until,
                    seconds=time.monotonic() - began,
                    run_id=trial.run_id,
                    trained_steps=until - context.start_step,
                    validation_psnr=result.validation_psnr,
                    segments=segments,
                    copied_segments=trial.copied_segments,
                    curve=result.curve,
                    weights=result.weights,
                    scores=scored.scores if scored else None,
                    evaluation=scored.folder if scored else "",
                )
                with _segments_checkpoint(segments) as checkpoint:
                    tune.report(report.to_result(), checkpoint=checkpoint)
    except (StepFailed, ValueError) as error:
        trial.report_progress(1, 1, str(error), "failed")
        seconds = time.monotonic() - began
        tune.report(
            TrialReport(steps, seconds, trial.run_id, failure_reason=_short_reason(error)).to_result()
        )


class TrialRunner:
    """Trains and scores one trial. `run_id` is its MLflow run, or '' without tracking."""

    def __init__(self, context: SweepContext, number: int, values: FieldValues) -> None:
        self.context, self.number, self.values = context, number, values
        self.run_id, self.name = "", f"trial-{number:04d}"
        self.copied_segments = 0  # how many of its segments were trained by another trial
        self.title = trial_title(number, values).replace(",", "")  # Ray's messages separate by commas
        self.progress = context.progress.child(trial_title(number, values))

    def report_progress(self, done: float, total: float, note: str = "", state: str = "running") -> None:
        self.progress(done, total, note, state)

    @contextmanager
    def mlflow_run(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Open the trial's MLflow run, a child of the sweep's run. The sweep ends it, as the scheduler may stop a trial.

        A run holds the curves of one training run, and MLflow cannot delete points. When population-based training
        makes the trial continue from another trial's `segments`, the trial therefore gets a new run.
        """
        stored = self._stored_trial()
        length = min(len(segments), len(stored.segments))
        replaced = list(segments[:length]) != stored.segments[:length]
        self.copied_segments = len(segments) if replaced else stored.copied_segments
        if self.context.tracking:
            key = f"{self.context.step_key}/{self.number}"
            if self.copied_segments:
                key += f"/{_segments_digest(segments[: self.copied_segments])}"
            tracking, client = self.context.tracking, self.context.tracking.client()
            name, tags = trial_run_name(self.values) or self.name, {"inpaint.trial": str(self.number)}
            self.run_id = runs.open_run(tracking, key, name, self.context.sweep_run_id, tags)
            # logged once: later changes by population-based training are logged as metrics
            runs.log_params(client, self.run_id, segments[0][1] if segments else stored.initial_values)
            if replaced:
                from mlflow.exceptions import MlflowException

                with suppress(MlflowException):  # the sweep may have started with another server
                    client.set_terminated(stored.record.run, "KILLED")
        yield

    def saved_segments(self) -> list[Segment]:
        """The segments that are finished according to the trial store."""
        return self._stored_trial().segments

    def _stored_trial(self) -> StoredTrial:
        return read_trial(self.context.storage, self.context.store_folder, self.number)

    def train_segment(self, segments: Sequence[Segment]) -> SegmentResult:
        """Train up to the end of the last segment; curve and validation score."""
        last = self.build_steps(segments)[-1]
        weights = self.run_steps(segments).of(last.id, TrainOutputs).weights
        points = list(read_curves(self.context.storage, weights).points)
        curve = [(step, values[VALIDATION_METRIC]) for step, values in points if VALIDATION_METRIC in values]
        if self.run_id and self.context.tracking:
            client = self.context.tracking.client()
            if sweep_section(self.context.recipe).scheduler == "pbt":
                points += [(until, _value_metrics(values)) for until, values in segments]
            runs.log_curves(client, self.run_id, points)
        return SegmentResult(curve[-1][1], curve, weights)

    def score(self, segments: Sequence[Segment]) -> ScoreOutputs:
        """Evaluate the weights at the end of the last segment."""
        last = self.build_steps(segments)[-1]
        step = score_step(self.recipe, last.id, self.context.step_settings)
        outputs = self.run_steps(segments, step).of(SCORE, ScoreOutputs)
        metrics = sweep_section(self.context.recipe).metrics
        scores = {metric: outputs.scores[metric] for metric in metrics if metric in outputs.scores}
        self.report_progress(1, 1, format_values(scores), "finished")
        return outputs

    def run_steps(self, segments: Sequence[Segment], *further_steps: Step) -> RunResults:
        """Run this trial's steps, except those that are cached; their outputs."""
        context = self.context
        steps = [*self.build_steps(segments), *further_steps]
        workflow = Workflow(
            f"{context.step_key}-{self.name}", steps, context.storage, context.input_manifests
        )
        while True:
            try:
                return run_workflow(
                    workflow.with_settings(trial_run_id=self.run_id), self._on_event, part_of=self.title
                )
            except LeaseHeld as busy:  # another trial computes the same edges, or has the same values
                self.report_progress(0, self.context.total_steps, str(busy))
                time.sleep(RETRY_SECONDS)

    def _on_event(self, event: StepEvent) -> None:
        total = self.context.total_steps
        if event.state == "note":
            self.progress.announce(f"{event.step}: {event.note}")
        elif event.state == "retry":
            self.report_progress(0, total, f"{event.step}: retry: {event.note}")
        elif event.state == "running" and event.kind == StepKind.TRAIN:
            if event.total:
                self.report_progress(event.done, event.total, event.note)
            else:
                self.report_progress(0, total, event.note)
        elif event.state == "running":
            self.report_progress(total if event.kind == StepKind.SCORE else 0, total, event.step)

    @property
    def recipe(self) -> Recipe:
        return trial_recipe(self.context.recipe, self.values)

    def build_steps(self, segments: Sequence[Segment]) -> list[Step]:
        """A training step per segment, each resuming from the one before, and steps for edges that are not shared."""
        context, key = self.context, swept_model(self.context.recipe)
        steps: dict[StepId, Step] = {}
        previous = shared_training_id(context.recipe, self.values) if context.start_step else None
        for until, values in segments:
            recipe = trial_recipe(context.recipe, values)
            for sigma in edge_sigmas(recipe, key):
                if edges_id(sigma) not in context.input_manifests:
                    steps[edges_id(sigma)] = edges_step(sigma, context.step_settings)
            step = train_step(recipe, key, context.step_settings)
            if until < context.total_steps:
                step = truncated_training(step, StepId(StepKind.TRAIN, f"{key}-{until}"), until)
            if previous:
                step = replace(step, inputs={**step.inputs, "resume_from": previous})
            steps[step.id] = step
            previous = step.id
        return list(steps.values())


def truncated_training(step: Step, step_id: StepId, until: int) -> Step:
    """The training step with another id, ending after step `until` of the schedule."""
    return replace(step, id=step_id, config=replace(step.config, stop_after_step=until))


def shared_training_id(recipe: Recipe, values: FieldValues) -> StepId:
    return StepId(StepKind.BEGIN, f"{swept_model(recipe)}-{trial_seed(recipe, values)}")


def shared_training_step(recipe: Recipe, values: FieldValues, until: int, settings: RunSettings) -> Step:
    """The training step for the phases that are identical in all trials of a seed."""
    step = train_step(trial_recipe(recipe, values), swept_model(recipe), settings)
    return truncated_training(step, shared_training_id(recipe, values), until)


def score_step(recipe: Recipe, trained: StepId, settings: RunSettings) -> Step:
    """The step that evaluates a trial's training `trained`."""
    return Step(
        SCORE,
        "pipelines.evaluation.step:score",
        recipe.evaluate,
        {"shards": SHARD_ID, "baselines": BASELINES, "trained": trained},
        ScoreInputs,
        ScoreOutputs,
        settings,
        version=2,
    )


@contextmanager
def _segments_checkpoint(segments: Sequence[Segment]) -> Iterator[Any]:
    """A trial's checkpoint for Ray Tune: not weights, only its segments."""
    from ray.tune import Checkpoint

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SEGMENTS_FILE).write_text(json.dumps(list(segments)))
        yield Checkpoint.from_directory(folder)


def _read_segments(checkpoint: Any) -> list[Segment]:
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        return [
            (int(until), values) for until, values in json.loads((Path(folder) / SEGMENTS_FILE).read_text())
        ]


def trial_seed(recipe: Recipe, values: Mapping[str, Any]) -> int:
    """The seed among the values, or else the swept model's in the recipe."""
    seed = values.get(SEED)
    return recipe.seed_for(swept_model(recipe)) if seed is None else int(seed)


def _short_names(values: Mapping[str, Any]) -> FieldValues:
    return {path.rpartition(".")[2]: value for path, value in values.items()}


def _short_reason(error: BaseException) -> str:
    """The message without the step's name and the traceback's path: the table names the trial."""
    text = " ".join(str(error).split())
    with suppress(ValueError):
        text = text[text.index("failed: ") + 8 : text.rindex(" (")]
    return text


def _value_metrics(values: FieldValues) -> dict[str, float]:
    """The numeric values of a segment as MLflow metrics."""
    numbers = {
        path: x for path, x in values.items() if isinstance(x, int | float) and not isinstance(x, bool)
    }
    return {f"value/{path}": float(x) for path, x in numbers.items()}


def _segments_digest(segments: Sequence[Segment]) -> str:
    return hashlib.sha256(canonical_json(list(segments)).encode()).hexdigest()[:16]
