"""Runs a sweep's trials under Ray Tune: concurrency, scheduler, and the callback that stores their reports."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.fs
import ray
from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from pipelines.durable.task import to_attempt_error
from pipelines.recipe import Domain, Scaling
from pipelines.sweeps.results import (
    FAILED,
    FINISHED,
    SEED,
    STOPPED,
    FieldValues,
    Segment,
    SweepResult,
    format_values,
)
from pipelines.sweeps.searcher import TrialSearcher
from pipelines.sweeps.space import sweep_section
from pipelines.sweeps.trial import SweepContext, run_trial, trial_title
from pipelines.sweeps.trial_store import RUNNING, StoredTrial, TrialReport, TrialStore
from pipelines.tracking import runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

TUNE_FOLDER = "tune"  # Ray Tune's folder, deleted at the end
MAX_CRASHES = 2  # restarts of a trial whose process was killed
MLFLOW_STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}
"""trial state -> status of its MLflow run"""


def tune_trials(
    context: SweepContext,
    store: TrialStore,
    callback: TrialCallback,
    max_concurrent_trials: int | None,
    storage_path: str,
    filesystem: pyarrow.fs.FileSystem | None,
    trial_function: Callable[[dict[str, Any], SweepContext], None] = run_trial,
) -> None:
    """Run the trials that the store does not have as ended.

    A resumed sweep starts a new Ray Tune experiment: earlier results are in the store and in the trials' steps, none
    in Ray Tune's pickles.
    """
    sweep = sweep_section(context.recipe)
    max_concurrent_trials = max_concurrent_trials or trials_that_fit(context.step_settings.scaling)
    random.seed(context.recipe.seed)  # population-based training samples from these
    np.random.seed(context.recipe.seed % 2**32)  # noqa: NPY002
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failed trial has no metric
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max_concurrent_trials)
    # A share of a resource that only the head node has. It also limits population-based training, whose trials pause
    # and resume. Training workers request their own CPUs; Ray Train's cleaners need a thousandth of this resource each.
    head_share = max(0.9 / max_concurrent_trials, 1e-3)
    trainable = tune.with_resources(
        tune.with_parameters(trial_function, context=context),
        tune.PlacementGroupFactory([{"node:__internal_head__": head_share}]),
    )
    searcher, is_population = TrialSearcher(context.recipe, store), sweep.scheduler == "pbt"
    tune.Tuner(
        trainable,
        param_space=_population_space(searcher) if is_population else None,
        tune_config=tune.TuneConfig(
            search_alg=None if is_population else searcher,
            scheduler=make_scheduler(context, store),
            num_samples=1 if is_population else -1,
            max_concurrent_trials=None if is_population else max_concurrent_trials,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=MAX_CRASHES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _population_space(searcher: TrialSearcher) -> dict[str, Any]:
    """The parameter space with all trials: Ray Tune's population-based training takes no searcher."""
    members: dict[int, FieldValues] = {}
    while (proposal := searcher.suggest("")) != Searcher.FINISHED:
        members[proposal["number"]] = proposal["values"]

    def member_value(path: str, spec: Any) -> Any:
        return members[spec["config"]["number"]][path]

    paths = next(iter(members.values()), {})
    values = {path: tune.sample_from(partial(member_value, path)) for path in paths}
    return {"number": tune.grid_search(list(members)), "values": values}


def trials_that_fit(scaling: Scaling) -> int:
    """How many training runs fit on the cluster now; at least one."""
    available = ray.cluster_resources()
    per_worker = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    counts = [
        int(available.get(name, 0) // (scaling.max_workers * amount))
        for name, amount in per_worker.items()
        if amount
    ]
    return max(1, min(counts, default=1))


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['number']:04d}"


def make_scheduler(context: SweepContext, store: TrialStore) -> TrialScheduler:
    """The scheduler of the sweep. ASHA gets the scores that were reported before the sweep was interrupted."""
    common: dict[str, Any] = {"time_attr": "trained_steps", "metric": "validation_psnr", "mode": "max"}
    sweep = sweep_section(context.recipe)
    interval, steps_per_trial = sweep.report_every or 0, context.total_steps - context.start_step
    if sweep.scheduler == "asha":
        asha = AsyncHyperBandScheduler(
            **common,
            grace_period=interval,
            max_t=steps_per_trial,
            reduction_factor=sweep.reduction_factor,
        )
        for number, stored in store.by_number.items():
            earlier_trial = SimpleNamespace(trial_id=f"before-{number}")
            asha.on_trial_add(None, earlier_trial)  # type: ignore[arg-type]
            for step, score in stored.reported_scores:
                result = {"trained_steps": step - context.start_step, "validation_psnr": score}
                asha.on_trial_result(None, earlier_trial, result)  # type: ignore[arg-type]
        return asha
    if sweep.scheduler == "median":
        return MedianStoppingRule(**common, grace_period=interval, min_samples_required=3)
    if sweep.scheduler == "pbt":
        fields = {path: domain for path, domain in sweep.fields.items() if path != SEED}
        mutations = {path: list(d.values) if d.values else _tune_sampler(d) for path, d in fields.items()}
        return PopulationBasedTraining(
            **common,
            perturbation_interval=interval,
            hyperparam_mutations={"values": mutations},
            require_attrs=False,
            synch=True,  # compares all members at the same step, however many run concurrently
        )
    return FIFOScheduler()


