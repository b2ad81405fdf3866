"""What a version is: read without our code or pickle, by Python and over HTTP."""

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
from ports import free_port
from stores import Store

from models.base import Model
from pipelines.registry.versions import connected

SAFE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false"}


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
