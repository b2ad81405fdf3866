"""Entry point of each Ray Train worker. Cheap to import: Ray Train's controller imports it, without torch."""

from __future__ import annotations

from typing import Any

from pipelines.durable.memory import explain_out_of_memory
from pipelines.durable.task import PERMANENT_ERRORS, to_attempt_error
from pipelines.training.job import TrainJob

# of CUDA, and of torch's allocator on CPUs
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory")


def train_worker(config: dict[str, Any]) -> None:
    """Run the training loop. Returns at once if an earlier worker group met an error that a retry cannot fix."""
    from pipelines.training.loop import train_loop  # imports torch, which the controller does without

    job: TrainJob = config["job"]
    error_file = job.folders.error_file
    if job.storage.exists(error_file):
        return
    try:
        train_loop(job)
    except PERMANENT_ERRORS as error:
        job.storage.put_if_absent(error_file, to_attempt_error(error).message.encode())
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(message in str(error) for message in OUT_OF_MEMORY_TEXTS):
            import ray.train

            advice = job.out_of_memory_advice(ray.train.get_context().get_world_size())
            message, is_transient = explain_out_of_memory(
                str(error), advice, inspect_machine="CUDA" not in str(error)
            )
            if is_transient:
                raise RuntimeError(message) from error
            job.storage.put_if_absent(error_file, message.encode())
        raise
