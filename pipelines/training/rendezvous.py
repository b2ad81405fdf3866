"""How a training's ranks find each other: as Ray has it, but on loopback where Ray is. Light for Ray's controller."""

from __future__ import annotations

import importlib
import socket
from typing import Any

from ray.train.torch import TorchConfig
from torch.distributed import TCPStore

from pipelines.cluster.loopback import HOSTS, LOOPBACK


def store_on_loopback() -> None:
    """Have torch's store, which listens everywhere and lets anybody write, listen on loopback.

    For a process that is about to join a process group; does nothing where the first rank has another address.
    """

    def store(host_name: str, port: int, **options: Any) -> TCPStore:
        if options.get("is_master") and host_name in HOSTS:
            options["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
        return TCPStore(host_name, port, **options)

    module: Any = importlib.import_module(
        "torch.distributed.rendezvous"
    )  # the package has a function of this name
    module.TCPStore = store


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(store_on_loopback)
        super().on_start(worker_group, backend_config)


class Rendezvous(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
