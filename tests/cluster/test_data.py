"""Sharding, edges and checks on a real Ray: workers killed, two runs at once, photographs that come later, repairs."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from harness import RECIPE, clean_environment, family, kill, wait_for

from data_prep.shards import load_manifest
from data_prep.sources import bundled_photo
from data_prep.storage import open_storage
from pipelines.cluster.session import ray_session
from pipelines.reading import parse_recipe
from pipelines.workflow import build_workflow

PHOTOS = 360


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """360 photographs of 320 x 240 pixels."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for number in range(PHOTOS):
        photo = bundled_photo(("astronaut", "coffee", "hubble", "china")[number % 4])
        top, left = (int(rng.integers(length - side)) for length, side in zip(photo.shape, (240, 320)))
        cv2.imwrite(str(folder / f"{number:03d}.jpg"), photo[top : top + 240, left : left + 320, ::-1])
    return folder


def inpaint(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == status, output
    return output


def sums(folder: Path) -> dict[str, str]:
    """Of all but the manifest, which names its storage."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "edges.json" and ".tmp-" not in p.name]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def workers(driver: subprocess.Popen[str], task: str) -> list[psutil.Process]:
    """The processes that run a task of this driver's Ray at this moment."""
    return [p for p in family(driver.pid) if task in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_some(driver: subprocess.Popen[str], task: str, done: Callable[[], int], seed: int) -> None:
    """Three workers in the middle of a task, one after another, at moments that the seed chooses."""
    rng, at = random.Random(seed), 0
    for _ in range(3):
        at += rng.randrange(1, 8)
        wait_for(lambda: done() >= at and workers(driver, task), f"{task} after {at} tars", driver)  # noqa: B023
        kill(workers(driver, task)[:1])


def test_killed_workers_change_nothing_and_repairs_bring_all_back(many: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    options = ("--size", 128, "--shard-photos", 8)
    first, second = (inpaint("shard", many, calm, *options) for _ in range(2))  # two at once, to one folder
    finish(first)
    finish(second)
    driver = inpaint("shard", many, killed, *options)
    kill_some(driver, "_make_slice", lambda: len(list(killed.glob("*.tar"))), 1)
    finish(driver)
    assert sums(killed) == sums(calm)
    assert sum(load_manifest(open_storage(killed))["splits"].values()) == PHOTOS

    finish(inpaint("edges", calm, "--sigma", 1, 2))
    driver = inpaint("edges", killed, "--sigma", 1, 2)
    kill_some(driver, "_write_edges", lambda: len(list(killed.glob("edges/sigma-1/*.tar"))), 2)
    finish(driver)
    assert sums(killed) == sums(calm)

    tars = sorted(killed.glob("train-*.tar"))
    data = bytearray(tars[3].read_bytes())
    data[3000] ^= 1
    tars[3].write_bytes(data)
    tars[5].unlink()
    (killed / "edges/sigma-2" / tars[7].name).write_bytes(b"cut")
    output = finish(inpaint("data", "check", killed), status=1)
    assert all(f"{tars[n].name}" in output for n in (3, 5, 7))
    assert "--repair" in output
    told = json.loads(finish(inpaint("data", "check", killed, "--repair", "--json")))
    assert {found["shard"] for found in told["findings"]} == {tars[n].name for n in (3, 5, 7)}
    assert sums(killed) == sums(calm)


def test_photographs_that_come_later_cost_their_own_tars_only(many: Path, tmp_path: Path) -> None:
    """The workflow's next shard and edges steps take over what the last ones made."""
    recipe = json.loads(json.dumps(RECIPE)) | {"name": "grown", "storage": str(tmp_path / "runs")}
    recipe["data"]["source"] = str(tmp_path / "source")
    (tmp_path / "source").mkdir()
    seen: list[dict[str, dict[str, int]]] = []
    with ray_session():
        for photos in (48, 60):
            for path in sorted(many.iterdir())[:photos]:
                (tmp_path / "source" / path.name).unlink(missing_ok=True)
                (tmp_path / "source" / path.name).symlink_to(path)
            workflow = build_workflow(parse_recipe(recipe), until="edges")
            values = workflow.run()
            assert sum(values["shard"]["splits"].values()) == photos
            folders = (values["shard"]["shards"], values["edges-sigma-1.5"]["edges"])
            found = [
                {p.name: p.stat().st_ino for p in (tmp_path / "runs" / f).glob("*.tar")} for f in folders
            ]
            seen.append(dict(zip(("photographs", "edges"), found)))
    before, after = seen
    for kind in ("photographs", "edges"):
        assert after[kind].items() > before[kind].items()  # links to the same files
    assert before["edges"].keys() == before["photographs"].keys()
    assert after["edges"].keys() == after["photographs"].keys()
