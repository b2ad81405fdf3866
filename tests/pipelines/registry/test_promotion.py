"""Promotion after a comparison: of better, equal, worse and incomparable versions, and with --force."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient

from data_prep.frozen_masks import freeze_masks, load_frozen_set
from data_prep.masks import open_masks
from pipelines import registry
from pipelines.evaluation.results import EvaluationResult
from pipelines.registry import (
    ConcurrentPromotion,
    LoadedModel,
    RegistryError,
    load,
    load_model,
    show,
    version_comparison,
)
from pipelines.registry.loaded_model import LoadedModelMethod
from pipelines.registry.promotion import PromotionPlan, carry_out, compare_and_promote, plan_promotion
from pipelines.registry.version_comparison import choose_photographs, metric_difference
from support.mlflow_stores import PipelineOutputs, champion_version


@pytest.fixture(scope="module")
def models(chain: PipelineOutputs) -> dict[str, LoadedModel]:
    uris = [f"models:/encoder/{number}" for number in "123"]
    return {uri: load_model(uri, tracking_uri=chain.tracking.uri) for uri in uris}


@pytest.fixture(autouse=True)
def uri(registry_of_chain: str, models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> str:
    """Version 2 is champion; 1 and 3 fill holes with white. The versions are loaded once, as that takes seconds."""
    monkeypatch.setattr(load, "load_model", lambda uri, tracking_uri: models[uri])
    return registry_of_chain


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 photographs of squares on grey."""
    for number in range(12):
        image = np.full((40, 50, 3), 100, np.uint8)
        image[number : number + 9, 20:30] = 40 + 10 * number
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    return tmp_path


def test_a_worse_version_is_refused_with_the_scores(chain: PipelineOutputs) -> None:
    with pytest.raises(RegistryError) as error:
        compare_and_promote("encoder", "3")
    message = str(error.value)
    assert message.startswith("encoder version 3 is worse than the champion, version 2: psnr_rgb_hole ")
    shards = chain.storage.subfolder("work/s/a1").uri
    assert f"n = 29) on {shards}, center masks; --force promotes it anyway" in message
    assert "95 % interval -" in message
    assert "\n" not in message
    assert champion_version() == "2"
    assert len(registry.history("encoder")) == 2


def test_force_promotes_a_worse_version_and_is_recorded() -> None:
    promotion = compare_and_promote("encoder", "3", force=True, reason="for the demo")
    assert promotion.previous_version == "2"
    assert "is worse than the champion, version 2" in promotion.notes[0]
    move = registry.history("encoder")[-1]
    assert move.forced is True
    assert move.reason.startswith("for the demo; psnr_rgb_hole ")
    assert move.comparison["difference"] == promotion.comparison.mean_difference < 0  # type: ignore[union-attr]
    promotion = compare_and_promote("encoder", "2")  # it is better
    assert promotion.previous_version == "3"
    assert promotion.comparison is not None
    assert promotion.comparison.low is not None
    assert promotion.comparison.low > 0
    assert not registry.history("encoder")[-1].forced


def test_an_equal_version_is_promoted() -> None:
    registry.promote("encoder", "3")
    promotion = compare_and_promote("encoder", "1")
    assert promotion.comparison is not None
    assert promotion.comparison.mean_difference == 0
    assert champion_version() == "1"


def test_versions_are_compared_on_given_photographs(photos: Path) -> None:
    with pytest.raises(RegistryError, match=rf"n = 12\) on {photos}, box masks"):
        compare_and_promote("encoder", "3", images=str(photos), masks=["box"])


def test_bundled_photographs_replace_unreachable_ones(chain: PipelineOutputs, tmp_path: Path) -> None:
    metadata = {
        "protocol": {"masks": ["box"], "seed": 7},
        "scored_on": {
            "shards": str(tmp_path / "gone"),
            "digest": "x",
            "split": "test",
            "count": 9,
            "size": 32,
        },
    }
    chosen = choose_photographs(metadata, None, [])
    assert (chosen.images, chosen.masks, chosen.seed) == ("bundled", ("box",), 7)
    assert chosen.note == f"compared on bundled photographs: {tmp_path / 'gone'} is not reachable from here"
    shutil.copytree(chain.storage.local_path("work/s/a1") or "", tmp_path / "gone")
    assert choose_photographs(metadata, None, []).images == "bundled", "other photographs at the same path"
    assert choose_photographs({}, None, []).masks == ("center",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "/nowhere/at/all"}, "cannot be compared with the champion, version 2: .*/nowhere/at/all"),
        ({"masks": ["centre"]}, "cannot be compared with the champion, version 2: .*centre"),
        ({"few": True}, "cannot be compared on 9 photographs, too few, with the champion, version 2"),
    ],
)
def test_an_incomparable_version_is_refused_unless_forced(
    photos: Path, options: dict[str, object], message: str
) -> None:
    if options.pop("few", False):
        for number in range(3):
            (photos / f"{number}.png").unlink()
        options["images"] = str(photos)
    with pytest.raises(RegistryError, match=message) as error:
        compare_and_promote("encoder", "3", **options)  # type: ignore[arg-type]
    assert str(error.value).endswith("--force promotes it anyway")
    assert champion_version() == "2"
    assert compare_and_promote("encoder", "3", force=True, **options).previous_version == "2"  # type: ignore[arg-type]
    reason = registry.history("encoder")[-1].reason
    assert "cannot be compared" in reason or "too few for an interval, n = 9" in reason
    assert registry.history("encoder")[-1].forced is True


def test_a_version_that_uses_true_edges_is_not_compared_with_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true_edges = property(lambda self: self.model.version == "3")
    monkeypatch.setattr(LoadedModelMethod, "uses_true_edges", true_edges)
    with pytest.raises(RegistryError, match="one of the two paints over true edges"):
        compare_and_promote("encoder", "3")


