"""The commands of the MLflow and S3 servers of `inpaint services`, by default on loopback, and their secrets.

The first start generates their secrets and stores them in a file of mode 600, which later starts read. To choose the
secrets, write that file before the first start. Secrets in the environment usually belong to other servers; they are
used only on request (--from-environment, for containers).
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from data_prep.uris import file_url, sqlite_url
from pipelines.cluster.loopback import LOOPBACK, free_ports
from pipelines.cluster.service_process import ServerCommand, ServiceError
from pipelines.private.mlflow_tables import read_admin

BUCKET = "inpaint"
INSTALL_HINT = "pip install 'inpaint-pipelines[services]'"
AUTH_INI = """[mlflow]
default_permission = READ
database_uri = {users}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""
# The only variables passed to JuiceFS: it would store ACCESS_KEY and SECRET_KEY in its database, and read any MINIO_*
PASSED_VARIABLES = ("HOME", "LANG", "PATH", "TMPDIR", "TZ")
# KEY=VALUE, exported or not, that a shell and shlex parse alike: nothing that a shell would expand
ASSIGNMENT = r"""(?:export\s+)?([A-Za-z_]\w*)=((?:'[^']*'|"[^"$`\\]*"|[\w@%+=:,./-])*)(?:\s+#.*)?"""


