"""A sweep's trials under Ray Tune: how many at once, what the scheduler is told, what is kept of what they report."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
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

from pipelines import tracking
from pipelines.durable.attempt import failure
from pipelines.recipe import Domain
from pipelines.sweeps.ledger import RUNNING, Entry, Ledger
from pipelines.sweeps.proposals import Proposals
from pipelines.sweeps.result import FAILED, FINISHED, SEED, STOPPED, SweepResult, in_words
from pipelines.sweeps.space import Link, Values, sweep_of
from pipelines.sweeps.trial import Trials, label, run_trial

if TYPE_CHECKING:
    from mlflow import MlflowClient

TUNE = "tune"  # Ray Tune's own folder, deleted at the end
CRASHES = 2  # how often a trial is started again whose process was killed
STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}  # MLflow's


def tune_trials(
    trials: Trials,
    ledger: Ledger,
    books: Books,
    at_once: int | None,
    path: str,
    filesystem: pyarrow.fs.FileSystem | None,
    run: Callable[[dict[str, Any], Trials], None] = run_trial,
) -> None:
    """Run what the ledger does not have yet. Ray Tune begins a new experiment in every life of a sweep: what was
    found before is in the ledger and in the trials' own steps, nothing in its pickles."""
    sweep = sweep_of(trials.recipe)
    at_once = at_once or room(trials.local["scaling"])
    random.seed(trials.recipe.seed)  # population-based training draws from these
    np.random.seed(trials.recipe.seed)  # noqa: NPY002
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failed trial has no metric
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once)
    # Of a resource that only the head has: what limits population-based training, whose trials pause and go on. The
    # trainings' CPUs are their own to ask for, and Ray Train's cleaners need a thousandth each of this.
    share = max(0.9 / at_once, 1e-3)
    trainable = tune.with_resources(
        tune.with_parameters(run, trials=trials),
        tune.PlacementGroupFactory([{"node:__internal_head__": share}]),
    )
    proposals, population = Proposals(trials.recipe, ledger), sweep.scheduler == "pbt"
    tune.Tuner(
        trainable,
        param_space=_whole_population(proposals) if population else None,
        tune_config=tune.TuneConfig(
            search_alg=None if population else proposals,
            scheduler=scheduler(trials, ledger),
            num_samples=1 if population else -1,
            max_concurrent_trials=None if population else at_once,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[books],
            failure_config=tune.FailureConfig(max_failures=CRASHES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _whole_population(proposals: Proposals) -> dict[str, Any]:
    """All trials at once: Ray Tune's population-based training takes no searcher."""
    members: dict[int, Values] = {}
    while (proposal := proposals.suggest("")) != Searcher.FINISHED:
        members[proposal["number"]] = proposal["values"]

    def value(path: str, spec: Any) -> Any:
        return members[spec["config"]["number"]][path]

    paths = next(iter(members.values()), {})
    values = {path: tune.sample_from(partial(value, path)) for path in paths}
    return {"number": tune.grid_search(list(members)), "values": values}


def room(scaling: Mapping[str, Any]) -> int:
    """How many trainings the cluster holds side by side now; at least one."""
    there = ray.cluster_resources()
    workers = scaling["workers"] if isinstance(scaling["workers"], int) else scaling["workers"][1]
    needs = {"CPU": scaling["cpus_per_worker"], "GPU": scaling["gpus_per_worker"]}
    fits = [int(there.get(name, 0) // (workers * each)) for name, each in needs.items() if each]
    return max(1, min(fits, default=1))


def _name(trial: Any) -> str:
    return f"trial-{trial.config['number']:04d}"


def scheduler(trials: Trials, ledger: Ledger) -> TrialScheduler:
    """Told of what an earlier life of the sweep has seen, where it compares with the past."""
    common: dict[str, Any] = {"time_attr": "trained", "metric": "val", "mode": "max"}
    sweep = sweep_of(trials.recipe)
    every, longest = sweep.every or 0, trials.total - trials.start
    if sweep.scheduler == "asha":
        halving = AsyncHyperBandScheduler(
            **common, grace_period=every, max_t=longest, reduction_factor=sweep.reduction
        )
        for number, entry in ledger.entries.items():
            before = SimpleNamespace(trial_id=f"before-{number}")
            halving.on_trial_add(None, before)  # type: ignore[arg-type]
            for steps, score in entry.looks:
                seen = {"trained": steps - trials.start, "val": score}
                halving.on_trial_result(None, before, seen)  # type: ignore[arg-type]
        return halving
    if sweep.scheduler == "median":
        return MedianStoppingRule(**common, grace_period=every, min_samples_required=3)
    if sweep.scheduler == "pbt":
        fields = {path: domain for path, domain in sweep.fields.items() if path != SEED}
        mutations = {path: list(d.values) if d.values else _sampler(d) for path, d in fields.items()}
        return PopulationBasedTraining(
            **common,
            perturbation_interval=every,
            hyperparam_mutations={"values": mutations},
            require_attrs=False,
            synch=True,  # every member against all others at the same step, however many run at once
        )
    return FIFOScheduler()


def _sampler(domain: Domain) -> Any:
    draw = tune.loguniform if domain.loguniform else tune.uniform
    return draw(*domain.range or ())


class Books(Callback):
    """What the trials report, kept in the ledger and told to MLflow and to whoever watches."""

    def __init__(self, ledger: Ledger, trials: Trials, planned: int, client: MlflowClient | None) -> None:
        self.ledger, self.trials, self.planned, self.client = ledger, trials, planned, client
        self.clock: dict[int, float] = {}  # seconds of this life that a trial has reported
        # trials whose end MLflow may not know: a sweep can die between the ledger and the server
        self.untold = {trial.number for trial in ledger.over}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"client": None}  # Tune pickles its callbacks, and uses this one where it is

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        entry = self._entry(trial)
        state = FAILED if "failed" in result else FINISHED if "scores" in result else RUNNING
        kept = ("steps", "scores", "curve", "evaluation", "weights", "run")
        told = {name: result[name] for name in kept if name in result}
        seconds = result["seconds"] - self.clock.get(entry.trial.number, 0.0)
        self.clock[entry.trial.number] = result["seconds"]
        if "chain" in result:
            entry.chain = result["chain"]
            entry.looks = [*entry.looks, (result["steps"], result["val"])]
            told |= {"values": entry.chain[-1][1], "changes": changes(entry.chain, self.trials.start)}
        told |= {"state": state, "reason": str(result.get("failed", ""))}
        self._keep(entry, **told, seconds=entry.trial.seconds + max(0.0, seconds))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        entry = self._entry(trial)
        if entry.trial.state == RUNNING:
            seen = f" at {entry.looks[-1][1]:.2f} dB" if entry.looks else ""
            self._keep(entry, state=STOPPED, reason=f"fell behind after {entry.trial.steps} steps{seen}")
            self.trials.progress.child(label(entry.trial.number, entry.trial.values))(
                1, 1, entry.trial.reason, STOPPED
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_error()
        reason = failure(error)["error"] if error else "its process ended"
        self._keep(self._entry(trial), state=FAILED, reason=f"{reason} ({CRASHES + 1} times)")

    def _entry(self, trial: Any) -> Entry:
        return self.ledger.entries[int(str(trial).rpartition("-")[2])]

    def _keep(self, entry: Entry, **told: Any) -> None:
        entry.trial = replace(entry.trial, **told)
        self.ledger.write(entry)
        if entry.trial.state != RUNNING:
            self.untold.add(entry.trial.number)
            with suppress(Exception):  # a server that is away: `settle` tells it
                self.settle()
        self.show()

    def settle(self) -> None:
        """End the MLflow runs of trials that are over."""
        for number in sorted(self.untold):
            trial = self.ledger.entries[number].trial
            if (
                self.client
                and trial.run
                and self.client.get_run(trial.run).info.status != STATUS[trial.state]
            ):
                tags = {"inpaint.state": trial.state, "inpaint.reason": trial.reason}
                tracking.log_tags(
                    self.client, trial.run, {key: value for key, value in tags.items() if value}
                )
                self.client.set_terminated(trial.run, STATUS[trial.state])
            self.untold.discard(number)

    def show(self) -> None:
        """How many trials are over, and the best setting so far."""
        over = self.ledger.over
        result = SweepResult("", "", {}, sweep_of(self.trials.recipe).metrics, tuple(over))
        failed = sum(trial.state == FAILED for trial in over)
        best, metric = result.best, result.metrics[0]
        notes = [f"best {metric} {best.mean(metric):.2f}: {in_words(best.values)}"] if best else []
        notes += [f"{failed} failed"] if failed else []
        self.trials.progress(len(over), max(self.planned, len(over)), ", ".join(notes))


def changes(chain: list[Link], start: int) -> list[tuple[int, dict[str, Any]]]:
    """(step, values from there on) of a training whose values changed, from its beginning; [] when they did not."""
    first = (start, chain[0][1])
    later = [(until, after) for (until, before), (_, after) in pairwise(chain) if before != after]
    return [first, *later] if later else []
