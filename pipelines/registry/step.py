"""The step that registers: weights -> a version with all that made it; champion when it beats the present one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from mlflow import MlflowClient

from pipelines import registry, tracking
from pipelines.durable.steps import StepContext
from pipelines.durable.tracked import Value, tracked
from pipelines.evaluation.completers import photographs
from pipelines.evaluation.evaluate import EvaluationSpec
from pipelines.evaluation.figures import encode_png, sample_grid
from pipelines.evaluation.judging import against_champion
from pipelines.evaluation.scores import Evaluation
from pipelines.provenance import TAG, made_by
from pipelines.registry.aliases import Overtaken
from pipelines.registry.searching import DISTANCE, PROTOCOL, split_column
from pipelines.training.weights import load_weights, local_folder

NOT_COMPARED = (
    "versions",
    "true_edges",
    "distance",
)  # of a protocol: scores of the rest compare without them
TRIES = 5  # of becoming champion, each after a comparison with whoever did meanwhile


@tracked
def register(ctx: StepContext, client: MlflowClient | None, run: str) -> Value:
    """Weights -> a version in the registry; champion when it beats the present one on these photographs and masks."""
    assert client is not None, "registering needs MLflow"
    config, uri = ctx.config, ctx.local["tracking"]["uri"]
    label, name = ctx.name.removeprefix("register-"), config["register_as"]
    trained = ctx.inputs[f"train-{label}"]
    with local_folder(ctx.storage, trained["weights"]) as folder:
        model, about = load_weights(folder)
    scores = Evaluation.load(ctx.storage.sub(ctx.inputs["evaluate"]["evaluation"]).read)
    here = scores.score(label, config["metric"])
    ctx.progress(0, 2, "exporting")
    samples = {f"samples/{grid.title}.png": encode_png(sample_grid(grid)) for grid in scores.grids()}
    for path, png in samples.items():
        tracking.log_picture(client, run, path, png)
    record = lineage(ctx, client, label, scores) | {"samples": list(samples)}
    version = registry.register(
        model,
        name=name,
        run_id=run,
        step_key=ctx.key,
        tags={"inpaint.recipe": config["recipe"], "inpaint.metric": f"{config['metric']} {here:.3f}"}
        | short(record),
        metrics=by_band(scores, label),
        metadata=about | record,
        tracking_uri=uri,
    )
    ctx.progress(1, 2, "comparing with the champion")
    crowned, reason = crown(ctx, client, name, version, label, scores, here)
    tracking.log_tags(
        client, run, {"inpaint.version": version, "inpaint.champion": crowned, "inpaint.reason": reason}
    )
    return {"name": name, "version": version, "champion": crowned, "reason": reason}


def lineage(ctx: StepContext, client: MlflowClient, label: str, scores: Evaluation) -> dict[str, Any]:
    """Everything that made a version, kept in its own file; code, packages and Ray job are the training's."""
    trained, shards, config = ctx.inputs[f"train-{label}"], ctx.inputs["shard"], ctx.config["evaluate"]
    told = client.get_run(trained["run"]).data.tags.get(TAG) if trained["run"] else None
    size = int(scores.protocol["sizes"][0].partition("x")[0])
    record = {
        "recipe": ctx.local["recipe"],
        "shards": shards["digest"],
        "edges": edge_digests(ctx, label),
        "scored_on": {
            "shards": ctx.storage.sub(shards["shards"]).uri,
            "digest": shards["digest"],
            "split": config["split"],
            "count": config["count"],
            "size": size,
        },
        "protocol": scores.protocol,
        "photographs": {masks: dict(Counter(bands)) for masks, bands in scores.bands.items()},
        "metric": ctx.config["metric"],
        "training_run": trained["run"],
        "sweep": ctx.local.get("sweep"),
    }
    return record | (json.loads(told) if told else made_by())


