"""SQL on MLflow's SQLite files; no other module has any. Tables and columns as of MLflow 3.17.

Reads do without MLflow: its import takes longer than the rest of a run whose steps are all cached, and it migrates or
rejects a file that is only to be read. Writes happen in two cases: to set the journal mode of a file before MLflow fills
it, and to change the artifact paths of a moved storage, for which MLflow has no command.

Without these tables a storage cannot be moved, and a run with nothing to do imports MLflow. tests/test_private.py
checks that a database of the installed MLflow has them.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from data_prep.uris import UriError, file_url, path_from_file_url, sqlite_connect_uri

ARTIFACTS_FOLDER = "mlflow-artifacts"  # the folder of artifacts beside the file
REGISTRY_TAG = "inpaint.registry"  # experiment tag with the address at which the registry was created
LOCK_TIMEOUT = 30.0  # seconds to wait for another process that writes
SKIPPED_TABLES = (
    "metrics",
    "latest_metrics",
    "spans",
    "span_metrics",
    "trace_metrics",
)  # large, and without addresses

REQUIRED_COLUMNS = {
    "experiments": ("experiment_id", "artifact_location"),
    "experiment_tags": ("experiment_id", "key", "value"),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location", "lifecycle_stage"),
    "datasets": ("dataset_source_type", "dataset_source"),
    "model_versions": ("name", "version", "current_stage"),
    "model_version_tags": ("name", "version", "key", "value"),
}
"""table -> columns used by the statements below"""

REQUIRED_USER_COLUMNS = {"users": ("username", "password_hash")}
"""the same for the file of a server with users (mlflow.server.auth)"""

Error = sqlite3.Error


def use_write_ahead_log(path: Path) -> None:
    """Create the file if it is missing, and let readers read while one process writes. Raises Error."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("pragma journal_mode=WAL")


@contextmanager
def open_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection. Raises Error if the file cannot be opened or is not an SQLite file."""
    database = sqlite3.connect(sqlite_connect_uri(path), uri=True, timeout=LOCK_TIMEOUT)
    try:
        database.execute("select 1 from sqlite_master limit 1")
    except sqlite3.OperationalError:
        database.close()
        if not os.statvfs(path).f_flag & os.ST_RDONLY:
            raise
        # on a read-only file system a write-ahead log cannot be created, and nobody writes
        database = sqlite3.connect(f"{sqlite_connect_uri(path)}&immutable=1", uri=True)
        database.execute("select 1 from sqlite_master limit 1")
    except sqlite3.Error:
        database.close()
        raise
    with closing(database):
        yield database


def has_version(path: Path, name: str, version: str, step_key: str) -> bool:
    """Whether the registry in the file has this version, registered by the step with this key. Raises Error."""
    query = (
        "select 1 from model_versions v join model_version_tags t on v.name = t.name and v.version = t.version "
        "where v.name = ? and v.version = ? and v.current_stage != 'Deleted_Internal' "
        "and t.key = 'step_key' and t.value = ?"
    )
    with open_read_only(path) as database:
        return database.execute(query, (name, int(version), step_key)).fetchone() is not None


def read_admin(path: Path) -> tuple[bool, str | None]:
    """Whether the file has a table of users, and the password hash of the user `admin`, if there is one. Raises Error."""
    with closing(sqlite3.connect(path)) as database:
        if not database.execute("select 1 from sqlite_master where name = 'users'").fetchone():
            return False, None
        row = database.execute("select password_hash from users where username = 'admin'").fetchone()
    return True, row[0] if row else None


def read_registry_name(database: sqlite3.Connection) -> str | None:
    """The registry's name that `move_artifact_root` stored. Raises Error."""
    query = "select value from experiment_tags where key = ? order by experiment_id"
    row = database.execute(query, (REGISTRY_TAG,)).fetchone()
    return str(row[0]) if row else None


