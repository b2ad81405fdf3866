"""The training loop of each Ray Train worker: batches, steps, checkpoints."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode

from data_prep.cache import ShardCache
from data_prep.stream import BatchStream
from models import build_model
from models.base import make_schedule
from pipelines.downloads import with_local_weights
from pipelines.durable.task import announce
from pipelines.tracking.runs import CurvePoint, CurvePublisher
from pipelines.training.checkpoint import (
    CHECKPOINT_FILES,
    copy_checkpoint,
    read_checkpoint,
    read_resume_state,
    write_checkpoint_files,
)
from pipelines.training.job import TrainJob
from pipelines.training.learner import Learner
from pipelines.training.lost_workers import announce_resume
from pipelines.training.monitoring import LossMeter, TrainMonitor
from pipelines.training.precision import TrainedPrecision, begin_precision, describe_resumed_precision
from pipelines.training.validation_set import ValidationSet

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def train_loop(job: TrainJob) -> None:
    """Train from the last checkpoint to the end. A resumed run ends with the same bits as an uninterrupted one."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    meter = LossMeter()
    preemption_handled = False  # a checkpoint was written for the announced end of a node
    state, points = read_last_state(job)
    learner = make_learner(job, rank, world_size, TrainedPrecision.from_state(state) if state else None)
    start = learner.load(state) if state else 0
    total = job.config.stop_after_step or learner.schedule.total_steps
    monitor = make_monitor(job, learner, points) if rank == 0 else None
    stream = make_stream(job, rank, world_size)
    if monitor and start:  # after a crash MLflow may lack points of this checkpoint
        monitor.publish_on_commit(start, lambda _: True, partial(keep_best_checkpoint, job))
    if monitor and ray.train.get_checkpoint() is not None:
        announce_resume(job.progress, start, world_size)
    if monitor:
        announce_precision(job, learner, resumed=bool(start))
    with monitor or nullcontext():
        for step, batch in enumerate(stream.iter_batches(start, total), start):
            meter.batch_ready()
            meter.add(learner.step(step, batch.as_dict()), batch.keys)
            done = step + 1
            preempted = False
            if done % job.config.train.log_every == 0 or done == total:
                means = meter.means(learner, bad_samples=len(stream.unreadable))
                if monitor:
                    monitor.record(done, means)
                # a collective call: all ranks make it
                preempted = not preemption_handled and ray.train.get_preemption_info() is not None
                if monitor and preempted:
                    announce(job.progress, f"a node will shut down: saving a checkpoint at step {done}")
                preemption_handled = preemption_handled or preempted
            if done % job.config.train.checkpoint_every == 0 or done == total or preempted:
                save_checkpoint(job, learner, done, monitor, is_last=preempted or done == total)
            if monitor:
                monitor.report_progress(done, total)
            meter.step_done()


def make_stream(job: TrainJob, rank: int, world_size: int) -> BatchStream:
    """This rank's training batches."""
    return BatchStream(
        job.storage.subfolder(job.shards),
        "train",
        size=job.config.size,
        batch_size=job.config.train.batch,
        masks=job.config.masks,
        scan_cache=job.storage,
        seed=job.config.seed,
        streams=job.config.streams,
        rank=rank,
        world_size=world_size,
        flip=job.config.flip,
        edges={sigma: job.storage.subfolder(folder) for sigma, folder in job.edges.items()},
        edge_source=job.config.edge_source,
        sigmas=job.config.sigma,
        threads=job.loading.decode_threads,
        cache=make_cache(job),
        max_unreadable=job.max_unreadable,
    )


def make_cache(job: TrainJob) -> ShardCache | None:
    """The shard cache that all workers and runs of a machine share; None for a local storage, or without cache_gb."""
    if not job.loading.cache_gb or job.storage.local_path() is not None:
        return None
    folder = Path(job.loading.cache_dir or f"{tempfile.gettempdir()}/inpaint-shards-{os.getuid()}")
    return ShardCache(folder, int(job.loading.cache_gb * 1e9))


