"""The servers' secrets: their source, their storage, and which variables of the user's environment are passed."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.cluster import services
from pipelines.cluster.service_process import ServiceError
from pipelines.cluster.services import read_env_file, write_env_file
from support.gateway import running_gateway
from support.ports import free_port

REAL = {
    "AWS_ACCESS_KEY_ID": "AKIAREALACCOUNT",
    "AWS_SECRET_ACCESS_KEY": "real-account-secret",
    "AWS_SESSION_TOKEN": "real-account-token",
    "MLFLOW_TRACKING_PASSWORD": "password-of-another-server",
}
START = """
import sys
from mlflow.server import auth
auth.bootstrap_admin_user()  # before a server listens
print(auth.store.authenticate_user("admin", sys.stdin.read()))
"""


Prepare = Callable[..., dict[str, str]]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepares a server of a service and folder; returns its environment. No folder is formatted."""
    monkeypatch.setattr(services, "_create_bucket", lambda *_: None)
    for name, value in REAL.items():
        monkeypatch.setenv(name, value)

    def call(service: str, folder: Path, **options: Any) -> dict[str, str]:
        return getattr(services, f"prepare_{service}")(folder, free_port(), **options).environment

    return call


def test_the_gateways_keys_are_generated_once_and_reused(tmp_path: Path, prepare: Prepare) -> None:
    started = [prepare("s3", tmp_path) for _ in range(2)]
    variables = read_env_file(tmp_path / "s3.env")
    assert not set(variables.values()) & set(REAL.values())
    assert len(variables["AWS_ACCESS_KEY_ID"]) >= 16
    assert len(variables["AWS_SECRET_ACCESS_KEY"]) >= 32
    assert not any(set(server.values()) & set(REAL.values()) for server in started)
    assert variables["AWS_SESSION_TOKEN"] == ""  # one of the real account would be sent with these keys
    keys = {(server["MINIO_ROOT_USER"], server["MINIO_ROOT_PASSWORD"]) for server in started}
    assert keys == {(variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"])}


def test_from_environment_takes_the_secrets_from_the_environment(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = prepare("s3", tmp_path, from_environment=True)
    mlflow = prepare("mlflow", tmp_path, from_environment=True)
    assert (gateway["MINIO_ROOT_USER"], gateway["MINIO_ROOT_PASSWORD"]) == (
        REAL["AWS_ACCESS_KEY_ID"],
        REAL["AWS_SECRET_ACCESS_KEY"],
    )
    assert mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"] == REAL["MLFLOW_TRACKING_PASSWORD"]
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ServiceError, match="AWS_SECRET_ACCESS_KEY is not in the environment"):
        prepare("s3", tmp_path, from_environment=True)


def test_keys_in_the_file_before_the_first_start_are_used(tmp_path: Path, prepare: Prepare) -> None:
    """Written by hand, readable by all until then."""
    file = tmp_path / "s3.env"
    file.write_text(
        "# mine\nAWS_ACCESS_KEY_ID='myself'\n\nexport AWS_SECRET_ACCESS_KEY=\"a longer secret\"\nexport MORE=1 # kept\n"
    )
    file.chmod(0o644)
    server = prepare("s3", tmp_path)
    assert (server["MINIO_ROOT_USER"], server["MINIO_ROOT_PASSWORD"]) == ("myself", "a longer secret")
    assert read_env_file(file)["MORE"] == "1"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("server", "line"),
    [
        ("s3", "AWS_ACCESS_KEY_ID=me"),
        ("s3", "AWS_SECRET_ACCESS_KEY=seven77"),
        ("mlflow", "MLFLOW_TRACKING_PASSWORD=eleven-char"),
    ],
)
def test_a_chosen_secret_that_is_too_short_is_reported(
    tmp_path: Path, prepare: Prepare, server: str, line: str
) -> None:
    (tmp_path / f"{server}.env").write_text(line)
    with pytest.raises(ServiceError, match=f"^{line.partition('=')[0]} in .* is too short") as refused:
        prepare(server, tmp_path)
    assert line.partition("=")[2] not in str(refused.value).split()


def is_admin_password(server: dict[str, str], password: str) -> bool:
    """Whether the password is the administrator's after a server has started in this environment."""
    done = subprocess.run(
        [sys.executable, "-c", START],
        env=os.environ | server,
        input=password,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() == "True"


@pytest.mark.slow
def test_a_start_with_another_administrator_password_is_refused(tmp_path: Path, prepare: Prepare) -> None:
    """MLflow keeps an existing administrator's password and ignores the one of later starts."""
    file = tmp_path / "mlflow.env"
    passwords = set()
    for _ in range(2):
        server = prepare("mlflow", tmp_path)
        password = read_env_file(file)["MLFLOW_TRACKING_PASSWORD"]
        assert password not in REAL.values()
        assert is_admin_password(server, password)
        passwords.add(server["MLFLOW_AUTH_ADMIN_PASSWORD"])
    assert len(passwords) == 1

    for text, reason in (
        (None, "is missing"),
        ("", "has no MLFLOW_TRACKING_PASSWORD"),
        ("mistaken", "another password"),
    ):
        file.unlink()
        if text is not None:
            write_env_file(file, {"MLFLOW_TRACKING_PASSWORD": text} if text else {})
        before = file.read_bytes() if text is not None else None
        with pytest.raises(ServiceError, match=f"{reason}.*put it there.*move") as refused:
            prepare("mlflow", tmp_path)
        assert "\n" not in str(refused.value)
        assert "mistaken" not in str(refused.value)
        assert (file.read_bytes() if file.exists() else None) == before
        file.touch()


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
def test_values_written_are_read_back_by_a_shell_and_by_read_env_file(tmp_path: Path, value: str) -> None:
    file = tmp_path / "s.env"
    write_env_file(file, {"FIRST": value, "LAST": "1"})
    script = '. ./s.env; printf "%s|%s" "$FIRST" "$LAST"; env | grep -c "^FIRST="'
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}|11\n"
    assert read_env_file(file) == {"FIRST": value, "LAST": "1"}
    assert os.listdir(tmp_path) == ["s.env"]
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\u2028b"])
def test_a_value_of_several_lines_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ServiceError, match=r"^X cannot be kept in .*s.env"):
        write_env_file(tmp_path / "s.env", {"X": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    ["X=$(touch x)", 'X="$HOME"', "X=a b", "X=`id`", "X='a", "X=a;id", "X=~", "echo", "1X=a", 'X="\\n"'],
)
def test_lines_that_a_shell_would_expand_are_refused_without_showing_them(tmp_path: Path, line: str) -> None:
    (tmp_path / "s.env").write_text(f"# a comment\n{line}\n")
    with pytest.raises(ServiceError, match=r"s\.env, line 2: ") as refused:
        read_env_file(tmp_path / "s.env")
    assert line not in str(refused.value)


def test_the_file_of_secrets_is_private_from_its_creation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    opened = os.fdopen
    monkeypatch.setattr(
        os,
        "fdopen",
        lambda file, *a, **k: modes.append(os.fstat(file).st_mode & 0o777) or opened(file, *a, **k),
    )
    before = os.umask(0)
    try:
        write_env_file(tmp_path / "s.env", {"X": "1"})
    finally:
        os.umask(before)
    assert modes == [0o600]


@pytest.mark.slow
def test_the_gateway_gets_none_of_the_users_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`juicefs format` stores ACCESS_KEY and SECRET_KEY of its environment in the database."""
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