def edge_digests(ctx: StepContext, label: str) -> dict[str, str]:
    """sigma -> sha256 of edges.json, which has the sha256 of every tar; empty when edges were made on the fly."""
    found = {}
    for name, key in ctx.manifests[f"train-{label}"]["inputs"].items():
        value = json.loads(ctx.storage.read(f"manifests/{key}.json"))["value"] if name != "shard" else {}
        if "edges" in value:
            listed = ctx.storage.sub(value["edges"]).read("edges.json")
            found[f"{value['sigma']:g}"] = hashlib.sha256(listed).hexdigest()
    return found


def short(record: dict[str, Any]) -> dict[str, str]:
    """The tags by which versions are searched and told apart."""
    code, protocol = record["code"], record["protocol"]
    shared = {key: value for key, value in protocol.items() if key not in NOT_COMPARED}
    sizes, masks = " and ".join(protocol["sizes"]), " and ".join(protocol["masks"])
    tags = {
        "inpaint.commit": code.get("commit", "")[:12] + ("-dirty" if code.get("dirty") == "true" else ""),
        "inpaint.shards": record["shards"],
        "inpaint.edges": ", ".join(record["edges"].values()),
        "inpaint.sweep": (record["sweep"] or {}).get("name", ""),
        PROTOCOL: f"{_digest(shared)}: {protocol['photographs']} photographs of {sizes}, {masks} masks, "
        f"seed {protocol['seed']}",
    }
    if distance := protocol["distance"]:
        tags[DISTANCE] = f"{_digest(distance)}: {distance['name']}"
    return {key: value for key, value in tags.items() if value}


def by_band(scores: Evaluation, label: str) -> dict[str, float]:
    """A method's means as `masks/metric` and `masks/band/metric`; masks of one band are of that band as a whole."""
    found = scores.flat(label)
    for column, value in list(found.items()):
        masks, band, metric = split_column(column)
        bands = set(scores.bands.get(masks, ()))
        if not band and len(bands) == 1:
            found[f"{masks}/{bands.pop()}/{metric}"] = value
    return found


def crown(
    ctx: StepContext,
    client: MlflowClient,
    name: str,
    version: str,
    label: str,
    scores: Evaluation,
    here: float,
) -> tuple[bool, str]:
    """Make the version champion if it beats the present one, scored again on this run's photographs and masks.

    Whether it did, and why. A champion that cannot be scored keeps its place: it may only be out of reach, and a person
    can promote by hand. Whoever became champion meanwhile is compared with anew.
    """
    uri, metric = ctx.local["tracking"]["uri"], ctx.config["metric"]
    for _ in range(TRIES):
        at, comparison = registry.place(name, tracking_uri=uri), None
        if at.holder == version:
            return True, "champion already"
        better, reason = True, f"first version; {metric} {here:.3f}"
        if at.holder is not None:
            better, reason, comparison = beats(ctx, name, at.holder, label, scores)
        if not better:
            client.set_model_version_tag(name, version, "not_champion", reason)
            return False, reason
        try:
            registry.promote(
                name,
                version,
                reason=reason,
                score=here,
                comparison=comparison,
                expected=at,
                tracking_uri=uri,
            )
            return True, reason
        except Overtaken as error:
            reason = str(error)
    return False, reason


def beats(
    ctx: StepContext, name: str, champion: str, label: str, scores: Evaluation
) -> tuple[bool, str, dict[str, Any] | None]:
    """Whether the new version is better than the champion, why, and the comparison if there was one."""
    config, uri = ctx.config["evaluate"], ctx.local["tracking"]["uri"]
    spec = EvaluationSpec.of(config | {"distance": None, "samples": 1})
    photos = list(photographs(ctx.storage.sub(ctx.inputs["shard"]["shards"]), config["split"]))
    try:
        old = registry.load_model(f"models:/{name}/{champion}", tracking_uri=uri)
        found = against_champion(old, scores, label, photos, spec, ctx.config["metric"])
    except ValueError as error:
        reason = (
            f"the champion, version {champion}, cannot be compared with here, so nothing is known: {error}"
        )
        return False, reason, None
    return found.gain > 0, f"{found} of version {champion} on the same photographs", vars(found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
