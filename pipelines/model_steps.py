"""The steps that make models: train, evaluate, register."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from data_prep.masks import fixed_masks
from data_prep.storage import Storage
from models import build_model
from pipelines import registry, tracking
from pipelines.completers import LoadedCompleter, completer, photographs
from pipelines.durable import StepContext
from pipelines.evaluate import Completer, EvaluationSpec, baselines
from pipelines.evaluate import evaluate as score
from pipelines.figures import encode_png, sample_grid
from pipelines.learner import make_schedule
from pipelines.metrics import higher_is_better
from pipelines.provenance import code_version
from pipelines.scores import Evaluation
from pipelines.steps import Value, tracked
from pipelines.tables import table_markdown
from pipelines.tracking import Tracking
from pipelines.train import TrainJob, fit
from pipelines.weights import load_weights, save_weights


@tracked
def train(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Tars and edge tars -> weights, under Ray Train; `stable` holds its checkpoints between attempts."""
    config = ctx.config
    job = TrainJob(
        storage=ctx.storage,
        model=config["model"],
        options=config["options"],
        shards=ctx.inputs["shard"]["shards"],
        edges={value["sigma"]: value["edges"] for value in ctx.inputs.values() if "edges" in value},
        data={key: config[key] for key in ("size", "flip", "streams")}
        | {
            "threads": ctx.local["threads"],
            "torch_threads": max(1, int(ctx.local["scaling"]["cpus_per_worker"])),
        },
        masks=config["masks"],
        edge_source=config["edge_source"],
        sigmas=tuple(config["sigma"]),
        train=config["train"] | {"keep": ctx.local["keep"]},
        seed=config["seed"],
        run=run,
        tracking=Tracking(**ctx.local["tracking"]) if run else None,
        progress=ctx.progress,
        fatal=f"{ctx.stable}/fatal",
    )
    ctx.progress(0, 0, "starting workers")
    state, journal = fit(job, ctx.local["scaling"], ctx.stable, f"{ctx.name}-{ctx.key[:16]}")
    if client:
        tracking.log_curves(client, run, journal)
    model = build_model(config["model"], **config["options"])
    model.networks.load_state_dict(state["networks"])
    about = {key: config[key] for key in ("options", "size", "seed", "masks", "edge_source")} | {
        "name": config["model"],
        "sigma": statistics.median(config["sigma"]),
        "sigmas": config["sigma"],
        "hole_range": hole_range(config["masks"], config["size"]),
        "steps": state["step"],
    }
    schedule = make_schedule(model, config["train"]["steps"])
    phases = [[phase.name, start, end] for phase, start, end in schedule.parts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = save_weights(folder, model, state["ema"], about)
        (folder / "curves.json").write_text(json.dumps({"points": journal, "phases": phases}))
        for name in (*files, "curves.json"):
            ctx.storage.upload(folder / name, f"{ctx.work}/{name}")
    return {
        "outputs": [f"{ctx.work}/{name}" for name in (*files, "curves.json")],
        "weights": ctx.work,
        "run": run,
        "steps": state["step"],
    }


def hole_range(masks: Mapping[str, Any], size: int) -> list[float]:
    """The smallest and largest share of hole among a sample of the training masks."""
    shares = [float(mask.mean()) for mask in fixed_masks(masks, size, size, 64, 0)]
    return [min(shares), max(shares)]


@tracked
def evaluate(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Every trained model and the classical baselines on the held-out photographs, under one protocol."""
    shards = ctx.storage.sub(ctx.inputs["shard"]["shards"])
    photos = list(photographs(shards, ctx.config["split"]))
    methods: dict[str, Completer] = {}
    for name, value in ctx.inputs.items():
        if "weights" in value:
            with local_folder(ctx.storage, value["weights"]) as folder:
                methods[name.removeprefix("train-")] = completer(*load_weights(folder))
    spec = EvaluationSpec.of(ctx.config)
    found = score(baselines() | methods, photos, spec, progress=ctx.progress)
    keys = found.save(ctx.storage.sub(ctx.work).write)
    if client:
        for method in found.methods:
            tracking.log_values(client, run, {f"{method}/{k}": v for k, v in found.flat(method).items()})
        tracking.log_text(client, run, "table.md", table_markdown(found))
        for grid in found.grids():
            tracking.log_picture(client, run, f"samples/{grid.title}.png", encode_png(sample_grid(grid)))
    return {
        "outputs": [f"{ctx.work}/{key}" for key in keys],
        "evaluation": ctx.work,
        "scores": {method: found.score(method, ctx.config["metric"]) for method in methods},
    }


@tracked
def register(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Weights -> a version in the registry; champion when it beats the present one on these photographs and masks."""
    assert client is not None, "registering needs MLflow"
    config, uri = ctx.config, ctx.local["tracking"]["uri"]
    label = ctx.name.removeprefix("register-")
    trained, evaluated, shards = ctx.inputs[f"train-{label}"], ctx.inputs["evaluate"], ctx.inputs["shard"]
    with local_folder(ctx.storage, trained["weights"]) as folder:
        model, about = load_weights(folder)
    scores = Evaluation.load(ctx.storage.sub(evaluated["evaluation"]).read)
    metric, name = config["metric"], config["register_as"]
    champion = registry.current_champion(name, uri)
    ctx.progress(0, 2, "exporting")
    version = registry.register(
        model,
        name=name,
        run_id=run,
        step_key=ctx.key,
        tags={
            "inpaint.recipe": config["recipe"],
            "inpaint.metric": f"{metric} {scores.score(label, metric):.3f}",
        },
        metrics=scores.flat(label),
        metadata=about
        | {"recipe": ctx.local["recipe"], "shards": shards["digest"], "training_run": trained["run"]}
        | {"protocol": scores.protocol, "code": code_version()},
        tracking_uri=uri,
    )
    for grid in scores.grids():
        tracking.log_picture(client, run, f"samples/{grid.title}.png", encode_png(sample_grid(grid)))
    ctx.progress(1, 2, "comparing with the champion")
    here = scores.score(label, metric)
    better, reason = _beats(ctx, name, champion, version, here, metric, model.true_edges)
    crowned = registry.crown(name, version, better, reason, score=here, tracking_uri=uri)
    tracking.log_tags(
        client, run, {"inpaint.version": version, "inpaint.champion": crowned, "inpaint.reason": reason}
    )
    return {"name": name, "version": version, "champion": crowned, "reason": reason}


def _beats(
    ctx: StepContext,
    name: str,
    champion: str | None,
    version: str,
    score_here: float,
    metric: str,
    true_edges: bool,
) -> tuple[bool, str]:
    """Whether the new version beats the champion, scored again on this run's photographs and masks.

    A champion that cannot be scored keeps its place: it may only be out of reach, and a person can promote by hand.
    What paints over true edges does not compete with what completes.
    """
    if champion is None:
        return True, f"first version; {metric} {score_here:.3f}"
    if champion == version:
        return True, "champion already"
    spec = EvaluationSpec.of(ctx.config["evaluate"] | {"distance": None, "samples": 1})
    photos = list(
        photographs(ctx.storage.sub(ctx.inputs["shard"]["shards"]), ctx.config["evaluate"]["split"])
    )
    try:
        old = registry.load_model(f"models:/{name}/{champion}", tracking_uri=ctx.local["tracking"]["uri"])
        if bool(old.metadata.get("true_edges")) != true_edges:
            return (
                False,
                f"of this and version {champion} one paints over true edges: give studies a name, register_as",
            )
        theirs = score({"champion": LoadedCompleter(old)}, photos, spec).score("champion", metric)
    except ValueError as error:
        return False, f"the champion, version {champion}, cannot be scored here, so nothing is known: {error}"
    better = score_here > theirs if higher_is_better(metric) else score_here < theirs
    return (
        better,
        f"{metric} {score_here:.3f} against {theirs:.3f} of version {champion} on the same photographs",
    )


@contextmanager
def local_folder(storage: Storage, folder: str) -> Iterator[Path]:
    """A folder of the storage on this machine: itself, or a download from a bucket."""
    here = storage.sub(folder)
    path = here.path()
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        for key, _ in here.list():
            target = Path(temporary) / key
            target.parent.mkdir(parents=True, exist_ok=True)
            here.download(key, target)
        yield Path(temporary)
