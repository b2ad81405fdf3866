"""Sweeps: trials of one recipe with other loss weights or another sigma, chosen by Ray Tune, kept in durable steps.

tars, edge tars of every sigma, baselines, what all trainings begin with --sweep--> trials --> the best recipe
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune import Callback

from data_prep.storage import Storage, open_storage
from pipelines import tracking
from pipelines.attempt import failure
from pipelines.durable import Step, StepContext, Value, Workflow
from pipelines.proposals import RUNNING, Entry, Ledger, Link, Proposals
from pipelines.provenance import code_version
from pipelines.reading import parse_recipe
from pipelines.recipe import Recipe, Sweep
from pipelines.space import (
    best_recipe,
    settings,
    shared_steps,
    sweep_of,
    swept_model,
    total_steps,
    trial_recipe,
)
from pipelines.steps import tracked
from pipelines.sweep_result import FAILED, FINISHED, SEED, STOPPED, SweepResult, in_words
from pipelines.tracking import Tracking
from pipelines.trial import Trials, begin_step, run_trial
from pipelines.workflow import Later, edge_sigmas, edges_name, shard_step

if TYPE_CHECKING:
    from mlflow import MlflowClient

TUNE = "tune"  # Ray Tune's own folder, deleted at the end
CRASHES = 2  # how often Tune starts a trial again whose process was killed
ELSEWHERE = {"storage", "tracking", "experiment", "scaling"}  # of a recipe: where it runs, not what comes out


def build_sweep(recipe: Recipe, place: Tracking | None = None) -> Workflow:
    """The steps of a sweep: what its trials share, then the sweep itself. Imports torch; raises RecipeError."""
    sweep = sweep_of(recipe)
    shard = shard_step(recipe)
    sigmas = sorted({sigma for values in _corners(recipe) for sigma in _sigmas(recipe, values)})
    steps = [shard]
    steps += [Step(edges_name(s), Later("steps", "edges"), {"sigma": s}, needs=("shard",)) for s in sigmas]
    evaluation = trial_recipe(recipe, {}).evaluate.model_dump(mode="json")
    steps.append(Step("baselines", Later("trial", "baselines"), evaluation, needs=("shard",)))
    start = shared_steps(recipe)
    if start:
        seeds = sweep.fields[SEED].values if SEED in sweep.fields else (None,)
        first = {
            path: domain.range[0] if domain.range else domain.values[0]
            for path, domain in sweep.fields.items()
        }
        steps += [begin_step(recipe, first if s is None else first | {SEED: s}, start) for s in seeds]
    body = recipe.model_dump(mode="json", exclude_defaults=True, exclude=ELSEWHERE)
    body["sweep"].pop("at_once", None)
    config = {"recipe": body, "start": start}
    steps.append(Step("sweep", Later("sweep", "search"), config, needs=tuple(step.name for step in steps)))
    local = {
        "tracking": None if place is None else vars(place),
        "scaling": recipe.scaling.model_dump(),
        "at_once": sweep.at_once,
        "recipe": recipe.to_yaml(),
    }
    return Workflow(
        f"{recipe.name}-sweep",
        [replace(step, local={**local, **step.local}) for step in steps],
        open_storage(recipe.storage),
    )


def _corners(recipe: Recipe) -> list[dict[str, Any]]:
    """Settings that together hold every listed value of every field."""
    found: list[dict[str, Any]] = [{}]
    for path, domain in sweep_of(recipe).fields.items():
        found += [{path: value} for value in domain.values]
    return found


def _sigmas(recipe: Recipe, values: dict[str, Any]) -> tuple[float, ...]:
    """The sigmas that a setting needs edges of; of a swept sigma the recipe's own is not one."""
    swept = [path for path in sweep_of(recipe).fields if path.endswith("edges.sigma")]
    if swept and not set(swept) & set(values):
        return ()
    return edge_sigmas(trial_recipe(recipe, values), swept_model(recipe))


