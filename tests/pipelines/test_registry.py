"""Versions: registered once whatever dies, read without our code or pickle, crowned, taken back, loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file

from data_prep.canny import canny_edges
from models import build_model
from models.base import Model
from pipelines import exporting, registry
from pipelines.fill import fill
from pipelines.loading import as_rgb
from pipelines.registry import LoadedModel, RegistryError, load_model, register
from pipelines.versions import connected

SAFE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false"}
SIGMA = 1.5


@dataclass
class Store:
    """An MLflow store of its own, with a run."""

    uri: str
    client: MlflowClient
    run: str

    @staticmethod
    def make(folder: Path, template: Path | None = None) -> Store:
        if template:  # MLflow takes seconds to make a database
            shutil.copy(template, folder / "mlflow.db")
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        client = MlflowClient(uri, registry_uri=uri)
        experiment = client.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
        return Store(uri, client, client.create_run(experiment).info.run_id)

    def register(self, model: Model, name: str, step_key: str = "key", **metadata: Any) -> str:
        metadata = {"size": 32, "sigma": SIGMA, "recipe": "name: test\nseed: 0\n", **metadata}
        return register(
            model,
            name=name,
            run_id=self.run,
            step_key=step_key,
            tags={"recipe": "test"},
            metrics={"psnr": 20.5},
            metadata=metadata,
            tracking_uri=self.uri,
        )

    def versions(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = registry.show(name, self.uri)["versions"]
        return rows


@pytest.fixture(scope="module")
def encoder() -> Model:
    torch.manual_seed(0)
    return build_model("context_encoder", size=32, width=0.0625)


@pytest.fixture(scope="module")
def edge_connect() -> Model:
    torch.manual_seed(0)
    return build_model("edge_connect", width=0.0625, residual_blocks=1)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without experiments of ours."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, empty: Path, encoder: Model, edge_connect: Model
) -> Store:
    store = Store.make(tmp_path_factory.mktemp("registry"), empty)
    assert store.register(encoder, "encoder") == "1"
    assert store.register(edge_connect, "edges") == "1"
    return store


@pytest.fixture(scope="module")
def loaded(store: Store) -> dict[str, LoadedModel]:
    return {name: load_model(f"models:/{name}/1", tracking_uri=store.uri) for name in ("encoder", "edges")}


@pytest.fixture(scope="module")
def exported(store: Store) -> Path:
    """The folder of an exported encoder."""
    version = store.client.get_model_version("encoder", "1")
    logged = store.client.get_logged_model(str(version.source).rpartition("/")[2])
    return Path(logged.artifact_location.removeprefix("file://"))


@pytest.fixture
def quick(tmp_path: Path, empty: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of this test's own, where exporting is a copy."""
    monkeypatch.setattr(exporting, "export", lambda model, folder, *rest: shutil.copytree(exported, folder))
    return Store.make(tmp_path, empty)


def photograph(height: int = 66, width: int = 91) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H,W,3], and a mask uint8 [H,W] that both models can fill."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    squares = (x // 8 + y // 8) % 2 * 100
    image = (np.stack([x + squares, y + squares, squares], axis=2) + noise).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[20:41, 33:60] = 1
    return image, mask