def artifact_roots(database: sqlite3.Connection) -> list[Path]:
    """The artifact folders of experiments that are named mlflow-artifacts; a user chose the others."""
    try:
        rows = database.execute("select distinct artifact_location from experiments").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):  # the file is new, or not MLflow's, and MLflow reports that
            return []
        raise
    paths = (_local_path(text) for (text,) in rows)
    return sorted({path for path in paths if path is not None and path.name == ARTIFACTS_FOLDER})


def artifact_folders(database: sqlite3.Connection) -> tuple[list[Path], list[Path]]:
    """The artifact folders of all runs, and of all models that are not deleted; none if the table is missing."""
    runs = _query_paths(database, "select artifact_uri from runs")
    models = _query_paths(
        database, "select artifact_location from logged_models where lifecycle_stage = 'active'"
    )
    return runs, models


def _query_paths(database: sqlite3.Connection, query: str) -> list[Path]:
    with suppress(sqlite3.OperationalError):  # an old release lacks the table
        return [path for (text,) in database.execute(query) if (path := _local_path(text))]
    return []


def _local_path(text: str | None) -> Path | None:
    if text and text.startswith("file:"):
        with suppress(UriError):
            return path_from_file_url(text)
    return Path(text) if text and text.startswith("/") else None


def move_artifact_root(path: Path, old_root: Path, new_root: Path, registry_name: str) -> int:
    """Replace the root of all artifact paths, in one transaction; returns the number of changed values.

    Stores `registry_name`, the name before the move, unless one is stored already. Returns 0 if another process was
    first. Raises Error.
    """
    pairs = [(file_url(old_root), file_url(new_root)), (str(old_root), str(new_root))]
    count = 0
    address = sqlite_connect_uri(path, "rw")
    with closing(sqlite3.connect(address, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None)) as database:
        database.execute("begin immediate")
        try:
            if old_root not in artifact_roots(database):
                return 0
            _store_registry_name(database, registry_name)
            for table, column in _text_columns(database):
                for before, after in pairs:
                    count += database.execute(
                        f'update "{table}" set "{column}" = ? || substr("{column}", ?) '
                        f'where "{column}" = ? or substr("{column}", 1, ?) = ?',
                        (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
                    ).rowcount
            count += _move_datasets(database, old_root.parent, new_root.parent)
            database.execute("commit")
        finally:
            if database.in_transaction:
                database.execute("rollback")
    return count


def _store_registry_name(database: sqlite3.Connection, name: str) -> None:
    if database.execute("select 1 from experiment_tags where key = ?", (REGISTRY_TAG,)).fetchone() is None:
        (first,) = database.execute("select min(experiment_id) from experiments").fetchone()
        row = (REGISTRY_TAG, name, first)
        database.execute("insert into experiment_tags (key, value, experiment_id) values (?, ?, ?)", row)


def _text_columns(database: sqlite3.Connection) -> list[tuple[str, str]]:
    """All text columns of MLflow's tables, whatever their names in this release."""
    tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
    columns = []
    for table in tables:
        if table not in SKIPPED_TABLES and not table.startswith(("sqlite_", "alembic_")):
            for _, column, kind, *_ in database.execute(f'pragma table_info("{table}")'):
                if "CHAR" in kind.upper() or "TEXT" in kind.upper():
                    columns.append((table, column))
    return columns


def _move_datasets(database: sqlite3.Connection, old: Path, new: Path) -> int:
    """Change the URIs of photographs and shards, which datasets hold as JSON."""
    query = "select rowid, dataset_source from datasets where dataset_source_type = 'inpaint shards'"
    count = 0
    for row, text in database.execute(query).fetchall():
        with suppress(ValueError, AttributeError):
            source = {
                key: f"{new}{uri.removeprefix(str(old))}" if str(uri).startswith(f"{old}/") else uri
                for key, uri in json.loads(text).items()
            }
            if source != json.loads(text):
                values = (json.dumps(source), row)
                database.execute("update datasets set dataset_source = ? where rowid = ?", values)
                count += 1
    return count
