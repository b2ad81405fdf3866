"""Typed config, inputs and outputs of every kind of step.

A config holds everything that enters the step's key; MLflow shows its fields as the run's parameters. RunSettings holds
what may change between runs without changing the outputs. Decoding is strict: an unknown or missing field, or one of
another type, is an error that names the field (data_prep/records.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from pydantic import JsonValue

from data_prep.left_out import LeftOutEntry
from pipelines.recipe import EvaluationConfig, Masks, Scaling
from pipelines.tracking_address import Tracking

FolderKey = str
"""A key prefix in the run's storage."""


class StepKind(StrEnum):
    """What a step does. BEGIN trains the first steps, which all trials of a sweep with the same seed share."""

    SHARD = "shard"
    EDGES = "edges"
    TRAIN = "train"
    EVALUATE = "evaluate"
    REGISTER = "register"
    BASELINES = "baselines"
    BEGIN = "begin"
    SCORE = "score"
    SWEEP = "sweep"


STEP_ORDER = (StepKind.SHARD, StepKind.EDGES, StepKind.TRAIN, StepKind.EVALUATE, StepKind.REGISTER)
"""The kinds of steps of a recipe, each after those that it needs."""
NON_RECIPE_FIELDS = frozenset({"listing_digest", "registry_uri"})
"""Fields of configs that do not follow from the recipe: the photographs in the source, and MLflow's URI."""


class ProgressCallback(Protocol):
    """Called with the work done, the total, and a note for the user."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


@dataclass(frozen=True)
class SweepOrigin:
    """The sweep that found a recipe's values. Stored in the metadata of registered versions."""

    name: str
    run: str
    """Id of its MLflow run, or ''."""
    values: str
    """As text for people."""


@dataclass(frozen=True)
class DataLoading:
    """How a training worker reads its photographs."""

    decode_threads: int = 1
    cache_gb: float = 0.0
    """Disk space per machine for the tars of a bucket; 0: no cache."""
    cache_dir: str | None = None
    """None: the system's temporary folder."""
    max_unreadable_fraction: float = 0.0
    """Of the training photographs; above it training fails."""


@dataclass(frozen=True)
class RunSettings:
    """Settings of a step that do not enter its key: tracking, resources, and records of where it comes from."""

    tracking: Tracking | None = None
    """None: without MLflow."""
    parent_run_id: str | None = None
    """The MLflow run that is the parent of the steps' runs."""
    trial_run_id: str = ""
    """The MLflow run of a trial, to which its steps log; '': every step has a run of its own."""
    recipe_yaml: str = ""
    sweep_origin: SweepOrigin | None = None
    scaling: Scaling = field(default_factory=Scaling)
    loading: DataLoading = field(default_factory=DataLoading)
    keep_checkpoints: int = 2
    max_concurrent_trials: int | None = None
    """None: as many as fit on the cluster."""
    left_out: Mapping[str, LeftOutEntry] | None = None
    """Files that the listing of the source left out, by kind; None: the source was not listed."""


@dataclass(frozen=True)
class ShardConfig:
    """The fields of the recipe's `data` that determine the shards; `source` is normalised."""

    source: str
    listing_digest: str
    """Digest of the names and sizes of the source's photographs."""
    root: str | None
    size: int
    margin: int
    crop: Literal["none", "square"]
    format: Literal["jpg", "png", "original"]
    quality: int
    val: float
    test: float
    partition_size: int
    max_shard_mb: float
    max_reject_fraction: float


@dataclass(frozen=True)
class ShardOutputs:
    files: tuple[str, ...]
    folder: FolderKey
    digest: str
    """sha256 over the names and sha256 of the tars; identifies the shards."""
    splits: dict[str, int]
    """Split -> number of photographs, for train, val and test."""
    rejects: int


@dataclass(frozen=True)
class EdgesConfig:
    sigma: float
    """Of Canny's Gaussian, in pixels."""


@dataclass(frozen=True)
class EdgesInputs:
    shards: ShardOutputs


@dataclass(frozen=True)
class EdgesOutputs:
    files: tuple[str, ...]
    folder: FolderKey
    sigma: float
    digest: str
    """sha256 of edges.json, which has the sha256 of every tar."""


