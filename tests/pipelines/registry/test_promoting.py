"""Promotion after a comparison: the better one, the worse one, by force, and what cannot be compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient
from stores import Chain, champion

from pipelines import registry
from pipelines.evaluation import judging
from pipelines.evaluation.completers import LoadedCompleter
from pipelines.evaluation.judging import choose
from pipelines.registry import LoadedModel, Overtaken, RegistryError, load_model, show
from pipelines.registry.promoting import promote


@pytest.fixture(scope="module")
def models(chain: Chain) -> dict[str, LoadedModel]:
    uris = [f"models:/encoder/{number}" for number in "123"]
    return {uri: load_model(uri, tracking_uri=chain.place.uri) for uri in uris}


@pytest.fixture(autouse=True)
def uri(registry_of_chain: str, models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> str:
    """Version 2 is champion; 1 and 3 fill holes with white. Loading takes seconds, and is done once."""
    monkeypatch.setattr(judging, "load_model", lambda uri, tracking_uri: models[uri])
    return registry_of_chain


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 photographs of squares on grey."""
    for number in range(12):
        image = np.full((40, 50, 3), 100, np.uint8)
        image[number : number + 9, 20:30] = 40 + 10 * number
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    return tmp_path


def test_a_worse_one_is_refused_with_the_numbers(chain: Chain) -> None:
    with pytest.raises(RegistryError) as error:
        promote("encoder", "3")
    said = str(error.value)
    assert said.startswith("encoder version 3 is worse than the champion, version 2: psnr_rgb_hole ")
    shards = chain.storage.sub("work/s/a1").uri
    assert f"n = 29) on {shards}, center masks; --force promotes it all the same" in said
    assert "95 % interval -" in said
    assert "\n" not in said
    assert champion() == "2"
    assert len(registry.history("encoder")) == 2


def test_force_promotes_and_the_history_says_so() -> None:
    done = promote("encoder", "3", force=True, reason="for the demo")
    assert done.before == "2"
    assert "is worse than the champion, version 2" in done.notes[0]
    move = registry.history("encoder")[-1]
    assert move["forced"] is True
    assert move["reason"].startswith("for the demo; psnr_rgb_hole ")
    assert move["comparison"]["difference"] == done.comparison.difference < 0  # type: ignore[union-attr]
    done = promote("encoder", "2")  # back, since it is better
    assert done.before == "3"
    assert done.comparison is not None
    assert done.comparison.low is not None
    assert done.comparison.low > 0
    assert "forced" not in registry.history("encoder")[-1]


def test_equal_is_not_worse() -> None:
    registry.promote("encoder", "3")
    done = promote("encoder", "1")
    assert done.comparison is not None
    assert done.comparison.difference == 0
    assert champion() == "1"


def test_on_photographs_of_ones_own(photos: Path) -> None:
    with pytest.raises(RegistryError, match=rf"n = 12\) on {photos}, box masks"):
        promote("encoder", "3", images=str(photos), masks=["box"])


def test_bundled_photographs_where_its_own_are_gone(chain: Chain, tmp_path: Path) -> None:
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
    chosen = choose(metadata, None, [])
    assert (chosen.images, chosen.masks, chosen.seed) == ("bundled", ("box",), 7)
    assert chosen.note == f"compared on bundled photographs: {tmp_path / 'gone'} is not reachable from here"
    shutil.copytree(chain.storage.path("work/s/a1") or "", tmp_path / "gone")
    assert choose(metadata, None, []).images == "bundled", "other photographs in the same place"
    assert choose({}, None, []).masks == ("center",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": "/nowhere/at/all"}, "cannot be compared with the champion, version 2: .*/nowhere/at/all"),
        ({"masks": ["centre"]}, "cannot be compared with the champion, version 2: .*centre"),
        ({"few": True}, "cannot be compared on 9 photographs, too few, with the champion, version 2"),
    ],
)
def test_what_cannot_be_compared_is_refused_unless_forced(
    photos: Path, options: dict[str, object], words: str
) -> None:
    if options.pop("few", False):
        for number in range(3):
            (photos / f"{number}.png").unlink()
        options["images"] = str(photos)
    with pytest.raises(RegistryError, match=words) as error:
        promote("encoder", "3", **options)  # type: ignore[arg-type]
    assert str(error.value).endswith("--force promotes it all the same")
    assert champion() == "2"
    assert promote("encoder", "3", force=True, **options).before == "2"  # type: ignore[arg-type]
    reason = registry.history("encoder")[-1]["reason"]
    assert "cannot be compared" in reason or "too few for an interval, n = 9" in reason
    assert registry.history("encoder")[-1]["forced"] is True


def test_what_paints_over_true_edges_does_not_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    true_edges = property(lambda self: self.loaded.version == "3")
    monkeypatch.setattr(LoadedCompleter, "true_edges", true_edges)
    with pytest.raises(RegistryError, match="one of the two paints over true edges"):
        promote("encoder", "3")


def test_other_aliases_and_a_first_champion_need_no_comparison(uri: str) -> None:
    assert promote("encoder", "3", "shadow", images="/nowhere").comparison is None
    assert show("models:/encoder@shadow")["version"] == "3"
    assert promote("encoder", "2").before == "2", "champion already"
    MlflowClient(uri).delete_registered_model_alias("encoder", "champion")
    assert promote("encoder", "3").before is None
    assert champion() == "3"
    with pytest.raises(RegistryError, match="no version 12; its versions: 1, 2, 3"):
        promote("encoder", "12")
    with pytest.raises(RegistryError, match="no model 'encodr': did you mean 'encoder'"):
        promote("encodr", "1")


def test_the_champion_changed_during_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = judging.compare

    def slowly(*arguments: object) -> object:
        registry.promote("encoder", "3")
        return real(*arguments)  # type: ignore[arg-type]

    registry.promote("encoder", "1")
    monkeypatch.setattr(judging, "compare", slowly)
    with pytest.raises(Overtaken, match="made version 3 champion of encoder at the same time"):
        promote("encoder", "2")
    assert champion() == "3"
