"""Fixtures of the cluster tests: real photographs under awkward names, and runs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import psutil
import pytest
from harness import Finished, Run, family, kill
from xdist.scheduler import LoadFileScheduling

from data_prep.sources import decode_photo, open_source

# longest first
ORDER = ("test_faults", "test_chain_kill", "test_commands", "test_sweep", "test_jobs", "test_data")
# in one process, for the run of `finished`, to which the second adds its own
TOGETHER = ("test_chain_kill", "test_commands")


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
    """72 real photographs under awkward names, and four files that are none."""
    folder = tmp_path_factory.mktemp("photographs")
    source = open_source("bundled", tile=96)
    for index, name in enumerate(source.names()[::4][:72]):
        photo = decode_photo(source.read(name))
        awkward = ["a b {}.png", "é{}.png", "..{}.png", "sub/deep.{}.png"][index % 4].format(index)
        path = folder / awkward
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", photo[..., ::-1])[1].tobytes())
    whole = (folder / "a b 0.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no photograph")
    (folder / "dot.png").write_bytes(cv2.imencode(".png", photo[:1, :1])[1].tobytes())
    return folder


@pytest.fixture(scope="session")
def finished(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An uninterrupted run of both models, shared by the tests that only look at one."""
    run = Run(tmp_path_factory.mktemp("finished"))
    run.recipe["data"]["source"] = str(photographs)
    assert run.finish() == 0, run.output
    return Finished(run, {model: run.weights(model) for model in run.recipe["models"]}, run.points())


@pytest.fixture
def make_run(photographs: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(name: str, **changes: object) -> Run:
        run = Run(tmp_path / name)
        run.recipe["data"]["source"] = str(photographs)
        run.recipe |= changes
        made.append(run)
        return run

    yield make
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    kill([member for process in mine for member in family(process.pid)])
