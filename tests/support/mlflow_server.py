"""A real MLflow server, optionally with authentication, and its users."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.server.auth.client import AuthServiceClient

from support.cluster_harness import clean_environment, kill_processes, process_tree, wait_for
from support.ports import free_port

ADMIN, ADMIN_PASSWORD = "admin", "the-admins-password-1"
AS_ADMIN = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": ADMIN_PASSWORD}
FIRST_USER = {
    "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
    "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-its-forms",
}
QUIET = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # would start a dozen processes that no test needs
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
CONFIG = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


class MlflowServer:
    """`mlflow server` on a free port with a SQLite database; can be stopped and restarted."""

    def __init__(self, folder: Path, authenticated: bool = False) -> None:
        self.folder, self.port, self.authenticated = folder, free_port(), authenticated
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        environment = clean_environment() | QUIET
        command = [str(Path(sys.executable).with_name("mlflow")), "server"]
        if self.authenticated:
            (self.folder / "auth.ini").write_text(CONFIG.format(folder=self.folder))
            environment["MLFLOW_AUTH_CONFIG_PATH"] = str(self.folder / "auth.ini")
            environment |= FIRST_USER
            command += ["--app-name", "basic-auth"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        log = self.folder / "server.log"
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        process = self.process
        wait_for(lambda: process.poll() is not None or _answers(self.uri), "the MLflow server")
        assert process.poll() is None, log.read_text()[-3000:]

    def stop(self) -> None:
        if self.process:
            kill_processes(process_tree(self.process.pid))
            self.process.wait()
            self.process = None

    def create_user(self, name: str, password: str) -> dict[str, str]:
        """Create a user who may only read. Returns the environment variables of this user."""
        with acting_as(AS_ADMIN):
            AuthServiceClient(self.uri).create_user(name, password)
        return {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}

    def allow_edits(self, name: str, model: str) -> None:
        """Let a user edit a registered model."""
        with acting_as(AS_ADMIN):
            AuthServiceClient(self.uri).grant_user_permission(name, "registered_model", model, "EDIT")


@contextmanager
def acting_as(user: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in user.items():
            patch.setenv(key, value)
        yield


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
