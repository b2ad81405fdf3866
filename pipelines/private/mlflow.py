"""Private APIs of MLflow 3.17; its tables are in mlflow_tables.py."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

PRIVATE_APIS: dict[str, tuple[str, str]] = {
    "mlflow.utils.credentials.get_default_host_creds": (
        "user, password, token and certificates for a server, from all of MLflow's sources",
        "a server with users cannot be asked whether it is up",
    ),
    "mlflow.utils.rest_utils.http_request": (
        "one request with those, without retries: MLflow's client keeps asking a dead server for minutes",
        "an unreachable server is reported only after minutes",
    ),
    "mlflow.store.db_migrations": (
        "its folder of migrations has a file for every revision of the database that this MLflow can upgrade",
        "for a database of another release, the error cannot say whether to upgrade it or MLflow",
    ),
}


def rest_get(uri: str, endpoint: str, timeout: float, **params: Any) -> Any:
    """GET an endpoint of the REST API of the server at `uri`, without retries; `timeout` in seconds.

    Returns a requests.Response. Raises the errors of requests, or MLflow's exception around them.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    creds = get_default_host_creds(uri)
    return http_request(creds, endpoint, "GET", max_retries=0, retry_codes=(), timeout=timeout, params=params)


def knows_revision(revision: str) -> bool:
    """Whether the installed MLflow knows this revision of a database and can upgrade it. Does not import MLflow."""
    spec = find_spec("mlflow")
    folders = spec.submodule_search_locations or () if spec else ()
    return any(
        any(Path(folder, "store/db_migrations/versions").glob(f"{revision}_*.py")) for folder in folders
    )
