"""How a training's ranks find each other: as under Ray's TorchTrainer, but on loopback where Ray is.

Ray Train's controller never imports torch for it, which would be a second of every training's start.
"""

from __future__ import annotations

import importlib
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

from pipelines.cluster.loopback import HOSTS, LOOPBACK

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LEAVE = 30.0  # seconds that the ranks have to take leave of each other


@dataclass
class Rendezvous(BackendConfig):
    backend: str  # gloo or nccl

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, Rendezvous)
        place, world = worker_group.execute_single(0, get_address_and_port), len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, join, backend_config.backend, rank, world, *place)
                for rank in range(world)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave), timeout=LEAVE)


def join(backend: str, rank: int, world: int, address: str, port: int) -> None:
    """On every rank: the process group, and the variables that torchrun would set."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _set_torch_distributed_env_vars()
    store_on_loopback()
    _setup_torch_process_group(backend, rank, world, "env://")


def leave() -> None:
    import torch.distributed as dist
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(dist.is_initialized() and dist.get_world_size() > 1)


def store_on_loopback() -> None:
    """Have torch's store, which listens everywhere and lets anybody write, listen on loopback.

    For a process that is about to join a process group; does nothing where the first rank has another address.
    """
    from torch.distributed import TCPStore

    def store(host_name: str, port: int, **options: Any) -> TCPStore:
        if options.get("is_master") and host_name in HOSTS:
            options["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
        return TCPStore(host_name, port, **options)

    module: Any = importlib.import_module(
        "torch.distributed.rendezvous"
    )  # the package has a function of this name
    module.TCPStore = store
