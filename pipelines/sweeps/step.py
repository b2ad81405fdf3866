"""The step that a sweep is: run the trials, then say which were best, in figures, a table and a recipe."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data_prep.storage import Storage
from pipelines import tracking
from pipelines.durable.attempt import Progress
from pipelines.durable.steps import StepContext, Value
from pipelines.durable.tracked import tracked
from pipelines.provenance import code_version
from pipelines.reading import parse_recipe
from pipelines.recipe import Recipe
from pipelines.sweeps.ledger import Ledger
from pipelines.sweeps.result import SweepResult, best_name, in_words
from pipelines.sweeps.space import best_recipe, settings, sweep_of, swept_model, total_steps, trial_recipe
from pipelines.sweeps.trial import Trials
from pipelines.sweeps.tuning import TUNE, Books, tune_trials
from pipelines.tracking import Tracking
from pipelines.training.arrow_storage import ray_storage

if TYPE_CHECKING:
    from mlflow import MlflowClient


@tracked
def search(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Run the trials, as many side by side as the cluster holds; `stable` keeps what must outlive this process."""
    recipe = parse_recipe({**ctx.config["recipe"], "scaling": ctx.local["scaling"]})
    known = ctx.inputs["baselines"]
    for metric in sweep_of(recipe).metrics:
        if not any(metric in scores for scores in known["scores"].values()):
            raise ValueError(f"sweep.metrics: {metric} cannot be had here: {'; '.join(known['reasons'][:1])}")
    trials = _trials(ctx, recipe, run)
    ledger = Ledger(ctx.storage, trials.local["trials"], trials.total - trials.start)
    books = Books(ledger, trials, _planned(recipe), client)
    books.show()
    path, filesystem = ray_storage(ctx.storage, ctx.work)
    tune_trials(trials, ledger, books, ctx.local["at_once"], path, filesystem)
    ctx.storage.delete_tree(f"{ctx.work}/{TUNE}")
    books.settle()
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
        progress=cast(Progress, ctx.progress),
    )


def _planned(recipe: Recipe) -> int:
    """How many trials there will be, as far as that is known: for progress."""
    sweep = sweep_of(recipe)
    known = sum(1 for _ in settings(recipe)) if sweep.search == "grid" else None
    limits = [limit for limit in (known, sweep.budget.trials) if limit is not None]
    return min(limits) if limits else 0


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
    from pipelines.evaluation.scores import Evaluation
    from pipelines.sweeps.report import sweep_html, sweep_markdown, sweep_pictures

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
        files[best_name(result.name)] = yaml.encode()
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
