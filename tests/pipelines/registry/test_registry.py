"""Versions: registered once whatever dies, looked up and searched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from stores import SIGMA, Killed, Store

from models.base import Model
from pipelines import registry
from pipelines.registry import LoadedModel, RegistryError, exporting
from pipelines.tracking import still_registered


def test_version_has_tags_alias_metrics_and_metadata(store: Store, loaded: dict[str, LoadedModel]) -> None:
    row = registry.show("models:/edges@candidate", store.uri)
    assert row["version"] == "1"
    assert row["aliases"] == ["candidate"]
    assert row["run_id"] == store.run
    assert row["metrics"] == {"psnr": 20.5}
    expected = {"model": "edge_connect", "sigma": "1.5", "size": "32", "step_key": "key", "recipe": "test"}
    assert row["tags"] == expected
    model = loaded["edges"]
    assert (model.name, model.version, model.sigma, model.size) == ("edges", "1", SIGMA, 32)
    assert model.metadata["options"]["width"] == 0.0625
    assert model.metadata["recipe"] == "name: test\nseed: 0\n"
    logged = store.client.get_metric_history(store.run, "psnr")
    assert len({(m.step, m.timestamp, m.value) for m in logged}) == 1


# -- registered exactly once --------------------------------------------------------------------------------------

CALLS = [
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "log_batch",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_dying_at_any_call_leaves_one_version(
    quick: Store, encoder: Model, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    real = getattr(MlflowClient, call)

    def deadly(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        if after:
            real(self, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, deadly)
        with pytest.raises(Killed):
            quick.register(encoder, "encoder")
    for row in quick.client.search_model_versions("name = 'encoder'"):
        assert row.tags["step_key"] == "key", "a version is whole from the moment it is there"
    assert quick.register(encoder, "encoder") == "1"
    assert [row["aliases"] for row in quick.versions("encoder")] == [["candidate"]]
    assert registry.show("models:/encoder/1", quick.uri)["metrics"] == {"psnr": 20.5}
    assert len(quick.client.get_metric_history(quick.run, "psnr")) == 1
    source = str(quick.client.get_model_version("encoder", "1").source)
    logged = quick.client.get_logged_model(source.rpartition("/")[2])
    assert logged.status == "READY"
    assert Path(logged.artifact_location.removeprefix("file://"), "data/model.pt2").is_file()


def test_a_request_sent_twice_leaves_one_version(
    quick: Store, encoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MlflowClient.create_model_version

    def twice(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        real(self, *args, **kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", twice)
    assert quick.register(encoder, "encoder") == "1"
    assert [row["version"] for row in quick.versions("encoder")] == ["1"]


def test_another_key_is_another_version(quick: Store, encoder: Model) -> None:
    assert [quick.register(encoder, "encoder", key) for key in ("a", "b", "a")] == ["1", "2", "1"]
    assert quick.versions("encoder")[0]["aliases"] == ["candidate"], "the newest stays the candidate"
    assert registry.list_models(quick.uri)[0]["versions"] == 2
    value, place = {"name": "encoder", "version": "2"}, {"tracking": {"uri": quick.uri, "experiment": "test"}}
    assert still_registered(value, "b", place)
    registry.delete("encoder", "1", quick.uri)
    assert still_registered(value, "b", place)
    quick.client.delete_registered_model_alias("encoder", "candidate")
    registry.delete("encoder", "2", quick.uri)
    assert not still_registered(value, "b", place)
    assert not still_registered({"name": "nothing", "version": "1"}, "b", place)


def test_what_cannot_be_registered(
    quick: Store, encoder: Model, edge_connect: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"metadata\.sigma is missing"):
        quick.register(edge_connect, "edges", sigma=None)
    with pytest.raises(ValueError, match=r"metadata\.when cannot be kept as JSON"):
        quick.register(encoder, "encoder", when=object())
    with pytest.raises(ValueError, match="cannot name a registered model"):
        quick.register(encoder, "en/coder")
    assert registry.list_models(quick.uri) == []


def test_an_export_that_differs_is_refused(
    store: Store, encoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting.mlflow.pytorch, "load_model", lambda path: lambda x: x[:, :3] + 1e-3)
    with pytest.raises(RegistryError, match="differs from the model by"):
        store.register(encoder, "encoder", "another key")
    assert [row["version"] for row in store.versions("encoder")] == ["1"]


def test_looking_up_loads_no_torch() -> None:
    code = "import sys; from pipelines import registry; registry.search; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert registry.load_model.__module__ == "pipelines.filling.loading"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        registry.nothing  # noqa: B018