def _tune_sampler(domain: Domain) -> Any:
    distribution = tune.loguniform if domain.loguniform else tune.uniform
    return distribution(*domain.bounds or ())


class TrialCallback(Callback):
    """Stores the trials' reports, ends their MLflow runs, and shows the progress."""

    def __init__(
        self, store: TrialStore, context: SweepContext, expected_trials: int, client: MlflowClient | None
    ) -> None:
        self.store, self.context, self.expected_trials, self.client = store, context, expected_trials, client
        self.reported_seconds: dict[int, float] = {}
        """trial number -> seconds that it has reported to this process"""
        # Their MLflow runs may still be open: a sweep can be killed between the two writes.
        self.unsynced = {trial.number for trial in store.ended_records}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {
            "client": None
        }  # Ray Tune pickles its callbacks, but calls this one in this process

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        stored, report = self._stored_trial(trial), TrialReport.from_result(result)
        number = stored.record.number
        seconds = report.seconds - self.reported_seconds.get(number, 0.0)
        self.reported_seconds[number] = report.seconds
        state = FAILED if report.failure_reason else FINISHED if report.scores is not None else RUNNING
        fields = {
            "steps": report.steps,
            "run": report.run_id,
            "state": state,
            "reason": report.failure_reason,
        }
        if report.segments:
            stored.segments, stored.copied_segments = list(report.segments), report.copied_segments
            fields |= {
                "values": stored.segments[-1][1],
                "changes": value_changes(stored.segments, self.context.start_step),
                "curve": list(report.curve),
                "weights": report.weights,
                "evaluation": report.evaluation,
                "scores": report.scores or {},
            }
        if report.validation_psnr is not None:
            stored.reported_scores = [*stored.reported_scores, (report.steps, report.validation_psnr)]
        self._update(stored, **fields, seconds=stored.record.seconds + max(0.0, seconds))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        stored = self._stored_trial(trial)
        if stored.record.state == RUNNING:
            score = f" at {stored.reported_scores[-1][1]:.2f} dB" if stored.reported_scores else ""
            self._update(
                stored, state=STOPPED, reason=f"fell behind after {stored.record.steps} steps{score}"
            )
            self.context.progress.child(trial_title(stored.record.number, stored.record.values))(
                1, 1, stored.record.reason, STOPPED
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_error()
        reason = to_attempt_error(error).message if error else "its process ended"
        self._update(self._stored_trial(trial), state=FAILED, reason=f"{reason} ({MAX_CRASHES + 1} times)")

    def _stored_trial(self, trial: Any) -> StoredTrial:
        return self.store.by_number[int(str(trial).rpartition("-")[2])]

    def _update(self, stored: StoredTrial, **fields: Any) -> None:
        stored.record = replace(stored.record, **fields)
        self.store.write(stored)
        if stored.record.state != RUNNING:
            self.unsynced.add(stored.record.number)
            with suppress(Exception):  # the server is unavailable: end_mlflow_runs at the end retries
                self.end_mlflow_runs()
        self.report_progress()

    def end_mlflow_runs(self) -> None:
        """End the MLflow runs of ended trials."""
        for number in sorted(self.unsynced):
            trial = self.store.by_number[number].record
            if (
                self.client
                and trial.run
                and self.client.get_run(trial.run).info.status != MLFLOW_STATUS[trial.state]
            ):
                tags = {"inpaint.state": trial.state, "inpaint.reason": trial.reason}
                runs.log_tags(self.client, trial.run, {key: value for key, value in tags.items() if value})
                self.client.set_terminated(trial.run, MLFLOW_STATUS[trial.state])
            self.unsynced.discard(number)

    def end_replaced_runs(self) -> None:
        """End the MLflow runs that population-based training replaced by a copy of another trial's training."""
        if self.client is None or sweep_section(self.context.recipe).scheduler != "pbt":
            return
        experiment = self.client.get_run(self.context.sweep_run_id).info.experiment_id
        children = f"tags.`mlflow.parentRunId` = '{self.context.sweep_run_id}'"
        current = {trial.run for trial in self.store.records}
        for run in self.client.search_runs([experiment], children, max_results=50_000):
            if run.info.run_id not in current:
                tags = {
                    "inpaint.state": "replaced",
                    "inpaint.reason": "its trial continues from another trial's training",
                }
                runs.log_tags(self.client, run.info.run_id, tags)
                self.client.set_terminated(run.info.run_id, "KILLED")

    def report_progress(self) -> None:
        """Show how many trials have ended, and the best setting so far."""
        ended = self.store.ended_records
        result = SweepResult("", "", {}, sweep_section(self.context.recipe).metrics, tuple(ended))
        failed = sum(record.state == FAILED for record in ended)
        best, metric = result.best_group, result.metrics[0]
        notes = [f"best {metric} {best.mean(metric):.2f}: {format_values(best.values)}"] if best else []
        notes += [f"{failed} failed"] if failed else []
        self.context.progress(len(ended), max(self.expected_trials, len(ended)), ", ".join(notes))


def value_changes(segments: list[Segment], start: int) -> list[tuple[int, dict[str, Any]]]:
    """(step, values from that step on), the values at `start` included; [] if they never change."""
    initial = (start, segments[0][1])
    changes = [(until, after) for (until, before), (_, after) in pairwise(segments) if before != after]
    return [initial, *changes] if changes else []
