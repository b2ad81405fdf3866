"""The step that registers: what a version of it carries, and who is champion."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from mlflow import MlflowClient
from stores import MADE_BY, Chain, champion

from data_prep.canny import load_edges
from pipelines import registry
from pipelines.cli.model_text import shown
from pipelines.evaluation.scores import Evaluation
from pipelines.registry import show
from pipelines.registry import step as registering


def test_a_version_carries_all_that_made_it(chain: Chain) -> None:
    found = show("models:/encoder/2", chain.place.uri)
    shards = chain.manifests["shard"]["value"]["digest"]
    assert load_edges(chain.storage.sub("work/e/a1"), shards)["sigma"] == 1.5
    edges = hashlib.sha256(chain.storage.read("work/e/a1/edges.json")).hexdigest()
    assert (found["shards"], found["edges"]) == (shards, {"1.5": edges})
    assert {key: found[key] for key in MADE_BY} == MADE_BY, "the training's, not this process's"
    assert found["sweep"] == {"name": "seeds", "run": "abc", "values": "seed 1"}
    assert found["recipe"] == "name: small\nseed: 1\n"
    assert (found["model"]["sigma"], found["model"]["steps"], found["model"]["seed"]) == (1.5, 100, 1)
    assert found["curves"]["run"] == chain.runs[1]
    assert found["signature"] == {"inputs": "float32 [-1, 5, -1, -1]", "outputs": "float32 [-1, 3, -1, -1]"}
    assert found["input_example"] == "input_example.json"
    (grid,) = found["samples"]
    assert Path(grid).read_bytes().startswith(b"\x89PNG")
    assert found["protocol"]["masks"] == ["center"]
    assert found["photographs"] == {"center": {"20-30": found["protocol"]["photographs"]}}
    scores = Evaluation.load(chain.storage.sub("work/v1/a1").read)
    for name, value in scores.row("one").metrics.items():
        assert found["metrics"][f"center/{name}"] == pytest.approx(value, rel=1e-5)
        assert found["metrics"][f"center/20-30/{name}"] == found["metrics"][f"center/{name}"], "its only band"
    client = MlflowClient(chain.place.uri)
    logged = client.get_run(found["run_id"]).data.metrics
    assert {key: float(f"{value:.6g}") for key, value in logged.items()} == found["metrics"]

    text = shown(found)
    for words in (
        *(
            shards,
            edges,
            "0123456789abcdef0123, with changes since",
            "torch 2.13.0",
            "raysubmit_1",
            "nodes 2",
        ),
        *("cpus 4", "name seeds", chain.runs[1], "center masks.png", "float32 [-1, 5, -1, -1]", "sigma 1.5"),
        *("center  20-30", "seed: 1", "input_example.json", "PSNR hole"),
    ):
        assert words in text
    assert "not on record" not in text


def test_the_better_one_on_the_same_photographs_is_champion(chain: Chain) -> None:
    assert [(value["version"], value["champion"]) for value in chain.values] == [
        ("1", True),
        ("2", True),
        ("3", False),
    ]
    assert chain.values[0]["reason"].startswith("first version; psnr_rgb_hole")
    moves = registry.history("encoder", chain.place.uri)
    assert [(move["from"], move["to"]) for move in moves] == [(None, "1"), ("1", "2")]
    compared = moves[1]["comparison"]
    white, better = (
        Evaluation.load(chain.storage.sub(f"work/v{seed}/a1").read).score("one", "psnr_rgb_hole")
        for seed in (0, 1)
    )
    assert compared["difference"] == pytest.approx(better - white, abs=0.01), "to the program's rounding"
    assert 0 < compared["low"] < compared["difference"] < compared["high"]
    assert f"psnr_rgb_hole {better:.2f} against {white:.2f}" in moves[1]["reason"]
    assert "of version 1 on the same photographs" in moves[1]["reason"]
    tags = show("models:/encoder/3", chain.place.uri)["tags"]
    assert "of version 2 on the same photographs" in tags["not_champion"]
    assert show("models:/encoder@candidate", chain.place.uri)["version"] == "3"


def test_whoever_became_champion_meanwhile_is_compared_with_anew(
    chain: Chain, registry_of_chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 is being judged against the champion, version 1, when somebody makes version 3 champion."""
    uri = registry_of_chain
    registry.promote("encoder", "1", tracking_uri=uri)
    compared = []

    def beats(context: object, name: str, champion: str, *rest: object) -> tuple[bool, str, None]:
        compared.append(champion)
        if len(compared) == 1:
            registry.promote("encoder", "3", tracking_uri=uri)
        return True, f"better than version {champion}", None

    monkeypatch.setattr(registering, "beats", beats)

    class Context:
        local, config = {"tracking": {"uri": uri}}, {"metric": "psnr_rgb_hole"}

    scores = Evaluation.load(chain.storage.sub("work/v1/a1").read)
    done = registering.crown(Context(), MlflowClient(uri), "encoder", "2", "one", scores, 20.0)  # type: ignore[arg-type]
    assert done == (True, "better than version 3")
    assert compared == ["1", "3"]
    assert champion(uri) == "2"
