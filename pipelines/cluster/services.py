"""`inpaint services`: an MLflow server and an S3 server, on loopback unless told otherwise.

Their secrets are generated at the first start, and are in a file of mode 600 that every later start reads. Whoever wants
to choose them writes that file before. The environment's, which open something else, are taken only when that is asked
for: in a container of their own.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from pipelines.cluster.loopback import LOOPBACK, free_ports

BUCKET = "inpaint"
EXTRA = "pip install 'inpaint-pipelines[services]'"
AUTH = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""
# all that JuiceFS gets of the environment: it would keep an ACCESS_KEY and SECRET_KEY in its database, and obey any MINIO_*
PASSED = ("HOME", "LANG", "PATH", "TMPDIR", "TZ")
# KEY=VALUE, exported or not, in what a shell and shlex read alike: nothing that a shell would expand
ASSIGNED = r"""(?:export\s+)?([A-Za-z_]\w*)=((?:'[^']*'|"[^"$`\\]*"|[\w@%+=:,./-])*)(?:\s+#.*)?"""


class ServiceError(RuntimeError):
    """A server that cannot be started; one line."""


def mlflow(
    folder: Path,
    port: int,
    backend: str | None = None,
    artifacts: str | None = None,
    host: str = LOOPBACK,
    allowed_hosts: str | None = None,
    from_environment: bool = False,
) -> NoReturn:
    """Become `mlflow server` with users, artifacts through it; `allowed_hosts` are the names it may be reached by."""
    if find_spec("flask_wtf") is None:
        raise ServiceError(f"users of an MLflow server need the package Flask-WTF: {EXTRA}")
    _prepare(folder, host, port)
    known = read_environment(folder / "mlflow.env")
    known |= _environments("MLFLOW_TRACKING_PASSWORD") if from_environment else {}
    _check_administrator(folder, known.get("MLFLOW_TRACKING_PASSWORD", ""))
    password = known.get("MLFLOW_TRACKING_PASSWORD") or secrets.token_urlsafe(24)
    uri = f"http://{_reached(host)}:{port}"
    own = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
    }
    _check_length(folder / "mlflow.env", own, MLFLOW_TRACKING_PASSWORD=12)
    write_environment(folder / "mlflow.env", known | own)
    (folder / "auth.ini").write_text(AUTH.format(folder=folder))
    server = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_BACKEND_STORE_URI": backend
        or f"sqlite:///{folder}/mlflow.db",  # may hold a password: not for `ps`
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that nothing here needs
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
    command += ["--host", host, "--port", str(port), "--workers", "2"]
    command += ["--allowed-hosts", allowed_hosts] if allowed_hosts else []
    print(
        f"MLflow at {uri}; address and password are in {folder}/mlflow.env: source it. Ctrl-C ends it.",
        flush=True,
    )
    _become(command, folder, {**os.environ, **server})


