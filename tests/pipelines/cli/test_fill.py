"""`inpaint fill` on folders: output, exit status, and the files that a killed command leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.base import Model
from pipelines.inference.fill_record import RECORD_FILE
from pipelines.inference.writing import TEMPORARY
from pipelines.weights import CheckpointInfo, save_weights
from support.inpainting import hole_mask, photograph

COUNT = 40


@pytest.fixture
def folder(tmp_path: Path, encoder: Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a checkpoint folder `encoder`, 40 photographs in `photos` and a mask."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "encoder"):
        Path(name).mkdir()
    save_weights(
        Path("encoder"), encoder, {}, CheckpointInfo("context_encoder", vars(encoder.options), size=32)
    )
    for seed in range(COUNT):
        Image.fromarray(photograph(seed=seed)).save(f"photos/{seed:02d}.png")
    Image.fromarray(hole_mask()).save("mask.png")
    return tmp_path


def written(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(name).glob("*.png")}


def test_a_folder_is_filled_with_a_summary(
    folder: Path, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    command = ("fill", "encoder", "photos", "mask.png", "--out", "filled")
    status, out, err = command_line(*command)
    assert (status, err) == (0, "")
    summary, seam = out.splitlines()[-2:]
    assert summary == f"filled {COUNT} photographs in filled"
    assert re.fullmatch(
        r"warning: \d\d\.png and \d+ more: a seam shows at the border .*; --blend hides it", seam
    )
    assert "fill" in out.splitlines()[0]
    assert "(100 %)" in out or "finished in" in out
    for seed in (0, COUNT - 1):
        filled = np.asarray(Image.open(f"filled/{seed:02d}.png"))
        np.testing.assert_array_equal(filled[~hole_mask()], photograph(seed=seed)[~hole_mask()])
        assert (filled[hole_mask()] != photograph(seed=seed)[hole_mask()]).any()

    Path("photos/99.png").write_text("no picture")
    status, out, err = command_line(*command)
    assert (status, err) == (1, "")
    assert out.splitlines()[-3:] == [
        f"filled 0 photographs in filled; {COUNT} were filled before",
        "1 photograph failed; the same command tries them again:",
        "  99.png: photos/99.png cannot be read as a photograph: not an image in a known format",
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_fill_resumes(folder: Path, command_line: Callable[..., tuple[int, str, str]]) -> None:
    assert command_line("fill", "encoder", "photos", "mask.png", "--out", "whole")[0] == 0
    arguments = ["fill", "encoder", "photos", "mask.png", "--out", "killed"]
    command = [sys.executable, "-m", "pipelines", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    kills = 0
    while not Path("killed").exists() or len(written("killed")) < COUNT // 2:
        before = len(written("killed"))
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(written("killed")) < before + COUNT // 4:
            time.sleep(0.002)
        process.kill()
        process.wait()
        kills += 1
        for data in written("killed").values():
            assert data.endswith(b"IEND\xaeB`\x82")
    assert 0 < kills < COUNT
    recorded = {json.loads(line)["out"] for line in Path("killed", RECORD_FILE).read_text().splitlines()}
    times = {name: os.stat(f"killed/{name}").st_mtime_ns for name in recorded}
    assert 0 < len(recorded) < COUNT
    status, out, _ = command_line(*arguments)
    assert status == 0
    assert f"; {len(recorded)} were filled before" in out
    assert written("killed") == written("whole")
    assert times == {name: os.stat(f"killed/{name}").st_mtime_ns for name in recorded}
    assert not list(Path("killed").glob(f"{TEMPORARY}*"))
