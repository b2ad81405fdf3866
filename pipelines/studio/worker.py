"""The worker process of a JobRunner: runs one job after another and keeps the two models used last.

Messages in both directions are JSON, so nothing is unpickled. The process ends with its parent.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.registry.loaded_model import LoadedModel

MAX_MODELS = 2
FUNCTIONS = "pipelines.studio."  # the only package whose functions a job may name


class Cancelled(Exception):
    """The job was cancelled: raised by `JobContext.progress`, and not to be caught by the job."""


class ModelCache:
    """The models used last, by NAME/VERSION."""

    def __init__(self, load: Callable[[str], Any], size: int = MAX_MODELS) -> None:
        self._load, self._size = load, size
        self._models: OrderedDict[str, Any] = OrderedDict()

    def get(self, version: str) -> Any:
        """The model; loaded if it is not among those used last, of which the oldest is dropped before."""
        if version not in self._models:
            while len(self._models) >= self._size:
                self._models.popitem(last=False)
            self._models[version] = self._load(version)
        self._models.move_to_end(version)
        return self._models[version]

    def __contains__(self, version: str) -> bool:
        return version in self._models


class JobContext:
    """What a job's function gets as its first argument."""

    def __init__(self, job_id: str, connection: Connection, models: ModelCache) -> None:
        self.job_id = job_id
        self._connection, self._models = connection, models

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Report progress. Raises Cancelled if the job was cancelled: call it several times per second."""
        self.check()
        send(self._connection, {"done": done, "total": total, "note": note})

    def check(self) -> None:
        """Raises Cancelled if the job was cancelled."""
        while self._connection.poll():
            if receive(self._connection).get("cancel") == self.job_id:
                raise Cancelled

    def has_model(self, version: str) -> bool:
        """Whether `load_model` has this version at hand."""
        return version in self._models

    def load_model(self, version: str) -> LoadedModel:
        """The registered version NAME/VERSION. RegistryError: it cannot be loaded."""
        model: LoadedModel = self._models.get(version)
        return model


def send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message, default=str).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """The next message. EOFError, OSError: the other process has ended."""
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


def find_function(name: str) -> Callable[..., Any]:
    """The function `package.module:function` of the studio. ValueError: another package's."""
    module, _, function = name.partition(":")
    if not module.startswith(FUNCTIONS):
        raise ValueError(f"{name} is not a function of the studio")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def work(connection: Connection, tracking_uri: str) -> None:
    """The process's main function: jobs from the connection until it closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    models = ModelCache(lambda version: _load_model(version, tracking_uri))
    while True:
        try:
            message = receive(connection)
        except (EOFError, OSError):
            return
        if message.get("prepare"):
            importlib.import_module("pipelines.registry.load")
        if "job" not in message:  # or a cancel that came after its job's end
            continue
        context = JobContext(message["job"], connection, models)
        try:
            result = find_function(message["function"])(context, **message["arguments"])
            reply = {"state": "finished", "result": result}
        except Cancelled:
            reply = {"state": "cancelled"}
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            from pipelines.errors import explain_error

            if not isinstance(error, ValueError):
                logging.getLogger(__name__).exception("the job %s failed", message["function"])
            reply = {"state": "failed", "error": explain_error(error)}
        try:
            send(connection, reply)
        except (BrokenPipeError, ConnectionResetError):
            return


def _load_model(version: str, tracking_uri: str) -> Any:
    from pipelines.registry.load import load_model

    return load_model(f"models:/{version}", tracking_uri=tracking_uri)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        sys.stderr.flush()
        os._exit(1)
