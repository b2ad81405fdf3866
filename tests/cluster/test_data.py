"""Sharding, edges and checks on a real Ray: killed workers, concurrent runs, photographs added later, repairs."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from data_prep.manifest import load_manifest
from data_prep.preprocess import ShardOptions
from data_prep.sources import bundled_photo
from data_prep.storage import Storage, open_storage
from data_prep.verify import Finding
from pipelines.cluster.session import ray_session
from pipelines.contracts import EdgesOutputs, ShardOutputs, StepKind
from pipelines.data.check import ShardCheck, check_shards, repair
from pipelines.data.shard_tasks import make_edge_tars, shard_photographs
from pipelines.durable.runner import run_workflow
from pipelines.pipeline import SHARD_ID, build_workflow, edges_id
from pipelines.recipe.load import parse_recipe
from support.cluster_harness import RECIPE, kill_processes, process_tree, wait_for

PHOTOS = 240


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 photographs of 320 x 240 pixels."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for number in range(PHOTOS):
        photo = bundled_photo(("astronaut", "coffee", "hubble", "china")[number % 4])
        top, left = (int(rng.integers(length - side)) for length, side in zip(photo.shape, (240, 320)))
        cv2.imwrite(str(folder / f"{number:03d}.jpg"), photo[top : top + 240, left : left + 320, ::-1])
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session():
        yield


def checksums_without_edge_manifests(folder: Path) -> dict[str, str]:
    """sha256 per file; edges.json is left out because it names its storage."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "edges.json" and ".tmp-" not in p.name]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def workers(task: str) -> list[psutil.Process]:
    """The processes of this process's Ray that are running `task`."""
    return [p for p in process_tree(os.getpid()) if task in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_three_workers(work: Future, task: str, count_tars: Callable[[], int], seed: int) -> None:
    """Kill three workers in the middle of a task, one after another, at random numbers of finished tars."""
    rng, tars = random.Random(seed), 0
    for _ in range(3):
        tars += rng.randrange(1, 8)
        wait_for(lambda: work.done() or (count_tars() >= tars and workers(task)), f"{task} after {tars} tars")  # noqa: B023
        assert not work.done(), work.exception() or f"it ended before {tars} tars"
        kill_processes(workers(task)[:1])


def ignore_progress(*report: object) -> None:
    pass


@pytest.mark.usefixtures("cluster")
def test_killed_workers_do_not_change_the_output(many: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def shard(folder: Path) -> object:
        return shard_photographs(str(many), open_storage(folder), ShardOptions(size=128), 8, ignore_progress)

    def edges(folder: Path) -> None:
        out = open_storage(folder)
        make_edge_tars(
            out, {sigma: out.subfolder(f"edges/sigma-{sigma:g}") for sigma in (1.0, 2.0)}, ignore_progress
        )

    with ThreadPoolExecutor() as background:
        concurrent = [background.submit(shard, undisturbed) for _ in range(2)]  # into the same folder
        for work in concurrent:
            work.result()
        work = background.submit(shard, killed)
        kill_three_workers(work, "_write_partition", lambda: len(list(killed.glob("*.tar"))), 1)
        work.result()
        assert checksums_without_edge_manifests(killed) == checksums_without_edge_manifests(undisturbed)
        assert sum(load_manifest(open_storage(killed)).splits.values()) == PHOTOS

        edges(undisturbed)
        work = background.submit(edges, killed)
        kill_three_workers(work, "_write_edge_tars", lambda: len(list(killed.glob("edges/sigma-1/*.tar"))), 2)
        work.result()
        assert checksums_without_edge_manifests(killed) == checksums_without_edge_manifests(undisturbed)


@pytest.mark.usefixtures("cluster")
def test_photographs_added_later_only_add_their_own_tars(many: Path, tmp_path: Path) -> None:
    """The next shard and edges steps reuse the tars of the previous ones."""
    recipe = json.loads(json.dumps(RECIPE)) | {"name": "grown", "storage": str(tmp_path / "runs")}
    recipe["data"]["source"] = str(tmp_path / "source")
    (tmp_path / "source").mkdir()
    inodes: list[dict[str, dict[str, int]]] = []
    for photos in (48, 60):
        for path in sorted(many.iterdir())[:photos]:
            (tmp_path / "source" / path.name).unlink(missing_ok=True)
            (tmp_path / "source" / path.name).symlink_to(path)
        results = run_workflow(build_workflow(parse_recipe(recipe), last_kind=StepKind.EDGES))
        shards, edges = results.of(SHARD_ID, ShardOutputs), results.of(edges_id(1.5), EdgesOutputs)
        assert sum(shards.splits.values()) == photos
        folders = (shards.folder, edges.folder)
        by_folder = [
            {p.name: p.stat().st_ino for p in (tmp_path / "runs" / f).glob("*.tar")} for f in folders
        ]
        inodes.append(dict(zip(("photographs", "edges"), by_folder)))
    before, after = inodes
    for kind in ("photographs", "edges"):
        assert after[kind].items() > before[kind].items()  # hard links to the same files
    assert before["edges"].keys() == before["photographs"].keys()
    assert after["edges"].keys() == after["photographs"].keys()


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """48 crops of the bundled photographs, one of them twice, and a text file."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(48):
        photo = bundled_photo(("astronaut", "coffee", "china")[number % 3])
        top, left = (int(rng.integers(length - 64)) for length in photo.shape[:2])
        cv2.imwrite(str(folder / f"{number:02d}.png"), photo[top : top + 64, left : left + 64, ::-1])
    (folder / "49.png").write_bytes((folder / "07.png").read_bytes())
    (folder / "notes.txt").write_text("not a photograph")
    return folder


def run_check(out: Storage, sigmas: Sequence[float] = ()) -> tuple[ShardCheck, list[Finding]]:
    check = ShardCheck.load(out, sigmas)
    return check, check.check_manifests() + check_shards(check, ignore_progress)


def damage(shards: Path, tars: list[str], unique: str) -> None:
    """A flipped byte, a truncated tar, missing ones, an index and edges in another order, a missing edges.json."""
    flipped = bytearray((shards / tars[0]).read_bytes())
    flipped[700] ^= 1
    (shards / tars[0]).write_bytes(flipped)
    (shards / tars[1]).write_bytes((shards / tars[1]).read_bytes()[:3000])
    (shards / tars[2]).unlink()
    (shards / unique).unlink()
    index = json.loads((shards / tars[3].replace(".tar", ".json")).read_text())
    index["keys"].reverse()
    (shards / tars[3].replace(".tar", ".json")).write_text(json.dumps(index))
    (shards / "edges/sigma-1" / tars[5]).write_bytes((shards / "edges/sigma-1" / tars[0]).read_bytes())
    (shards / "edges/sigma-1" / tars[4]).unlink()
    (shards / "edges/sigma-2.5/edges.json").unlink()


@pytest.mark.usefixtures("cluster")
def test_a_repair_restores_every_byte(photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    out = open_storage(shards)
    shard_photographs(str(photos), out, ShardOptions(size=48, val=0, test=0), 8, ignore_progress)
    make_edge_tars(out, {s: out.subfolder(f"edges/sigma-{s:g}") for s in (1.0, 2.5)}, ignore_progress)
    intact = checksums(shards)
    assert run_check(out)[1] == []

    (unique,) = (path.name for path in shards.glob("*-unique.tar"))
    tars = sorted(path.name for path in shards.glob("*.tar") if path.name != unique)
    damage(shards, tars, unique)
    damaged = checksums(shards)
    check, findings = run_check(out)
    named = {(finding.shard, finding.sigma) for finding in findings}
    photographs = {(name, None) for name in (*tars[:4], unique)}
    edges = {(tars[4], 1.0), (tars[5], 1.0), ("edges.json", 2.5)}
    assert named >= photographs | edges
    others = {name for name, _ in named - photographs - edges}
    assert others <= {tars[3]}  # its edges no longer match its order
    assert {finding.sigma for finding in run_check(out, [1.0])[1]} == {None, 1.0}
    assert checksums(shards) == damaged  # a check changes nothing

    record = json.loads((shards / "partitions/00000.json").read_text())
    removed = photos / record["names"][0]
    removed.rename(tmp_path / "aside")
    (photos / "later.png").write_bytes((photos / "08.png").read_bytes()[:-1])
    (reason,) = repair(check, findings, ignore_progress)
    assert f"no longer gives {removed.name}" in reason
    assert {name for name, digest in checksums(shards).items() if intact[name] != digest} == {tars[0]}

    (tmp_path / "aside").rename(removed)
    assert repair(*run_check(out), ignore_progress) == []
    assert run_check(out)[1] == []
    assert checksums(shards) == intact