def test_other_aliases_and_a_first_champion_need_no_comparison(uri: str) -> None:
    assert compare_and_promote("encoder", "3", "shadow", images="/nowhere").comparison is None
    assert show("models:/encoder@shadow").version == "3"
    assert compare_and_promote("encoder", "2").previous_version == "2", "champion already"
    MlflowClient(uri).delete_registered_model_alias("encoder", "champion")
    assert compare_and_promote("encoder", "3").previous_version is None
    assert champion_version() == "3"
    with pytest.raises(RegistryError, match="no version 12; its versions: 1, 2, 3"):
        compare_and_promote("encoder", "12")
    with pytest.raises(RegistryError, match="no model 'encodr': did you mean 'encoder'"):
        compare_and_promote("encodr", "1")


def test_a_champion_that_changes_during_the_comparison_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    original = version_comparison.compare_versions

    def promote_meanwhile(*arguments: object) -> object:
        registry.promote("encoder", "3")
        return original(*arguments)  # type: ignore[arg-type]

    registry.promote("encoder", "1")
    monkeypatch.setattr(version_comparison, "compare_versions", promote_meanwhile)
    with pytest.raises(ConcurrentPromotion, match="made version 3 champion of encoder at the same time"):
        compare_and_promote("encoder", "2")
    assert champion_version() == "3"


def sent_as_json(plan: PromotionPlan) -> PromotionPlan:
    """The plan as another process receives it."""
    received = PromotionPlan.from_record(json.loads(json.dumps(plan.as_json())))
    assert received == plan
    return received


def test_a_plan_changes_nothing_and_can_be_carried_out_by_another_process() -> None:
    registry.promote("encoder", "3")
    before = registry.history("encoder")
    loaded: list[str] = []

    def load_version(uri: str) -> LoadedModel:
        loaded.append(uri)
        return load.load_model(uri, tracking_uri=None)

    plan = sent_as_json(plan_promotion("encoder", "2", load=load_version))
    assert registry.history("encoder") == before
    assert champion_version() == "3"
    assert (plan.expected.version, plan.objection) == ("3", "")
    assert loaded == ["models:/encoder/3", "models:/encoder/2"]
    assert plan.comparison is not None
    promotion = carry_out(plan, reason="sharper")
    assert (promotion.previous_version, champion_version()) == ("3", "2")
    move = registry.history("encoder")[-1]
    assert move.reason == f"sharper; {plan.comparison} on {plan.photographs}"
    assert move.comparison == plan.comparison.as_json() | {"images": plan.images}


def test_a_plan_with_an_objection_needs_force() -> None:
    plan = sent_as_json(plan_promotion("encoder", "3"))
    assert plan.objection.startswith(
        "encoder version 3 is worse than the champion, version 2: psnr_rgb_hole "
    )
    with pytest.raises(RegistryError, match="--force promotes it anyway"):
        carry_out(plan)
    assert champion_version() == "2"
    carry_out(plan, force=True)
    assert champion_version() == "3"
    assert registry.history("encoder")[-1].forced is True


def test_a_plan_is_refused_if_the_alias_was_moved_since(uri: str) -> None:
    plan = plan_promotion("encoder", "3", "shadow")
    registry.promote("encoder", "1", "shadow")
    with pytest.raises(ConcurrentPromotion, match="made version 1 shadow of encoder at the same time"):
        carry_out(sent_as_json(plan))
    plan = plan_promotion("encoder", "3", "shadow")
    MlflowClient(uri).set_registered_model_alias("encoder", "shadow", "2")
    with pytest.raises(ConcurrentPromotion, match="from version 1 to 2 meanwhile, not by inpaint: try again"):
        carry_out(plan)


def test_scores_on_other_masks_are_never_compared(chain: PipelineOutputs) -> None:
    evaluation = EvaluationResult.load(chain.storage.subfolder("work/v1/a1").read)
    same = replace(evaluation.protocol, metrics={**evaluation.protocol.metrics, "new": "?"}, versions={})
    assert (
        metric_difference(replace(evaluation, protocol=same), "one", evaluation, "one", "psnr_rgb_hole").n
        == 29
    )
    for change, words in (
        ({"masks_sha256": "0" * 64}, r"the scores are not comparable: other masks \(0{12} and \w{12}\)"),
        ({"photographs_sha256": "0" * 64}, r"other photographs \(0{12} and \w{12}\)"),
        ({"metrics": {"psnr_rgb_hole": "another"}}, r"other definitions of metrics \(psnr_rgb_hole\)"),
    ):
        other = replace(evaluation, protocol=replace(evaluation.protocol, **change))
        with pytest.raises(ValueError, match=words):
            metric_difference(other, "one", evaluation, "one", "psnr_rgb_hole")


def test_a_version_is_compared_on_its_frozen_set_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    freeze_masks(open_masks("brush"), {"brush": {}}, 4, 32, 0, str(path))
    frozen = load_frozen_set(str(path))
    protocol = {"masks": [str(path)], "frozen_masks": {str(path): frozen.record()}}
    assert choose_photographs({"protocol": protocol}, None, ()).masks == (str(path),)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        choose_photographs({"protocol": protocol}, None, ())
    freeze_masks(open_masks("brush"), {"brush": {}}, 4, 32, 1, str(path))
    with pytest.raises(ValueError, match=r"is not the mask set that the version was scored on .*--masks"):
        choose_photographs({"protocol": protocol}, None, ())
    assert choose_photographs({"protocol": protocol}, None, ("center",)).masks == ("center",)
