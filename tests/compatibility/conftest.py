"""Fixtures of release 0.1.0: its storage, moved here, its answers and its computed numbers (make_release.py)."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compatibility.digests import of_machine
from pipelines.__main__ import main
from support.small_models import disable_torch_trace

FOLDER = Path(__file__).parent
ORIGINAL_FOLDER = "/tmp/inpaint-release-0.1.0"  # its path when the release made it

RunCommand = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Release:
    """The contents of the archive. The first access to the registry of the moved storage updates the paths in it."""

    folder: Path

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.storage / 'mlflow.db'}"

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    def answer(self, name: str) -> Any:
        """The release's recorded answer, with this folder as the path of its storage."""
        text = (self.folder / "said" / f"{name}.json").read_text()
        return json.loads(text.replace(ORIGINAL_FOLDER, str(self.folder)))

    def image(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(self.folder / "said" / f"{name}.png"))

    def copy_to(self, folder: Path) -> Release:
        """A copy in another folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Release(folder)


@pytest.fixture(scope="session")
def release_numbers() -> dict[str, Any]:
    """The numbers that the release computed."""
    computed: dict[str, Any] = json.loads((FOLDER / "release.json").read_text())
    return computed


@pytest.fixture(scope="session")
def same_machine(release_numbers: dict[str, Any]) -> bool:
    """Whether torch computes the same bits here as on the machine that the release's numbers are from."""
    return of_machine() == release_numbers["machine"]


@pytest.fixture
def same_bits(release_numbers: dict[str, Any], same_machine: bool) -> None:
    if not same_machine:
        pytest.skip(
            f"torch computes other bits here than {release_numbers['machine']['torch']} did for the release"
        )


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The unpacked archive. Tests must not open its registry: that would change it."""
    folder = tmp_path_factory.mktemp("archive")
    with tarfile.open(FOLDER / "release.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return Release(folder)


@pytest.fixture(scope="session")
def release(archive: Release, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The release for tests that only read."""
    return archive.copy_to(tmp_path_factory.mktemp("release"))


@pytest.fixture
def writable_release(archive: Release, tmp_path: Path) -> Release:
    """A copy of the release for a test that changes it."""
    return archive.copy_to(tmp_path / "release")


@pytest.fixture
def run_inpaint(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Runs `inpaint` in this process; returns exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def quiet_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        disable_torch_trace(patch)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
