"""Messages for errors of libraries: the translated cause or the library's message, and what was being done."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_prep.storage import StorageError, open_storage
from pipelines.cli.main import main
from pipelines.errors import doing, error_text, explain_error, known_cause, user_message
from pipelines.registry import RegistryError, list_models
from pipelines.tracking.runs import Tracking, TrackingError, ensure_experiment
from pipelines.tracking.server import explain_mlflow_error


def catch(function: Callable[[], object], action: str = "") -> BaseException:
    with pytest.raises(Exception) as error, doing(action or "trying"):
        function()
    return error.value


def test_an_unknown_error_has_the_action_and_the_librarys_message() -> None:
    error = catch(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), "multiplying")
    message = user_message(error)
    assert message.startswith(
        "multiplying: RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"
    )
    assert message.endswith("(--debug shows where)")
    assert "\n" not in message
    assert (
        user_message(catch(lambda: {}["key"], "looking")) == "looking: KeyError: 'key' (--debug shows where)"
    )
    assert user_message(ValueError("our own words")) == "our own words"
    assert user_message(catch(lambda: open_storage("ftp://x"))).startswith("storage 'ftp://x'")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda folder: (folder / "no" / "x").write_bytes(b""), "no such file or folder"),
        (lambda folder: folder.write_bytes(b""), "it is a folder, not a file"),
        (lambda folder: (folder / "file" / "x").read_bytes(), "there is a file where a folder should be"),
        (lambda folder: (folder / ("n" * 300)).write_bytes(b""), "the name is too long"),
        (lambda folder: (folder / "circle").read_bytes(), "circle"),
        (lambda folder: Path("/proc/self/comm/x").mkdir(), "folder"),
        (lambda folder: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), "the disk is full"),
    ],
)
def test_os_errors_name_the_file_and_a_hint(
    function: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "circle").symlink_to("circle")
    message = explain_error(catch(lambda: function(tmp_path), "writing a picture"))
    assert text in message
    assert "Errno" not in message
    assert message.startswith("writing a picture: ")


def test_too_many_open_files_gets_a_hint(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("x", b"x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(tmp_path / "x", os.O_RDONLY)  # all lower descriptors are in use
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        error = catch(lambda: storage.read("x"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(error, StorageError)
    assert "too many open files; raise the limit of this process, for example with `ulimit -n 4096`" in str(
        error
    )


def test_temporary_paths_are_hidden(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sub" / "model.safetensors"
        message = error_text(catch(path.read_bytes))
        assert "sub/model.safetensors (a temporary copy)" in message
        assert folder not in message
        assert folder not in explain_error(catch(lambda: Path(folder).write_bytes(b"")))
    exported = OSError(f"cannot write {tmp_path}/.onnx-ab12_xyz/model.onnx")
    assert error_text(exported) == "cannot write model.onnx (a temporary copy)"
    hidden = OSError(f"cannot write {tmp_path}/.tmp-{'0a' * 16}.B3Fc")
    assert error_text(hidden) == f"cannot write {tmp_path}/(a file not yet published)"
    (tmp_path / "file").write_bytes(b"")
    for storage in (open_storage(tmp_path / "file"), open_storage("/proc/nothing")):
        with pytest.raises(StorageError, match="cannot write a file in") as error:
            storage.check_writable()
        assert ".tmp-" not in str(error.value)


def database(folder: Path, template: Path, revision: str) -> str:
    shutil.copy(template, folder / "changed.db")
    with closing(sqlite3.connect(folder / "changed.db")) as changed, changed:
        changed.execute("update alembic_version set version_num = ?", (revision,))
    return f"sqlite:///{folder / 'changed.db'}"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "not a SQLite file"),
        ("folder", "is a folder"),
        ("older", "by an older MLflow .* mlflow db upgrade sqlite:///"),
        ("newer", "by a newer MLflow"),
    ],
)
def test_an_unusable_database_is_explained(kind: str, words: str, tmp_path: Path, empty: Path) -> None:
    """By commands that write to MLflow and by those that read; neither reports an unreachable server."""
    (tmp_path / "text.db").write_text("this is text, and no database " * 100)
    address = {
        "text": lambda: f"sqlite:///{tmp_path / 'text.db'}",
        "folder": lambda: f"sqlite:///{tmp_path}",
        "older": lambda: database(tmp_path, empty, "c48cb773bb87"),
        "newer": lambda: database(tmp_path, empty, "ffffffffffff"),
    }[kind]()
    with pytest.raises(TrackingError, match=words) as error:
        ensure_experiment(Tracking(address, "any"))
    assert "does not answer" not in str(error.value)
    assert "\n" not in str(error.value)
    if kind != "folder":
        with pytest.raises(RegistryError, match=words) as error:
            list_models(address)
        assert "SQL" not in str(error.value).replace("SQLite", "")


def sqlite_error(folder: Path, kind: str) -> sqlite3.Error:
    path = folder / "some.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table t (x)")
    address, statement = {
        "locked": (f"file:{path}?mode=rw", "insert into t values (1)"),
        "readonly": (f"file:{path}?mode=ro", "insert into t values (1)"),
        "no table": (f"file:{path}?mode=rw", "select * from experiments"),
        "no database": (f"file:{path}?mode=rw", "select * from t"),
        "no folder": (f"file:{folder}/none/some.db", "select * from t"),
    }[kind]
    if kind == "no database":
        path.write_text("this is text, and no database " * 100)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        if kind == "locked":
            other.execute("begin exclusive")
        with (
            pytest.raises(sqlite3.Error) as error,
            closing(sqlite3.connect(address, 0, uri=True)) as database,
        ):
            database.execute(statement)
    return error.value


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("locked", "{} is locked by another process: try again"),
        ("readonly", "this user may not write {}: ask for"),
        ("no table", "{} lacks MLflow's tables"),
        ("no database", "{} is damaged or not a SQLite file"),
        ("no folder", "this user may not open {}, or its folder does not exist"),
    ],
)
def test_sqlites_messages_are_translated(kind: str, words: str, tmp_path: Path) -> None:
    """For any database, and for MLflow's with its address."""
    error = sqlite_error(tmp_path, kind)
    assert known_cause(error).startswith(words.format("the database"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert explain_mlflow_error(error, uri).startswith(words.format(f"MLflow's database {uri}"))


def test_messages_of_libraries_are_translated() -> None:
    message = known_cause(catch(lambda: __import__("no_such_package_of_anybody")))
    assert "the package no_such_package_of_anybody is not installed here" in message
    message = known_cause(catch(lambda: torch.empty(1 << 50)))
    assert "there is not enough memory" in message


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, "probably http://127.0.0.1:9"),
        ({"AWS_PROFILE": "nobody"}, "correct AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "{https}"}, "does not speak TLS"),
        ({"AWS_ACCESS_KEY_ID": ""}, "no credentials"),
    ],
)
def test_unreachable_buckets_get_a_hint(
    variables: dict[str, str], words: str, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("INPAINT_S3_RETRY_SECONDS", "0.1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        **variables,
    }
    for key, value in settings.items():
        if value:
            monkeypatch.setenv(key, value.format(https=server.replace("http:", "https:")))
        else:
            monkeypatch.delenv(key, raising=False)
    from data_prep.storage import s3_retry

    s3_retry.client_for.cache_clear()
    try:
        with pytest.raises(StorageError, match=words) as error:
            list(open_storage("s3://bucket/prefix").list())
        assert "\n" not in str(error.value)
    finally:
        s3_retry.client_for.cache_clear()


def test_invalid_and_missing_buckets_are_errors(s3: str) -> None:
    with pytest.raises(ValueError, match="'my bucket' is not a valid bucket name"):
        open_storage("s3://my bucket/x")
    with pytest.raises(StorageError, match="there is no such bucket"):
        list(open_storage("s3://not-there-at-all/x").list())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("cluster up --nodes 0", "'0' is too small: at least 1"),
        ("shard a b --val 0,2", "'0,2' is not a number; did you mean 0.2?"),
        ("shard a b --size big", "'big' is not a whole number"),
        ("shard a b --max-shard-mb 0", "'0' is not above 0"),
        ("evaluate m --images p --masks c --out o --max-photos 0", "'0' is too small"),
        ("services s3 --port 99999", "'99999' is too large: at most 65535"),
    ],
)
def test_errors_of_numeric_options_name_no_function(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert words in message
    assert "invalid" not in message
