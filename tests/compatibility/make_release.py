"""Make release.tar.xz and release.json: a storage with its registry as release 0.1.0 makes them, and what it computes.

Run by the released commit's code, from this folder's repository:

    git worktree add --detach ../released d6d0054
    PYTHONPATH=../released .venv/bin/python tests/compatibility/make_release.py

It takes about three minutes. Every import here is the release's: no later change of names belongs in this file. Made
twice, the files differ in times and in the names that MLflow gives to runs, so the answers go with the storage.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digests import EDGES, MASKS, SMALLEST, of_array, of_batch, of_machine, of_names, of_tensors
from PIL import Image

import pipelines
from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, load_manifest, make_slice, plan
from data_prep.sources import open_source
from data_prep.storage import open_storage
from data_prep.stream import Stream
from models import build_model, list_models
from pipelines import registry
from pipelines.evaluation.completers import photographs
from pipelines.evaluation.evaluate import EvaluationSpec, baselines, evaluate
from pipelines.reading import load_recipe
from pipelines.registry.step import short
from pipelines.training.learner import Learner, make_schedule

RELEASE = "d6d0054"
PLACE = Path(
    "/tmp/inpaint-release-0.1.0"
)  # MLflow keeps it in its database: unpacked elsewhere, the storage was moved
HERE = Path(__file__).resolve().parent
TILES, TILE = 40, 64  # photographs, pixels

RECIPE = """
name: {name}
data: {{source: {photos}, size: 64, format: original, val: 0.1, test: 0.25, shard_photos: 20}}
edges: {{sigma: 1.5}}
masks: center
train: {{batch: 4, ema: 0.9, checkpoint_every: 20, log_every: 10, keep: 1}}
models:
  context_encoder: {{size: 64, width: 0.02, seed: {seed}, train: {{steps: {{train: {steps}}}}}}}
{more}
evaluate: {{masks: [center], samples: 2, distance: {{crops: 16}}}}
"""
EDGE_CONNECT = """
  edge_connect:
    width: 0.03125
    residual_blocks: 1
    lr: 2.0e-3
    lambda_p: 0
    lambda_s: 0
    train: {steps: {edge: 20, inpaint_canny: 20, inpaint: 20, joint: 0}}
