"""URIs survive a round trip, and invalid ones are rejected with a suggestion."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from data_prep.storage import open_storage
from data_prep.uris import (
    UriError,
    file_url,
    normalize_storage_uri,
    normalize_tracking_uri,
    path_from_file_url,
    path_from_sqlite_url,
    quote_for_shell,
    redact_uri,
    sqlite_connect_uri,
    sqlite_url,
)

NAMES = [
    "r a",
    "r%20a",
    "x?1",
    "x?a=1",
    "x#1",
    "ä",
    "a&b",
    "a+b",
    "a;b",
    "a'b",
    'a"b',
    "-dash",
    "a@b",
    "100%",
    "a:b",
]
NAMES += ["%", "%%25", "a\\b", "$HOME", "~a", "a=b", "s3:", "*", "[a]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_database_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    """Opened by SQLAlchemy, as MLflow does, and by sqlite3; no other file appears."""
    path = tmp_path / name / "mlflow.db"
    path.parent.mkdir()
    url = sqlite_url(path)
    assert make_url(url).database == str(path)
    engine = create_engine(url)
    with engine.begin() as database:
        database.execute(text("create table t (name text)"))
    engine.dispose()
    for mode in ("ro", "rw"):
        with closing(sqlite3.connect(sqlite_connect_uri(path, mode), uri=True)) as database:
            assert database.execute("select * from t").fetchall() == []
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert path_from_sqlite_url(url) == path
    assert normalize_tracking_uri(url) == url
    assert normalize_tracking_uri(f"sqlite:///{path}") == url  # as a person types it
    assert path_from_file_url(file_url(path)) == path
    assert normalize_storage_uri(str(path.parent)) == open_storage(path.parent).uri == str(path.parent)


def test_ordinary_paths_are_not_quoted(tmp_path: Path) -> None:
    """Step keys contain the registry's URI: a new spelling would repeat finished steps."""
    for name in ("runs", "r a", "ä", "x#1", "a+b"):
        assert sqlite_url(tmp_path / name / "mlflow.db") == f"sqlite:///{tmp_path}/{name}/mlflow.db"


def test_a_sqlite_path_may_be_quoted_or_not(tmp_path: Path) -> None:
    for name in ("r%20a", "x?1"):
        (tmp_path / name).mkdir()
    raw, url = f"sqlite:///{tmp_path}/r%20a/mlflow.db", sqlite_url(tmp_path / "r%20a" / "mlflow.db")
    # only this folder exists
    assert normalize_tracking_uri(raw) == normalize_tracking_uri(raw.replace("%", "%25")) == url
    (tmp_path / "r%20a" / "mlflow.db").touch()
    assert normalize_tracking_uri(raw) == url
    new = f"sqlite:///{tmp_path}/new%20one/mlflow.db"  # neither exists: as SQLAlchemy reads it
    assert path_from_sqlite_url(normalize_tracking_uri(new)) == tmp_path / "new one" / "mlflow.db"
    (tmp_path / "r a").mkdir()
    (tmp_path / "r a" / "mlflow.db").touch()
    with pytest.raises(UriError, match=r"either of two files that exist: give .*r a/.* or .*r%2520a"):
        normalize_tracking_uri(raw)
    assert normalize_tracking_uri(url) == url
    question = f"sqlite:///{tmp_path}/x?1/mlflow.db"
    assert path_from_sqlite_url(normalize_tracking_uri(question)) == tmp_path / "x?1" / "mlflow.db"
    options = f"sqlite:///{tmp_path}/mlflow.db?timeout=30"
    assert normalize_tracking_uri(options) == options
    assert path_from_sqlite_url(options) == tmp_path / "mlflow.db"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("s3:/bucket", "probably s3://bucket, or the folder ./s3:/bucket"),
        ("s3:bucket/x", "probably s3://bucket/x"),
        ("s3//bucket", "probably s3://bucket"),
        ("S3://bucket/x", "probably s3://bucket/x"),
        ("s3a://bucket", "probably s3://bucket"),
        ("s3;//bucket", "probably s3://bucket"),
        ("s3:\\bucket", "probably s3://bucket"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://my bucket/x", "is not a valid bucket name"),
        ("s3://key:planted-9@bucket", "AWS_ACCESS_KEY_ID"),
        ("gs://bucket", "only folders and s3://bucket/prefix"),
        ("hdfs:/x", "only folders"),
        ("sqlite:///x.db", "only folders"),
        ("http://me:planted-9@127.0.0.1:9000/b/x", "s3://b/x, with AWS_ENDPOINT_URL=http://127.0.0.1:9000"),
        ("https://s3.example", "is a web address"),
        ("C:\\runs", "a Windows path"),
        ("\\\\server\\runs", "a Windows path"),
        ("file://host/x", "probably file:///host/x"),
        ("~nobody-here/x", "there is no user 'nobody-here'"),
        ("", "is empty"),
        ("a\nb", "control character"),
        ("a\udce4", "not UTF-8"),
    ],
)
def test_invalid_storage_uris_are_rejected_with_a_suggestion(text: str, problem: str) -> None:
    with pytest.raises(UriError) as error:
        open_storage(text)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert "planted" not in str(error.value)


