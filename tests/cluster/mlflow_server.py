"""A real MLflow server with authentication, users of it, and processes that promote at once."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import clean_environment, family, kill, wait_for
from mlflow.server.auth.client import AuthServiceClient
from ports import free_port

ADMIN, PASSWORD = "admin", "the-admins-password-1"
AS_ADMIN = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
QUIET = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that nothing here needs
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
CONFIG = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


@dataclass(frozen=True)
class Server:
    uri: str

    def user(self, name: str, password: str) -> dict[str, str]:
        """What the environment of a new user is, who may read and nothing else."""
        with acting_as(AS_ADMIN):
            AuthServiceClient(self.uri).create_user(name, password)
        return {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}

    def allow(self, name: str, model: str) -> None:
        """Have a user change a registered model."""
        with acting_as(AS_ADMIN):
            AuthServiceClient(self.uri).grant_user_permission(name, "registered_model", model, "EDIT")


@contextmanager
def acting_as(user: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in user.items():
            patch.setenv(key, value)
        yield


@contextmanager
def mlflow_server(folder: Path, authenticated: bool = True) -> Iterator[Server]:
    """`mlflow server` on a free port, its database and artifacts in `folder`."""
    port = free_port()
    (folder / "auth.ini").write_text(CONFIG.format(folder=folder))
    environment = clean_environment() | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-its-forms",
    } | QUIET  # fmt: skip
    command = [str(Path(sys.executable).with_name("mlflow")), "server"]
    command += ["--app-name", "basic-auth"] if authenticated else []
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    uri = f"http://127.0.0.1:{port}"
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(lambda: server.poll() is not None or _answers(uri), "the MLflow server")
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            yield Server(uri)
        finally:
            kill(family(server.pid))
            server.wait()


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


class RestartedServer:
    """A real MLflow server over a SQLite file, which can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self.folder / 'mlflow.db'}", str(self.folder / "artifacts")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", store, "--artifacts-destination", artifacts, "--workers", "1"]
        self.process = subprocess.Popen(
            command,
            env=clean_environment() | QUIET,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: _answers(self.uri), "the MLflow server")

    def stop(self) -> None:
        if self.process:
            kill(family(self.process.pid))
            self.process.wait()
            self.process = None
