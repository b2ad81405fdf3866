"""Folders for Ray's files if the usual one is too long for sockets or not writable."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from pipelines.cluster import folders
from pipelines.cluster.folders import FolderError, cluster_folder, forkserver_variables, private_ray_folder

LONG = "slurm_jobdir_" * 6


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /tmp."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    path = tmp_path / "short"
    path.mkdir()
    monkeypatch.setattr(folders, "SHORT_FOLDERS", ("/nowhere/at/all", str(path)))
    return path


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_with_a_long_path_is_not_used(
    variable: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / LONG
    monkeypatch.setenv(variable, str(long))
    folder, note = private_ray_folder()
    assert folder == f"{short}/ray-{os.getuid()}/ray"
    assert mode(Path(folder).parent) == 0o700
    assert note.startswith(
        f"{variable}={long} has {len(str(long))} bytes where Ray's sockets leave room for 39"
    )
    assert note.endswith(f"Ray keeps its files in {folder}")
    assert private_ray_folder()[0] == folder
    cluster, note = cluster_folder()
    assert cluster.parent == short
    assert mode(cluster) == 0o700
    assert f"the cluster keeps its files in {cluster}" in note
    assert not long.exists()


def test_the_length_is_counted_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_socket_error", lambda folder: "")
    monkeypatch.setenv("TMPDIR", f"/tmp/{'é' * 17}")
    assert private_ray_folder() == (f"/tmp/{'é' * 17}/ray", "")
    monkeypatch.setenv("TMPDIR", f"/tmp/{'é' * 18}")
    assert "has 41 bytes" in private_ray_folder()[1]


def test_usable_folders_are_used() -> None:
    assert private_ray_folder() == ("/tmp/ray", "")
    folder, note = cluster_folder()
    assert folder.parent == Path("/tmp")
    assert not note
    folder.rmdir()


def test_ray_tmpdir_takes_precedence_and_empty_variables_are_ignored(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", f"/tmp/{LONG}")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert private_ray_folder() == ("/tmp/ray", "")
    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.setenv("TMPDIR", "")
    assert private_ray_folder() == ("/tmp/ray", "")


def test_a_relative_folder_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_socket_error", lambda folder: "")
    monkeypatch.chdir("/tmp")
    monkeypatch.setenv("TMPDIR", "x")
    assert private_ray_folder() == ("/tmp/x/ray", "")


@pytest.mark.parametrize("folder", ["/proc/nothing", "/dev/null", "/proc"])
def test_a_folder_that_is_not_writable(folder: str, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", folder)
    ray_folder, note = private_ray_folder()
    assert ray_folder.startswith(str(short))
    assert note.startswith(f"TMPDIR={folder} cannot hold sockets (")


def test_a_folder_that_cannot_hold_sockets(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some shared file systems, simulated here."""

    def bind(self: object, path: str) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders.socket, "socket", type("Socket", (socket.socket,), {"bind": bind}))
    ray_folder, note = private_ray_folder()
    assert ray_folder.startswith(str(short))
    assert note.startswith("/tmp cannot hold sockets (Operation not supported): Ray keeps its files in ")


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_files_of_other_users_are_not_touched(
    kind: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", f"/tmp/{LONG}")
    name, elsewhere = short / f"ray-{os.getuid()}", short / "elsewhere"
    if kind == "file":
        name.write_text("theirs")
    else:
        name.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir(mode=0o755)
    folder, _ = private_ray_folder()
    assert Path(folder).parent.parent == short
    assert Path(folder).parent not in (name, elsewhere)
    assert mode(Path(folder).parent) == 0o700
    assert kind != "file" or name.read_text() == "theirs"
    assert kind != "link" or (mode(elsewhere) == 0o755 and not any(elsewhere.iterdir()))


def test_a_folder_of_this_user_is_made_private(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"/tmp/{LONG}")
    name = short / f"ray-{os.getuid()}"
    name.mkdir()
    name.chmod(0o777)
    assert private_ray_folder()[0] == f"{name}/ray"
    assert mode(name) == 0o700


def test_without_a_usable_folder_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"/tmp/{LONG}")
    monkeypatch.setattr(folders, "SHORT_FOLDERS", ("/nowhere/at/all",))
    for make_folder in (private_ray_folder, cluster_folder):
        with pytest.raises(
            FolderError, match="no folder can be created in /nowhere/at/all: set RAY_TMPDIR to a short path"
        ):
            make_folder()


def test_pythons_forkserver_gets_a_short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert forkserver_variables(tmp_path) == {}
    monkeypatch.setenv("TMPDIR", "/" + "x" * 74)
    assert forkserver_variables(tmp_path) == {}
    monkeypatch.setenv("TMPDIR", "/" + "x" * 75)
    assert forkserver_variables(tmp_path) == {"TMPDIR": str(tmp_path)}
