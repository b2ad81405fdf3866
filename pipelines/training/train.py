"""Distributed training of one model with Ray Train: the loop, its checkpoints, and the step of the workflow."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.exceptions import OutOfMemoryError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)

from data_prep.cache import ShardCache
from data_prep.storage import Storage
from data_prep.stream import Stream
from models import build_model
from pipelines.durable.attempt import root_cause
from pipelines.resources import local_options
from pipelines.tracking import Point, Publisher
from pipelines.training.arrow_storage import ray_storage
from pipelines.training.bookkeeping import Bookkeeper, Meter, best_step
from pipelines.training.job import TrainJob, out_of_memory, train_worker
from pipelines.training.learner import Learner, make_schedule
from pipelines.training.rendezvous import Rendezvous
from pipelines.training.trainer import Trainer
from pipelines.training.validate import Validation

FILES = ("state.pt", "journal.json")  # of a checkpoint
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def learn(job: TrainJob) -> None:
    """The training loop. Killed and resumed, it ends with the same bits as uninterrupted."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    meter, left = Meter(), False
    learner = make_learner(job, rank, world)
    start, journal = restore(job, learner)
    total = job.until or learner.schedule.total
    book = make_bookkeeper(job, learner, journal) if rank == 0 else None
    stream = make_stream(job, rank, world)

    for step, batch in enumerate(stream.batches(start, total), start):
        meter.waited()
        meter.add(learner.step(step, batch), batch["keys"])
        done = step + 1
        leaving = False
        if done % job.train["log_every"] == 0 or done == total:
            means = meter.means(learner, bad_samples=len(stream.bad))
            if book:
                book.note(done, means)
            leaving = not left and ray.train.get_preemption_info() is not None  # asks all ranks
            left = left or leaving
        if done % job.train["checkpoint_every"] == 0 or done == total or leaving:
            save(job, learner, done, book, last=leaving or done == total)
        if book:
            book.show(done, total)
        meter.stepped()
    if book:
        book.close()


def make_stream(job: TrainJob, rank: int, world: int) -> Stream:
    return Stream(
        job.storage.sub(job.shards),
        "train",
        size=job.data["size"],
        batch=job.train["batch"],
        masks=job.masks,
        seed=job.seed,
        streams=job.data["streams"],
        rank=rank,
        world=world,
        flip=job.data["flip"],
        edges={sigma: job.storage.sub(folder) for sigma, folder in job.edges.items()},
        edge_source=job.edge_source,  # type: ignore[arg-type]
        sigmas=job.sigmas,
        threads=job.data["threads"],
        cache=make_cache(job),
        max_bad=job.data["max_bad"],
    )


def make_cache(job: TrainJob) -> ShardCache | None:
    """One for all workers and runs of a machine."""
    if not job.data["cache_gb"] or job.storage.path() is not None:
        return None
    folder = Path(job.data["cache_dir"] or f"{tempfile.gettempdir()}/inpaint-shards-{os.getuid()}")
    return ShardCache(folder, int(job.data["cache_gb"] * 1e9))


def make_bookkeeper(job: TrainJob, learner: Learner, journal: list[Point]) -> Bookkeeper:
    sigma = statistics.median(job.sigmas)
    shards, size = job.storage.sub(job.shards), job.data["size"]
    held_out = Validation.load(shards, size, job.masks, sigma, learner.model.true_edges)
    publisher = Publisher(job.tracking, job.run) if job.tracking else None
    return Bookkeeper(learner, journal, held_out, publisher, job.progress)


def make_learner(job: TrainJob, rank: int, world: int) -> Learner:
    """The same initial weights on every rank: seeded by the recipe alone."""
    torch.set_num_threads(job.data["torch_threads"])
    keep_memory()
    torch.manual_seed(job.seed)
    if job.train["tf32"]:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    model = build_model(job.model, **local_options(job.options))
    return Learner(
        model,
        make_schedule(model, job.train["steps"]),
        job.seed,
        rank,
        world,
        job.train["lr_scale"],
        job.train["ema"],
        torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"),
        bfloat16=job.train["precision"] == "bfloat16",
        channels_last=job.train["channels_last"],
        compiled=job.train["compile"],
        at_once=job.data["at_once"],
    )


def keep_memory() -> None:
    """Tell glibc to keep what is freed: on CPUs a step frees and asks for the same hundreds of megabytes again, and
    handing them to the system and back costs up to a third of the step in page faults."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)


def restore(job: TrainJob, learner: Learner) -> tuple[int, list[Point]]:
    """The position to go on from and the journal of what was logged before it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        state, journal = read_checkpoint(checkpoint)
    elif job.start:
        state, journal = read_part(job.storage.sub(job.start))
    else:
        return 0, []
    return learner.load(state), journal


