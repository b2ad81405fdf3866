"""Loading versions and checkpoint folders, and completing photographs as they come."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from stores import SIGMA, Store, photograph

from data_prep.canny import canny_edges
from models.base import Model
from pipelines.filling.fill import fill
from pipelines.filling.loading import as_rgb
from pipelines.registry import LoadedModel, RegistryError, load_model


def eager(model: Model, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
    """float32 [H,W,3] in [0,255]: the model's own completion."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    e = None if edge is None else torch.from_numpy(edge)[None, None].float()
    y = model.complete(x, torch.from_numpy(mask)[None, None].float(), e)
    return np.asarray(y[0].permute(1, 2, 0)) * 255


@pytest.mark.parametrize("name", ["encoder", "edges"])
def test_loaded_equals_the_model(
    loaded: dict[str, LoadedModel], encoder: Model, edge_connect: Model, name: str
) -> None:
    model, version = {"encoder": encoder, "edges": edge_connect}[name], loaded[name]
    image, mask = photograph()
    edge = canny_edges(image, SIGMA, mask) if model.needs_edges else None
    for given in (None, edge):
        found = version.complete(image, mask, given)
        assert found.dtype == np.uint8
        assert abs(found - eager(model, image, mask, edge)).max() <= 0.5 + 255e-5
        np.testing.assert_array_equal(found[mask == 0], image[mask == 0])
    garbled = image.copy()
    garbled[mask > 0] = 255 - garbled[mask > 0]
    np.testing.assert_array_equal(version.complete(garbled, mask), found)
    np.testing.assert_array_equal(version.complete(image, mask * 255), found)
    np.testing.assert_array_equal(version.complete(image, mask > 0), found)


def test_drawn_edges_change_the_hole_alone(loaded: dict[str, LoadedModel]) -> None:
    version = loaded["edges"]
    image, mask = photograph()
    edges = version.known_edges(image, mask)
    assert edges.any()
    assert not edges[mask > 0].any()
    drawn = edges.copy()
    drawn[30, 35:58] = True
    free, guided = version.complete(image, mask), version.complete(image, mask, drawn)
    assert (free != guided)[mask > 0].any()
    np.testing.assert_array_equal(free[mask == 0], guided[mask == 0])


def test_filling_from_the_registry(loaded: dict[str, LoadedModel], tmp_path: Path) -> None:
    image, mask = photograph()
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(mask * 255).save(tmp_path / "mask.png")
    for name, version in loaded.items():
        report = fill(version, tmp_path / "photo.png", tmp_path / "mask.png", tmp_path / f"{name}.png")
        assert report["windows"][0]["seen"] == [64, 64]
        found = np.asarray(Image.open(tmp_path / f"{name}.png"))
        np.testing.assert_array_equal(found[mask == 0], image[mask == 0])
        assert (found[mask > 0] != image[mask > 0]).any()


