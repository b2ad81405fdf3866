"""Loading versions and checkpoint folders, and completing images of all types."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from data_prep.canny import canny_edges
from data_prep.uris import path_from_file_url
from models.base import Model
from pipelines.inference.fill import fill
from pipelines.registry import LoadedModel, RegistryError, load_model, show
from pipelines.registry.client import find_version, registry_client
from pipelines.registry.loaded_model import to_hole_mask, to_rgb_array
from pipelines.weights import CheckpointInfo, save_weights
from support.inpainting import loaded_model
from support.mlflow_stores import SIGMA, MlflowStore, photograph


def eager(model: Model, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
    """float32 [H,W,3] in [0,255]: the model's own completion."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    e = None if edge is None else torch.from_numpy(edge)[None, None].float()
    y = model.complete(x, torch.from_numpy(mask)[None, None].float(), e)
    return np.asarray(y[0].permute(1, 2, 0)) * 255


@pytest.mark.parametrize("name", ["encoder", "edges"])
def test_a_loaded_version_completes_like_the_model(
    loaded: dict[str, LoadedModel], encoder: Model, edge_connect: Model, name: str
) -> None:
    model, version = {"encoder": encoder, "edges": edge_connect}[name], loaded[name]
    image, mask = photograph()
    edge = canny_edges(image, SIGMA, mask) if model.needs_edges else None
    for edge_argument in (None, edge):
        completed = version.complete(image, mask, edge_argument)
        assert completed.dtype == np.uint8
        assert abs(completed - eager(model, image, mask, edge)).max() <= 0.5 + 255e-5
        np.testing.assert_array_equal(completed[mask == 0], image[mask == 0])
    garbled = image.copy()
    garbled[mask > 0] = 255 - garbled[mask > 0]
    np.testing.assert_array_equal(version.complete(garbled, mask), completed)
    np.testing.assert_array_equal(version.complete(image, mask * 255), completed)
    np.testing.assert_array_equal(version.complete(image, mask > 0), completed)


def test_drawn_edges_change_only_the_hole(loaded: dict[str, LoadedModel]) -> None:
    version = loaded["edges"]
    image, mask = photograph()
    edges = version.edges_outside_hole(image, mask)
    assert edges.any()
    assert not edges[mask > 0].any()
    drawn = edges.copy()
    drawn[30, 35:58] = True
    free, guided = version.complete(image, mask), version.complete(image, mask, drawn)
    assert (free != guided)[mask > 0].any()
    np.testing.assert_array_equal(free[mask == 0], guided[mask == 0])


def test_fill_with_a_version_changes_only_the_hole(loaded: dict[str, LoadedModel], tmp_path: Path) -> None:
    image, mask = photograph()
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(mask * 255).save(tmp_path / "mask.png")
    for name, version in loaded.items():
        report = fill(version, tmp_path / "photo.png", tmp_path / "mask.png", tmp_path / f"{name}.png")
        assert report.tiles[0].model_size == (64, 64)
        filled = np.asarray(Image.open(tmp_path / f"{name}.png"))
        np.testing.assert_array_equal(filled[mask == 0], image[mask == 0])
        assert (filled[mask > 0] != image[mask > 0]).any()


