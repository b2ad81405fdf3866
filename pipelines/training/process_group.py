"""The process group of the training workers: as under Ray's TorchTrainer, but on loopback if Ray is on loopback.

Ray Train's controller imports this without torch, which would add a second to every start.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from pipelines.cluster.loopback import LOOPBACK, LOOPBACK_HOSTS
from pipelines.private import ray as ray_internals

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SHUTDOWN_TIMEOUT = 30.0  # seconds for all ranks to leave the process group


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Ray Train's backend config for a torch process group."""

    backend: str  # gloo or nccl

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def train_func_context(self) -> Any:
        return ray_internals.torch_worker_context()


class _ProcessGroupBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroupConfig)
        address, world_size = worker_group.execute_single(0, free_address), len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, init_process_group, backend_config.backend, rank, world_size, *address
                )
                for rank in range(world_size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(destroy_process_group), timeout=SHUTDOWN_TIMEOUT)


def free_address() -> tuple[str, int]:
    """This node's address as Ray knows it, and a free port on it."""
    host = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return host, probe.getsockname()[1]


def init_process_group(backend: str, rank: int, world_size: int, address: str, port: int) -> None:
    """Join the process group and set the variables that torchrun would set. Runs on every rank."""
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    ray_internals.set_torchrun_env()
    use_loopback_store()
    ray_internals.init_process_group(backend, rank, world_size)


def destroy_process_group() -> None:
    import torch.distributed as dist

    ray_internals.shutdown_torch(dist.is_initialized() and dist.get_world_size() > 1)


def use_loopback_store() -> None:
    """Make torch's TCPStore listen on loopback only: by default it listens on all interfaces and anybody may write.

    Call it before joining a process group. Does nothing if the first rank has another address.
    """
    from torch.distributed import TCPStore

    from pipelines.private.torch import replace_tcp_store

    def store(host_name: str, port: int, **options: Any) -> TCPStore:
        if options.get("is_master") and host_name in LOOPBACK_HOSTS:
            options["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
        return TCPStore(host_name, port, **options)

    replace_tcp_store(store)