def test_valid_storage_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert normalize_storage_uri("runs/") == str(tmp_path / "runs")
    assert normalize_storage_uri("./s3:/bucket") == str(tmp_path / "s3:" / "bucket")
    assert normalize_storage_uri("s3/bucket") == str(tmp_path / "s3" / "bucket")
    assert normalize_storage_uri("~/runs") == "/home/somebody/runs"
    assert normalize_storage_uri("file:///a%20b%3F") == "/a b?"
    assert normalize_storage_uri("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert normalize_storage_uri("s3://bucket/") == "s3://bucket"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("localhost:5000", "probably http://localhost:5000"),
        ("127.0.0.1:5000", "probably http://127.0.0.1:5000"),
        ("me:planted-9@mlflow.example:5000", "probably http://mlflow.example:5000"),
        ("mlflow.example.com", "probably http://mlflow.example.com"),
        ("http:/host:5000", "probably http://host:5000"),
        ("http//host:5000", "probably http://host:5000"),
        ("htpp://host", "probably http://host"),
        ("http://:5000", "probably http://localhost:5000"),
        ("http://host:port", "its port is not a number"),
        ("http://me:planted-9@host:99999", "its port is not a number"),
        ("sqlite://x.db", "probably sqlite:///x.db"),
        ("sqlite:/x.db", "probably sqlite:////x.db"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///~/x.db", "probably sqlite:///"),
        ("postgres://u:planted-9@host/db", "probably postgresql://host/db"),
        ("mlflow.db", "a path, not a URI: probably sqlite:////"),
        ("/", "a path, not a URI: probably sqlite:////mlflow.db"),
        ("file:///", "a path, not a URI"),
        ("s3://bucket", "not an MLflow tracking URI"),
        ("nothing/here", "not an MLflow tracking URI"),
        (" ", "is empty"),
    ],
)
def test_invalid_tracking_uris_are_rejected_with_a_suggestion(text: str, problem: str) -> None:
    with pytest.raises(UriError) as error:
        normalize_tracking_uri(text)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert "planted" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://host:5000",
        "https://me:pw@host/path",
        "postgresql://u:p@h/d",
        "mysql+pymysql://u:p@h/d",
        "databricks",
        "databricks://profile",
        "plugin-of-mlflow://x",
    ],
)
def test_other_tracking_uris_are_not_changed(url: str) -> None:
    assert normalize_tracking_uri(url) == url
    assert normalize_tracking_uri(f" {url}\n") == url


def test_redacted_uris_have_no_password_and_can_be_pasted() -> None:
    assert redact_uri("https://me:p@ss@host/x") == "https://host/x"
    assert redact_uri("postgresql://u:p/w@host/db") == "postgresql://host/db"
    assert redact_uri("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"
    assert quote_for_shell("sqlite:////a b/mlflow.db") == "'sqlite:////a b/mlflow.db'"
