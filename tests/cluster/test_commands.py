"""Every command of the command line and of the README, on one small finished run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from harness import RECIPE, Finished, Run, clean_environment

from pipelines.__main__ import main
from pipelines.reading import shipped_recipes

ROOT = Path(__file__).parents[2]
SHORT = ["train.checkpoint_every=10", "train.log_every=5", "evaluate.distance=null", "evaluate.count=8"]
SHORT += ["models.context_encoder.width=0.1", "models.context_encoder.train.steps={train: 10}"]
SHORT += ["models.edge_connect.train.steps={edge: 10, inpaint_canny: 0, inpaint: 10, joint: 0}"]


@pytest.fixture(scope="module")
def place(finished: Finished, photographs: Path) -> Run:
    """A working folder with `photos`, `photo.png`, `mask.png` and a finished run in `runs`."""
    run = finished.run
    (run.folder / "photos").symlink_to(photographs)
    photo = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    mask = np.zeros((90, 120), np.uint8)
    mask[30:50, 40:60] = 255
    cv2.imwrite(str(run.folder / "photo.png"), photo)
    cv2.imwrite(str(run.folder / "mask.png"), mask)
    return run


@pytest.fixture
def inpaint(
    place: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs the command line in this process, in the working folder: exit status and output."""
    monkeypatch.chdir(place.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        captured = capfd.readouterr()
        return int(end.value.code or 0), captured.out + captured.err

    return call


def readme_commands() -> list[str]:
    """The `inpaint` lines of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "inpaint" in line]


def test_the_readme_is_as_this_test_expects() -> None:
    assert len(readme_commands()) >= 12
    assert "_TABLE" not in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "command",
    [
        c
        for c in readme_commands()
        if c.split()[0] == "inpaint"
        and c.split()[1] not in ("run", "status", "train", "sweep", "submit", "services", "cluster")
    ],
)
def test_readme_command(command: str, inpaint: Callable[..., tuple[int, str]]) -> None:
    status, output = inpaint(*shlex.split(command)[1:])
    assert status == 0, output
    assert "Traceback" not in output


def test_readme_runs(place: Run, inpaint: Callable[..., tuple[int, str]]) -> None:
    """The runs of the README in one short version, and `train`, which finds everything finished afterwards."""
    short = [argument for value in SHORT for argument in ("--set", value)]
    for command in ("run demo --set data.source=photos", "train demo --set data.source=photos"):
        assert any(command in line for line in readme_commands())
        status, output = inpaint(*shlex.split(command), *short)
        assert status == 0, output
    assert "found finished" in output
    look = "inpaint status demo --set data.source=photos"
    assert look in readme_commands()
    status, output = inpaint(*shlex.split(look)[1:], *short)
    assert status == 0, output
    assert output.count("finished") >= 7


@pytest.mark.timeout(600)
def test_readme_sweep(inpaint: Callable[..., tuple[int, str]]) -> None:
    """The sweep of the README in a short version, and `run`, which goes on from it to a registered version."""
    model = "models.edge_connect-canny"
    short = ["data.size=32", "data.margin=4", "data.val=0.4", "train.batch=4", "evaluate.distance.crops=32"]
    short += ["evaluate.count=8", f"{model}.width=0.08", f"{model}.residual_blocks=1", f"{model}.lambda_p=0"]
    short += [f"{model}.lambda_s=0", f"{model}.train.steps={{inpaint_canny: 5}}", "train.checkpoint_every=5"]
    short += ["train.log_every=5", "sweep.fields={edges.sigma: [1, 2]}", "sweep.train={}"]
    options = [argument for value in short for argument in ("--set", value)]
    for command in (
        "sweep edge_connect-sigma --set data.source=photos",
        "run edge_connect-sigma --set data.source=photos",
    ):
        assert any(command in line for line in readme_commands())
        status, output = inpaint(*shlex.split(command), *options)
        assert status == 0, output
    assert "the sweep was found finished" in output
    assert "registered models:/edge_connect-canny/1 (champion" in output
    status, output = inpaint("status", "edge_connect-sigma", "--set", "data.source=photos", *options)
    assert (status, output.count("trial 0"), output.count("trial 1")) == (0, 1, 1)
    status, output = inpaint("models", "show", "edge_connect-canny@champion")
    assert "edge_connect-sigma" in output  # the sweep that its values are from


def test_readme_notebook(place: Run) -> None:
    """The README's Python, and what it says that comes out."""
    (notebook,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    check = """
assert filled.dtype == np.uint8 and filled.shape == photo.shape
assert (filled == photo)[~mask].all() and (filled != photo)[mask].any()
assert {"context_encoder", "edge_connect"} <= set(frame["name"])
assert frame["center/psnr_rgb_hole"].is_monotonic_decreasing
assert not {"ray"} & set(__import__("sys").modules)
"""
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", notebook + check],
        cwd=place.folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "center/psnr_rgb_hole" in done.stdout


def test_the_registry_through_the_command_line(inpaint: Callable[..., tuple[int, str]]) -> None:
    status, output = inpaint("models", "list", "--json")
    assert {row["name"] for row in json.loads(output)} >= set(RECIPE["models"])
    status, output = inpaint("models", "show", "context_encoder@champion")
    assert status == 0
    assert "psnr_rgb_hole" in output
    status, output = inpaint("models", "rollback", "nobody")
    assert (status, output.count("\n")) == (1, 1)
    status, output = inpaint("models", "promote", "context_encoder/99")
    assert (status, output.count("\n")) == (1, 1)


def test_fill_keeps_every_known_pixel(place: Run, inpaint: Callable[..., tuple[int, str]]) -> None:
    for model in RECIPE["models"]:
        status, output = inpaint(
            "fill", f"models:/{model}@champion", "photo.png", "mask.png", "--out", f"{model}.png"
        )
        assert status == 0, output
        before, after = (cv2.imread(str(place.folder / name)) for name in ("photo.png", f"{model}.png"))
        known = cv2.imread(str(place.folder / "mask.png"), cv2.IMREAD_GRAYSCALE) == 0
        assert np.array_equal(before[known], after[known])
        assert not np.array_equal(before, after)


def test_a_checkpoint_folder_is_a_model_too(place: Run, inpaint: Callable[..., tuple[int, str]]) -> None:
    folder = next(place.storage.glob("work/*-train-context_encoder/a*"))
    status, output = inpaint("fill", str(folder), "photo.png", "mask.png", "--out", "c.png")
    assert status == 0, output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "dema"], "did you mean demo"),
        (["run", "demo", "--set", "data.sizee=3"], "did you mean size"),
        (["sweep", "demo"], "demo has no sweep block"),
        (["sweep", "edge_connect-sigma", "--set", "sweep.fields={edges.sigma: [-1]}"], "edges.sigma = -1"),
        (["sweep", "edge_connect-sigma", "--set", "sweep.fields={edges.sigma: []}"], "is empty"),
        (["run", "demo", "--set", "data.source=/nowhere/at/all"], "/nowhere/at/all"),
        (["run", "demo", "--set", "data.source=empty"], "empty"),
        (["run", "demo", "--storage", "/proc/nothing"], "/proc/nothing"),
        (["run", "demo", "--storage", "s3://bucket/x"], "MLFLOW_TRACKING_URI"),
        (["run", "demo", "--tracking", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["fill", "models:/edge_connect@champoin", "photo.png", "mask.png", "--out", "x.png"], "champion"),
        (
            ["fill", "models:/edge_connect@champion", "photo.png", "nomask.png", "--out", "x.png"],
            "nomask.png",
        ),
        (
            ["evaluate", "models:/nobody@champion", "--images", "photos", "--masks", "center", "--out", "o"],
            "nobody",
        ),
        (["edges", "photos", "--sigma", "2"], "inpaint shard"),
        (["shard", "empty", "out"], "empty"),
    ],
)
def test_errors_are_one_line_that_names_the_culprit(
    place: Run, inpaint: Callable[..., tuple[int, str]], arguments: list[str], words: str
) -> None:
    (place.folder / "empty").mkdir(exist_ok=True)
    status, output = inpaint(*arguments)
    assert status == 1
    lines = [line for line in output.splitlines() if line.startswith("inpaint ")]
    assert len(lines) == 1, output
    assert words in lines[0]
    assert "Traceback" not in output


def test_every_command_has_help_with_an_example_and_answers_at_once() -> None:
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipelines", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "ray", "mlflow", "pydantic"} & set(
        re.findall(r"\| +(\w+)$", listed.stderr, re.MULTILINE)
    )
    names = re.findall(r"^    (\w+) ", listed.stdout, re.MULTILINE)
    assert {"run", "plan", "status", "shard", "edges", "train", "evaluate", "fill", "models"} <= set(names)
    for name in names:
        text = subprocess.run(
            [sys.executable, "-m", "pipelines", name, "--help"], capture_output=True, text=True, check=True
        )
        assert f"example: inpaint {name}" in text.stdout


def test_there_are_recipes() -> None:
    assert {"demo", "facades"} <= set(shipped_recipes())