def save(job: TrainJob, learner: Learner, done: int, book: Bookkeeper | None, last: bool) -> None:
    """Rank 0 hands the state to Ray Train; a barrier for the others. To a bucket it travels while the training goes on.

    MLflow gets what the checkpoint before this one holds, which is committed by now: nothing that a crash could take
    back. After the `last` checkpoint its own is waited for.
    """
    name = f"step-{done:08d}"
    if book is None:
        ray.train.report({"step": done}, checkpoint_dir_name=name)
        return
    settle(job, book)
    book.look(done)
    bucket = job.storage.path() is None
    folder = Path(tempfile.mkdtemp())
    try:
        _write(folder, learner.state(done), book.journal)
        ray.train.report(
            {"step": done},
            checkpoint=Checkpoint(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC if bucket else CheckpointUploadMode.SYNC,
            checkpoint_upload_fn=partial(_upload, job) if bucket else None,
            delete_local_checkpoint_after_upload=True,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if last:
        settle(job, book)


def settle(job: TrainJob, book: Bookkeeper) -> None:
    """Once the newest checkpoint is committed: its points to MLflow, and itself kept if it is the best so far."""
    if not book.looked:
        return
    ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    if book.best == book.looked:
        for file in FILES:
            job.storage.copy(f"{job.checkpoints}/step-{book.looked:08d}/{file}", f"{job.best}/{file}")
    book.publish()


def _upload(job: TrainJob, checkpoint: Checkpoint, name: str) -> Checkpoint:
    """By our own storage, which outlasts a bucket that is away for a while."""
    for file in FILES:
        job.storage.upload(Path(checkpoint.path) / file, f"{job.checkpoints}/{name}/{file}")
    storage = ray.train.get_context().get_storage()
    return Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)


def fit(
    job: TrainJob, scaling: Mapping[str, Any], folder: str, name: str
) -> tuple[dict[str, Any], list[Point]]:
    """Train to the end under Ray Train; a run of this name in this folder of the storage is resumed.

    Returns the last checkpoint's state and the journal of the curves. Raises ValueError when a worker met an error
    that would only come again (a loss that is not finite, too little memory), or Ray's own error once more than
    `max_failures` worker groups were lost.
    """
    job.storage.delete(job.fatal)
    path, filesystem = ray_storage(job.storage, folder)
    per_worker = {"CPU": scaling["cpus_per_worker"], "GPU": scaling["gpus_per_worker"]}
    workers = scaling["workers"]
    try:
        result = Trainer(
            train_worker,
            train_loop_config={"job": job},
            backend_config=Rendezvous(backend="nccl" if scaling["gpus_per_worker"] else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers if isinstance(workers, int) else tuple(workers),  # type: ignore[arg-type]
                elastic_resize_monitor_interval_s=scaling["resize_every"],  # type: ignore[call-arg]  # Train V2's own
                use_gpu=scaling["gpus_per_worker"] > 0,
                resources_per_worker={kind: number for kind, number in per_worker.items() if number},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=scaling["max_failures"]),
                checkpoint_config=CheckpointConfig(num_to_keep=job.train["keep"]),
            ),
        ).fit()
    except Exception as error:
        if isinstance(root_cause(error), OutOfMemoryError):
            held = (job.train["batch"], job.data["size"], job.data["at_once"])
            raise ValueError(out_of_memory(*held, workers)) from error
        raise
    if job.storage.exists(job.fatal):
        raise ValueError(job.storage.read(job.fatal).decode())
    if result.error or result.checkpoint is None:
        raise RuntimeError(
            f"training {name} ended without a checkpoint: {result.error or 'Ray gave no reason'}"
        )
    return read_checkpoint(result.checkpoint)


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[Point]]:
    """The state and the journal of a checkpoint, wherever it lies."""
    with checkpoint.as_directory() as folder:
        return _read(Path(folder), checkpoint.path)


def read_best(job: TrainJob, journal: list[Point]) -> dict[str, Any] | None:
    """The state with the best look at held-out photographs; None where that is the last one, or was not kept."""
    step = best_step(journal)
    if step == journal[-1][0] or not job.storage.exists(f"{job.best}/{FILES[0]}"):
        return None
    state, _ = read_part(job.storage.sub(job.best))
    return state if state["step"] == step else None


def write_part(storage: Storage, state: dict[str, Any], journal: list[Point]) -> list[str]:
    """Keep the end of a part of a schedule, from which another training goes on; returns the files' names."""
    with tempfile.TemporaryDirectory() as temporary:
        _write(Path(temporary), state, journal)
        for name in FILES:
            storage.upload(Path(temporary) / name, name)
    return list(FILES)


def read_part(storage: Storage) -> tuple[dict[str, Any], list[Point]]:
    with tempfile.TemporaryDirectory() as temporary:
        for name in FILES:
            storage.download(name, Path(temporary) / name)
        return _read(Path(temporary), storage.uri)


def _write(folder: Path, state: dict[str, Any], journal: list[Point]) -> None:
    torch.save(state, folder / "state.pt")
    (folder / "journal.json").write_text(json.dumps(journal))


def _read(folder: Path, where: str) -> tuple[dict[str, Any], list[Point]]:
    """Never unpickled: weights_only. Raises ValueError for a state that is damaged or holds more than tensors."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{where}/state.pt is damaged, or holds more than tensors, and is not read: delete {Path(where).parent} to "
            "train from the start"
        ) from error
    journal = json.loads((folder / "journal.json").read_text())
    return state, [(int(step), values) for step, values in journal]
