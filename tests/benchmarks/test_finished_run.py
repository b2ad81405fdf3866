"""How long the command line takes to see that there is nothing to do: a run whose 1,000 shards lie in a bucket."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from data_prep.storage import open_storage

SHARDS = 1000
RECIPE = {
    "name": "many",
    "data": {"size": 32, "format": "png", "shard_photos": 1},
    "train": {"batch": 8, "checkpoint_every": 10, "log_every": 10},
    "models": {
        "edge_connect": {
            "width": 0.08, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0,
            "train": {"steps": {"edge": 10, "inpaint_canny": 0, "inpaint": 10, "joint": 0}},
        },
    },
    "edges": {"sigma": 1.5},
    "evaluate": {"count": 4, "distance": None, "samples": 2},
}  # fmt: skip


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_what_is_finished_is_found_finished(
    gateway_s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        small = rng.integers(0, 256, (5, 5, 3), np.uint8)
        cv2.imwrite(str(photos / f"{number:04d}.png"), cv2.resize(small, (32, 32)))
    where = {"storage": f"{gateway_s3}/runs", "tracking": f"sqlite:///{tmp_path}/mlflow.db"}
    recipe = RECIPE | where | {"data": {**RECIPE["data"], "source": str(photos)}}  # type: ignore[dict-item]
    (tmp_path / "many.yaml").write_text(yaml.safe_dump(recipe))

    def inpaint(command: str) -> tuple[float, str]:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", command, "many.yaml"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return time.monotonic() - began, done.stdout

    first, said = inpaint("run")
    tars = [key for key, _ in open_storage(where["storage"]).list("work") if key.endswith(".tar")]
    assert len(tars) == 2 * SHARDS  # of photographs and of edges
    rows = [f"{'the first run':<28} {first:6.1f} s"]
    for command in ("run", "run", "status", "plan"):
        seconds, said = inpaint(command)
        rows.append(f"inpaint {command:<20} {seconds:6.1f} s")
        assert "everything was found finished" in said if command == "run" else "to run" not in said
    with capsys.disabled():
        print(f"\nA run of {SHARDS} shards and their edges in a bucket, once it is finished", *rows, sep="\n")
