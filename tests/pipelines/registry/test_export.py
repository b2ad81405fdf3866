"""Exports: each file computes what the version computes; one that does not is never written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from models.base import Model
from pipelines.registry import LoadedModel, RegistryError, load_model, registration
from pipelines.registry import export as export_module
from pipelines.registry.export import export_version
from pipelines.weights import CheckpointInfo
from support.mlflow_stores import MlflowStore, network_input, photograph


def test_an_onnx_file_equals_the_version(
    store: MlflowStore, loaded: dict[str, LoadedModel], tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / "encoder.onnx"
    result = export_version("models:/encoder@candidate", "onnx", out, tracking_uri=store.uri)
    assert (result.name, result.version, result.path) == ("encoder", "1", str(out))
    assert result.bytes == out.stat().st_size
    assert 0 < result.difference <= 1e-5
    session = onnxruntime.InferenceSession(out)
    x = network_input(*photograph())
    (y,) = session.run(["y"], {"x": x.numpy()})
    expected = loaded["encoder"].forward(x).detach().numpy()
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=0)
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["version"] == "encoder version 1"
    assert (properties["size"], properties["sigma"]) == ("32", "1.5")


def test_a_pt2_file_is_the_versions_program(
    store: MlflowStore, loaded: dict[str, LoadedModel], tmp_path: Path
) -> None:
    result = export_version("models:/edges/1", "pt2", tmp_path / "edges.pt2", tracking_uri=store.uri)
    assert result.difference <= 1e-5
    program = torch.export.load(tmp_path / "edges.pt2").module()
    torch.testing.assert_close(
        program(network_input(*photograph())),
        loaded["edges"].forward(network_input(*photograph())),
        atol=0,
        rtol=0,
    )


def test_exported_weights_are_a_checkpoint_folder(
    store: MlflowStore, edge_connect: Model, loaded: dict[str, LoadedModel], tmp_path: Path
) -> None:
    out = tmp_path / "edges" / "model.safetensors"
    result = export_version("models:/edges/1", "safetensors", out, tracking_uri=store.uri)
    assert result.difference <= 1e-5
    state, expected = load_file(out), edge_connect.state_dict()
    assert {key for key in state if "discriminator" in key}, "discriminators too"
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    image, mask = photograph()
    model = load_model(out.parent)
    assert (model.sigma, model.size) == (1.5, 32)
    difference = model.complete(image, mask).astype(int) - loaded["edges"].complete(image, mask)
    assert abs(difference).max() <= 1
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.json", "model.safetensors"]


def test_a_version_without_checkpoint_is_exported_only_as_pt2(
    quick: MlflowStore, encoder: Model, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_checkpoint(model: Model, folder: Path, *arguments: object) -> None:
        shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("checkpoint"))

    monkeypatch.setattr(registration, "export_model", without_checkpoint)
    quick.register(encoder, "encoder")
    for export_format in ("onnx", "safetensors"):
        with pytest.raises(
            RegistryError, match="registered by an earlier release, without its networks"
        ) as error:
            export_version("models:/encoder/1", export_format, tmp_path / "out", tracking_uri=quick.uri)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    result = export_version("models:/encoder/1", "pt2", tmp_path / "out", tracking_uri=quick.uri)
    assert result.difference == 0
    image, mask = photograph()
    assert load_model("models:/encoder/1", tracking_uri=quick.uri).complete(image, mask).shape == image.shape


def test_an_export_that_differs_is_not_written(
    store: MlflowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., tuple[Model, CheckpointInfo]] = export_module.load_checkpoint_model

    def with_other_weights(*arguments: object) -> tuple[Model, CheckpointInfo]:
        model, info = original(*arguments)
        with torch.no_grad():
            for parameter in model.networks["generator"].parameters():
                parameter.mul_(1.5)
        return model, info

    monkeypatch.setattr(export_module, "load_checkpoint_model", with_other_weights)
    with pytest.raises(
        ValueError, match="safetensors of encoder version 1 differs from the model by"
    ) as error:
        export_version("models:/encoder/1", "safetensors", tmp_path / "a.safetensors", tracking_uri=store.uri)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="is a folder: name a file"):
        export_version("models:/encoder/1", "pt2", tmp_path, tracking_uri=store.uri)
