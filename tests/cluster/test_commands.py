"""The command line on one small finished run: what the commands print, keep and refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient

from pipelines.cli.main import main
from pipelines.recipe.load import shipped_recipes
from support.cluster_harness import (
    RECIPE,
    ROOT,
    CliRun,
    ListenerWatch,
    clean_environment,
)
from support.pages import DOCS, blocks


@pytest.fixture(scope="module", autouse=True)
def watch() -> Iterator[ListenerWatch]:
    """Watches the processes started by the commands; this process imported Ray earlier, like a notebook."""
    with ListenerWatch(os.getpid()) as watch:
        yield watch
    assert watch.exposed == set()


@pytest.fixture
def inpaint(
    place: CliRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs a command in this process, in the working folder; returns exit status and output."""
    monkeypatch.chdir(place.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        captured = capfd.readouterr()
        return int(exit_info.value.code or 0), captured.out + captured.err

    return call


def test_train_and_status_reuse_a_finished_run(
    place: CliRun, inpaint: Callable[..., tuple[int, str]]
) -> None:
    status, output = inpaint("train", *place.recipe_arguments)
    assert status == 0, output
    assert "all steps are cached" in output
    status, output = inpaint("status", *place.recipe_arguments)
    assert status == 0, output
    assert output.count("finished") >= 7


def test_a_model_is_used_without_ray(place: CliRun) -> None:
    """The Python code of the page on filling, and a search."""
    (documented,) = (block.text for block in blocks(DOCS / "filling.md") if block.language == "python")
    check = """
assert filled.dtype == np.uint8 and filled.shape == photo.shape
assert (filled == photo)[~mask].all() and (filled != photo)[mask].any()
frame = registry.search(where="center/psnr > 5", order_by="center/psnr desc", tracking_uri=tracking_uri)
assert {"context_encoder", "edge_connect"} <= set(frame["name"])
assert frame["center/psnr_rgb_hole"].is_monotonic_decreasing
assert not {"ray"} & set(__import__("sys").modules)
"""
    process = subprocess.run(
        [sys.executable, "-c", documented + check],
        cwd=place.folder,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def test_registry_commands(inpaint: Callable[..., tuple[int, str]]) -> None:
    status, output = inpaint("models", "list", "--json")
    assert {row["name"] for row in json.loads(output)} >= set(RECIPE["models"])
    status, output = inpaint("models", "show", "context_encoder@champion")
    assert status == 0
    assert "psnr_rgb_hole" in output
    status, output = inpaint("models", "rollback", "nobody")
    assert (status, output.count("\n")) == (1, 1)
    status, output = inpaint("models", "promote", "context_encoder/99")
    assert (status, output.count("\n")) == (1, 1)


def test_fill_keeps_every_known_pixel(place: CliRun, inpaint: Callable[..., tuple[int, str]]) -> None:
    for model in RECIPE["models"]:
        status, output = inpaint(
            "fill", f"models:/{model}@champion", "photo.png", "mask.png", "--out", f"{model}.png"
        )
        assert status == 0, output
        before, after = (cv2.imread(str(place.folder / name)) for name in ("photo.png", f"{model}.png"))
        known = cv2.imread(str(place.folder / "mask.png"), cv2.IMREAD_GRAYSCALE) == 0
        assert np.array_equal(before[known], after[known])
        assert not np.array_equal(before, after)


def test_a_copied_and_moved_storage_keeps_its_cached_steps(
    place: CliRun, inpaint: Callable[..., tuple[int, str]]
) -> None:
    """A copy is told from the original; after `adopt` and a move, its steps are cached and its models are found."""
    shutil.copytree(place.storage, place.folder / "copy")
    fill = [
        "fill",
        "models:/context_encoder@champion",
        "photo.png",
        "mask.png",
        "--out",
        "moved.png",
        "--tracking-uri",
    ]
    database = "sqlite:///{}/mlflow.db"
    status, output = inpaint(*fill, database.format("copy"))
    assert status == 1
    assert f"storage {place.folder}/copy was created as {place.storage}, and both exist" in output
    (adopt,) = re.findall(r"inpaint (models adopt --tracking-uri .*)", output)
    assert inpaint(*shlex.split(adopt))[0] == 0
    (place.folder / "copy").rename(place.folder / "moved")
    status, output = inpaint("run", *place.recipe_arguments, "--storage", "moved")
    assert status == 0, output
    assert "all steps are cached" in output
    assert f"storage {place.folder}/moved was created as {place.folder}/copy" in output
    (show,) = re.findall(r"inpaint (models show .*)", output)
    status, output = inpaint(*shlex.split(show), "--json")
    assert status == 0, output
    assert f"{place.folder}/moved/mlflow-artifacts/" in json.loads(output)["samples"][0]
    status, output = inpaint(*fill, database.format("moved"))
    assert status == 0, output
    assert not (place.folder / "copy").exists()

    # if a version was deleted, only its registration runs again
    client = MlflowClient(database.format("moved"))
    champion = client.get_model_version_by_alias("context_encoder", "champion").version
    client.delete_model_version("context_encoder", str(champion))
    status, output = inpaint("plan", *place.recipe_arguments, "--storage", "moved")
    assert status == 0, output
    states = dict(re.findall(r"^(\S+) +(finished|to run)", output, re.MULTILINE))
    assert len(states) == 7
    assert [name for name, state in states.items() if state == "to run"] == ["register-context_encoder"]


def test_damaged_shards_are_named_and_repaired(
    place: CliRun, inpaint: Callable[..., tuple[int, str]]
) -> None:
    (shards,) = place.storage.glob("work/*-shard/stable")
    shutil.copytree(shards, place.folder / "damaged")
    tars = sorted((place.folder / "damaged").glob("train-*.tar"))
    contents = [tar.read_bytes() for tar in tars[:2]]
    tars[0].write_bytes(contents[0][:3000] + bytes([contents[0][3000] ^ 1]) + contents[0][3001:])
    tars[1].unlink()
    status, output = inpaint("data", "check", "damaged")
    assert status == 1, output
    assert all(tar.name in output for tar in tars[:2])
    assert "--repair" in output
    status, output = inpaint("data", "check", "damaged", "--repair", "--json")
    assert status == 0, output
    result, _ = json.JSONDecoder().raw_decode(output, output.index("{"))
    assert {found["shard"] for found in result["findings"]} == {tar.name for tar in tars[:2]}
    assert [tar.read_bytes() for tar in tars[:2]] == contents


def test_fill_takes_a_checkpoint_folder(place: CliRun, inpaint: Callable[..., tuple[int, str]]) -> None:
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
        (["run", "demo", "--tracking-uri", "http://127.0.0.1:9"], "127.0.0.1:9"),
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
def test_errors_are_one_line_that_names_the_cause(
    place: CliRun, inpaint: Callable[..., tuple[int, str]], arguments: list[str], words: str
) -> None:
    (place.folder / "empty").mkdir(exist_ok=True)
    status, output = inpaint(*arguments)
    assert status == 1
    lines = [line for line in output.splitlines() if line.startswith("inpaint ")]
    assert len(lines) == 1, output
    assert words in lines[0]
    assert "Traceback" not in output


def test_help_has_an_example_and_imports_no_heavy_library() -> None:
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
        assert re.search(rf"\nexamples?:(?s:.*)\binpaint {name}\b", text.stdout)


def test_recipes_are_shipped() -> None:
    assert {"demo", "facades"} <= set(shipped_recipes())
