"""A folder filled in Ray tasks: the same bytes as in one process, failures, and a process that dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from models import build_model
from pipelines.cli.main import main
from pipelines.inference import fill_tasks
from pipelines.inference.fill_folder import FillOutcome, FillSettings, fill_folder
from pipelines.inference.fill_tasks import ModelSource, RayFillRunner
from pipelines.inference.folder_plan import FillJob
from pipelines.registry import load_model
from pipelines.weights import CheckpointInfo, save_weights
from support.inpainting import photograph

COUNT = 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a checkpoint folder `model`, photographs and a mask that needs several tiles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("photos", "model"):
        Path(name).mkdir()
    torch.manual_seed(0)
    model = build_model("edge_connect", width=0.0625, residual_blocks=1)
    save_weights(
        Path("model"), model, {}, CheckpointInfo("edge_connect", vars(model.options), size=32, sigma=1.5)
    )
    for seed in range(COUNT):
        Image.fromarray(photograph(150, 200, seed)).save(f"photos/{seed}.png")
    mask = np.zeros((150, 200), bool)
    mask[20:50, 20:60] = mask[90:120, 140:190] = True
    Image.fromarray(mask).resize((400, 300)).save("mask.png")
    Path("photos/broken.png").write_bytes(b"no picture")
    return tmp_path


def written(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(name).glob("*.png")}


def test_tasks_write_the_same_bytes(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def inpaint(out: str, workers: int) -> list[str]:
        command = f"fill model photos mask.png --out {out} --workers {workers} --blend --max-tile-size 64"
        with pytest.raises(SystemExit) as end:
            main(command.split())
        assert end.value.code == 1
        return capfd.readouterr().out.splitlines()

    alone, in_tasks = inpaint("alone", 1), inpaint("tasks", 2)
    assert written("alone").keys() == {f"{seed}.png" for seed in range(COUNT)}
    assert written("tasks") == written("alone")
    assert alone[-1] == in_tasks[-1]
    assert "broken.png: " in alone[-1]
    assert "cannot be read as a photograph" in alone[-1]
    (pending,) = [line for line in inpaint("tasks", 2) if "were filled before" in line]
    assert pending == f"filled 0 photographs in tasks; {COUNT} were filled before"


def test_a_process_that_dies_fails_one_photograph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_task = fill_tasks._fill_task._function

    def dying(shared: tuple[ModelSource, FillSettings], job: FillJob) -> FillOutcome:
        if job.name == "3.png":
            os._exit(1)
        return fill_task(shared, job)

    model = load_model("model")
    expected = fill_folder(model, "photos", "mask.png", "alone")
    monkeypatch.setattr(fill_tasks, "_fill_task", ray.remote(num_cpus=1, max_retries=0)(dying))
    source = ModelSource.of(model, "model", "")
    runner = RayFillRunner(source, startup_seconds=-1.0)  # the first photograph in this process
    result = fill_folder(model, "photos", "mask.png", "tasks", run_jobs=runner)
    assert [name for name, _ in expected.failures] == ["broken.png"]
    assert [name for name, _ in result.failures] == ["3.png", "broken.png"]
    assert result.failures[0][1] == "its process died: killed, crashed, or out of memory"
    missing = {"3.png": written("alone")["3.png"]}
    assert written("tasks") | missing == written("alone")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert fill_folder(model, "photos", "mask.png", "tasks").filled == ("3.png",)
    assert written("tasks") == written("alone")