@tracked
def search(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Run the trials, as many side by side as the cluster holds; `stable` keeps what must outlive this process."""
    from ray import tune

    recipe = parse_recipe({**ctx.config["recipe"], "scaling": ctx.local["scaling"]})
    trials = _trials(ctx, recipe, run)
    ledger = Ledger(ctx.storage, trials.local["trials"], trials.total - trials.start)
    planned = _planned(recipe)
    books = Books(ledger, trials, planned, client)
    at_once = ctx.local["at_once"] or _room(ctx.local["scaling"])
    random.seed(recipe.seed)  # population-based training draws from these
    np.random.seed(recipe.seed)  # noqa: NPY002
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failed trial has no metric
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(at_once))
    # Of a resource that only the head has: what limits population-based training, whose trials pause and go on. The
    # trainings' CPUs are their own to ask for, and Ray Train's cleaners need a thousandth each of this.
    share = max(0.9 / at_once, 1e-3)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, trials=trials),
        tune.PlacementGroupFactory([{"node:__internal_head__": share}]),
    )
    ctx.progress(len(ledger.over), planned, f"{at_once} trials at once" if at_once > 1 else "")
    _tuner(ctx, trainable, ledger, recipe, trials, books, at_once).fit()
    ctx.storage.delete_tree(f"{ctx.work}/{TUNE}")
    result = _result(ctx, recipe, ledger, trials)
    out = ctx.storage.sub(ctx.work)
    out.write("sweep.json", result.to_json().encode())
    names = ["sweep.json", *_report(ctx, recipe, result, out)]
    best = result.best
    if client:
        for name in names:
            _log_file(client, run, out, name)
        tracking.log_tags(client, run, {"inpaint.best": in_words(best.values) if best else "none"})
        if best:
            tracking.log_values(client, run, {f"best/{m}": best.mean(m) for m in result.metrics})
    if best is None:
        raise ValueError(f"no trial of the sweep finished: {_reasons(result)}")
    return {
        "outputs": [f"{ctx.work}/{name}" for name in names],
        "result": f"{ctx.work}/sweep.json",
        "best": best.values,
        "scores": {metric: best.mean(metric) for metric in result.metrics},
        "run": run,
    }


def _trials(ctx: StepContext, recipe: Recipe, run: str) -> Trials:
    local = {"scaling": ctx.local["scaling"], "recipe": ctx.local["recipe"], "trials": f"{ctx.stable}/trials"}
    first = next(settings(recipe), {})
    return Trials(
        key=ctx.key,
        recipe=recipe,
        storage=ctx.storage,
        given=dict(ctx.manifests),
        local=local,
        start=ctx.config["start"],
        total=total_steps(trial_recipe(recipe, first)),
        run=run,
        tracking=Tracking(**ctx.local["tracking"]) if run else None,
        progress=ctx.progress,
    )


def _planned(recipe: Recipe) -> int:
    """How many trials there will be, as far as that is known: for progress."""
    sweep = sweep_of(recipe)
    known = sum(1 for _ in settings(recipe)) if sweep.search == "grid" else None
    limits = [limit for limit in (known, sweep.budget.trials) if limit is not None]
    return min(limits) if limits else 0


def _room(scaling: Mapping[str, Any]) -> int:
    """How many trainings the cluster holds side by side now; at least one."""
    import ray

    there = ray.cluster_resources()
    needs = {"CPU": scaling["cpus_per_worker"], "GPU": scaling["gpus_per_worker"]}
    fits = [int(there.get(name, 0) // (scaling["workers"] * each)) for name, each in needs.items() if each]
    return max(1, min(fits, default=1))


def _tuner(
    ctx: StepContext, trainable: Any, ledger: Ledger, recipe: Recipe, trials: Trials, books: Any, at_once: int
) -> Any:
    """A new experiment in every life of the sweep: what was found before is in the ledger, nothing in Tune's pickles."""
    from ray import tune

    from pipelines.train import ray_storage

    path, filesystem = ray_storage(ctx.storage.sub(ctx.work))
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=Proposals(recipe, ledger),
            scheduler=_scheduler(sweep_of(recipe), trials, ledger),
            num_samples=-1,
            max_concurrent_trials=None if sweep_of(recipe).scheduler == "pbt" else at_once,
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
    )


def _name(trial: Any) -> str:
    return f"trial-{trial.config['number']:04d}"


def _scheduler(sweep: Sweep, trials: Trials, ledger: Ledger) -> Any:
    """Told of what an earlier life of the sweep has seen, where it compares with the past."""
    from ray.tune.schedulers import (
        AsyncHyperBandScheduler,
        FIFOScheduler,
        MedianStoppingRule,
        PopulationBasedTraining,
    )

    common: dict[str, Any] = {"time_attr": "trained", "metric": "val", "mode": "max"}
    every, longest = sweep.every or 0, trials.total - trials.start
    if sweep.scheduler == "asha":
        halving = AsyncHyperBandScheduler(
            **common, grace_period=every, max_t=longest, reduction_factor=sweep.reduction
        )
        for number, entry in ledger.entries.items():
            before = SimpleNamespace(trial_id=f"before-{number}")
            halving.on_trial_add(None, before)
            for steps, score in entry.looks:
                halving.on_trial_result(None, before, {"trained": steps - trials.start, "val": score})
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
        )
    return FIFOScheduler()


def _sampler(domain: Any) -> Any:
    from ray import tune

    return tune.loguniform(*domain.loguniform) if domain.loguniform else tune.uniform(*domain.uniform)