def test_a_checkpoint_folder_is_loaded_and_checked(
    tmp_path: Path, edge_connect: Model, loaded: dict[str, LoadedModel]
) -> None:
    save_file(edge_connect.state_dict(), tmp_path / "model.safetensors")
    image, mask = photograph()
    options = {"width": 0.0625, "residual_blocks": 1}
    info = {"name": "edge_connect", "options": options, "size": 32, "sigma": SIGMA}
    (tmp_path / "model.json").write_text(json.dumps(info))
    model = load_model(tmp_path)
    assert (model.name, model.version, model.sigma, model.size) == ("edge_connect", None, SIGMA, 32)
    difference = model.complete(image, mask).astype(int) - loaded["edges"].complete(image, mask)
    assert abs(difference).max() <= 1
    (tmp_path / "model.json").write_text(json.dumps({**info, "sigma": None}))
    with pytest.raises(ValueError, match="sigma is not on record"):
        load_model(tmp_path).complete(image, mask)
    (tmp_path / "model.json").write_text(json.dumps({**info, "options": {"width": 0.125}}))
    with pytest.raises(RegistryError, match="cannot be loaded") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RegistryError, match=r"cannot be loaded|damaged"):
        load_model(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(RegistryError, match=r"has no model\.json"):
        load_model(tmp_path)


def test_metadata_of_the_wrong_type_is_refused(quick: MlflowStore, encoder: Model) -> None:
    quick.register(encoder, "encoder")
    uri = "models:/encoder/1"
    mlmodel = Path(path_from_file_url(show(uri, quick.uri).files), "MLmodel")
    record = yaml.safe_load(mlmodel.read_text())
    for change, message in (({"size": "large"}, "size is 'large'"), ({"hole_range": 1}, "hole_range is 1")):
        mlmodel.write_text(yaml.safe_dump(record | {"metadata": record["metadata"] | change}))
        with pytest.raises(RegistryError, match=f"^the MLmodel of {uri}, {message}, should be") as error:
            load_model(uri, tracking_uri=quick.uri)
        assert "\n" not in str(error.value)
    # another project's version: it can only complete
    mlmodel.write_text(yaml.safe_dump(record | {"metadata": None}))
    image, mask = photograph()
    model = load_model(uri, tracking_uri=quick.uri)
    assert (model.sigma, model.size, model.needs_edges) == (None, None, False)
    assert model.complete(image, mask).shape == image.shape


def test_all_image_types_are_completed(loaded: dict[str, LoadedModel]) -> None:
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
        completed = version.complete(kind, mask)
        assert completed.shape == image.shape
        np.testing.assert_array_equal(completed[mask == 0], to_rgb_array(kind)[mask == 0])
    np.testing.assert_array_equal(to_rgb_array(image / 255), image)
    np.testing.assert_array_equal(to_rgb_array(grey.astype(np.uint16) * 257)[..., 1], grey)
    np.testing.assert_array_equal(version.complete(image, np.zeros_like(mask)), image)
    for invalid in (image * 1.0, image.astype(int) - 300, image[None], np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match="photograph"):
            version.complete(invalid, mask)


def test_all_mask_types_are_read() -> None:
    hole = np.zeros((40, 60), bool)
    hole[10:20, 15:40] = True
    red = Image.fromarray(hole[..., None] * np.uint8((255, 0, 0)))
    soft = np.where(hole, 0.7, 0.2).astype(np.float32)
    arrays = [hole, hole * 1, np.uint8(hole * 255), hole * 2, np.int64(hole) * 76, soft, hole[..., None]]
    for mask in (*arrays, red, Image.fromarray(hole), Image.fromarray(np.uint8(hole * 2))):
        np.testing.assert_array_equal(to_hole_mask(mask), hole)
    assert not to_hole_mask(soft / 2).any(), "probabilities below 0.5"
    assert not to_hole_mask(np.zeros((4, 5), np.uint8)).any()
    classes = np.uint8(hole) + np.uint8(np.roll(hole, 15, 0)) * 2
    for ambiguous in (classes, Image.fromarray(classes)):
        with pytest.raises(
            ValueError, match=r"^the mask: which of its values is the hole\? It has the values 0 \("
        ):
            to_hole_mask(ambiguous)


def test_inputs_that_do_not_fit_are_refused(loaded: dict[str, LoadedModel]) -> None:
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


def test_errors_list_what_exists(store: MlflowStore) -> None:
    for uri, message in {
        "models:/encodr@champion": "no model 'encodr': did you mean 'encoder'",
        "models:/xyz@champion": "no model 'xyz': it has edges, encoder",
        "models:/encoder@best": r"no alias 'best'; its aliases: candidate \(version 1\)",
        "models:/encoder/7": "encoder has no version 7; its versions: 1",
        "models:/encoder/latest": "names no model version",
        "encodr": "no model 'encodr': did you mean 'encoder'.; there is no folder 'encodr' either",
        "encoder@best": r"no alias 'best'; its aliases: candidate \(version 1\)",
        "runs/best": "'runs/best' is not a model: there is no such folder; write NAME, NAME@ALIAS, NAME/VERSION or a",
    }.items():
        with pytest.raises(RegistryError, match=message) as error:
            load_model(uri, tracking_uri=store.uri)
        assert "\n" not in str(error.value)
    with pytest.raises(RegistryError, match="no MLflow registry at sqlite:////nowhere"):
        load_model("models:/encoder/1", tracking_uri="sqlite:////nowhere/mlflow.db")
    with pytest.raises(RegistryError, match=r"server at http://127\.0\.0\.1:9 does not answer") as error:
        load_model("models:/encoder/1", tracking_uri="http://user:secret@127.0.0.1:9")
    assert "secret" not in str(error.value)


def test_a_model_is_named_with_or_without_prefix_alias_and_version(
    store: MlflowStore, loaded: dict[str, LoadedModel]
) -> None:
    image, mask = photograph()
    expected = loaded["encoder"].complete(image, mask)
    for name in ("encoder", "encoder@candidate", "encoder/1", "models:/encoder", "models:/encoder@candidate"):
        model = load_model(name, tracking_uri=store.uri)
        assert (model.name, model.version) == ("encoder", "1")
        np.testing.assert_array_equal(model.complete(image, mask), expected)


def test_a_name_alone_is_the_champion_else_the_newest_version(bare: MlflowStore) -> None:
    bare.add_empty_versions("many", 11)
    with registry_client(bare.uri) as client:
        assert int(find_version(client, "many").version) == 11
        assert int(find_version(client, "many/2").version) == 2
        bare.client.set_registered_model_alias("many", "champion", "9")
        assert {int(find_version(client, name).version) for name in ("many", "models:/many")} == {9}
        bare.client.create_registered_model("none")
        with pytest.raises(RegistryError, match="none has no version yet"):
            find_version(client, "none")
    assert [row.version for row in show("models:/many", bare.uri).versions][:2] == ["11", "10"]


def test_a_folder_comes_before_a_registered_model(
    store: MlflowStore, edge_connect: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    with pytest.raises(
        RegistryError, match=r"it has no model\.safetensors; models:/encoder means the registered"
    ):
        load_model("encoder", tracking_uri=store.uri)
    assert load_model("models:/encoder", tracking_uri=store.uri).version == "1"
    save_weights(
        tmp_path / "encoder", edge_connect, {}, CheckpointInfo("edge_connect", vars(edge_connect.options))
    )
    model = load_model("encoder", tracking_uri=store.uri)
    assert (model.name, model.version) == ("edge_connect", None)


def test_loading_restores_mlflows_settings(store: MlflowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in (None, "sqlite:///elsewhere.db"):
        if uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        before = mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)
        load_model("models:/encoder/1", tracking_uri=store.uri)
        assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)) == before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    model = load_model("models:/encoder@candidate")
    assert model.version == "1", "MLflow's current URI is the default"
    assert repr(model) == "LoadedModel(encoder version 1 (candidate), sigma 1.5, 32 px, cpu)"


def test_a_loaded_model_is_shown_in_one_line() -> None:
    assert repr(loaded_model()) == "LoadedModel(toy version 1, 16 px, cpu)"
    folder = replace(loaded_model(size=None, sigma=2), version=None, device="cuda:1")
    assert repr(folder) == "LoadedModel(toy from a checkpoint folder, sigma 2, cuda:1)"


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["TRAP"],)


def test_a_pickled_model_is_refused(
    quick: MlflowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
