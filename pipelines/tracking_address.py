"""Address of an MLflow server or database, without importing MLflow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.network import bypass_proxy_for_loopback

# Otherwise imported where it is used: MLflow takes two seconds, and most processes only pass addresses on.
if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Tracking:
    """Where runs are tracked. Pickled into Ray tasks, so it never holds credentials; MLflow reads them itself."""

    uri: str
    experiment: str
    artifacts: str | None = None
    """URI of the artifact folder for a SQLite database; None: the server decides."""

    def client(self) -> MlflowClient:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(
            logging.CRITICAL
        )  # it logs errors that it also raises
        bypass_proxy_for_loopback(self.uri)
        return MlflowClient(self.uri, registry_uri=self.uri)