def eager(model: Model, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
    """float32 [H,W,3] in [0,255]: the model's own completion."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    e = None if edge is None else torch.from_numpy(edge)[None, None].float()
    y = model.complete(x, torch.from_numpy(mask)[None, None].float(), e)
    return np.asarray(y[0].permute(1, 2, 0)) * 255


# -- what a version is --------------------------------------------------------------------------------------------


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


def test_model_folder_holds_no_code_and_no_pickle(store: Store, tmp_path: Path) -> None:
    with connected(store.uri):
        path = mlflow.artifacts.download_artifacts("models:/edges/1", dst_path=str(tmp_path))
    files = sorted(str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file())
    assert not [file for file in files if Path(file).suffix in (".py", ".pkl", ".pth", ".pickle", ".pyc")]
    assert "data/model.pt2" in files
    required = Path(path, "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == ["mlflow", "torch", "numpy"]
    assert all("==" in line and "+" not in line for line in required)
    described = Path(path, "MLmodel").read_text()
    assert "code: null" in described
    assert "pipelines" not in described.replace("inpaint-pipelines", "")
    assert sum(file.stat().st_size for file in Path(path).rglob("*")) < 4e6
    program = zipfile.ZipFile(Path(path, "data/model.pt2"))
    # sample_inputs is torch.save's own zip: MLflow's check of it is what the switch in the clean process turns on
    pickles = [name for name in program.namelist() if program.read(name)[:1] == b"\x80"]
    assert pickles == []


CLEAN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("models", "pipelines", "data_prep"):
            raise ModuleNotFoundError(f"{name} is not for this process")

sys.meta_path.insert(0, Blocked())
for name in ("models", "pipelines", "data_prep"):
    try:
        __import__(name)
        raise SystemExit(f"{name} could be imported")
    except ModuleNotFoundError:
        pass

import mlflow, numpy as np

inputs = np.load(sys.argv[1])
outputs = {}
for name in ("encoder", "edges"):
    model = mlflow.pyfunc.load_model(f"models:/{name}@candidate")
    for size in inputs.files:
        outputs[f"{name}-{size}"] = model.predict(inputs[size])
np.savez(sys.argv[2], **outputs)
assert not {"models", "pipelines", "data_prep"} & {name.partition(".")[0] for name in sys.modules}
"""


def inputs() -> dict[str, np.ndarray]:
    """float32 [B,5,H,W] of several batches and sizes, NaN in the holes."""
    found = {}
    for b, h, w in [(1, 33, 47), (3, 64, 64), (2, 130, 95)]:
        x = np.random.default_rng(h).random((b, 5, h, w), dtype=np.float32)
        x[:, 3:] = 0
        x[:, 3, h // 3 : h // 2, w // 3 : w // 2] = 1
        x[:, 4, ::7] = 1
        x[:, :3][np.repeat(x[:, 3:4], 3, axis=1) > 0] = np.nan
        found[f"{b}x{h}x{w}"] = x
    return found


def test_a_process_without_our_code_gets_the_same_pixels(
    store: Store, encoder: Model, edge_connect: Model, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", **inputs())  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")],
        cwd=tmp_path,
        env={**os.environ, **SAFE, "MLFLOW_TRACKING_URI": store.uri},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outputs = np.load(tmp_path / "out.npz")
    for name, model in (("encoder", encoder), ("edges", edge_connect)):
        module = model.completion()
        for size, x in inputs().items():
            found = outputs[f"{name}-{size}"]
            with torch.no_grad():
                wanted = module(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
            known = np.repeat(x[:, 3:4], 3, axis=1) == 0
            np.testing.assert_array_equal(found[known], x[:, :3][known])


@pytest.fixture
def served(store: Store, tmp_path: Path) -> Iterator[str]:
    """The address of `mlflow models serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bin_folder = Path(sys.executable).parent
    arguments = [
        "-m",
        "models:/encoder@candidate",
        "--env-manager",
        "local",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    with open(tmp_path / "log.txt", "w") as log:
        server = subprocess.Popen(
            [str(bin_folder / "mlflow"), "models", "serve", *arguments, "-w", "1"],
            cwd=tmp_path,
            env={
                **os.environ,
                **SAFE,
                "MLFLOW_TRACKING_URI": store.uri,
                "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 100
        while time.monotonic() < end:
            assert server.poll() is None, (tmp_path / "log.txt").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_served_over_http(served: str, encoder: Model) -> None:
    x = np.nan_to_num(inputs()["1x33x47"])
    body = json.dumps({"inputs": x.tolist()}).encode()
    request = urllib.request.Request(f"{served}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        found = np.array(json.load(response)["predictions"], np.float32)
    with torch.no_grad():
        wanted = encoder.completion()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


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


class Killed(BaseException):
    """Nobody catches it: what follows does not happen, as after kill -9."""


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
    assert registry.still_registered("encoder", "2", "b", quick.uri)
    quick.client.delete_model_version("encoder", "2")
    assert not registry.still_registered("encoder", "2", "b", quick.uri)
    assert not registry.still_registered("nothing", "1", "b", quick.uri)


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


# -- loading and completing ---------------------------------------------------------------------------------------


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


# -- champions ----------------------------------------------------------------------------------------------------


def test_champions_and_their_history(quick: Store, encoder: Model) -> None:
    assert registry.current_champion("encoder", quick.uri) is None, "not even the model is there"
    for key in "abc":
        quick.register(encoder, "encoder", key)
    assert registry.crown("encoder", "1", True, "first", score=20.0, tracking_uri=quick.uri)
    assert not registry.crown("encoder", "2", False, "psnr 19 against 20", tracking_uri=quick.uri)
    assert registry.current_champion("encoder", quick.uri) == "1"
    assert registry.show("models:/encoder/2", quick.uri)["tags"]["not_champion"] == "psnr 19 against 20"
    assert registry.crown("encoder", "3", True, "psnr 21 against 20", score=21.0, tracking_uri=quick.uri)
    assert registry.crown("encoder", "3", True, "again", tracking_uri=quick.uri)  # a step that is repeated
    events = registry.history("encoder", quick.uri)
    assert [(event["from"], event["to"]) for event in events] == [(None, "1"), ("1", "3")]
    assert events[1]["reason"] == "psnr 21 against 20"
    assert events[1]["score"] == 21.0
    assert events[1]["who"]
    assert events[1]["when"].startswith("20")

    assert registry.promote("encoder", "2", reason="looks better", tracking_uri=quick.uri) == "3"
    assert registry.rollback("encoder", tracking_uri=quick.uri) == "3"
    assert registry.rollback("encoder", tracking_uri=quick.uri) == "1"
    with pytest.raises(RegistryError, match="no earlier champion"):
        registry.rollback("encoder", tracking_uri=quick.uri)
    assert registry.current_champion("encoder", quick.uri) == "1"
    assert len(registry.history("encoder", quick.uri)) == 5
    with pytest.raises(RegistryError, match="no version 9"):
        registry.promote("encoder", "9", tracking_uri=quick.uri)


@pytest.mark.parametrize("call", ["set_registered_model_tag", "set_registered_model_alias"])
def test_dying_while_crowning(
    quick: Store, encoder: Model, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for key in "ab":
        quick.register(encoder, "encoder", key)
    registry.promote("encoder", "1", tracking_uri=quick.uri)

    def deadly(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, deadly)
        with pytest.raises(Killed):
            registry.promote("encoder", "2", tracking_uri=quick.uri)
    assert registry.current_champion("encoder", quick.uri) == "1"
    registry.promote("encoder", "2", tracking_uri=quick.uri)
    assert registry.current_champion("encoder", quick.uri) == "2"
    assert [event["to"] for event in registry.history("encoder", quick.uri)] == ["1", "2"]
    assert registry.rollback("encoder", tracking_uri=quick.uri) == "1"