def prepare_mlflow(
    folder: Path,
    port: int,
    backend: str | None = None,
    artifacts: str | None = None,
    host: str = LOOPBACK,
    allowed_hosts: str | None = None,
    from_environment: bool = False,
) -> ServerCommand:
    """The command of `mlflow server` with users, which proxies artifacts; its files are written. Raises ServiceError.

    allowed_hosts: the host names that clients may use.
    """
    if find_spec("flask_wtf") is None:
        raise ServiceError(f"users of an MLflow server need the package Flask-WTF: {INSTALL_HINT}")
    _check_folder_and_port(folder, host, port)
    variables = read_env_file(folder / "mlflow.env")
    variables |= _require_variables("MLFLOW_TRACKING_PASSWORD") if from_environment else {}
    _check_administrator(folder, variables.get("MLFLOW_TRACKING_PASSWORD", ""))
    password = variables.get("MLFLOW_TRACKING_PASSWORD") or secrets.token_urlsafe(24)
    uri = f"http://{_connect_host(host)}:{port}"
    connection = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
    }
    _check_lengths(folder / "mlflow.env", connection, MLFLOW_TRACKING_PASSWORD=12)
    write_env_file(folder / "mlflow.env", variables | connection)
    (folder / "auth.ini").write_text(
        AUTH_INI.format(users=sqlite_url(folder / "users.db").replace("%", "%%"))
    )
    server_variables = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        # not on the command line, as it may contain a password
        "MLFLOW_BACKEND_STORE_URI": backend or sqlite_url(folder / "mlflow.db"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves a dozen unused processes
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--artifacts-destination", artifacts or file_url(folder / "artifacts")]
    command += ["--host", host, "--port", str(port), "--workers", "2"]
    command += ["--allowed-hosts", allowed_hosts] if allowed_hosts else []
    return ServerCommand("mlflow", folder, uri, command, {**os.environ, **server_variables})


def prepare_s3(
    folder: Path, port: int, host: str = LOOPBACK, from_environment: bool = False
) -> ServerCommand:
    """The command of JuiceFS's S3 gateway, after its bucket exists; files and SQLite database lie in the folder.

    Raises ServiceError.
    """
    program = _find_juicefs()
    _check_folder_and_port(folder, host, port)
    variables = read_env_file(folder / "s3.env")
    variables |= _require_variables("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if from_environment else {}
    endpoint = f"http://{_connect_host(host)}:{port}"
    connection = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": variables.get("AWS_ACCESS_KEY_ID") or secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": variables.get("AWS_SECRET_ACCESS_KEY") or secrets.token_hex(20),
        "AWS_SESSION_TOKEN": "",  # a token of another account would be sent with these keys and refused
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    _check_lengths(folder / "s3.env", connection, AWS_ACCESS_KEY_ID=3, AWS_SECRET_ACCESS_KEY=8)
    write_env_file(folder / "s3.env", variables | connection)
    server_variables = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ} | {
        "MINIO_ROOT_USER": connection["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": connection["AWS_SECRET_ACCESS_KEY"],
    }
    database = "sqlite3://files.db"  # relative to the working directory: JuiceFS cuts a path at a '?'
    gateway_command = [program, "--no-agent", "gateway", "--no-color", "--no-banner", "--no-usage-report"]
    gateway_command += [
        "--log",
        str(folder / "gateway.log"),
        "--cache-size",
        "0",
        "--metrics",
        f"{LOOPBACK}:0",
    ]
    # The storage needs metadata (tokens of claims) and ETags (conditional writes); top folders are buckets.
    gateway_command += ["--object-meta", "--keep-etag", "--multi-buckets", "--backup-meta", "0"]
    gateway_command += [database]
    if not (folder / "files.db").exists():
        format_command = [program, "format", "--no-color", "--trash-days", "0", "--storage", "file"]
        format_command += ["--bucket", f"{folder}/files/", database, BUCKET]
        _create_bucket(folder, format_command, gateway_command, server_variables)
    command = [*gateway_command, f"{host}:{port}"]
    return ServerCommand("s3", folder, endpoint, command, server_variables)


def _require_variables(*keys: str) -> dict[str, str]:
    if missing := [key for key in keys if not os.environ.get(key)]:
        raise ServiceError(f"--from-environment: {missing[0]} is not in the environment")
    return {key: os.environ[key] for key in keys}


def _check_administrator(folder: Path, password: str) -> None:
    """ServiceError if MLflow's database has an administrator with another password: MLflow sets it for a new one only."""
    from werkzeug.security import check_password_hash

    users, file = folder / "users.db", folder / "mlflow.env"
    if not users.exists():
        return
    has_users, password_hash = read_admin(users)
    if not has_users:
        return  # the first start was interrupted before it created users
    if password_hash is None or (password and check_password_hash(password_hash, password)):
        return
    problem = "has another password" if password else "has no MLFLOW_TRACKING_PASSWORD"
    raise ServiceError(
        f"{users} has an administrator, and {file} {problem if file.exists() else 'is missing'}: "
        f"put it there as MLFLOW_TRACKING_PASSWORD='...', or move {users.name} away, and all users with it, for a new one"
    )


def _check_lengths(file: Path, values: dict[str, str], **min_lengths: int) -> None:
    """Check the minimum lengths that the servers require of secrets. Raises ServiceError."""
    for key, length in min_lengths.items():
        if len(values[key]) < length:
            raise ServiceError(f"{key} in {file} is too short: give {length} characters or more")


def _create_bucket(
    folder: Path, format_command: list[str], gateway_command: list[str], server_variables: dict[str, str]
) -> None:
    """Format the folder and create the bucket through a temporary gateway on another port."""
    import boto3
    from botocore.config import Config

    result = subprocess.run(format_command, env=server_variables, cwd=folder, capture_output=True, text=True)
    try:
        if result.returncode:
            reason = (result.stderr.strip() or result.stdout.strip() or "no reason given").splitlines()[-1]
            raise ServiceError(f"juicefs format failed in {folder}: {reason}")
        address = f"{LOOPBACK}:{free_ports()[0]}"
        with open(folder / "first.log", "w") as log:
            temporary_gateway = subprocess.Popen(
                [*gateway_command, address], env=server_variables, cwd=folder, stdout=log, stderr=log
            )
        try:
            boto3.client(
                "s3",
                endpoint_url=f"http://{address}",
                aws_access_key_id=server_variables["MINIO_ROOT_USER"],
                aws_secret_access_key=server_variables["MINIO_ROOT_PASSWORD"],
                region_name="us-east-1",
                config=Config(retries={"mode": "standard", "total_max_attempts": 8}),
            ).create_bucket(Bucket=BUCKET)
        finally:
            temporary_gateway.terminate()
            temporary_gateway.wait()
    except BaseException:
        for leftover in folder.glob("files.db*"):
            leftover.unlink()
        raise


def write_env_file(path: Path, values: dict[str, str]) -> None:
    """Write a file for `source`, each value quoted. ServiceError for a value with a newline or control character."""
    for key, value in values.items():
        if not value.isprintable():
            raise ServiceError(
                f"{key} cannot be kept in {path}: it contains a newline or a control character"
            )
    write_private_file(path, "".join(f"export {key}={shlex.quote(value)}\n" for key, value in values.items()))


def write_private_file(path: Path, text: str) -> None:
    """Write a file atomically, readable by its owner only from its creation on."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_env_file(path: Path) -> dict[str, str]:
    """The variables in a file of `write_env_file`, or one written by hand; {} if there is no file.

    Values are quoted as for a shell. ServiceError for any other line, with its number and without its content.
    """
    variables = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if (assignment := re.fullmatch(ASSIGNMENT, line, re.ASCII)) is None:
            raise ServiceError(f"{path}, line {number}: give KEY='VALUE', with nothing that a shell expands")
        variables[assignment[1]] = "".join(shlex.split(assignment[2]))
    return variables


def _connect_host(host: str) -> str:
    """The host by which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return LOOPBACK
    return f"[{host}]" if ":" in host else host


def _check_folder_and_port(folder: Path, host: str, port: int) -> None:
    os.umask(0o077)  # databases and artifacts are readable by their owner only
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"port {port} of {host} is unavailable ({error.strerror}); give another --port"
            ) from None


def _find_juicefs() -> str:
    in_environment = Path(sys.executable).with_name("juicefs")
    program = str(in_environment) if in_environment.exists() else shutil.which("juicefs")
    if program is None:
        raise ServiceError(f"the S3 server needs the program juicefs, which is not installed: {INSTALL_HINT}")
    return program
