"""Updates the artifact URIs in MLflow's SQLite file when its storage was moved; reads the file without MLflow.

MLflow stores absolute artifact URIs. A storage was moved or copied if they point to OLD/mlflow-artifacts and the file is
in NEW. If the artifacts exist only in NEW, all URIs are rewritten in one transaction. If they exist in both, only the
user knows which ones to use.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.uris import path_from_sqlite_url, sqlite_url
from pipelines.private import mlflow_tables as tables
from pipelines.private.mlflow_tables import ARTIFACTS_FOLDER
from pipelines.tracking.server import TrackingError, explain_mlflow_error


@dataclass(frozen=True)
class ArtifactFolders:
    """The two folders in which the artifacts of one artifact root may be, and the names of their subfolders."""

    old: Path
    new: Path
    recorded: frozenset[str]
    """Subfolders of runs and of models, relative to the root, that the database names."""
    models: frozenset[str]
    """Those of models, which must have files; a run need not have any."""

    @property
    def in_old(self) -> set[str]:
        return {name for name in self.recorded if (self.old / name).exists()}

    @property
    def in_new(self) -> set[str]:
        return {name for name in self.recorded if (self.new / name).exists()}


def relocate_if_moved(uri: str, for_writing: bool = False) -> None:
    """Rewrite the artifact URIs in the SQLite file at `uri` if its storage was moved, with a line on stderr.

    Does nothing for other URIs. Raises TrackingError in one line: the file cannot be read or is not a SQLite file, its
    artifacts are in two folders, or (`for_writing`) the folder with its artifacts does not exist.
    """
    path = path_from_sqlite_url(uri)
    if path is None or not path.exists():
        return
    moved = [folders for folders in _artifact_folders(path, uri) if not _is_same_folder(folders)]
    for folders in moved:
        if _classify(folders, for_writing) == "moved":
            count = rewrite_artifact_uris(path, folders)
            if count:
                print(
                    f"storage {folders.new.parent} was created as {folders.old.parent}: MLflow's artifact URIs now point "
                    f"to {folders.new} ({count} URIs rewritten)",
                    file=sys.stderr,
                    flush=True,
                )


def adopt_copy(uri: str) -> tuple[Path, int]:
    """Rewrite the artifact URIs of a copied storage to its own artifacts; returns the file and the number of URIs.

    Raises TrackingError in one line: not a SQLite file, or the artifacts are not beside it.
    """
    path = path_from_sqlite_url(uri)
    if path is None or not path.is_file():
        raise TrackingError(
            f"{uri} is not a SQLite file: give --tracking-uri sqlite:////folder/mlflow.db of the copy"
        )
    count = 0
    for folders in _artifact_folders(path, uri):
        if folders.old == folders.new:
            continue
        if missing := sorted(folders.models - folders.in_new):
            raise TrackingError(
                f"{folders.new} lacks artifacts that {path} names (such as {missing[0]}): copy {folders.old} there first"
            )
        count += rewrite_artifact_uris(path, folders)
    return path, count


def original_registry_uri(uri: str) -> str:
    """The URI under which a registry was created, without user and password; it stays when the storage is moved. Steps
    have it in their keys."""
    path = path_from_sqlite_url(uri)
    if path is not None and path.is_file():
        with suppress(tables.Error, TrackingError), _open_database(path, uri) as database:
            if name := tables.read_registry_name(database):
                return name
            for root in tables.artifact_roots(database):
                folders = ArtifactFolders(root, _default_artifacts(path), frozenset(), frozenset())
                if not _is_same_folder(folders):
                    return _registry_uri(root.parent / path.name)
    if path is not None and uri.startswith("sqlite:///"):
        return _registry_uri(path)
    return _without_credentials(uri)


def _registry_uri(path: Path) -> str:
    return _without_credentials(sqlite_url(path))


def _without_credentials(uri: str) -> str:
    """Must not change: it is part of step keys."""
    scheme, separator, location = uri.partition("://")
    return f"{scheme}{separator}{location.rpartition('@')[2]}"


def _classify(folders: ArtifactFolders, for_writing: bool) -> str:
    """Either "moved" or "elsewhere", if the artifacts are kept apart from the file. TrackingError: it may be either."""
    in_old, in_new = folders.in_old, folders.in_new
    storage, original = folders.new.parent, folders.old.parent
    if in_old & in_new or (not in_new and not in_old and folders.old.is_dir()):
        uri = shlex.quote(sqlite_url(storage / "mlflow.db"))
        raise TrackingError(
            f"storage {storage} was created as {original}, and both exist: use --storage {shlex.quote(str(original))}; "
            f"if {storage} is a copy to use on its own: inpaint models adopt --tracking-uri {uri}"
        )
    if in_old and in_new:
        quoted = [shlex.quote(str(path)) for path in (folders.old, folders.new)]
        raise TrackingError(
            f"storage {storage} was created as {original}, and MLflow has files in both: merge them with "
            f"cp -a {quoted[0]}/. {quoted[1]}/ and then mv {quoted[0]} {quoted[0]}-copied"
        )
    if in_old:
        return "elsewhere"
    if folders.models and not in_new:
        if for_writing:
            raise TrackingError(
                f"MLflow's files of storage {storage} are in {folders.old}, which does not exist: mount it, or restore its "
                f"files as {folders.new}"
            )
        return "elsewhere"
    return "moved"


def rewrite_artifact_uris(path: Path, folders: ArtifactFolders) -> int:
    """Replace the root of all artifact URIs in one transaction; returns their number. Raises TrackingError."""
    try:
        return tables.move_artifact_root(
            path, folders.old, folders.new, _registry_uri(folders.old.parent / path.name)
        )
    except tables.Error as error:
        raise TrackingError(
            f"storage {folders.new.parent} was created as {folders.old.parent}, and MLflow's artifact URIs cannot be "
            f"rewritten: {explain_mlflow_error(error, sqlite_url(path))}"
        ) from None


def _artifact_folders(path: Path, uri: str) -> list[ArtifactFolders]:
    """One entry per artifact root in the file."""
    entries = []
    new = _default_artifacts(path)
    try:
        with _open_database(path, uri) as database:
            for root in tables.artifact_roots(database):
                runs: set[str] = set()
                models: set[str] = set()
                if root != new:
                    run_folders, model_folders = tables.artifact_folders(database)
                    runs = {name for folder in run_folders if (name := _name_under(root, folder, 1))}
                    models = {name for folder in model_folders if (name := _name_under(root, folder, 2))}
                entries.append(ArtifactFolders(root, new, frozenset(runs | models), frozenset(models)))
    except tables.Error as error:
        raise TrackingError(explain_mlflow_error(error, uri)) from None
    return entries


def _name_under(root: Path, folder: Path, depth: int) -> str | None:
    """The folder of a run (RUN, depth 1) or a model (models/MODEL, depth 2), relative to the root."""
    try:
        parts = folder.relative_to(root).parts
    except ValueError:
        return None
    return "/".join(parts[:depth]) or None


def _default_artifacts(path: Path) -> Path:
    return path.parent / ARTIFACTS_FOLDER


def _is_same_folder(folders: ArtifactFolders) -> bool:
    """Whether old and new are the same folder, also through a link or a mount."""
    if folders.old == folders.new:
        return True
    for old, new in ((folders.old, folders.new), (folders.old.parent, folders.new.parent)):
        if old.is_dir() and new.is_dir():
            return os.path.samefile(old, new)
    return False


@contextmanager
def _open_database(path: Path, uri: str) -> Iterator[Any]:
    if path.is_dir():
        raise TrackingError(f"{uri} is a folder: MLflow's database is a file in it, such as {path}/mlflow.db")
    with ExitStack() as stack:
        try:
            database = stack.enter_context(tables.open_read_only(path))
        except tables.Error as error:
            raise TrackingError(explain_mlflow_error(error, uri)) from None
        yield database
