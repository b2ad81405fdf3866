"""The servers' secrets: where they come from, how they are kept, and what else of the user's environment goes in."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from gateway import running_gateway
from ports import free_port

from pipelines.cluster import services
from pipelines.cluster.services import ServiceError, read_environment, write_environment

REAL = {
    "AWS_ACCESS_KEY_ID": "AKIAREALACCOUNT",
    "AWS_SECRET_ACCESS_KEY": "real-account-secret",
    "AWS_SESSION_TOKEN": "real-account-token",
    "MLFLOW_TRACKING_PASSWORD": "password-of-another-server",
}
STORE = "from mlflow.server import auth; auth.store.init_db(auth.auth_config.database_uri); "
BOOTSTRAP = "from mlflow.server import auth; auth.bootstrap_admin_user()"  # before a server listens
AUTHENTICATE = STORE + "print(auth.store.authenticate_user('admin', __import__('sys').stdin.read()))"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What the servers would be started with, newest last; the formatting of a folder is left out."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(services, "_become", lambda command, folder, server: found.append(server))
    monkeypatch.setattr(services, "_first_bucket", lambda *_: None)
    for name, value in REAL.items():
        monkeypatch.setenv(name, value)
    return found


def test_the_gateways_keys_are_generated_and_the_same_at_the_next_start(
    tmp_path: Path, started: list[dict[str, str]]
) -> None:
    for _ in range(2):
        services.s3(tmp_path, free_port())
    own = read_environment(tmp_path / "s3.env")
    assert not set(own.values()) & set(REAL.values())
    assert len(own["AWS_ACCESS_KEY_ID"]) >= 16
    assert len(own["AWS_SECRET_ACCESS_KEY"]) >= 32
    assert not any(set(server.values()) & set(REAL.values()) for server in started)
    assert own["AWS_SESSION_TOKEN"] == ""  # of the real account, it would go with these keys
    keys = {(server["MINIO_ROOT_USER"], server["MINIO_ROOT_PASSWORD"]) for server in started}
    assert keys == {(own["AWS_ACCESS_KEY_ID"], own["AWS_SECRET_ACCESS_KEY"])}


def test_a_container_gives_the_secrets_by_its_environment_when_asked_to(
    tmp_path: Path, started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    services.s3(tmp_path, free_port(), from_environment=True)
    services.mlflow(tmp_path, free_port(), from_environment=True)
    gateway, mlflow = started
    assert (gateway["MINIO_ROOT_USER"], gateway["MINIO_ROOT_PASSWORD"]) == (
        REAL["AWS_ACCESS_KEY_ID"],
        REAL["AWS_SECRET_ACCESS_KEY"],
    )
    assert mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"] == REAL["MLFLOW_TRACKING_PASSWORD"]
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ServiceError, match="AWS_SECRET_ACCESS_KEY is not in the environment"):
        services.s3(tmp_path, free_port(), from_environment=True)


def test_keys_in_the_file_before_the_first_start_are_taken(
    tmp_path: Path, started: list[dict[str, str]]
) -> None:
    """As somebody writes them by hand, readable by all until then."""
    file = tmp_path / "s3.env"
    file.write_text(
        "# mine\nAWS_ACCESS_KEY_ID='myself'\n\nexport AWS_SECRET_ACCESS_KEY=\"a longer secret\"\nexport MORE=1 # kept\n"
    )
    file.chmod(0o644)
    services.s3(tmp_path, free_port())
    assert (started[0]["MINIO_ROOT_USER"], started[0]["MINIO_ROOT_PASSWORD"]) == ("myself", "a longer secret")
    assert read_environment(file)["MORE"] == "1"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("server", "line"),
    [
        ("s3", "AWS_ACCESS_KEY_ID=me"),
        ("s3", "AWS_SECRET_ACCESS_KEY=seven77"),
        ("mlflow", "MLFLOW_TRACKING_PASSWORD=eleven-char"),
    ],
)
def test_a_chosen_secret_that_the_server_would_refuse_is_named(
    tmp_path: Path, started: list[dict[str, str]], server: str, line: str
) -> None:
    (tmp_path / f"{server}.env").write_text(line)
    with pytest.raises(ServiceError, match=f"^{line.partition('=')[0]} in .* is too short") as refused:
        getattr(services, server)(tmp_path, free_port())
    assert line.partition("=")[2] not in str(refused.value).split()
    assert not started


def bootstrapped(server: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, "-c", BOOTSTRAP], env=os.environ | server, check=True, capture_output=True
    )


def authenticates(server: dict[str, str], password: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", AUTHENTICATE],
        env=os.environ | server,
        input=password,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() == "True"


def test_the_administrators_password_is_the_first_starts_or_the_start_is_refused(
    tmp_path: Path, started: list[dict[str, str]]
) -> None:
    """MLflow keeps the password of an administrator that it has, whatever it is given at later starts."""
    file = tmp_path / "mlflow.env"
    for _ in range(2):
        services.mlflow(tmp_path, free_port())
        bootstrapped(started[-1])
    password = read_environment(file)["MLFLOW_TRACKING_PASSWORD"]
    assert password not in REAL.values()
    assert authenticates(started[-1], password)

    for text, why in (
        (None, "is missing"),
        ("", "has no MLFLOW_TRACKING_PASSWORD"),
        ("other", "not its own"),
    ):
        file.unlink()
        if text is not None:
            write_environment(file, {"MLFLOW_TRACKING_PASSWORD": text} if text else {})
        before = file.read_bytes() if text is not None else None
        with pytest.raises(ServiceError, match=f"{why}.*put it there.*move") as refused:
            services.mlflow(tmp_path, free_port())
        assert "\n" not in str(refused.value)
        assert "other" not in str(refused.value)
        assert (file.read_bytes() if file.exists() else None) == before
        file.touch()
    assert len(started) == 2


@pytest.mark.parametrize(
    "value",
    [
        "plain-Value_1",
        "$(touch x)",
        "`touch x`",
        "a b  c",
        'it\'s "quoted"',
        "back\\slash\\",
        "#comment a #b",
        "~ $HOME ${HOME} !! * ?",
        ";touch x;&|<>(){}[]=%",
        "é 穴",
        "'",
        "",
    ],
)
def test_a_shell_and_our_reader_get_the_value_that_was_written(tmp_path: Path, value: str) -> None:
    file = tmp_path / "s.env"
    write_environment(file, {"FIRST": value, "LAST": "1"})
    script = '. ./s.env; printf "%s|%s" "$FIRST" "$LAST"; env | grep -c "^FIRST="'
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}|11\n"
    assert read_environment(file) == {"FIRST": value, "LAST": "1"}
    assert os.listdir(tmp_path) == ["s.env"]
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\u2028b"])
def test_a_value_that_is_not_of_one_line_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ServiceError, match=r"^X cannot be kept in .*s.env"):
        write_environment(tmp_path / "s.env", {"X": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    ["X=$(touch x)", 'X="$HOME"', "X=a b", "X=`id`", "X='a", "X=a;id", "X=~", "echo", "1X=a", 'X="\\n"'],
)
def test_lines_that_a_shell_would_read_otherwise_are_refused_without_their_value(
    tmp_path: Path, line: str
) -> None:
    (tmp_path / "s.env").write_text(f"# a comment\n{line}\n")
    with pytest.raises(ServiceError, match=r"s\.env, line 2: ") as refused:
        read_environment(tmp_path / "s.env")
    assert line not in str(refused.value)


def test_a_secret_is_private_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    opened = os.fdopen
    monkeypatch.setattr(
        os,
        "fdopen",
        lambda file, *a, **k: modes.append(os.fstat(file).st_mode & 0o777) or opened(file, *a, **k),
    )
    before = os.umask(0)
    try:
        write_environment(tmp_path / "s.env", {"X": "1"})
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_gateway_takes_nothing_of_the_users_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`juicefs format` keeps ACCESS_KEY and SECRET_KEY of its environment in the database."""
    for name, value in REAL.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.removeprefix("AWS_").removesuffix("_ID"), value)
    monkeypatch.setenv("SECRET_KEY", "real-account-secret")
    monkeypatch.setenv("MINIO_ROOT_PASSWORD_FILE", str(tmp_path / "none"))
    chosen = "a 'secret' $(id)"
    with running_gateway(tmp_path, "a user", chosen):
        for process in psutil.Process().children():
            assert chosen not in " ".join(process.cmdline())
    with closing(sqlite3.connect(tmp_path / "files.db")) as database:
        (format,) = database.execute("SELECT value FROM jfs_setting WHERE name = 'format'").fetchone()
    assert not {"AccessKey", "SecretKey", "SessionToken"} & set(json.loads(format))
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        content = path.read_bytes()
        assert not any(value.encode() in content for value in REAL.values()), path
        assert path.name == "s3.env" or chosen.encode() not in content, path