"""
RUNS = (  # the second context_encoder beats the first, and the third does not beat the second
    ("first", {"seed": 0, "steps": 20, "more": EDGE_CONNECT}),
    ("second", {"seed": 0, "steps": 200, "more": ""}),
    ("third", {"seed": 1, "steps": 20, "more": ""}),
)
LEFT_OUT = (  # nothing of the registry reads them
    "storage/reports",
    "storage/example",
    "/stable/best",
    "/stable/train-",
    "/a1/best",
    "/samples/step-",
    "-evaluate/a1/samples",
    "mlflow.db-",
)
QUESTIONS = {
    "list": "list",
    "show-context_encoder": "show context_encoder",
    "show-context_encoder-1": "show context_encoder/1",
    "show-context_encoder-champion": "show context_encoder@champion",
    "show-context_encoder-candidate": "show context_encoder@candidate",
    "show-edge_connect": "show edge_connect",
    "show-edge_connect-champion": "show edge_connect@champion",
    "best-psnr": "best context_encoder --metric psnr",
    "best-ssim": "best context_encoder --metric ssim",
    "history-context_encoder": "history context_encoder",
    "history-edge_connect": "history edge_connect",
    "compare-versions": "compare context_encoder/1 context_encoder/2 --images {photos} --masks center",
    "compare-models": "compare edge_connect context_encoder --images {photos} --masks center",
}


def main() -> None:
    check_code()
    shutil.rmtree(PLACE, ignore_errors=True)
    storage, said = PLACE / "storage", PLACE / "said"
    said.mkdir(parents=True)
    make_photographs(PLACE / "photos")
    for name, fields in RUNS:
        recipe = PLACE / f"{name}.yaml"
        recipe.write_text(RECIPE.format(name=name, photos=PLACE / "photos", **fields))
        inpaint("run", str(recipe), "--storage", str(storage))
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    for name, question in QUESTIONS.items():
        words = [word.format(photos=PLACE / "photos") for word in question.split()]
        answer = json.loads(inpaint("models", *words, "--json", "--tracking", uri))
        write_json(said / f"{name}.json", {"asked": question, "answer": answer})
    frame = registry.search(tracking_uri=uri, order_by="center/psnr desc")
    write_json(said / "search.json", json.loads(frame.to_json(orient="records")))
    write_json(said / "fills.json", fill(uri, said))
    shards, edges = (next(storage.glob(f"work/*-{step}/stable")) for step in ("shard", "edges-sigma-1.5"))
    facts = {
        "commit": RELEASE,
        "machine": of_machine(),
        "networks": networks(),
        "shards": load_manifest(open_storage(shards))["digest"],
        "batches": batches(shards, edges),
        "trainings": trainings(shards, edges),
        "demo": demo(),
    }
    write_json(HERE / "release.json", facts)
    pack()


def check_code() -> None:
    """End with an error unless the imported code is the released commit's, unchanged."""
    tree = Path(pipelines.__file__).parents[1]
    git = ("git", "-C", str(tree))
    commit = subprocess.check_output((*git, "rev-parse", "HEAD"), text=True)
    changed = subprocess.check_output((*git, "status", "--porcelain", "--untracked-files=no"), text=True)
    if not commit.startswith(RELEASE) or changed:
        sys.exit(
            f"{tree} is at {commit[:7]}{', changed' if changed else ''}: this needs {RELEASE}, unchanged"
        )


