"""Folders for the state of clusters and services, and for Ray's files, short enough for its sockets.

A socket's path has at most 107 bytes, most of them Ray's.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

MAX_SOCKET_PATH = 107 if sys.platform.startswith("linux") else 103  # bytes of a socket's path
SESSION_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/")  # ends with a process id
SOCKET_NAME_BYTES = len("plasma_store")
DASHBOARD_SOCKET_BYTES = len("dash_UsageStatsHead")  # of the dashboard; a private Ray has none
FORKSERVER_BYTES = len("/pymp-12345678/listener-12345678")
HEAD_FOLDER_BYTES, NODE_FOLDER_BYTES = len("/inpaint-12345678/head"), len("/inpaint-12345678/node-999")
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class FolderError(RuntimeError):
    """No usable folder for Ray's files; one line with the remedy."""


def state_folder(kind: str) -> Path:
    """The folder for the state of what this user runs: `clusters` or `services`. It need not exist."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "inpaint" / kind


def private_ray_folder() -> tuple[str, str]:
    """The folder for a private Ray, and a note for the user or '': RAY_TMPDIR/ray or TMPDIR/ray, as in Ray itself; if they
    are unusable, a short folder that only this user can read. Raises FolderError.
    """
    folder, problem = _usual_folder(len("/ray") + SESSION_BYTES + SOCKET_NAME_BYTES)
    if not problem:
        return f"{folder}/ray", ""
    for base in SHORT_FOLDERS:
        with suppress(OSError):
            short_folder = f"{_make_user_folder(Path(base))}/ray"
            return short_folder, f"{problem}: Ray keeps its files in {short_folder}"
    raise _no_folder_error(problem)


def cluster_folder() -> tuple[Path, str]:
    """A new folder for the nodes of a local cluster, readable by this user only, and a note for the user or ''.

    Raises FolderError.
    """
    usual_folder, problem = _usual_folder(
        max(
            HEAD_FOLDER_BYTES + SESSION_BYTES + DASHBOARD_SOCKET_BYTES,
            NODE_FOLDER_BYTES + SESSION_BYTES + SOCKET_NAME_BYTES,
        )
    )
    for base in SHORT_FOLDERS if problem else (usual_folder,):
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="inpaint-", dir=base))
            return folder, f"{problem}: the cluster keeps its files in {folder}" if problem else ""
    raise _no_folder_error(problem or f"{usual_folder} cannot be written")


def forkserver_variables(folder: Path) -> dict[str, str]:
    """Variables with a short TMPDIR for the dashboard's processes, as Python's forkserver puts a socket into TMPDIR.

    Empty if TMPDIR is short enough.
    """
    length = len(os.fsencode(os.environ.get("TMPDIR", "")))
    return {"TMPDIR": str(folder)} if length > MAX_SOCKET_PATH - FORKSERVER_BYTES else {}


def _usual_folder(path_bytes: int) -> tuple[str, str]:
    """The folder from RAY_TMPDIR or TMPDIR, and why it is unusable or ''. path_bytes: of the longest path in it."""
    variable = next((key for key in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(key)), "")
    folder = os.path.abspath(os.environ[variable]) if variable else "/tmp"
    name = f"{variable}={folder}" if variable else folder
    if (folder_bytes := len(os.fsencode(folder))) > MAX_SOCKET_PATH - path_bytes:
        return (
            folder,
            f"{name} has {folder_bytes} bytes where Ray's sockets leave room for {MAX_SOCKET_PATH - path_bytes}",
        )
    error = _socket_error(folder)
    return folder, f"{name} cannot hold sockets ({error})" if error else ""


def _no_folder_error(problem: str) -> FolderError:
    return FolderError(
        f"{problem}, and no folder can be created in {', '.join(SHORT_FOLDERS)}: set RAY_TMPDIR to a short path"
    )


def _socket_error(folder: str) -> str:
    """Why no socket can be created in a folder, or '': permissions, a full disk, a file system without sockets.

    Creates the folder, as Ray would.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="ray-", dir=folder) as temporary,
            socket.socket(socket.AF_UNIX) as test_socket,
        ):
            test_socket.bind(f"{temporary}/s")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _make_user_folder(base: Path) -> str:
    """Create ray-UID in `base`, readable by this user only; under another name if that one is taken. Raises OSError."""
    path = base / f"ray-{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return tempfile.mkdtemp(prefix="ray-", dir=base)
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o700)
    return str(path)