def test_checkpoint_folder(tmp_path: Path, edge_connect: Model, loaded: dict[str, LoadedModel]) -> None:
    save_file(edge_connect.state_dict(), tmp_path / "model.safetensors")
    image, mask = photograph()
    options = {"width": 0.0625, "residual_blocks": 1}
    about = {"name": "edge_connect", "options": options, "size": 32, "sigma": SIGMA}
    (tmp_path / "model.json").write_text(json.dumps(about))
    found = load_model(tmp_path)
    assert (found.name, found.version, found.sigma, found.size) == ("edge_connect", None, SIGMA, 32)
    difference = found.complete(image, mask).astype(int) - loaded["edges"].complete(image, mask)
    assert abs(difference).max() <= 1
    (tmp_path / "model.json").write_text(json.dumps({**about, "sigma": None}))
    with pytest.raises(ValueError, match="sigma is not on record"):
        load_model(tmp_path).complete(image, mask)
    (tmp_path / "model.json").write_text(json.dumps({**about, "options": {"width": 0.125}}))
    with pytest.raises(RegistryError, match="cannot be loaded") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RegistryError, match=r"cannot be loaded|damaged"):
        load_model(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(RegistryError, match=r"has no model\.json"):
        load_model(tmp_path)


def test_any_kind_of_image(loaded: dict[str, LoadedModel]) -> None:
    version = loaded["encoder"]
    image, mask = photograph()
    grey = image[..., 0]
    kinds: list[Any] = [
        grey,
        grey[..., None],
        np.dstack([image, grey]),
        grey.astype(np.uint16) * 257,
        image / 255,
        grey > 100,
        Image.fromarray(image),
        Image.fromarray(image).convert("CMYK"),
        Image.fromarray(image).quantize(8),
        Image.fromarray(grey.astype(np.uint16) * 257),
    ]
    for kind in kinds:
        found = version.complete(kind, mask)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found[mask == 0], as_rgb(kind)[mask == 0])
    np.testing.assert_array_equal(as_rgb(image / 255), image)
    np.testing.assert_array_equal(as_rgb(grey.astype(np.uint16) * 257)[..., 1], grey)
    np.testing.assert_array_equal(version.complete(image, np.zeros_like(mask)), image)
    for wrong in (image * 1.0, image.astype(int) - 300, image[None], np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match="photograph"):
            version.complete(wrong, mask)


def test_what_cannot_fit_is_refused_beforehand(loaded: dict[str, LoadedModel]) -> None:
    version = loaded["encoder"]
    image, mask = photograph()
    mask[5:60] = 1
    with pytest.raises(ValueError, match=r"context_encoder cannot fill a hole"):
        version.complete(image, mask)
    with pytest.raises(ValueError, match="the mask is 10x12, the photograph 91x66"):
        version.complete(image, np.ones((12, 10)))
    with pytest.raises(ValueError, match="whole photograph"):
        version.complete(image, np.ones_like(mask))
    with pytest.raises(ValueError, match="the edges are"):
        version.complete(image, photograph()[1], np.zeros((3, 3)))


def test_errors_say_what_there_is(store: Store) -> None:
    for uri, message in {
        "models:/encodr@champion": "no model 'encodr': did you mean 'encoder'",
        "models:/xyz@champion": "no model 'xyz': it has edges, encoder",
        "models:/encoder@best": r"no alias 'best'; its aliases: candidate \(version 1\)",
        "models:/encoder/7": "encoder has no version 7; its versions: 1",
        "models:/encoder": "names no model version: write models:/NAME@ALIAS",
        "models:/encoder/latest": "names no model version",
        "nowhere": "'nowhere' is no model: write models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint folder",
    }.items():
        with pytest.raises(RegistryError, match=message) as error:
            load_model(uri, tracking_uri=store.uri)
        assert "\n" not in str(error.value)
    with pytest.raises(RegistryError, match="no MLflow registry at sqlite:////nowhere"):
        load_model("models:/encoder/1", tracking_uri="sqlite:////nowhere/mlflow.db")
    with pytest.raises(RegistryError, match=r"server at http://127\.0\.0\.1:9 does not answer") as error:
        load_model("models:/encoder/1", tracking_uri="http://user:secret@127.0.0.1:9")
    assert "secret" not in str(error.value)


def test_looking_up_leaves_mlflow_as_it_was(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in (None, "sqlite:///elsewhere.db"):
        if uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        before = mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)
        load_model("models:/encoder/1", tracking_uri=store.uri)
        assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)) == before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert load_model("models:/encoder/1").version == "1", "MLflow's current address, when none is given"


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["TRAP"],)


def test_a_pickled_model_is_refused(quick: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    folder = tmp_path / "bad"
    mlflow.pytorch.save_model(
        torch.nn.Identity(), str(folder), serialization_format="pickle", pip_requirements=["torch"]
    )
    for path in (folder / "data").glob("model.pt*"):
        path.write_bytes(pickle.dumps(Trap()))
    quick.client.create_registered_model("bad")
    quick.client.create_model_version("bad", folder.as_uri())
    with pytest.raises(RegistryError, match="pickle") as error:
        load_model("models:/bad/1", tracking_uri=quick.uri)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()
