"""The register step: the provenance of a version, and which version becomes champion."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_prep.edge_maps import load_edge_manifest
from pipelines import registry
from pipelines.cli.text import format_details
from pipelines.contracts import RegisterConfig, RunSettings
from pipelines.evaluation.results import EvaluationResult
from pipelines.recipe import EvaluationConfig
from pipelines.registry import show
from pipelines.registry import step as register_step
from pipelines.tracking.runs import Tracking
from support.mlflow_stores import PROVENANCE, PipelineOutputs, champion_version


def test_a_version_records_its_provenance(chain: PipelineOutputs) -> None:
    details = show("models:/encoder/2", chain.tracking.uri)
    shards = chain.shards.digest
    assert load_edge_manifest(chain.storage.subfolder("work/e/a1"), shards).sigma == 1.5
    edges = hashlib.sha256(chain.storage.read("work/e/a1/edges.json")).hexdigest()
    assert (details.shards, details.edges) == (shards, {"1.5": edges})
    assert {key: getattr(details, key) for key in PROVENANCE} == PROVENANCE, (
        "of the training run, not of this process"
    )
    assert details.sweep == {"name": "seeds", "run": "abc", "values": "seed 1"}
    assert details.recipe == "name: small\nseed: 1\n"
    assert (details.model["sigma"], details.model["steps"], details.model["seed"]) == (1.5, 100, 1)
    assert details.curves["run"] == chain.run_ids[1]
    assert details.signature == {"inputs": "float32 [-1, 5, -1, -1]", "outputs": "float32 [-1, 3, -1, -1]"}
    assert details.input_example == "input_example.json"
    (grid,) = details.samples
    assert Path(grid).read_bytes().startswith(b"\x89PNG")
    assert details.protocol["masks"] == ["center"]
    for tag, name in (("inpaint.photographs", "photographs_sha256"), ("inpaint.masks", "masks_sha256")):
        assert details.tags[tag] == details.protocol[name][:12]
        assert f"`{details.tags[tag]}`" in details.card
    assert "In brackets: the 95 % interval" in details.card
    assert details.photographs == {"center": {"20-30": details.protocol["photographs"]}}
    scores = EvaluationResult.load(chain.storage.subfolder("work/v1/a1").read)
    for name, value in scores.row("one").metrics.items():
        assert details.metrics[f"center/{name}"] == pytest.approx(value, rel=1e-5)
        assert details.metrics[f"center/20-30/{name}"] == details.metrics[f"center/{name}"], "its only band"
    client = MlflowClient(chain.tracking.uri)
    logged = client.get_run(details.run_id).data.metrics
    assert {key: float(f"{value:.6g}") for key, value in logged.items()} == details.metrics

    text = format_details(details)
    for words in (
        *(
            shards,
            edges,
            "0123456789abcdef0123, with uncommitted changes",
            "torch 2.13.0",
            "raysubmit_1",
            "nodes 2",
        ),
        *(
            "cpus 4",
            "name seeds",
            chain.run_ids[1],
            "center masks.png",
            "float32 [-1, 5, -1, -1]",
            "sigma 1.5",
        ),
        *("center  20-30", "seed: 1", "input_example.json", "PSNR hole"),
    ):
        assert words in text
    assert "not recorded" not in text
    assert "champion    yes, since 20" in text
    text = format_details(show("models:/encoder/3", chain.tracking.uri))
    assert "champion    no: psnr_rgb_hole" in text


def test_the_version_with_the_better_score_is_champion(chain: PipelineOutputs) -> None:
    assert [(value.version, value.champion) for value in chain.register_outputs] == [
        ("1", True),
        ("2", True),
        ("3", False),
    ]
    assert chain.register_outputs[0].reason.startswith("first version; psnr_rgb_hole")
    moves = registry.history("encoder", chain.tracking.uri)
    assert [(move.from_, move.to) for move in moves] == [(None, "1"), ("1", "2")]
    comparison = moves[1].comparison
    white, better = (
        EvaluationResult.load(chain.storage.subfolder(f"work/v{seed}/a1").read).score("one", "psnr_rgb_hole")
        for seed in (0, 1)
    )
    assert comparison["difference"] == pytest.approx(better - white, abs=0.01), "up to the program's rounding"
    assert 0 < comparison["low"] < comparison["difference"] < comparison["high"]
    assert f"psnr_rgb_hole {better:.2f} against {white:.2f}" in moves[1].reason
    assert "of version 1 on the same photographs" in moves[1].reason
    tags = show("models:/encoder/3", chain.tracking.uri).tags
    assert "of version 2 on the same photographs" in tags["not_champion"]
    assert show("models:/encoder@candidate", chain.tracking.uri).version == "3"


def test_every_version_and_model_has_a_card(chain: PipelineOutputs) -> None:
    client = MlflowClient(chain.tracking.uri)
    won, lost = (client.get_model_version("encoder", number).description for number in ("2", "3"))
    splits = ", ".join(f"{count} {split}" for split, count in chain.shards.splits.items())
    for words in (
        "Context Encoders: Feature Learning by Inpainting. Pathak",
        f"photographs: {splits}, of `x`",
        "crops of 32 x 32 pixels",
        "masks: center (holes of 25 % of the image)",
        "100 steps, seed 1",
        "commit `0123456789ab`, with uncommitted changes",
        "values found by the sweep seeds: seed 1",
        "Means over 29 test photographs of 32x32 pixels",
        "| center masks&nbsp;&nbsp;&nbsp; | PSNR hole&nbsp;&nbsp;&nbsp; |",
        "get-artifact?path=card.png&run_uuid=",
        "All methods: `samples/center masks.png`",
        "This version: ",
        "inpaint fill models:/encoder/2 photo.png",
        'registry.load_model("models:/encoder/2")',
        "this version became `champion`: psnr_rgb_hole",
    ):
        assert words in won
    assert "/VERSION" not in won
    details = show("models:/encoder/2", chain.tracking.uri)
    assert {file.path for file in client.list_artifacts(details.run_id)} == {"card.png", "samples"}
    assert f"| **this version** | {details.metrics['center/psnr_rgb_hole']:.2f}" in won
    assert "this version did not become `champion`: psnr_rgb_hole" in lost
    assert details.card == won
    description = client.get_registered_model("encoder").description
    for words in (
        "Pathak",
        "`candidate` is the newest version",
        "better in `psnr_rgb_hole`",
        "encoder@champion",
        "UTC: version 2 became champion instead of version 1, by ",
        "UTC: version 1 became champion, by ",
    ):
        assert words in description


def test_a_champion_promoted_meanwhile_is_compared_with_too(
    chain: PipelineOutputs, registry_of_chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While version 2 is compared with the champion, version 1, somebody promotes version 3."""
    uri = registry_of_chain
    registry.promote("encoder", "1", tracking_uri=uri)
    champions = []

    def promote_meanwhile(context: object, champion: str, scores: object) -> tuple[bool, str, None]:
        champions.append(champion)
        if len(champions) == 1:
            registry.promote("encoder", "3", tracking_uri=uri)
        return True, f"better than version {champion}", None

    monkeypatch.setattr(register_step, "compare_with_champion", promote_meanwhile)

    class Context:
        settings = RunSettings(tracking=Tracking(uri, "chain"))
        config = RegisterConfig("one", "encoder", "small", EvaluationConfig(), "")

    scores = EvaluationResult.load(chain.storage.subfolder("work/v1/a1").read)
    result = register_step.promote_if_better(Context(), MlflowClient(uri), "2", scores, 20.0)  # type: ignore[arg-type]
    assert result == (True, "better than version 3")
    assert champions == ["1", "3"]
    assert champion_version(uri) == "2"
