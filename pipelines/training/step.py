"""The step that trains."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from data_prep.masks import fixed_masks
from models import build_model
from pipelines import tracking
from pipelines.durable.steps import StepContext
from pipelines.durable.tracked import Value, tracked
from pipelines.provenance import TAG, made_by
from pipelines.tracking import Tracking
from pipelines.training.learner import make_schedule
from pipelines.training.train import TrainJob, fit, read_best, write_part
from pipelines.training.weights import save_weights


@tracked
def train(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Tars and edge tars -> weights, under Ray Train; `stable` holds its checkpoints between attempts. Where an earlier
    look at held-out photographs was better than the last, its weights are in `best/` beside the last ones.

    `until` in its config ends it early, with a part that a training of the same schedule goes on from.
    """
    config, name = ctx.config, f"{ctx.name}-{ctx.key[:16]}"
    job = TrainJob(
        storage=ctx.storage,
        model=config["model"],
        options=config["options"],
        shards=ctx.inputs["shard"]["shards"],
        edges={value["sigma"]: value["edges"] for value in ctx.inputs.values() if "edges" in value},
        data={key: config[key] for key in ("size", "flip", "streams")}
        | {
            **{name: ctx.local[name] for name in ("threads", "cache_gb", "cache_dir")},
            "at_once": ctx.local["scaling"]["at_once"],
            "max_bad": int(ctx.local["max_bad"] * ctx.inputs["shard"]["splits"]["train"]),
            "torch_threads": max(1, int(ctx.local["scaling"]["cpus_per_worker"])),
        },
        masks=config["masks"],
        edge_source=config["edge_source"],
        sigmas=tuple(config["sigma"]),
        train=config["train"] | {"keep": ctx.local["keep"]},
        seed=config["seed"],
        until=config.get("until"),
        start=next((value["part"] for value in ctx.inputs.values() if "part" in value), ""),
        run=run,
        tracking=Tracking(**ctx.local["tracking"]) if run else None,
        progress=ctx.progress,
        fatal=f"{ctx.stable}/fatal",
        checkpoints=f"{ctx.stable}/{name}",
        best=f"{ctx.stable}/best",
    )
    ctx.progress(0, 0, "starting workers")
    if client:
        tracking.log_tags(client, run, {TAG: json.dumps(made_by())})
    state, journal = fit(job, ctx.local["scaling"], ctx.stable, name)
    if client:
        tracking.log_curves(client, run, journal)
    model = build_model(config["model"], **config["options"])
    about = {key: config[key] for key in ("options", "size", "seed", "masks", "edge_source")} | {
        "name": config["model"],
        "sigma": statistics.median(config["sigma"]),
        "sigmas": config["sigma"],
        "hole_range": hole_range(config["masks"], config["size"]),
    }
    schedule = make_schedule(model, config["train"]["steps"])
    phases = [[phase.name, start, end] for phase, start, end in schedule.parts]
    with tempfile.TemporaryDirectory() as temporary:
        folder, kept = Path(temporary), []
        for where, found in (("", state), ("best/", read_best(job, journal))):
            if found:
                model.networks.load_state_dict(found["networks"])
                (folder / where).mkdir(exist_ok=True)
                files = save_weights(folder / where, model, found["ema"], about | {"steps": found["step"]})
                kept += [f"{where}{file}" for file in files]
        (folder / "curves.json").write_text(json.dumps({"points": journal, "phases": phases}))
        kept.append("curves.json")
        for file in kept:
            ctx.storage.upload(folder / file, f"{ctx.work}/{file}")
    value = {"weights": ctx.work, "run": run, "steps": state["step"]}
    if job.until:
        kept += write_part(ctx.storage.sub(ctx.work), state, journal)
        value["part"] = ctx.work
    return {"outputs": [f"{ctx.work}/{file}" for file in kept], **value}


def hole_range(masks: Mapping[str, Any], size: int) -> list[float]:
    """The smallest and largest share of hole among a sample of the training masks."""
    shares = [float(mask.mean()) for mask in fixed_masks(masks, size, size, 64, 0)]
    return [min(shares), max(shares)]