def make_photographs(folder: Path) -> None:
    """TILES squares of the photographs that scikit-image and scikit-learn bring, as JPEGs."""
    folder.mkdir(parents=True)
    source = open_source("bundled", tile=TILE)
    names = source.names()
    for number, name in enumerate(names[:: len(names) // TILES][:TILES]):
        Image.open(io.BytesIO(source.read(name))).save(folder / f"{number:02}.jpg", quality=90)


def inpaint(*arguments: str) -> str:
    """What the command prints."""
    print("inpaint", *arguments, flush=True)
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def fill(uri: str, said: Path) -> dict[str, dict[str, Any]]:
    """Fill one photograph by each model, through Python and on the command line; the pictures lie in `said`."""
    image = np.asarray(Image.open(PLACE / "photos/00.jpg").convert("RGB"))
    mask = np.zeros(image.shape[:2], bool)
    mask[20:44, 16:40] = True
    drawn = np.zeros_like(mask)
    drawn[30, 16:40] = True
    for name, picture in (("photo", image), ("mask", mask), ("drawn", drawn)):
        Image.fromarray(picture).save(said / f"{name}.png")
    found: dict[str, dict[str, Any]] = {}
    for name in ("context_encoder", "edge_connect"):
        model = registry.load_model(f"models:/{name}@champion", tracking_uri=uri)
        facts = ("version", "needs_edges", "takes_edges", "sigma", "size")
        found[name] = {fact: getattr(model, fact) for fact in facts}
        Image.fromarray(model.complete(image, mask)).save(said / f"{name}-completed.png")
        if model.needs_edges:
            known = model.known_edges(image, mask)
            found[name] |= {"known_edges": of_array(known), "known_edges_count": int(known.sum())}
            Image.fromarray(model.complete(image, mask, edge=known | drawn)).save(said / f"{name}-drawn.png")
        pictures = (said / "photo.png", said / "mask.png", "--out", said / f"{name}-filled.png")
        inpaint("fill", f"models:/{name}@champion", *map(str, pictures), "--tracking", uri)
    return found


def networks() -> dict[str, dict[str, dict[str, Any]]]:
    """The tensors and parameters of every model, at its defaults and at its smallest."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in list_models():
        for label, options in (("default", {}), ("smallest", SMALLEST[name])):
            with torch.device("meta"):
                model = build_model(name, **options)
            parameters = {
                key: sum(parameter.numel() for parameter in network.parameters())
                for key, network in model.networks.items()
            }
            state = model.state_dict()
            told = {"tensors": len(state), "names": of_names(state), "parameters": parameters}
            found.setdefault(name, {})[label] = told
    return found


def batches(shards: Path, edges: Path) -> dict[str, str]:
    """The first two batches of a training of two ranks, with each kind of masks and source of edges."""
    found = {}
    for label, masks in MASKS.items():
        for source in EDGES:
            for rank in (0, 1):
                stream = Stream(
                    open_storage(shards),
                    "train",
                    size=48,
                    batch=6,
                    masks=masks,
                    seed=3,
                    streams=2,
                    rank=rank,
                    world=2,
                    edges={1.5: open_storage(edges)},
                    edge_source=source,
                    sigmas=(1.5,),
                )
                for step in (0, 1):
                    found[f"{label}, {source}, rank {rank}, step {step}"] = of_batch(stream.batch(step))
    return found


def trainings(shards: Path, edges: Path) -> dict[str, str]:
    """The weights and their moving averages after a few steps of every phase of every model."""
    torch.set_num_threads(1)
    found = {}
    for name in list_models():
        torch.manual_seed(0)
        model = build_model(name, **SMALLEST[name])
        schedule = make_schedule(model, {phase.name: phase.critic_steps + 1 for phase in model.phases})
        learner = Learner(model, schedule, 0, ema_decay=0.9)
        stream = Stream(
            open_storage(shards),
            "train",
            size=64,
            batch=4,
            masks=MASKS["center"],
            streams=2,
            edges={1.5: open_storage(edges)},
            edge_source="full",
            sigmas=(1.5,),
        )
        for step in range(schedule.total):
            learner.step(step, stream.batch(step))
        averages = {f"average.{key}": value for key, value in learner.ema.items()}
        found[name] = of_tensors({**model.state_dict(), **averages})
    return found


def demo() -> dict[str, Any]:
    """Shards and protocol of the recipe `demo`, and the scores of the mean colour under it."""
    recipe = load_recipe("demo")
    options = ShardOptions.of(recipe.data.model_dump())
    with tempfile.TemporaryDirectory() as folder:
        source, out = open_source(recipe.data.source, options.size), open_storage(folder)
        slices, _ = plan(source, out, options, recipe.data.shard_photos)
        parts = [make_slice(source, piece, out, options) for piece in slices]
        manifest = assemble(parts, options, source.uri, out)
        spec = EvaluationSpec.of(recipe.evaluate.model_dump())
        method = {"mean_colour": baselines()["mean_colour"]}
        scores = evaluate(method, photographs(out, recipe.evaluate.split), spec)
    record = {"code": {}, "protocol": scores.protocol, "shards": "", "edges": {}, "sweep": None}
    tags = {key: text for key, text in short(record).items() if text}
    return {
        "options": dataclasses.asdict(options),
        "shards": manifest["digest"],
        "splits": manifest["splits"],
        "protocol": {key: value for key, value in scores.protocol.items() if key != "versions"},
        "tags": tags,
        "mean_colour": scores.flat("mean_colour"),
    }


def pack() -> None:
    """Everything in one archive, without what nobody reads; then the folder goes, as that of a storage that was moved."""

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if any(part in member.name for part in LEFT_OUT):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with closing(sqlite3.connect(PLACE / "storage/mlflow.db")) as database:
        database.execute("pragma wal_checkpoint(truncate)")  # one file, whoever wrote last
    target = HERE / "release.tar.xz"
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for name in ("photos", "storage", "said"):
            archive.add(PLACE / name, name, filter=wanted)
    print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")
    shutil.rmtree(PLACE)


if __name__ == "__main__":
    main()
