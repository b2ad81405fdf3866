"""Writes the model cards as descriptions of registered models and versions; text of users is kept."""

from __future__ import annotations

from contextlib import suppress

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from pipelines.registry.alias_moves import full_history
from pipelines.registry.client import find_model, list_versions
from pipelines.registry.model_card import model_card, numbered, with_history, with_outcome

WRITE_ATTEMPTS = 5  # while other processes move aliases of the same model


def describe_version(client: MlflowClient, version: ModelVersion, card: str) -> None:
    """Complete the description: a version is created with its card, before it has a number. May be repeated."""
    number = str(version.version)
    description = numbered(version.description or card, version.name, number)
    if description != version.description:
        client.update_model_version(version.name, number, description)


def describe_outcome(client: MlflowClient, name: str, version: str, is_champion: bool, reason: str) -> None:
    """Add the result of the comparison with the champion to a version's description. May be repeated."""
    description = client.get_model_version(name, version).description or ""
    client.update_model_version(name, version, with_outcome(description, is_champion, reason))


def describe_model(client: MlflowClient, registered: RegisteredModel, model: str, metric: str) -> None:
    """Describe a registered model that has no description. model: the network's name; metric: the champion's."""
    if not registered.description:
        moves = full_history(registered.tags)
        client.update_registered_model(registered.name, model_card(registered.name, model, metric, moves))


def describe_moves(client: MlflowClient, name: str) -> None:
    """Write the moves as sentences into the model's description, for readers of MLflow's pages; the tags are the record.

    It is read again after it was written: of two writers, the later one may have read fewer moves.
    """
    with suppress(MlflowException):  # this user may not change it
        for _ in range(WRITE_ATTEMPTS):
            model = find_model(client, name)
            moves, description = full_history(model.tags), model.description or ""
            if description:
                text = with_history(description, name, moves)
            else:
                versions = list_versions(client, name)
                tags = versions[-1].tags if versions else {}
                metric = tags.get("inpaint.metric", "").partition(" ")[0]
                text = model_card(name, tags.get("model", name), metric, moves)
            if text == description:
                return
            client.update_registered_model(name, text)
