"""A user's own model in one file, registered at run time, works with every command like the shipped models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from pipelines.__main__ import main
from support import tiny_model

RECIPE = {
    "name": "own",
    "data": {"source": "photos", "size": 32, "format": "png", "val": 0.25, "test": 0.25},
    "train": {"batch": 4, "steps": {"train": 2}, "checkpoint_every": 2, "log_every": 2},
    "models": {tiny_model.NAME: {}},
    "evaluate": {"max_photos": 4, "distance": None, "grid_rows": 2},
}
TESTS = Path(__file__).parents[1]


@pytest.fixture
def inpaint(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs a command in this process, in a folder with photographs and a recipe; returns its output."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(32):
        small = rng.integers(0, 256, (5, 5, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"photos/{number}.png"), cv2.resize(small, (40, 40)))
    cv2.imwrite(str(tmp_path / "mask.png"), np.pad(np.full((10, 10), 255, np.uint8), 15))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(RECIPE))
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # the workers' too
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)

    def call(command: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(command.split())
        captured = capfd.readouterr()
        assert not exit_info.value.code, captured.out + captured.err
        return captured.out

    return call


@pytest.mark.timeout(600)
def test_a_users_model_goes_through_the_whole_pipeline(
    inpaint: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "tiny            2 steps" in inpaint("plan own.yaml --photos 1000000")
    inpaint("run own.yaml")
    assert "all steps are cached" in inpaint("run own.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    (version,) = json.loads(inpaint("models show tiny --json"))["versions"]
    assert "champion" in version["aliases"]
    inpaint("fill models:/tiny@champion photos/0.png mask.png --out filled.png")
    hole = cv2.imread("mask.png", 0) > 0
    before, after = cv2.imread("photos/0.png"), cv2.imread("filled.png")
    assert np.array_equal(before[~hole], after[~hole])
    assert not np.array_equal(before[hole], after[hole])
    scores = inpaint(
        "evaluate models:/tiny@champion --images photos --masks center --max-photos 3 --no-baselines --out scores"
    )
    assert "tiny" in scores
    inpaint("models export tiny@champion --pt2 --out tiny.pt2")
    assert (tmp_path / "tiny.pt2").stat().st_size > 0
    assert json.loads(inpaint("models show tiny/1 --json"))["model"]["model"] == "tiny"