def s3(folder: Path, port: int, host: str = LOOPBACK, from_environment: bool = False) -> NoReturn:
    """Become JuiceFS's S3 gateway, its files and its SQLite database in the folder."""
    program = _juicefs()
    _prepare(folder, host, port)
    known = read_environment(folder / "s3.env")
    known |= _environments("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if from_environment else {}
    endpoint = f"http://{_reached(host)}:{port}"
    own = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": known.get("AWS_ACCESS_KEY_ID") or secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": known.get("AWS_SECRET_ACCESS_KEY") or secrets.token_hex(20),
        "AWS_SESSION_TOKEN": "",  # one of another account would be sent with these keys, and be refused
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    _check_length(folder / "s3.env", own, AWS_ACCESS_KEY_ID=3, AWS_SECRET_ACCESS_KEY=8)
    write_environment(folder / "s3.env", known | own)
    server = {name: os.environ[name] for name in PASSED if name in os.environ} | {
        "MINIO_ROOT_USER": own["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": own["AWS_SECRET_ACCESS_KEY"],
    }
    database = f"sqlite3://{folder}/files.db"
    command = [program, "--no-agent", "gateway", "--no-color", "--no-banner", "--no-usage-report"]
    command += ["--log", str(folder / "gateway.log"), "--cache-size", "0", "--metrics", f"{LOOPBACK}:0"]
    # tokens of claims are metadata; the checks of the storage are ETags; its top folders are buckets
    command += ["--object-meta", "--keep-etag", "--multi-buckets", "--backup-meta", "0"]
    command += [database]
    if not (folder / "files.db").exists():
        format = [program, "format", "--no-color", "--trash-days", "0", "--storage", "file"]
        format += ["--bucket", f"{folder}/files/", database, BUCKET]
        _first_bucket(folder, format, command, server)
    print(
        f"S3 at {endpoint}, bucket s3://{BUCKET}; address and keys are in {folder}/s3.env: source it. Ctrl-C ends it.",
        flush=True,
    )
    _become([*command, f"{host}:{port}"], folder, server)


def _environments(*keys: str) -> dict[str, str]:
    if missing := [key for key in keys if not os.environ.get(key)]:
        raise ServiceError(f"--from-environment: {missing[0]} is not in the environment")
    return {key: os.environ[key] for key in keys}


def _check_administrator(folder: Path, password: str) -> None:
    """MLflow gives a new administrator the password, and leaves one it has as it is: ServiceError if that needs another."""
    from werkzeug.security import check_password_hash

    users, file = folder / "users.db", folder / "mlflow.env"
    if not users.exists():
        return
    with closing(sqlite3.connect(users)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'users'").fetchone():
            return  # it was ended before it had any
        found = database.execute("SELECT password_hash FROM users WHERE username = 'admin'").fetchone()
    if found is None or (password and check_password_hash(found[0], password)):
        return
    wrong = "has a password that is not its own" if password else "has no MLFLOW_TRACKING_PASSWORD"
    raise ServiceError(
        f"{users} has an administrator, and {file} {wrong if file.exists() else 'is missing'}: "
        f"put it there as MLFLOW_TRACKING_PASSWORD='...', or move {users.name} away, and all users with it, for a new one"
    )


def _check_length(file: Path, values: dict[str, str], **least: int) -> None:
    """What the servers ask of secrets that somebody chose, said before they fail by it."""
    for key, length in least.items():
        if len(values[key]) < length:
            raise ServiceError(f"{key} in {file} is too short: give {length} characters or more")


def _first_bucket(folder: Path, format: list[str], gateway: list[str], server: dict[str, str]) -> None:
    """Format the folder, and make the bucket by a gateway that lives for the moment, on a port of its own."""
    import boto3
    from botocore.config import Config

    made = subprocess.run(format, env=server, capture_output=True, text=True)
    try:
        if made.returncode:
            last = (made.stderr.strip() or made.stdout.strip() or "no reason given").splitlines()[-1]
            raise ServiceError(f"juicefs format failed in {folder}: {last}")
        address = f"{LOOPBACK}:{free_ports()[0]}"
        with open(folder / "first.log", "w") as log:
            first = subprocess.Popen([*gateway, address], env=server, stdout=log, stderr=log)
        try:
            boto3.client(
                "s3",
                endpoint_url=f"http://{address}",
                aws_access_key_id=server["MINIO_ROOT_USER"],
                aws_secret_access_key=server["MINIO_ROOT_PASSWORD"],
                region_name="us-east-1",
                config=Config(retries={"mode": "standard", "total_max_attempts": 8}),
            ).create_bucket(Bucket=BUCKET)
        finally:
            first.terminate()
            first.wait()
    except BaseException:
        for leftover in folder.glob("files.db*"):
            leftover.unlink()
        raise


def write_environment(path: Path, values: dict[str, str]) -> None:
    """A file to be sourced, every value quoted. ServiceError for a value of several lines or with a control character."""
    for key, value in values.items():
        if not value.isprintable():
            raise ServiceError(
                f"{key} cannot be kept in {path}: it has a line's end or a control character in it"
            )
    write_private(path, "".join(f"export {key}={shlex.quote(value)}\n" for key, value in values.items()))


def write_private(path: Path, text: str) -> None:
    """A file that is readable by its owner alone from the moment it exists, and whole whatever happens."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_environment(path: Path) -> dict[str, str]:
    """What `write_environment` wrote, or somebody by hand; {} when there is no such file.

    The values are a shell's. ServiceError, which names the line and not what it holds, for any other line.
    """
    found = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if (pair := re.fullmatch(ASSIGNED, line, re.ASCII)) is None:
            raise ServiceError(f"{path}, line {number}: give KEY='VALUE', with nothing that a shell expands")
        found[pair[1]] = "".join(shlex.split(pair[2]))
    return found


def _reached(host: str) -> str:
    """How this machine reaches a server that listens there."""
    return LOOPBACK if host in ("0.0.0.0", "::") else host


def _prepare(folder: Path, host: str, port: int) -> None:
    os.umask(0o077)  # databases and artifacts are its owner's too
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"port {port} of {host} cannot be had ({error.strerror}); give another --port"
            ) from None


def _juicefs() -> str:
    beside = Path(sys.executable).with_name("juicefs")
    found = str(beside) if beside.exists() else shutil.which("juicefs")
    if found is None:
        raise ServiceError(f"the S3 server is the program juicefs, which is not here: {EXTRA}")
    return found


def _become(command: list[str], folder: Path, environment: dict[str, str]) -> NoReturn:
    os.chdir(folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    os.execve(command[0], command, {**environment, "PATH": path})
