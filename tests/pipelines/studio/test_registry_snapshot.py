"""The snapshot of the registry: what it holds, in how many requests."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.registry_versions import create_versions
from mlflow import MlflowClient

from pipelines import registry
from pipelines.registry.client import RegistryError
from pipelines.registry.searching import SCORES_TAG, scores_json
from pipelines.studio.registry_snapshot import RegistrySnapshot, load_registry
from support.mlflow_stores import MlflowStore


def add_version(store: MlflowStore, name: str, scores: dict[str, float], **tags: str) -> str:
    """Register a version without files; returns its number."""
    version = store.client.create_model_version(
        name, "file:///nowhere", store.run_id, tags={**tags, SCORES_TAG: scores_json(scores)}
    )
    return str(version.version)


def test_a_snapshot_has_aliases_scores_and_history(bare: MlflowStore) -> None:
    bare.client.create_registered_model("faces", description="Faces of friends.")
    bare.client.create_registered_model("empty")
    scores = {
        "brush/l1_percent": 3.0,
        "brush/10-20/psnr_rgb_hole": 21.0,
        "brush/psnr_rgb_hole": 20.0,
        "center/psnr_rgb_hole": 19.0,
    }
    tags = {"model": "edge_connect", "size": "64", "sigma": "2.0", "inpaint.metric": "psnr_rgb_hole 20.000"}
    add_version(bare, "faces", scores, **tags)
    add_version(bare, "faces", {"brush/l1_percent": 4.0}, not_champion="worse", sigma="?")
    registry.promote("faces", "1", reason="sharper", tracking_uri=bare.uri)
    snapshot = load_registry(bare.uri)
    assert [model.name for model in snapshot.models] == ["empty", "faces"]
    faces = snapshot.model("faces")
    assert faces is not None
    assert (faces.description.splitlines()[0], faces.aliases) == ("Faces of friends.", {"champion": "1"})
    assert [version.version for version in faces.versions] == ["2", "1"]
    first = faces.version("1")
    assert first is not None
    assert (first.model, first.size, first.sigma, first.aliases) == ("edge_connect", 64, 2.0, ("champion",))
    assert (first.main_column, first.main_score) == ("brush/psnr_rgb_hole", 20.0)
    assert SCORES_TAG not in first.tags
    assert (faces.versions[0].main_score, faces.main_column) == (None, "brush/psnr_rgb_hole")
    assert [move.reason for move in faces.moves] == ["sharper"]
    assert [(rejection.version, rejection.reason) for rejection in faces.rejections] == [("2", "worse")]
    assert [version.id for version in snapshot.versions] == ["faces/1", "faces/2"]
    assert snapshot.find("faces/2") is faces.versions[0]
    assert snapshot.find("faces/3") is snapshot.find("faces") is snapshot.find("../1") is None
    assert load_registry(bare.uri) == snapshot
    registry.promote("faces", "2", "shadow", tracking_uri=bare.uri)
    assert load_registry(bare.uri) != snapshot


def test_an_empty_registry_and_none(bare: MlflowStore, tmp_path: Any) -> None:
    assert load_registry(bare.uri) == RegistrySnapshot()
    assert load_registry(f"sqlite:///{tmp_path}/none.db") == RegistrySnapshot(), "before the first run"
    (tmp_path / "text.db").write_text("not a database")
    with pytest.raises(RegistryError, match=r"text\.db"):
        load_registry(f"sqlite:///{tmp_path}/text.db")


def test_two_searches_whatever_the_number_of_versions(
    bare: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_versions(bare.uri, 12)
    calls: list[str] = []
    for name in (
        "search_registered_models",
        "search_model_versions",
        "search_logged_models",
        "get_model_version",
    ):
        original = getattr(MlflowClient, name)

        def counted(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(MlflowClient, name, counted)
    snapshot = load_registry(bare.uri)
    assert calls == ["search_registered_models", "search_model_versions"]
    assert len(snapshot.versions) == 12
    assert snapshot.versions[0].main_score is not None


def test_scores_of_versions_of_earlier_releases_are_read_from_logged_models(bare: MlflowStore) -> None:
    create_versions(bare.uri, 1)
    expected = load_registry(bare.uri).versions[0].scores
    bare.client.delete_model_version_tag("facades", "1", SCORES_TAG)
    scores = load_registry(bare.uri).versions[0].scores
    assert scores == pytest.approx(dict(expected), rel=1e-5)
