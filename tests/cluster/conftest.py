"""Fixtures of the cluster tests: real photographs with awkward names, and runs on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from xdist.scheduler import LoadFileScheduling

from data_prep.images import decode_photo
from data_prep.sources import open_source
from support.cluster_harness import DEMO, CliRun, FinishedDemo, kill_processes, process_tree, wait_for

# By default Ray's workers have a low priority (nice 15). Beside the other test process and the drivers they would
# starve, and tests that wait for them would time out.
os.environ.setdefault("RAY_worker_niceness", "0")

# longest first
ORDER = (
    "test_faults",
    "test_chain_kill",
    "test_commands",
    "test_reported_cases",
    "test_pages",
    "test_jobs",
    "test_sweep",
    "test_examples",
    "test_data",
)
# in one process, because they share the run of `finished`
TOGETHER = ("test_chain_kill", "test_commands", "test_reported_cases", "test_pages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))


class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "together" if Path(file).stem in TOGETHER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 real photographs with awkward names, a quarter of them in a linked folder; four unreadable files and a Mac's
    companion files."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "sub").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    (folder / "loop").symlink_to(".")
    source = open_source("bundled", tile_size=96)
    for index, name in enumerate(source.names()[::4][:72]):
        photo = decode_photo(source.read(name))
        file_name = ["a b {}.png", "é{}.png", "..{}.png", "sub/deep.{}.png"][index % 4].format(index)
        path = folder / file_name
        path.write_bytes(cv2.imencode(".png", photo[..., ::-1])[1].tobytes())
    png = (folder / "a b 0.png").read_bytes()
    (folder / "truncated.png").write_bytes(png[: len(png) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no photograph")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "._a b 0.png").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    (folder / "dot.png").write_bytes(cv2.imencode(".png", photo[:1, :1])[1].tobytes())
    return folder


@pytest.fixture(scope="session")
def finished(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedDemo:
    """A short version of the README's run of both models, in a folder with an awkward name that contains `photos`.

    For tests that only read a finished run. While it ran, the same command was started a second time.
    """
    run = CliRun(tmp_path_factory.mktemp("finished") / "r%20a?1", recipe_arguments=DEMO)
    (run.folder / "photos").symlink_to(photographs)
    driver = run.start(storage=False)  # the default, `runs`
    wait_for(lambda: any(run.storage.glob("leases/*")), "the lease of the whole run", driver)
    second = replace(run)
    second_status = second.finish(second.start(storage=False))
    assert run.finish(driver) == 0, run.output
    assert run.exposed_listeners == set()
    return FinishedDemo(run, driver.pid, second, second_status)


@pytest.fixture(scope="session")
def place(finished: FinishedDemo) -> CliRun:
    """The finished run. In its working folder: `photos`, a few of them in `few` with their masks in `masks` and one mask
    for all, `watermark.png`; `photo.png` and its `mask.png`."""
    run = finished.run
    for name in ("few", "masks"):
        (run.folder / name).mkdir()
    watermark = np.zeros((96, 96), np.uint8)
    watermark[60:80, 50:90] = 255
    cv2.imwrite(str(run.folder / "watermark.png"), watermark)
    for index, photograph in enumerate(sorted((run.folder / "photos").glob("a b *.png"))[:12]):
        (run.folder / "few" / photograph.name).symlink_to(photograph.resolve())
        cv2.imwrite(str(run.folder / "masks" / photograph.name), np.roll(watermark, -4 * index, axis=0))
    photo = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    mask = np.zeros((90, 120), np.uint8)
    mask[30:50, 40:60] = 255
    cv2.imwrite(str(run.folder / "photo.png"), photo)
    cv2.imwrite(str(run.folder / "mask.png"), mask)
    return run


@pytest.fixture
def make_run(photographs: Path, tmp_path: Path) -> Iterator[Callable[..., CliRun]]:
    runs: list[CliRun] = []

    def make(name: str, **changes: object) -> CliRun:
        run = CliRun(tmp_path / name)
        run.recipe["data"]["source"] = str(photographs)
        run.recipe |= changes
        runs.append(run)
        return run

    yield make
    processes = [
        p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]
    kill_processes([member for process in processes for member in process_tree(process.pid)])
