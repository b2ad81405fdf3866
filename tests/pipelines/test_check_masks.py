"""Unusable masks are reported before anything starts: in runs, evaluations, comparisons and fills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.sources import bundled_photo
from data_prep.storage import open_storage
from pipelines.check_masks import check_masks, check_recipe_masks
from pipelines.cli import progress
from pipelines.recipe import Recipe
from pipelines.recipe.load import RecipeError, parse_recipe
from pipelines.registry.version_comparison import choose_photographs
from pipelines.sweeps.space import boundary_recipes
from pipelines.weights import CheckpointInfo, save_weights
from support.small_models import build_small

CommandLine = Callable[..., tuple[int, str, str]]
SIDE = 96


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photographs and masks: red and palette masks, masks of two classes, one without a hole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INPAINT_CACHE", str(tmp_path / "cache"))
    hole = np.zeros((SIDE, SIDE), bool)
    hole[30:60, 40:70] = True
    other = np.zeros_like(hole)
    other[70:80, 10:90] = True
    for folder in ("photos", "red", "classes", "black"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        crop = bundled_photo("astronaut")[number * 60 :, 100:][:SIDE, :SIDE, ::-1]
        cv2.imwrite(f"photos/{number}.png", crop)
    Image.fromarray(hole[..., None] * np.uint8((255, 0, 0))).save("red/a.png")
    voc = Image.fromarray(hole.astype(np.uint8) * 5)
    voc = Image.frombytes("P", voc.size, voc.tobytes())
    voc.putpalette([0] * 15 + [128, 0, 128])
    voc.save("red/b.png")
    for name in "ab":
        Image.fromarray((hole * 1 + other * 2).astype(np.uint8)).save(f"classes/{name}.png")
    Image.fromarray(np.uint8(255 * hole)).save("black/a.png")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save("black/b.png")
    return tmp_path


@pytest.fixture
def inpaint(workspace: Path, command_line: CommandLine) -> CommandLine:
    """Runs `inpaint` in the workspace with checkpoint folders `one` and `two`; returns (exit status, stdout, stderr)."""
    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        model = build_small("partial_conv")
        info = CheckpointInfo(model.name, vars(model.options), size=32, sigma=2.0)
        Path(name).mkdir()
        save_weights(Path(name), model, {}, info)
    return command_line


def test_evaluate_checks_its_masks(inpaint: CommandLine) -> None:
    command = ("evaluate", "one", "--images", "photos", "--out", "scores", "--no-baselines")
    status, out, _ = inpaint(*command, "--masks", "red")
    assert status == 0
    assert "exact" not in out
    status, out, error = inpaint("evaluate", "nowhere", *command[2:], "--masks", "black")
    assert (status, out) == (1, "")  # masks are checked before the model is loaded
    assert error.startswith("inpaint evaluate: mask b.png in ")
    assert "no hole: all of it is black" in error
    status, _, error = inpaint(*command, "--masks", "classes")
    assert (status, error.count("\n")) == (1, 1)
    assert "2 of 2 masks" in error
    assert "--hole VALUE" in error
    assert inpaint(*command, "--masks", "classes", "--hole", "2")[0] == 0
    assert "hole: 7 is in no mask of" in inpaint(*command, "--masks", "classes", "--hole", "7")[2]
    assert "applies to mask folders only" in inpaint(*command, "--masks", "center", "--hole", "7")[2]


def test_compare_checks_its_masks(inpaint: CommandLine) -> None:
    command = ("models", "compare", "one", "two", "--images", "photos", "--masks", "classes", "--json")
    status, _, error = inpaint(*command)
    assert status == 1
    assert "2 of 2 masks" in error
    status, out, _ = inpaint(*command, "--hole", 1)
    assert status == 0
    assert json.loads(out)["protocol"]["hole"] == ["1"]


def test_a_promotion_uses_the_masks_and_hole_values_of_the_protocol() -> None:
    metadata = {"protocol": {"masks": ["photos/masks"], "hole": ["2"]}}
    assert choose_photographs(metadata, "bundled", []).hole_values == ("2",)
    assert choose_photographs(metadata, "bundled", ["photos/others"]).hole_values is None
    assert choose_photographs(metadata, "bundled", ["photos/others"], ["1"]).hole_values == ("1",)


def test_fill_checks_its_mask(inpaint: CommandLine) -> None:
    command = ("fill", "one", "photos/0.png")
    photo = cv2.imread("photos/0.png")
    for mask in ("red/a.png", "red/b.png"):
        status, out, _ = inpaint(*command, mask, "--out", "out.png")
        assert status == 0
        assert "9.77 % hole" in out
        changed = np.argwhere((cv2.imread("out.png") != photo).any(2))
        assert changed.min(0).tolist() == [30, 40]
        assert changed.max(0).tolist() == [59, 69]
    status, _, error = inpaint(*command, "classes/a.png", "--out", "none.png")
    assert status == 1
    assert "classes/a.png: which of its values is the hole? It has the values 0 (" in error
    assert "--hole VALUE" in error
    status, out, _ = inpaint(*command, "classes/a.png", "--hole", 2, "--out", "out.png")
    assert "8.68 % hole" in out
    status, out, _ = inpaint(*command, "classes/a.png", "--hole", 2, "--hole", 1, "--out", "out.png")
    assert "18.45 % hole" in out
    status, _, error = inpaint(*command, "classes/a.png", "--hole", 1, "--hole", "red", "--out", "none.png")
    assert (status, Path("none.png").exists()) == (1, False)
    assert "--hole #ff0000 is not in the mask classes/a.png: it has the values 0 (" in error


def test_masks_show_checks_its_masks(inpaint: CommandLine) -> None:
    assert "mask a.png in" in inpaint("masks", "show", "classes", "--size", 96, "--count", 2)[2]
    status, out, _ = inpaint("masks", "show", "classes", "--hole", 1, "--size", 96, "--count", 2)
    assert status == 0
    assert "(hole: 1): the hole is 9.8% of the image" in out


def recipe(**changes: object) -> Recipe:
    raw = {"name": "small", "models": {"context_encoder": {"size": 32}}, "data": {"size": 32}}
    return parse_recipe({**raw, **changes})


def test_the_masks_of_a_recipe_are_read_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan_cache = open_storage(workspace / "runs")
    valid = recipe(masks={f"{workspace}/red": 1}, evaluate={"masks": [f"{workspace}/red"]})
    check_recipe_masks([valid], scan_cache)
    monkeypatch.setattr("data_prep.mask_folder.read_mask_and_matches", None)
    monkeypatch.setattr("data_prep.mask_folder.read_mask", None)
    check_recipe_masks([valid], scan_cache)  # fails if a mask is read again


def test_the_masks_of_a_recipe_are_checked(workspace: Path) -> None:
    scan_cache = open_storage(workspace / "runs")
    red, black, classes = (f"{workspace}/{name}" for name in ("red", "black", "classes"))
    invalid = {
        "^masks: mask b.png in .*black": {"masks": black},
        "^evaluate.masks: 2 of 2 .*evaluate: {hole: VALUE}$": {"evaluate": {"masks": ["center", classes]}},
        "^masks: hole: 3 is in no mask": {"masks": {classes: {"hole": 3}}},
        "^masks: 2 of 2 .*masks: {FOLDER: {hole: VALUE}}$": {
            "models": {
                "context_encoder": {"size": 32, "masks": classes},
                "other": {"name": "context_encoder"},
            }
        },
        "^masks: mask b.png": {"sweep": {"fields": {"masks": ["center", red, black]}}},
    }
    for words, changes in invalid.items():
        base = recipe(**changes)
        recipes = boundary_recipes(base, "masks") if base.sweep else [base]
        with pytest.raises(RecipeError, match=words):
            check_recipe_masks(recipes, scan_cache)
    valid = {"masks": {classes: {"hole": [1, 2]}}, "evaluate": {"masks": [classes], "hole": 2}}
    check_recipe_masks([recipe(**valid)], scan_cache)


def test_a_recipe_without_the_hole_option_keeps_its_step_key() -> None:
    assert "hole" not in recipe().evaluate.model_dump(mode="json")
    assert recipe(evaluate={"hole": 2}).evaluate.model_dump(mode="json")["hole"] == 2
    assert recipe(masks={"x/": {"band": [0, 1]}}).masks == {"x/": {"band": [0.0, 1.0]}}


def test_progress_is_shown_only_if_reading_takes_long(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.mask_reading_display() as report:
        check_masks(["red"], progress=report)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("INPAINT_CACHE", str(workspace / "other"))
    monkeypatch.setattr(progress, "MASK_DISPLAY_DELAY_S", -1.0)
    with progress.mask_reading_display(quiet=True) as report:
        check_masks(["red"], progress=report)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "masks                    1/2 (50 %)" in captured.err
    assert f"read in {workspace}/red" in captured.err


@pytest.mark.slow
def test_unusable_masks_stop_a_run_before_ray_starts(workspace: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "run", "context_encoder-small", "--storage", "runs"]
    sets = [f"masks={workspace}/black", "data.source=photos"]
    ray_folder = workspace / "ray"
    process = subprocess.run(
        [*command, *(word for value in sets for word in ("--set", value))],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_TMPDIR": str(ray_folder), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        f"inpaint run: masks: mask b.png in {workspace}/black: no hole: all of it is black, and white is the hole; "
        "repair or remove it"
    )
    assert "Ray" not in process.stderr
    assert not ray_folder.exists()
    assert not (workspace / "runs" / "work").exists()
