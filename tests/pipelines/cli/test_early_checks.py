"""Commands check their input and output paths before they import torch or MLflow: errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.path_checks import check_writable_file, check_writable_folder
from support.folders import as_unprivileged_user
from support.inpainting import hole_mask, photograph

MODEL = "models:/nobody@champion"
SCRIPT = """
import contextlib, io, json, sys
from pipelines.cli.main import main


results = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
    results.append([status, out.getvalue(), err.getvalue(), sorted({"torch", "mlflow", "ray"} & set(sys.modules))])
print(json.dumps(results))
"""
CASES = {
    "fill no.png mask.png --out out.png": "the photograph no.png cannot be read: No such file or directory",
    "fill photo.png no.png --out out.png": "the mask no.png cannot be read: No such file or directory",
    "fill photo.png mask.png --edges no.png --out out.png": "the drawing no.png cannot be read: No such file",
    "fill photo.png mask.png --frame 2 --out out.png": "--frame 2: photo.png has one frame, and the first is 1",
    "fill two.gif mask.png --out out.png": "two.gif has 2 frames: choose one with --frame N, 1 to 2",
    "fill text.png mask.png --out out.png": "text.png cannot be read as a photograph: not an image in a known format",
    "fill photo.png text.png --out out.png": "the mask text.png cannot be read: not an image in a known format",
    "fill folder mask.png --out out": "folder has no photographs",
    "fill photos folder --out out": "no photograph of photos has a mask in folder: the mask of a.png is a.png there",
    "fill photos no.png --out out": "the masks no.png do not exist: give a folder of masks, or one mask file for all",
    "fill photos mask.png --out text.png": "--out text.png is not a folder",
    "fill photos mask.png --out photos": "--out photos is the folder of the photographs: name another folder",
    "fill photos mask.png --edges mask.png --out out": "--edges mask.png goes with one photograph, and photos is a folder",
    "fill photo.png photos --out out.png": "photos is a folder of masks, and photo.png is one photograph: name its mask",
    "fill photo.png mask.png --out out.png --format png": "--format goes with a folder of photographs",
    "fill photo.png mask.png --out out.png --workers 2": "--workers goes with a folder of photographs",
    "fill photo.png mask.png --out out.gif": "--out out.gif: write a .png (or .tif, or .jpg)",
    "fill photo.png mask.png --out nowhere/out.png": "--out nowhere/out.png: the folder nowhere does not exist",
    "fill photo.png mask.png --out text.png/out.png": "the folder text.png is not a folder",
    "fill photo.png mask.png --out folder.png": "--out folder.png is a folder: name a file in it",
    "fill photo.png mask.png --out photo.png": "--out photo.png would overwrite an input",
    "fill photo.png mask.png --out linked.png": "--out linked.png would overwrite an input",
    f"fill photo.png mask.png --out {'x' * 300}.png": "cannot be written: File name too long",
    "fill photo.png mask.png --out /proc/out.png": "--out /proc/out.png: the folder /proc cannot be written to (",
    "evaluate --images photos --masks center --out text.png": "--out text.png is not a folder",
    "evaluate --images photos --masks center --out /proc/a/b": "the folder /proc cannot be written to (",
    "evaluate --images nowhere --masks center --out scores": "nowhere is not a folder; give a folder of photographs",
    "evaluate --images folder --masks center --out scores": "folder is empty; put photographs there",
    "models compare b/1 --out folder.png": "--out folder.png is a folder: name a file in it",
    "models compare b/1 --images nowhere": "nowhere is not a folder; give a folder of photographs",
    "models export --pt2 --out text.png/m.pt2": "--out text.png/m.pt2: the folder text.png is not a folder",
    "masks show center --out folder": "--out folder is a folder: name a file in it",
}


def test_paths_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    Image.fromarray(hole_mask()).save(tmp_path / "mask.png")
    frames = [Image.fromarray(photograph(seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "linked.png").symlink_to("photo.png")
    for name in ("folder", "folder.png", "photos"):
        (tmp_path / name).mkdir()
    Image.fromarray(photograph()).save(tmp_path / "photos" / "a.png")
    commands = []
    for text in CASES:
        words = text.split()
        position = {"fill": 1, "evaluate": 1, "models": 2, "masks": len(words)}[words[0]]
        name = "a" if words[0] == "models" else MODEL
        commands.append([*words[:position], *([] if words[0] == "masks" else [name]), *words[position:]])
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(commands),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(process.stdout.splitlines()[-1])
    for (text, words), (status, out, err, imported) in zip(CASES.items(), answers, strict=True):
        last = err.splitlines()[-1]
        assert (status, out) == (1, ""), text
        command = " ".join(text.split()[: 2 if text.startswith(("models", "masks")) else 1])
        assert last.startswith(f"inpaint {command}: "), text
        assert words in last, text
        assert imported == [], text
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))) == []


def test_a_path_check_changes_no_file(tmp_path: Path) -> None:
    existing = tmp_path / "there.png"
    existing.write_bytes(b"as it was")
    check_writable_file(existing, "--out")
    check_writable_file(tmp_path / "new.png", "--out")
    check_writable_file(tmp_path / "a" / "b" / "new.png", "--out", create_parents=True)
    check_writable_folder(tmp_path, "--out")
    check_writable_folder(tmp_path / "a" / "b", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]
    assert existing.read_bytes() == b"as it was"
    with pytest.raises(ValueError, match=r"the folder .*a does not exist"):
        check_writable_file(tmp_path / "a" / "new.png", "--out")


def test_missing_permissions_are_reported(opened: Path) -> None:
    closed = opened / "closed"
    closed.mkdir(mode=0o555)
    with as_unprivileged_user():
        with pytest.raises(ValueError, match="closed cannot be written to \\(Permission denied\\)"):
            check_writable_file(closed / "out.png", "--out")
        with pytest.raises(ValueError, match="Permission denied"):
            check_writable_folder(closed / "a", "--out")


def test_the_longest_allowed_name_is_written(tmp_path: Path) -> None:
    from pipelines.inference.fill import fill
    from support.inpainting import loaded_model

    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    Image.fromarray(hole_mask()).save(tmp_path / "mask.png")
    out = tmp_path / ("x" * 251 + ".png")
    fill(loaded_model(), tmp_path / "photo.png", tmp_path / "mask.png", out)
    assert np.asarray(Image.open(out)).shape == photograph().shape
