"""Addresses of MLflow's pages, from a tracking URI alone; '' if the URI is not a web server's."""

from __future__ import annotations

from urllib.parse import quote, urlsplit


def experiment_page(uri: str, experiment_id: str) -> str:
    """The page that lists the experiment's runs."""
    return _page(uri, "experiments", experiment_id, "runs")


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    return _page(uri, "experiments", experiment_id, "runs", run_id)


def logged_model_page(uri: str, experiment_id: str, model_id: str) -> str:
    return _page(uri, "experiments", experiment_id, "models", model_id)


def registered_model_page(uri: str, name: str) -> str:
    return _page(uri, "models", name)


def version_page(uri: str, name: str, version: str) -> str:
    """The page of a registered model's version."""
    return _page(uri, "models", name, "versions", version)


def _page(uri: str, *parts: str) -> str:
    """MLflow's pages are routes behind a `#`. A user and password in the URI are left out: pages get passed on."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return ""
    server = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path.rstrip('/')}"
    return f"{server}/#/" + "/".join(quote(part, safe="") for part in parts)
