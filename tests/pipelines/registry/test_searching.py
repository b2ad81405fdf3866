"""Searching versions, and ranking them per protocol."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from mlflow.entities import Metric

from pipelines import registry
from pipelines.cli.text import format_ranking
from pipelines.registry import RegistryError
from pipelines.registry.client import registry_client
from pipelines.registry.searching import find_column, split_column
from support.mlflow_stores import MlflowStore

OLD, NEW = "0a1b: 84 photographs of 64x64", "9f8e: 120 photographs of 64x64"


@pytest.fixture
def scored(bare: MlflowStore) -> MlflowStore:
    """`edges` with five versions under two protocols and one of an earlier release; `encoder` with one of those."""
    scores = [
        (OLD, {"center/psnr_rgb_hole": 17.0, "center/20-30/psnr_rgb_hole": 17.0, "center/fd": 300.0}),
        (OLD, {"center/psnr_rgb_hole": 18.5, "center/20-30/psnr_rgb_hole": 18.0, "center/fd": 350.0}),
        (NEW, {"center/psnr_rgb_hole": 16.0, "center/20-30/psnr_rgb_hole": 16.5}),
        (NEW, {"center/psnr_rgb_hole": 16.2, "center/l1_percent": 3.0}),
        (NEW, {"brush/psnr_rgb_hole": 30.0, "brush/0-10/psnr_rgb_hole": 31.0}),
    ]
    client = bare.client
    for name in ("edges", "encoder"):
        client.create_registered_model(name)
    for number, (protocol, version_scores) in enumerate(scores):
        tags = {"model": "edge_connect", "sigma": "2", "size": "64", "inpaint.recipe": f"recipe-{number + 1}"}
        tags |= {
            "inpaint.protocol": protocol,
            "inpaint.scores": json.dumps(version_scores),
            "inpaint.commit": "abc-dirty",
        }
        client.create_model_version("edges", "file:///nowhere", bare.run_id, tags=tags)
    experiment = client.get_run(bare.run_id).info.experiment_id
    # as earlier releases did: scores only as metrics of the logged model
    for name, score in (("edges", 15.0), ("encoder", 19.0)):
        model = client.create_logged_model(experiment, name, bare.run_id).model_id
        client.log_batch(bare.run_id, metrics=[Metric("center/psnr_rgb_hole", score, 0, 0, model)])
        with registry_client(bare.uri):
            client.create_model_version(name, f"models:/{model}", bare.run_id, model_id=model)
    client.set_registered_model_alias("edges", "champion", "2")
    return bare


def test_search_returns_one_row_per_version(scored: MlflowStore) -> None:
    frame = registry.search(tracking_uri=scored.uri)
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == 7
    assert list(frame.columns[:11]) == [
        *(
            "name",
            "version",
            "aliases",
            "created",
            "model",
            "sigma",
            "size",
            "run_id",
            "recipe",
            "commit",
            "protocol",
        )
    ]
    second = frame[(frame["name"] == "edges") & (frame["version"] == 2)].iloc[0]
    assert (second["aliases"], second["model"], second["sigma"], second["size"]) == (
        *(["champion"], "edge_connect", 2.0, 64),
    )
    assert (second["recipe"], second["commit"], second["run_id"]) == ("recipe-2", "abc-dirty", scored.run_id)
    assert second["center/20-30/psnr_rgb_hole"] == 18.0
    assert frame["created"].dt.tz is not None
    assert frame["brush/psnr_rgb_hole"].notna().sum() == 1, "nan: no such score"
    encoder = registry.search("encoder", tracking_uri=scored.uri).iloc[0]
    assert encoder["center/psnr_rgb_hole"] == 19.0, "registered by an earlier release"


def test_search_applies_conditions_order_and_limit(scored: MlflowStore) -> None:
    def versions(**options: object) -> list[int]:
        return list(registry.search("edges", tracking_uri=scored.uri, **options)["version"])  # type: ignore[arg-type]

    assert versions(where="center/psnr_rgb_hole > 16.1", order_by="version") == [1, 2, 4]
    assert versions(where=["center/psnr > 16.1", "fd < 320"]) == [1]
    assert versions(order_by="center/psnr desc", limit=2) == [2, 1]
    assert versions(order_by="center/psnr", limit=1) == [6], "the worst, registered by an earlier release"
    assert sorted(versions(filter="tags.`inpaint.recipe` = 'recipe-3'")) == [3]
    assert sorted(versions(where="sigma == 2")) == [1, 2, 3, 4, 5]
    assert versions(where="size != 64", order_by="version") == [], "an unknown value meets no condition"
    assert registry.search("nobody", tracking_uri=scored.uri).empty
    for options, message in (
        ({"where": "center/psnr"}, "is not a condition: write, for example"),
        ({"where": "psnr > 17"}, "scored with masks brush and center: say which"),
        ({"where": "center/psrn > 17"}, "no score 'psrn': did you mean psnr"),
        ({"where": "center/30-40/psnr > 17"}, "masks brush, center; bands 0-10, 20-30, all"),
        ({"order_by": "version down"}, "write a column, then `desc` or nothing"),
        ({"filter": "nonsense"}, "MLflow at sqlite"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            versions(**options)
        assert "\n" not in str(error.value)


def test_columns_are_found_by_short_names() -> None:
    columns = ["name", "a/b/psnr_rgb_hole", "a/b/20-30/psnr_rgb_hole", "10-20/psnr_rgb_hole"]
    assert split_column("a/b/20-30/fd") == ("a/b", "20-30", "fd")
    assert split_column("10-20/fd") == ("10-20", "", "fd"), "a mask folder may have this name"
    assert find_column(columns, "name") == "name"
    assert find_column(columns, "20-30/psnr") == "a/b/20-30/psnr_rgb_hole"
    assert find_column(columns, "a/b/psnr") == "a/b/psnr_rgb_hole"


def test_versions_are_ranked_per_protocol(scored: MlflowStore) -> None:
    best = registry.best("edges", "psnr", masks="center", tracking_uri=scored.uri)
    assert (best.metric, best.masks, best.band) == ("psnr_rgb_hole", "center", "all")
    ranks = {group.protocol: [row.version for row in group.versions] for group in best.groups}
    assert ranks == {None: ["6"], NEW: ["4", "3"], OLD: ["2", "1"]}
    assert list(ranks) == [None, NEW, OLD], "the newest version's protocol first"
    assert best.unscored == ("5",)
    text = format_ranking(best)
    assert "scored under 3 protocols, whose scores are not comparable" in text
    assert "best psnr_rgb_hole on center masks: edges/2, 18.5" in text
    assert "without this score: version 5" in text

    best = registry.best("edges", band="20-30", tracking_uri=scored.uri)
    assert [row.value for row in best.groups[1].versions] == [18.0, 17.0]
    assert best.unscored == ("6", "5", "4")
    lowest = registry.best("edges", "fd", tracking_uri=scored.uri).groups[0].versions
    assert [row.version for row in lowest] == ["1", "2"], "lower distances are better"


def test_groups_say_why_their_scores_cannot_be_compared(bare: MlflowStore) -> None:
    bare.client.create_registered_model("digests")
    for protocol, photographs, masks, distance in (
        ("1: 10 photographs", "aaa", "bbb", "f1"),
        ("1: 10 photographs", "aaa", "bbb", "f2"),
        ("2: 10 photographs", "aaa", "ccc", "f2"),
        ("3: 12 photographs", "ddd", "ccc", "f2"),
        ("4: 12 photographs", None, None, "f2"),
        ("5: 12 photographs", "ddd", "ccc", "f2"),
    ):
        tags = {
            "inpaint.protocol": protocol,
            "inpaint.distance": distance,
            "inpaint.scores": json.dumps({"center/psnr_rgb_hole": 17.0, "center/fd": 2.0}),
        }
        tags |= {"inpaint.photographs": photographs, "inpaint.masks": masks} if photographs and masks else {}
        bare.client.create_model_version("digests", "file:///nowhere", bare.run_id, tags=tags)
    ranking = registry.best("digests", tracking_uri=bare.uri)
    reasons = {group.protocol: group.not_comparable for group in ranking.groups if group.protocol}
    assert reasons == {
        "5: 12 photographs": "",
        "4: 12 photographs": "other photographs, masks, seed or definitions of metrics (digests are not on record)",
        "3: 12 photographs": "other sizes, seed or definitions of metrics, with the same photographs and masks",
        "2: 10 photographs": "other photographs (ddd and aaa)",
        "1: 10 photographs": "other photographs (ddd and aaa), other masks (ccc and bbb)",
    }
    assert [len(group.versions) for group in ranking.groups] == [1, 1, 1, 1, 2]
    text = format_ranking(ranking)
    assert "digests: photographs ddd, masks ccc" in text
    assert "digests: photographs not recorded, masks not recorded" in text
    assert "not comparable with the first: other photographs (ddd and aaa), other masks (ccc and bbb)" in text
    distances = registry.best("digests", "fd", tracking_uri=bare.uri)
    assert [len(group.versions) for group in distances.groups] == [1] * 6
    assert "digests" not in registry.search("digests", tracking_uri=bare.uri).columns


def test_scores_on_published_networks_are_ranked_per_weights_of_their_network(bare: MlflowStore) -> None:
    bare.client.create_registered_model("networks")
    first = {"alexnet": "a" * 64, "inception": "b" * 64}
    scores = {
        "center/psnr_rgb_hole": 17.0,
        "center/lpips_alex": 0.2,
        "center/fid": 30.0,
        "center/p_ids_percent": 5.0,
    }
    for number, features in enumerate((first, first, first | {"inception": "c" * 64}, None)):
        tags = {
            "inpaint.protocol": "1: 10 photographs",
            "inpaint.photographs": "aaa",
            "inpaint.masks": "bbb",
            "inpaint.scores": json.dumps({name: value - number / 100 for name, value in scores.items()}),
        }
        tags |= {"inpaint.features": json.dumps(features)} if features else {}
        bare.client.create_model_version("networks", "file:///nowhere", bare.run_id, tags=tags)

    def groups(metric: str) -> list[list[str]]:
        ranking = registry.best("networks", metric, tracking_uri=bare.uri)
        return [[row.version for row in group.versions] for group in ranking.groups]

    assert groups("psnr") == [["1", "2", "3", "4"]]
    assert groups("lpips") == [["4"], ["3", "2", "1"]], "the same AlexNet, whatever Inception"
    assert groups("fid") == [["4"], ["3"], ["2", "1"]]
    assert groups("p_ids") == [["4"], ["3"], ["1", "2"]], "higher is better"
    ranking = registry.best("networks", "fid", tracking_uri=bare.uri)
    reason = "other features of the distance, or other weights of the metric's network"
    assert [group.not_comparable for group in ranking.groups] == ["", reason, reason]
    assert "features" not in registry.search("networks", tracking_uri=bare.uri).columns


def test_a_missing_score_cannot_be_ranked(scored: MlflowStore) -> None:
    for options, message in (
        ({"metric": "psnr"}, "versions of edges were scored with masks brush and center: say which"),
        ({"metric": "psnr", "masks": "box"}, "have no psnr_rgb_hole for masks 'box': masks brush, center"),
        ({"metric": "psnr", "band": "50-60"}, "in band '50-60': masks brush, center; bands 0-10, 20-30, all"),
        ({"metric": "colour"}, "have no score 'colour': there are"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.best("edges", tracking_uri=scored.uri, **options)  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match="no model 'edge': did you mean 'edges'"):
        registry.best("edge", tracking_uri=scored.uri)
