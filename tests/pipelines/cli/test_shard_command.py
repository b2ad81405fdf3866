"""What `inpaint shard` prints about a source. Partitions are written in this process, without Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import load_manifest
from data_prep.shards import write_partition
from data_prep.sources import open_source
from data_prep.storage import open_storage
from pipelines.cli.main import main
from pipelines.cluster import session
from pipelines.data import shard_tasks

Shard = Callable[..., tuple[int, str, str]]


def run_tasks_in_process(task: Any, shared: Any, items: Sequence[Any], *_: Any) -> Iterator[tuple[int, Any]]:
    source, out, options = shared
    return (
        (number, write_partition(source, partition, out, options)) for number, partition in enumerate(items)
    )


@pytest.fixture
def shard(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shard:
    """Runs `inpaint shard SOURCE out` in `tmp_path`: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "ray_session", lambda debug, job_name: contextlib.nullcontext())
    monkeypatch.setattr(shard_tasks, "run_tasks", run_tasks_in_process)

    def shard(source: str, *options: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["shard", source, "out", "--size", "64", *map(str, options)])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight real photographs."""
    folder, bundled = tmp_path / "photos", open_source("bundled", 64)
    folder.mkdir()
    for number, name in enumerate(bundled.names()[::80][:8]):
        (folder / f"img_{number}.png").write_bytes(bundled.read(name))
    return folder


def test_companions_do_not_count_as_rejects(folder: Path, shard: Shard, tmp_path: Path) -> None:
    for path in [*folder.iterdir()]:
        (folder / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    (folder / ".DS_Store").touch()
    status, output, errors = shard("photos", "--max-reject-fraction", 0)
    assert status == 0, errors
    assert (
        "  left out of the source: 9 companions (.DS_Store, ._img_0.png, ._img_1.png and 6 more)\n" in output
    )
    assert "0 rejects, 0 duplicates, 9 left out (manifest.json lists them)" in output
    assert sum(load_manifest(open_storage(tmp_path / "out")).splits.values()) == 8


def test_linked_folders_are_followed_and_left_out_files_are_listed(
    folder: Path, shard: Shard, tmp_path: Path
) -> None:
    source = tmp_path / "library"
    source.mkdir()
    for name in ("a", "b"):
        (source / name).symlink_to("../photos")
    (source / "gone").symlink_to("nowhere")
    os.mkfifo(source / "pipe.png")
    status, output, errors = shard("library", "--max-reject-fraction", 0)
    assert status == 0, errors
    for line in (
        "1 repeated folder (b/: the same folder as a/)",
        "1 broken link (gone: leads to nowhere)",
        "1 special file (pipe.png: a named pipe)",
    ):
        assert f"  left out of the source: {line}\n" in output
    assert sum(load_manifest(open_storage(tmp_path / "out")).splits.values()) == 8


def test_unprintable_names_are_printed_with_escapes(folder: Path, shard: Shard, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\x1b[31m\n.jpg")
    try:
        (folder / name).write_bytes(b"no photograph")
    except OSError:
        pytest.skip("this file system wants unicode names")
    status, output, errors = shard("photos")
    assert status == 0, errors
    assert r"  rejected caf\udce9\x1b[31m\n.jpg: not an image in a known format" in output
    (reject,) = load_manifest(open_storage(tmp_path / "out")).rejects
    assert reject.name == name  # unescaped, as the source knows it
    (tmp_path / "out" / "manifest.json").unlink()
    status, output, errors = shard("photos", "--max-reject-fraction", 0.01)
    assert status == 1
    assert r"1 of 9 files" in errors
    assert r"(caf\udce9\x1b[31m\n.jpg: not an image in a known format)" in errors


def test_a_source_of_companions_only_is_empty(shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "mac").mkdir()
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "mac" / name).touch()
    status, _, errors = shard("mac")
    assert status == 1
    assert "mac is empty: all of its files are left out, 2 companions (.DS_Store, Thumbs.db); put" in errors
