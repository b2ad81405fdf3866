"""Announces lost training workers, from Ray Train's controller. Cheap to import: the controller does without torch."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from pipelines.contracts import ProgressCallback
from pipelines.durable.task import announce, root_cause
from pipelines.errors import explain_error
from pipelines.private.ray_train import hide_internal_calls
from pipelines.training.job import TrainJob

REPEAT_SECONDS = 10.0  # an error that the controller polls again within this time is not announced again
NODE_DIED = re.compile(r"its node has died|the actor's node was")  # in the text of Ray's ActorDiedError
# of gloo and NCCL, in the text of torch's error
LOST_PEER = re.compile(r"connection (?:was )?(?:closed|reset)|broken pipe|remote process exited", re.I)
ACTOR_ADDRESS = re.compile(r"^\s*ip: (\S+)$", re.M)


class AnnounceLostWorkers(UserCallback):
    """Tells the person who follows the run why its workers start again. Where they resume, the first of them says."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.last_text, self.announced_at = "", 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called in the controller, before it starts workers."""
        vars(self).update(state)
        hide_internal_calls()

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        if self.job.storage.exists(self.job.folders.error_file):
            return  # the training fails: its step says why
        text = describe_loss(worker_exceptions)
        if text != self.last_text or time.monotonic() > self.announced_at + REPEAT_SECONDS:
            announce(self.job.progress, text)
            self.last_text, self.announced_at = text, time.monotonic()


def describe_loss(errors: Mapping[int, Exception]) -> str:
    """What happened to the workers, in one line. errors: rank -> its exception.

    If a worker dies, the others fail soon after, in their next collective call: only those that died are named, if any.
    """
    causes = {rank: root_cause(error) for rank, error in errors.items()}
    lost = {rank: cause for rank, cause in causes.items() if isinstance(cause, RayActorError)}
    if not lost:
        rank = min(causes)
        cause = causes[rank]
        if LOST_PEER.search(str(cause)):  # Ray finds out later which one
            return f"a worker was lost (rank {rank} has no connection to it)"
        return f"a worker failed (rank {rank}: {explain_error(cause)})"
    ranks = ", ".join(map(str, sorted(lost)))
    reasons = {_why_lost(error) for error in lost.values()}
    subject = "a worker was lost (rank" if len(lost) == 1 else f"{len(lost)} workers were lost (ranks"
    return f"{subject} {ranks}: {'; '.join(sorted(reasons))})"


def _why_lost(error: RayActorError) -> str:
    text = str(error)
    address = ACTOR_ADDRESS.search(text)
    where = f" {address[1]}" if address else ""
    if NODE_DIED.search(text):
        return f"its node{where} died"
    return f"its process{f' on{where}' if where else ''} died"


def announce_resume(progress: ProgressCallback | None, step: int, workers: int) -> None:
    announce(progress, f"resuming from step {step} with {workers} worker{'' if workers == 1 else 's'}")
