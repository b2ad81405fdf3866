"""The files of a version can be used without our code or pickles, from Python and over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from models.base import Model
from pipelines.registry.client import registry_client
from support.mlflow_stores import MlflowStore
from support.ports import free_port

SAFE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false"}


def test_a_version_holds_no_code_and_no_pickle(store: MlflowStore, tmp_path: Path) -> None:
    with registry_client(store.uri):
        path = mlflow.artifacts.download_artifacts("models:/edges/1", dst_path=str(tmp_path))
    files = sorted(str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file())
    assert not [file for file in files if Path(file).suffix in (".py", ".pkl", ".pth", ".pickle", ".pyc")]
    assert "data/model.pt2" in files
    required = Path(path, "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == ["mlflow", "torch", "numpy"]
    assert all("==" in line and "+" not in line for line in required)
    mlmodel = Path(path, "MLmodel").read_text()
    assert "code: null" in mlmodel
    assert "pipelines" not in mlmodel.replace("inpaint-pipelines", "")
    assert sum(file.stat().st_size for file in Path(path).rglob("*")) < 4e6
    program = zipfile.ZipFile(Path(path, "data/model.pt2"))
    # sample_inputs is a zip of torch.save; the clean process makes MLflow check it
    pickles = [name for name in program.namelist() if program.read(name)[:1] == b"\x80"]
    assert pickles == []


PREDICT_WITHOUT_OUR_CODE = """
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


def example_inputs() -> dict[str, np.ndarray]:
    """float32 [B,5,H,W] for several batches and sizes, with NaN in the holes."""
    batches = {}
    for b, h, w in [(1, 33, 47), (3, 64, 64), (2, 130, 95)]:
        x = np.random.default_rng(h).random((b, 5, h, w), dtype=np.float32)
        x[:, 3:] = 0
        x[:, 3, h // 3 : h // 2, w // 3 : w // 2] = 1
        x[:, 4, ::7] = 1
        x[:, :3][np.repeat(x[:, 3:4], 3, axis=1) > 0] = np.nan
        batches[f"{b}x{h}x{w}"] = x
    return batches


def test_a_process_without_our_code_gets_the_same_pixels(
    store: MlflowStore, encoder: Model, edge_connect: Model, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", **example_inputs())  # type: ignore[arg-type]
    process = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            PREDICT_WITHOUT_OUR_CODE,
            str(tmp_path / "in.npz"),
            str(tmp_path / "out.npz"),
        ],
        cwd=tmp_path,
        env={**os.environ, **SAFE, "MLFLOW_TRACKING_URI": store.uri},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    outputs = np.load(tmp_path / "out.npz")
    for name, model in (("encoder", encoder), ("edges", edge_connect)):
        module = model.frozen_completion()
        for size, x in example_inputs().items():
            completed = outputs[f"{name}-{size}"]
            with torch.no_grad():
                expected = module(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(completed, expected, atol=1e-5, rtol=0)
            known = np.repeat(x[:, 3:4], 3, axis=1) == 0
            np.testing.assert_array_equal(completed[known], x[:, :3][known])


@pytest.fixture
def served(store: MlflowStore, tmp_path: Path) -> Iterator[str]:
    """The URL of `mlflow models serve`."""
    port = free_port()
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
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
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


def test_a_version_is_served_over_http(served: str, encoder: Model) -> None:
    x = np.nan_to_num(example_inputs()["1x33x47"])
    body = json.dumps({"inputs": x.tolist()}).encode()
    request = urllib.request.Request(f"{served}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        completed = np.array(json.load(response)["predictions"], np.float32)
    with torch.no_grad():
        expected = encoder.frozen_completion()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(completed, expected, atol=1e-5, rtol=0)
