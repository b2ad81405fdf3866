"""Registration of versions: exactly once, whenever the process is killed, and with valid metadata."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from models.base import Model
from pipelines import registry
from pipelines.contracts import RegisterOutputs, RunSettings
from pipelines.registry import LoadedModel, RegistryError, registration
from pipelines.tracking.runs import Tracking, version_exists
from support.mlflow_stores import SIGMA, Killed, MlflowStore


def test_a_version_has_tags_alias_metrics_and_metadata(
    store: MlflowStore, loaded: dict[str, LoadedModel]
) -> None:
    row = registry.show("models:/edges@candidate", store.uri)
    assert row.version == "1"
    assert row.aliases == ("candidate",)
    assert row.run_id == store.run_id
    assert row.metrics == {"psnr": 20.5}
    expected = {"model": "edge_connect", "sigma": "1.5", "size": "32", "step_key": "key", "recipe": "test"}
    assert row.tags == expected
    model = loaded["edges"]
    assert (model.name, model.version, model.sigma, model.size) == ("edges", "1", SIGMA, 32)
    assert model.info.options["width"] == 0.0625
    assert model.info.extra["recipe"] == "name: test\nseed: 0\n"
    logged = store.client.get_metric_history(store.run_id, "psnr")
    assert len({(m.step, m.timestamp, m.value) for m in logged}) == 1


# -- registered exactly once --------------------------------------------------------------------------------------

MLFLOW_CALLS = [
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
@pytest.mark.parametrize("call", MLFLOW_CALLS)
def test_a_registration_killed_at_any_call_leaves_one_version(
    quick: MlflowStore, encoder: Model, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    original = getattr(MlflowClient, call)

    def killed_call(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        if after:
            original(self, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, killed_call)
        with pytest.raises(Killed):
            quick.register(encoder, "encoder")
    for row in quick.client.search_model_versions("name = 'encoder'"):
        assert row.tags["step_key"] == "key", "a version is complete as soon as it exists"
    assert quick.register(encoder, "encoder") == "1"
    assert [row.aliases for row in quick.versions("encoder")] == [("candidate",)]
    assert registry.show("models:/encoder/1", quick.uri).metrics == {"psnr": 20.5}
    assert len(quick.client.get_metric_history(quick.run_id, "psnr")) == 1
    source = str(quick.client.get_model_version("encoder", "1").source)
    logged = quick.client.get_logged_model(source.rpartition("/")[2])
    assert logged.status == "READY"
    assert Path(logged.artifact_location.removeprefix("file://"), "data/model.pt2").is_file()


def test_a_request_sent_twice_leaves_one_version(
    quick: MlflowStore, encoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MlflowClient.create_model_version

    def send_twice(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", send_twice)
    assert quick.register(encoder, "encoder") == "1"
    assert [row.version for row in quick.versions("encoder")] == ["1"]


def test_another_step_key_is_another_version(quick: MlflowStore, encoder: Model) -> None:
    assert [quick.register(encoder, "encoder", key) for key in ("a", "b", "a")] == ["1", "2", "1"]
    assert quick.versions("encoder")[0].aliases == ("candidate",), "the newest version stays candidate"
    assert registry.list_models(quick.uri)[0]["versions"] == 2
    outputs, settings = (
        RegisterOutputs("encoder", "2", True, ""),
        RunSettings(tracking=Tracking(quick.uri, "test")),
    )
    assert version_exists(outputs, "b", settings)
    registry.delete("encoder", "1", quick.uri)
    assert version_exists(outputs, "b", settings)
    quick.client.delete_registered_model_alias("encoder", "candidate")
    registry.delete("encoder", "2", quick.uri)
    assert not version_exists(outputs, "b", settings)
    assert not version_exists(RegisterOutputs("nothing", "1", True, ""), "b", settings)


def test_invalid_metadata_and_names_are_refused(
    quick: MlflowStore, encoder: Model, edge_connect: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"metadata\.sigma is missing"):
        quick.register(edge_connect, "edges", sigma=None)
    with pytest.raises(ValueError, match=r"metadata\.when cannot be written as JSON"):
        quick.register(encoder, "encoder", when=object())
    with pytest.raises(ValueError, match=r"metadata, size is '32', should be a whole number"):
        quick.register(encoder, "encoder", size="32")
    with pytest.raises(ValueError, match="is not a valid name for a registered model"):
        quick.register(encoder, "en/coder")
    assert registry.list_models(quick.uri) == []


def test_a_name_may_have_dots(quick: MlflowStore, encoder: Model) -> None:
    """MLflow refuses dots in a logged model's name."""
    assert quick.register(encoder, "en.coder-v1.2", "one") == "1"
    assert registry.show("models:/en.coder-v1.2/1", quick.uri).metrics == {"psnr": 20.5}


def test_an_export_that_differs_is_refused(
    store: MlflowStore, encoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration.mlflow.pytorch, "load_model", lambda path: lambda x: x[:, :3] + 1e-3)
    with pytest.raises(RegistryError, match="differs from the model by"):
        store.register(encoder, "encoder", "another key")
    assert [row.version for row in store.versions("encoder")] == ["1"]


@pytest.mark.slow
def test_a_look_up_does_not_import_torch() -> None:
    code = "import sys; from pipelines import registry; registry.search; print({'torch', 'ray'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "set()\n"