class Books(Callback):
    """What the trials report, kept in the ledger and told to MLflow and to whoever watches."""

    def __init__(self, ledger: Ledger, trials: Trials, planned: int, client: MlflowClient | None) -> None:
        self.clock: dict[int, float] = {}  # seconds of this life that a trial has reported
        self.ledger, self.trials, self.planned, self.client = ledger, trials, planned, client

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"client": None}  # Tune pickles its callbacks, and uses this one where it is

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        entry = self._entry(trial)
        if "failed" in result:
            state, reason = FAILED, str(result["failed"])
        elif "scores" in result:
            state, reason = FINISHED, ""
        else:
            state, reason = RUNNING, ""
        kept = ("steps", "scores", "curve", "evaluation", "weights", "run")
        told = {name: result[name] for name in kept if name in result}
        seconds = entry.trial.seconds + max(0.0, result["seconds"] - self.clock.get(entry.trial.number, 0.0))
        self.clock[entry.trial.number] = result["seconds"]
        entry.trial = replace(entry.trial, state=state, reason=reason, seconds=seconds, **told)
        if "chain" in result:
            entry.chain = result["chain"]
            entry.looks = [*entry.looks, (result["steps"], result["val"])]
            entry.trial = replace(entry.trial, changes=_changes(entry.chain))
        self.ledger.write(entry)
        self._told(entry)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        entry = self._entry(trial)
        if entry.trial.state == RUNNING:
            seen = f" at {entry.looks[-1][1]:.2f} dB" if entry.looks else ""
            reason = f"fell behind after {entry.trial.steps} steps{seen}"
            entry.trial = replace(entry.trial, state=STOPPED, reason=reason)
            self.ledger.write(entry)
            self._told(entry)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        entry = self._entry(trial)
        error = trial.get_error()
        reason = failure(error)["error"] if error else "its process ended"
        entry.trial = replace(entry.trial, state=FAILED, reason=f"{reason} ({CRASHES + 1} times)")
        self.ledger.write(entry)
        self._told(entry)

    def _entry(self, trial: Any) -> Entry:
        return self.ledger.entries[int(str(trial).rpartition("-")[2])]

    def _told(self, entry: Entry) -> None:
        """End the trial's MLflow run, and tell where the sweep is."""
        trial = entry.trial
        if self.client and trial.run and trial.state != RUNNING:
            with suppress(Exception):  # a server that is away must not end a sweep: the report has it all
                tags = {"inpaint.state": trial.state, "inpaint.reason": trial.reason}
                tracking.log_tags(
                    self.client, trial.run, {key: value for key, value in tags.items() if value}
                )
                self.client.set_terminated(trial.run, _STATUS[trial.state])
        self.show()

    def show(self) -> None:
        over = self.ledger.over
        result = SweepResult("", "", {}, sweep_of(self.trials.recipe).metrics, tuple(over))
        failed = sum(trial.state == FAILED for trial in over)
        best = result.best
        metric = result.metrics[0]
        notes = [f"best {metric} {best.mean(metric):.2f}: {in_words(best.values)}"] if best else []
        notes += [f"{failed} failed"] if failed else []
        self.trials.progress(len(over), max(self.planned, len(over)), ", ".join(notes))


_STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}


def _changes(chain: list[Link]) -> list[tuple[int, dict[str, Any]]]:
    """(step, values from there on), where a training went on with others."""
    return [(until, after) for (until, before), (_, after) in pairwise(chain) if before != after]


def _result(ctx: StepContext, recipe: Recipe, ledger: Ledger, trials: Trials) -> SweepResult:
    sweep, code = sweep_of(recipe), code_version()
    known = ctx.inputs["baselines"]
    about = {
        "search": sweep.search,
        "scheduler": sweep.scheduler,
        "minutes": f"{ledger.seconds / 60:.0f}",
        "steps": str(trials.total),
        "shared steps": str(trials.start),
        "commit": code.get("commit", "")[:12] + (" and changes" if code.get("dirty") == "true" else ""),
        "command": f"inpaint sweep {recipe.name}",
        "masks": ", ".join(recipe.evaluate.masks),
    }
    return SweepResult(
        name=recipe.name,
        model=swept_model(recipe),
        fields={
            path: domain.model_dump(mode="json", exclude_none=True) for path, domain in sweep.fields.items()
        },
        metrics=sweep.metrics,
        trials=tuple(ledger.trials),
        baselines=known["scores"],
        split=sweep.split,
        photographs=known["photographs"],
        about={key: value for key, value in about.items() if value},
    )


def _report(ctx: StepContext, recipe: Recipe, result: SweepResult, out: Storage) -> list[str]:
    """Pictures, table, page and the best recipe; the names of the files."""
    from pipelines.scores import Evaluation
    from pipelines.sweep_report import sweep_html, sweep_markdown, sweep_pictures

    evaluations = {
        trial.number: Evaluation.load(ctx.storage.sub(trial.evaluation).read)
        for trial in result.trials
        if trial.evaluation
    }
    best = result.best
    yaml = best_recipe(recipe, best.values).to_yaml() if best else ""
    files = dict(sweep_pictures(result, evaluations))
    files["sweep.md"] = sweep_markdown(result).encode()
    files["sweep.html"] = sweep_html(result, evaluations, yaml).encode()
    if best:
        files["best.yaml"] = yaml.encode()
    for name, content in files.items():
        out.write(name, content)
    return list(files)


def _log_file(client: MlflowClient, run: str, out: Storage, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        out.download(name, path)
        client.log_artifact(run, str(path))


def _reasons(result: SweepResult) -> str:
    found = [f"trial {t.number} ({in_words(t.values)}): {t.reason}" for t in result.trials if t.reason]
    return "; ".join(found[:3]) or "none was begun within the budget"
