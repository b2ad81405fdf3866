"""What made a version, and what differs between two."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.studio.origin import differences, origin_facts
from pipelines.studio.registry_snapshot import VersionSummary

METADATA: dict[str, Any] = {
    "model": "edge_connect",
    "size": 64,
    "steps": 300,
    "seed": 0,
    "masks": {"center": 1.0},
    "hole_range": [0.25, 0.25],
    "takes_edges": True,
    "sigma": 2.0,
    "source": "photos",
    "splits": {"train": 81, "val": 9, "test": 10},
    "shards": "a" * 64,
    "edges": {"2": "b" * 64},
    "sweep": {"name": "a/b", "values": "lr 0.1"},
    "code": {"commit": "c" * 40, "dirty": "true"},
    "packages": {"torch": "2.13.0"},
    "ray": {"nodes": 1, "cpus": 4.0, "gpus": 0},
    "hardware": "amx",
    "recipe": "models:\n  one:\n    name: edge_connect\n    lr: 0.1\n  two:\n    name: glcic\n    lr: 5\n",
}
VERSION = VersionSummary(
    *(
        "faces",
        "1",
        (),
        "2026-11-30T12:00:00+00:00",
        "ab12",
        "m-1",
        "edge_connect",
        64,
        2.0,
        "demo",
        "",
        "psnr",
    ),
    *({}, {}, "", "", "", "", "", "", ""),
)


def facts(metadata: dict[str, Any]) -> dict[str, str]:
    return {fact.label: fact.text for fact in origin_facts(VERSION, metadata)}


def test_all_that_is_on_record_is_shown() -> None:
    shown = facts(METADATA)
    assert shown["Photographs"] == "photos (81 train, 9 val, 10 test)"
    assert (shown["Shards"], shown["Edges, sigma 2"]) == ("a" * 12, "b" * 12)
    assert shown["Training"] == "300 steps at 64 px, seed 0; center masks, holes of 25 %"
    assert shown["Machine"] == "amx, 1 node, 4 CPUs"
    assert shown["Code"] == f"commit {'c' * 12}, with uncommitted changes"
    sweep = next(fact for fact in origin_facts(VERSION, METADATA) if fact.label == "Sweep")
    assert (sweep.text, sweep.href) == ("a/b: lr 0.1", "/runs/a%2Fb")
    assert next(f for f in origin_facts(VERSION, METADATA) if f.label == "Shards").copy == "a" * 64


@pytest.mark.parametrize(
    "metadata", [{}, {"splits": None, "edges": None, "sweep": None, "code": None, "ray": None}]
)
def test_a_version_of_an_earlier_release_has_few_facts(metadata: dict[str, Any]) -> None:
    assert facts(metadata) == {}
    assert facts({"takes_edges": True, "sigma": 2.0})["Edges"] == "Canny, sigma 2, computed while training"
    assert facts({"imported": "weights.pth"})["Parent"] == "imported weights: weights.pth"


def test_only_what_differs_is_listed_and_only_of_this_model() -> None:
    other = {
        **METADATA,
        "seed": 1,
        "edges": {"3": "d" * 64},
        "recipe": METADATA["recipe"].replace("0.1", "0.2").replace("lr: 5", "lr: 6"),
    }
    assert differences(METADATA, METADATA) == []
    assert differences(METADATA, other) == [
        ("edges sigma 2 digest", "b" * 12, "not recorded"),
        ("edges sigma 3 digest", "not recorded", "d" * 12),
        ("seed", "0", "1"),
        ("recipe.models.edge_connect.lr", "0.1", "0.2"),
    ]
    assert differences({"recipe": "a: ["}, {"recipe": "- 1"}) == []