def make_monitor(job: TrainJob, learner: Learner, points: list[CurvePoint]) -> TrainMonitor:
    sigma = statistics.median(job.config.sigma)
    shards, size = job.storage.subfolder(job.shards), job.config.size
    validation_set = ValidationSet.load(
        shards, size, job.config.masks, sigma, learner.model.uses_true_edges, job.storage
    )
    publisher = CurvePublisher(job.tracking, job.run_id) if job.tracking else None
    return TrainMonitor(learner, points, validation_set, publisher, job.progress)


def make_learner(
    job: TrainJob, rank: int, world_size: int, trained: TrainedPrecision | None = None
) -> Learner:
    """A learner with the same initial weights on every rank: the recipe's seed alone decides them.

    trained: the precision of the training that goes on; None: it begins, and this is a collective call.
    """
    torch.set_num_threads(job.compute.torch_threads)
    tune_malloc()
    torch.manual_seed(job.config.seed)
    if job.config.train.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    model = build_model(job.config.model, **with_local_weights(job.config.options))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    trained = trained or begin_precision(job.config.train, type(model), device, world_size)
    return Learner(
        model,
        make_schedule(model, job.config.train.steps),
        job.config.seed,
        rank,
        world_size,
        job.config.train.lr_scale,
        job.config.train.ema_decay,
        device,
        bfloat16=trained.precision.bfloat16,
        channels_last=trained.precision.channels_last,
        hardware=trained.hardware,
        compiled=job.config.train.compile,
        micro_batch_size=job.compute.micro_batch_size,
    )


def tune_malloc() -> None:
    """Make glibc keep freed memory.

    On CPUs every step frees and allocates the same hundreds of megabytes; if they go back to the system each time,
    page faults take up to a third of the step.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)


def read_last_state(job: TrainJob) -> tuple[dict[str, Any] | None, list[CurvePoint]]:
    """The learner's state in the last checkpoint, None if there is none, and the curve points before it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        return read_checkpoint(checkpoint)
    if job.resume_from:
        return read_resume_state(job.storage.subfolder(job.resume_from))
    return None, []


def announce_precision(job: TrainJob, learner: Learner, resumed: bool) -> None:
    """Say which precision `auto` stands for when a training begins, and where it resumes on other hardware."""
    trained = learner.trained_precision
    if resumed:
        note = describe_resumed_precision(trained, learner.device)
    else:
        note = trained.describe() if job.config.train.precision == "auto" else ""
    if note:
        announce(job.progress, note)


def save_checkpoint(
    job: TrainJob, learner: Learner, step: int, monitor: TrainMonitor | None, is_last: bool
) -> None:
    """Report a checkpoint to Ray Train (rank 0) or wait at the barrier (others). Uploads to a bucket run in the background.

    MLflow gets the checkpoint's points once it is committed; after the last checkpoint, waits for that.
    """
    name = f"step-{step:08d}"
    if monitor is None:
        ray.train.report({"step": step}, checkpoint_dir_name=name)
        return
    monitor.wait_until_published()
    monitor.validate(step)
    bucket = job.storage.local_path() is None
    folder = Path(tempfile.mkdtemp())
    try:
        write_checkpoint_files(folder, learner.state(step), monitor.points)
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC if bucket else CheckpointUploadMode.SYNC,
            checkpoint_upload_fn=partial(_upload_checkpoint, job) if bucket else None,
            delete_local_checkpoint_after_upload=True,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    monitor.publish_on_commit(step, is_committed, partial(keep_best_checkpoint, job))
    if is_last:
        monitor.wait_until_published()


def is_committed(step: int) -> bool:
    """Wait until all reported checkpoints are committed; True if this step's is among them.

    It is not if another worker was lost meanwhile and Ray Train dropped the report.
    """
    reported = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    return any(checkpoint.metrics.get("step") == step for checkpoint in reported)


def keep_best_checkpoint(job: TrainJob, step: int) -> None:
    """Copy the checkpoint of a step to the folder of the best one."""
    copy_checkpoint(job.storage, f"{job.folders.checkpoints}/step-{step:08d}", job.folders.best)


def _upload_checkpoint(job: TrainJob, checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Upload through our own storage, which keeps retrying while a bucket is unreachable."""
    for file in CHECKPOINT_FILES:
        job.storage.upload(Path(checkpoint.path) / file, f"{job.folders.checkpoints}/{name}/{file}")
    storage = ray.train.get_context().get_storage()
    return Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)
