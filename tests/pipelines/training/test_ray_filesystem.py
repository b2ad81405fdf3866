"""Our file system of a bucket, compared with Arrow's own S3 file system on the same objects."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow.fs as fs
import pytest

from data_prep.storage import open_storage
from pipelines.training.ray_filesystem import ray_storage_location
from support.faulty_proxy import faulty_proxy


def test_a_local_folder_is_a_path_without_a_file_system(tmp_path: Path) -> None:
    assert ray_storage_location(open_storage(tmp_path), "work/x") == (str(tmp_path / "work/x"), None)


def test_files_and_folders_are_those_of_arrows_s3_file_system(s3: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/runs")
    base, ours = ray_storage_location(storage, "work/x")
    assert base == "work/x"
    assert pickle.loads(pickle.dumps(ours)) == ours
    theirs = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    root = f"{s3.removeprefix('s3://')}/runs/"

    (tmp_path / "deep").mkdir()
    for name, size in (("state.pt", 3_000_000), ("deep/journal.json", 20), ("empty", 0)):
        (tmp_path / name).write_bytes(os.urandom(size))
    fs.copy_files(str(tmp_path), f"{base}/step-1", destination_filesystem=ours)
    with ours.open_output_stream(f"{base}/snapshot.json") as file:
        file.write(b"one")
        file.write(b"two")
    assert storage.read(f"{base}/snapshot.json") == b"onetwo"

    def entries(infos: list[fs.FileInfo]) -> set[tuple[str, fs.FileType, int | None]]:
        return {(info.path.removeprefix(root), info.type, info.size) for info in infos}

    for recursive in (False, True):
        listings = [
            entries(system.get_file_info(fs.FileSelector(f"{prefix}{base}", recursive=recursive)))
            for system, prefix in ((ours, ""), (theirs, root))
        ]
        assert listings[0] == listings[1]
        assert listings[0]
    paths = [f"{base}/step-1", f"{base}/step-1/state.pt", f"{base}/step-1/stat", base]
    assert entries(ours.get_file_info(paths)) == entries(
        theirs.get_file_info([root + path for path in paths])
    )
    with pytest.raises(FileNotFoundError):
        ours.get_file_info(fs.FileSelector(f"{base}/nothing"))
    assert ours.get_file_info(fs.FileSelector(f"{base}/nothing", allow_not_found=True)) == []

    copied = tmp_path / "back"
    fs.copy_files(f"{base}/step-1", str(copied), source_filesystem=ours)
    assert (copied / "state.pt").read_bytes() == (tmp_path / "state.pt").read_bytes()
    assert (copied / "deep/journal.json").read_bytes() == (tmp_path / "deep/journal.json").read_bytes()
    ours.move(f"{base}/snapshot.json", f"{base}/other.json")
    ours.delete_dir(f"{base}/step-1")
    assert [key for key, _ in storage.list()] == [f"{base}/other.json"]


def test_writes_wait_for_a_server_that_is_down(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        _, system = ray_storage_location(open_storage(f"{s3}/runs"), "work")
        with system.open_output_stream("work/a") as file:
            file.write(b"1")
        proxy.take_down(3)
        with system.open_output_stream("work/b") as file:
            file.write(b"2")
        assert system.open_input_stream("work/b").read() == b"2"
