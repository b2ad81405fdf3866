"""MLflow: runs and training curves, checks of the server, and databases in storages that were moved or copied."""
