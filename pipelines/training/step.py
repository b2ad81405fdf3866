"""The step `train`."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from ray.exceptions import OutOfMemoryError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from data_prep.masks import fixed_masks
from data_prep.records import to_json
from data_prep.storage import Storage
from models import build_model
from models.base import make_schedule
from pipelines.contracts import RunSettings, TrainConfig, TrainInputs, TrainOutputs
from pipelines.durable.memory import explain_out_of_memory
from pipelines.durable.mlflow_run import with_mlflow_run
from pipelines.durable.steps import StepContext
from pipelines.durable.task import ray_job_id, root_cause
from pipelines.provenance import PROVENANCE_TAG, collect_provenance
from pipelines.recipe import Scaling
from pipelines.tracking import runs
from pipelines.tracking.datasets import log_dataset
from pipelines.tracking.runs import CurvePoint
from pipelines.training.checkpoint import read_best_state, read_checkpoint, write_resume_state
from pipelines.training.curves import CURVES_FILE, TrainingCurves
from pipelines.training.job import TrainFolders, TrainJob, WorkerCompute
from pipelines.training.lost_workers import AnnounceLostWorkers
from pipelines.training.precision import TrainedPrecision
from pipelines.training.process_group import ProcessGroupConfig
from pipelines.training.ray_filesystem import ray_storage_location
from pipelines.training.ray_train import FastStartTrainer
from pipelines.training.worker import train_worker
from pipelines.weights import CheckpointInfo, save_weights


@with_mlflow_run
def train(
    ctx: StepContext[TrainConfig, TrainInputs, RunSettings], client: MlflowClient | None, run_id: str
) -> TrainOutputs:
    """Tars and edge tars -> weights, under Ray Train. The persistent folder holds the checkpoints between attempts.

    If an earlier validation score was better than the last, the weights of that step are in `best/`, beside the last
    ones. `stop_after_step` in the config ends training early, with a state from which another run resumes.
    """
    config, settings, inputs = ctx.config, ctx.settings, ctx.inputs
    run_name = f"{ctx.name}-{ctx.key[:16]}"
    job = TrainJob(
        config=config,
        storage=ctx.storage,
        shards=inputs.shards.folder,
        folders=TrainFolders.within(ctx.persistent_folder, run_name),
        edges={edges.sigma: edges.folder for edges in inputs.edges},
        max_unreadable=int(settings.loading.max_unreadable_fraction * inputs.shards.splits["train"]),
        loading=settings.loading,
        compute=WorkerCompute(
            settings.scaling.micro_batch_size, max(1, int(settings.scaling.cpus_per_worker))
        ),
        resume_from=inputs.resume_from.resume_state if inputs.resume_from else None,
        run_id=run_id,
        tracking=settings.tracking if run_id else None,
        progress=ctx.progress,
    )
    ctx.progress(0, 0, "starting workers")
    if client:
        runs.log_tags(client, run_id, {PROVENANCE_TAG: json.dumps(collect_provenance())})
        log_dataset(client, run_id, ctx.storage.subfolder(inputs.shards.folder), "train")
    state, points = fit(job, settings.scaling, ctx.persistent_folder, run_name, settings.keep_checkpoints)
    if client:
        runs.log_curves(client, run_id, points)
    model = build_model(config.model, **config.options)
    config_json = to_json(config)
    info = CheckpointInfo(
        name=config.model,
        options=config_json["options"],
        size=config.size,
        seed=config.seed,
        masks=config_json["masks"],
        edge_source=config.edge_source,
        sigma=statistics.median(config.sigma),
        sigmas=tuple(config_json["sigma"]),
        hole_range=hole_area_range(config.masks, config.size, ctx.storage),
        **precision_record(state),
    )
    schedule = make_schedule(model, config.train.steps)
    curves = TrainingCurves(
        tuple(points), tuple((phase.name, start, end) for phase, start, end in schedule.phase_spans)
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder, files = Path(temporary), []
        best = read_best_state(ctx.storage, job.folders.best, points)
        for subfolder, weights in (("", state), ("best/", best)):
            if weights:
                model.networks.load_state_dict(weights["networks"])
                (folder / subfolder).mkdir(exist_ok=True)
                saved = save_weights(
                    folder / subfolder, model, weights["ema"], replace(info, steps=weights["step"])
                )
                files += [f"{subfolder}{file}" for file in saved]
        (folder / CURVES_FILE).write_text(curves.to_json())
        files.append(CURVES_FILE)
        for file in files:
            ctx.storage.upload(folder / file, f"{ctx.attempt_folder}/{file}")
    if config.stop_after_step:
        files += write_resume_state(ctx.storage.subfolder(ctx.attempt_folder), state, points)
    return TrainOutputs(
        files=tuple(f"{ctx.attempt_folder}/{file}" for file in files),
        weights=ctx.attempt_folder,
        run_id=run_id,
        steps=state["step"],
        resume_state=ctx.attempt_folder if config.stop_after_step else None,
        edge_digests={f"{edges.sigma:g}": edges.digest for edges in inputs.edges},
    )


def fit(
    job: TrainJob, scaling: Scaling, folder: str, run_name: str, keep_checkpoints: int = 2
) -> tuple[dict[str, Any], list[CurvePoint]]:
    """Train to the end under Ray Train; resumes a run of this name in this folder of the storage.

    Returns the state in the last checkpoint and the curve points. Raises ValueError if a worker met an error that a
    retry cannot fix (a non-finite loss, too little memory), RuntimeError if other programs took the machine's memory,
    and Ray's own error after more than `max_failures` lost worker groups.
    """
    job.storage.delete(job.folders.error_file)
    path, filesystem = ray_storage_location(job.storage, folder)
    resources = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    workers = scaling.workers
    try:
        result = FastStartTrainer(
            train_worker,
            train_loop_config={"job": job},
            backend_config=ProcessGroupConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers if isinstance(workers, int) else tuple(workers),  # type: ignore[arg-type]
                elastic_resize_monitor_interval_s=scaling.resize_interval_s,  # type: ignore[call-arg]  # Train V2's own
                use_gpu=scaling.gpus_per_worker > 0,
                resources_per_worker={kind: number for kind, number in resources.items() if number},
            ),
            run_config=RunConfig(
                name=run_name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=scaling.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=keep_checkpoints),
                callbacks=[AnnounceLostWorkers(job)],  # type: ignore[list-item]  # Train V2's own kind
            ),
        ).fit()
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, OutOfMemoryError):
            message, is_transient = explain_out_of_memory(
                str(cause), job.out_of_memory_advice(workers), ray_job_id()
            )
            raise (RuntimeError if is_transient else ValueError)(message) from error
        raise
    if job.storage.exists(job.folders.error_file):
        raise ValueError(job.storage.read(job.folders.error_file).decode())
    if result.error or result.checkpoint is None:
        raise RuntimeError(
            f"training {run_name} ended without a checkpoint: {result.error or 'Ray gave no reason'}"
        )
    return read_checkpoint(result.checkpoint)


def precision_record(state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of CheckpointInfo on the precision of a training; {} for a state from before it was recorded."""
    trained = TrainedPrecision.from_state(state)
    if trained is None:
        return {}
    return {
        "precision": trained.data_type,
        "channels_last": trained.precision.channels_last,
        "hardware": trained.hardware,
    }


def hole_area_range(
    masks: Mapping[str, Any], size: int, scan_cache: Storage | None = None
) -> tuple[float, float]:
    """Smallest and largest hole area, as a fraction of the image, in a sample of the training masks."""
    areas = [float(mask.mean()) for mask in fixed_masks(masks, size, size, 64, 0, scan_cache)]
    return min(areas), max(areas)
