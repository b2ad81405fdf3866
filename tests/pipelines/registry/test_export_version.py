"""Versions in other formats: each file computes what the version does, and one that does not is never written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from stores import Store, network_input, photograph

from models.base import Model
from pipelines.registry import LoadedModel, RegistryError, exporting, load_model
from pipelines.registry import export_version as exporting_versions
from pipelines.registry.export_version import export_version


def test_onnx(store: Store, loaded: dict[str, LoadedModel], tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "encoder.onnx"
    found = export_version("models:/encoder@candidate", "onnx", out, tracking_uri=store.uri)
    assert (found["name"], found["version"], found["path"]) == ("encoder", "1", str(out))
    assert found["bytes"] == out.stat().st_size
    assert 0 < found["difference"] <= 1e-5
    session = onnxruntime.InferenceSession(out)
    x = network_input(*photograph())
    (y,) = session.run(["y"], {"x": x.numpy()})
    wanted = loaded["encoder"].program(x).detach().numpy()
    np.testing.assert_allclose(y, wanted, atol=1e-5, rtol=0)
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["version"] == "encoder version 1"
    assert (properties["size"], properties["sigma"]) == ("32", "1.5")


def test_the_program_alone(store: Store, loaded: dict[str, LoadedModel], tmp_path: Path) -> None:
    found = export_version("models:/edges/1", "pt2", tmp_path / "edges.pt2", tracking_uri=store.uri)
    assert found["difference"] <= 1e-5
    program = torch.export.load(tmp_path / "edges.pt2").module()
    torch.testing.assert_close(
        program(network_input(*photograph())),
        loaded["edges"].program(network_input(*photograph())),
        atol=0,
        rtol=0,
    )


def test_weights_are_a_checkpoint_folder(
    store: Store, edge_connect: Model, loaded: dict[str, LoadedModel], tmp_path: Path
) -> None:
    out = tmp_path / "edges" / "model.safetensors"
    found = export_version("models:/edges/1", "safetensors", out, tracking_uri=store.uri)
    assert found["difference"] <= 1e-5
    state, wanted = load_file(out), edge_connect.state_dict()
    assert {key for key in state if "discriminator" in key}, "critics too"
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    image, mask = photograph()
    model = load_model(out.parent)
    assert (model.sigma, model.size) == (1.5, 32)
    apart = model.complete(image, mask).astype(int) - loaded["edges"].complete(image, mask)
    assert abs(apart).max() <= 1
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.json", "model.safetensors"]


def test_a_version_of_an_earlier_release(
    quick: Store, encoder: Model, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_checkpoint(model: Model, folder: Path, *rest: object) -> None:
        shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("checkpoint"))

    monkeypatch.setattr(exporting, "export", without_checkpoint)
    quick.register(encoder, "encoder")
    for form in ("onnx", "safetensors"):
        with pytest.raises(
            RegistryError, match="registered by an earlier release, without its networks"
        ) as error:
            export_version("models:/encoder/1", form, tmp_path / "out", tracking_uri=quick.uri)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    found = export_version("models:/encoder/1", "pt2", tmp_path / "out", tracking_uri=quick.uri)
    assert found["difference"] == 0
    image, mask = photograph()
    assert load_model("models:/encoder/1", tracking_uri=quick.uri).complete(image, mask).shape == image.shape


def test_what_differs_is_not_written(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., tuple[Model, dict[str, object]]] = exporting_versions.rebuilt

    def other(*arguments: object) -> tuple[Model, dict[str, object]]:
        model, about = real(*arguments)
        with torch.no_grad():
            for parameter in model.networks["generator"].parameters():
                parameter.mul_(1.5)
        return model, about

    monkeypatch.setattr(exporting_versions, "rebuilt", other)
    with pytest.raises(
        ValueError, match="safetensors of encoder version 1 differs from the model by"
    ) as error:
        export_version("models:/encoder/1", "safetensors", tmp_path / "a.safetensors", tracking_uri=store.uri)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="is a folder: name a file"):
        export_version("models:/encoder/1", "pt2", tmp_path, tracking_uri=store.uri)
