"""How long `inpaint run`, `status` and `plan` take for a finished run with 1,000 shards in a bucket."""

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
    "data": {"size": 32, "format": "png", "partition_size": 1},
    "train": {"batch": 8, "checkpoint_every": 10, "log_every": 10},
    "models": {
        "edge_connect": {
            "width": 0.08, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0,
            "train": {"steps": {"edge": 10, "inpaint_canny": 0, "inpaint": 10, "joint": 0}},
        },
    },
    "edges": {"sigma": 1.5},
    "evaluate": {"max_photos": 4, "distance": None, "grid_rows": 2},
}  # fmt: skip


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_commands_on_a_finished_run(
    gateway_s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        small = rng.integers(0, 256, (5, 5, 3), np.uint8)
        cv2.imwrite(str(photos / f"{number:04d}.png"), cv2.resize(small, (32, 32)))
    uris = {"storage": f"{gateway_s3}/runs", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    recipe = RECIPE | uris | {"data": {**RECIPE["data"], "source": str(photos)}}  # type: ignore[dict-item]
    (tmp_path / "many.yaml").write_text(yaml.safe_dump(recipe))

    def inpaint(command: str) -> tuple[float, str]:
        start = time.monotonic()
        process = subprocess.run(
            [sys.executable, "-m", "pipelines", command, "many.yaml"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return time.monotonic() - start, process.stdout

    first_seconds, _ = inpaint("run")
    tars = [key for key, _ in open_storage(uris["storage"]).list("work") if key.endswith(".tar")]
    assert len(tars) == 2 * SHARDS  # of photographs and of edges
    rows = [f"{'the first run':<28} {first_seconds:6.1f} s"]
    for command in ("run", "run", "status", "plan"):
        seconds, output = inpaint(command)
        rows.append(f"inpaint {command:<20} {seconds:6.1f} s")
        assert "all steps are cached" in output if command == "run" else "to run" not in output
    with capsys.disabled():
        print(f"\nA run of {SHARDS} shards and their edges in a bucket, once it is finished", *rows, sep="\n")