@dataclass(frozen=True)
class TrainSchedule:
    """The fields of the recipe's `train` that determine the weights; see recipe.Train."""

    steps: dict[str, int]
    batch: int
    lr_scale: float
    ema_decay: float
    precision: Literal["auto", "float32", "bfloat16"]
    tf32: bool
    channels_last: bool
    compile: bool
    checkpoint_every: int
    log_every: int


@dataclass(frozen=True)
class TrainConfig:
    model: str
    options: dict[str, JsonValue]
    """Of the model, which checks them."""
    seed: int
    size: int
    """pixels"""
    flip: bool
    streams: int
    masks: Masks
    edge_source: Literal["full", "live", "masked", "none"]
    sigma: tuple[float, ...]
    train: TrainSchedule
    stop_after_step: int | None = None
    """Stop after this step of the schedule and save a state from which training with the same schedule can resume."""


@dataclass(frozen=True)
class TrainOutputs:
    files: tuple[str, ...]
    weights: FolderKey
    """Holds model.safetensors, model.json and curves.json; in best/ the first two of the best step, if it is not the
    last."""
    run_id: str
    """Of its MLflow run, or ''."""
    steps: int
    resume_state: FolderKey | None
    """The state from which another step resumes; None: training ran to the end of the schedule."""
    edge_digests: dict[str, str]
    """sigma -> digest of the edges that were read; empty if edges were computed on the fly."""


@dataclass(frozen=True)
class TrainInputs:
    shards: ShardOutputs
    edges: tuple[EdgesOutputs, ...] = ()
    resume_from: TrainOutputs | None = None
    """Training that stopped after its `stop_after_step`."""


@dataclass(frozen=True)
class EvaluateInputs:
    shards: ShardOutputs
    trained: dict[str, TrainOutputs]
    """The model's key in the recipe -> its training."""


@dataclass(frozen=True)
class EvaluateOutputs:
    files: tuple[str, ...]
    folder: FolderKey
    scores: dict[str, float]
    """The model's key in the recipe -> its score in the recipe's evaluate.metric."""


@dataclass(frozen=True)
class RegisterConfig:
    model_key: str
    """The model's key in the recipe, and in the evaluation's scores."""
    register_as: str
    recipe_name: str
    evaluate: EvaluationConfig
    registry_uri: str
    """Without user and password."""


@dataclass(frozen=True)
class RegisterInputs:
    shards: ShardOutputs
    trained: TrainOutputs
    evaluation: EvaluateOutputs


@dataclass(frozen=True)
class RegisterOutputs:
    name: str
    version: str
    champion: bool
    reason: str
    """Why it is or is not the champion."""
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaselinesInputs:
    shards: ShardOutputs


@dataclass(frozen=True)
class BaselinesOutputs:
    files: tuple[str, ...]
    folder: FolderKey
    truth_features: str
    """Key of the .npy file with the features of the ground-truth photographs: float [crops, d]."""
    scores: dict[str, dict[str, float]]
    """classical method -> metric -> score"""
    photo_count: int
    no_distance_reason: str
    """Why there are no Frechet and kernel distances; '' if there are."""


@dataclass(frozen=True)
class ScoreInputs:
    shards: ShardOutputs
    baselines: BaselinesOutputs
    trained: TrainOutputs


@dataclass(frozen=True)
class ScoreOutputs:
    files: tuple[str, ...]
    folder: FolderKey
    scores: dict[str, float]
    """metric -> score"""


@dataclass(frozen=True)
class SweepConfig:
    recipe: dict[str, JsonValue]
    """The recipe as parsed YAML, without the fields that say where it runs."""
    shared_steps: int
    """Training steps that all trials of one seed share."""


@dataclass(frozen=True)
class SweepInputs:
    shards: ShardOutputs
    baselines: BaselinesOutputs
    edges: tuple[EdgesOutputs, ...] = ()
    shared_training: dict[int, TrainOutputs] = field(default_factory=dict)
    """seed -> training of the steps that all its trials share"""


@dataclass(frozen=True)
class SweepOutputs:
    files: tuple[str, ...]
    result: str
    """Key of sweep.json."""
    report: str
    """Key of the report's HTML page."""
    best_recipe: str
    """Key of the best recipe's YAML."""
    best_values: dict[str, JsonValue]
    """recipe path -> value of the best setting"""
    scores: dict[str, float]
    """metric -> mean over the best setting's trials"""
    run_id: str
