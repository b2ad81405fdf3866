"""The typed recipe: what one run is made of, read from YAML, frozen, with errors that name the nearest known field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class Data(Section):
    """Which photographs, and how they are kept in the shards."""

    source: str = Field(
        "bundled", description="a folder, s3://bucket/prefix, a listing (.txt) in either, or `bundled`"
    )
    root: str | None = Field(
        None,
        description="folder or s3://... that a listing's names are relative to; none = the listing's own",
    )
    size: Annotated[int, Field(ge=32)] = Field(256, description="side of a training crop, in pixels")
    margin: Annotated[int, Field(ge=0)] = Field(
        0, description="extra pixels of the short side, for random crops"
    )
    crop: Literal["keep", "square"] = Field("keep", description="keep the aspect, or centre-crop to a square")
    format: Literal["jpg", "png", "original"] = Field(
        "jpg", description="original keeps the files' own bytes and resizes them whenever they are read"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    val: Fraction = 0.1
    test: Fraction = 0.1
    shard_photos: Positive = Field(1000, description="photographs a shard is cut from")
    shard_mb: Annotated[float, Field(gt=0)] = Field(256, description="megabytes of a shard at most")
    max_rejects: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of unreadable files above which sharding fails"
    )
    flip: bool = True
    streams: Positive = Field(
        2, description="ranges an epoch is cut into; as a multiple of the workers, each reads its own shards"
    )
    threads: Positive = Field(1, description="decoding threads of a training worker")
    cache_gb: Annotated[float, Field(ge=0)] = Field(
        20, description="gigabytes of a machine's disk for a bucket's tars; 0: each photograph is one request"
    )
    cache_dir: str | None = Field(None, description="where they lie; none = the system's temporary folder")
    max_bad: Annotated[float, Field(ge=0, le=1)] = Field(
        0.001, description="share of the shards' samples that may turn out unreadable before a training stops"
    )


class Edges(Section):
    """Canny's sigma (several: one is drawn per photograph) and what the hole hides from it in training."""

    sigma: tuple[Annotated[float, Field(ge=0, le=20)], ...] = (2.0,)
    source: Literal["full", "masked", "none"] = Field(
        "full",
        description="full: Canny on the whole photograph, as released; masked: never looks into the hole",
    )
    stored: bool = Field(True, description="false: full edges are computed while training, into no tars")

    @model_validator(mode="before")
    @classmethod
    def _scalar(cls, value: Any) -> Any:
        if value == "none":
            return {"source": "none"}
        if isinstance(value, Mapping) and isinstance(value.get("sigma"), int | float):
            return {**value, "sigma": [value["sigma"]]}
        return value

    @model_validator(mode="after")
    def _some(self) -> Edges:
        if not self.sigma:
            raise ValueError("give at least one sigma")
        return self


Scalar = bool | int | float | str | None
Masks = Annotated[
    dict[str, float | dict[str, Scalar | list[float]]],
    BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value),
]
"""Kinds (center, box, block, region, brush, box_and_brush, half) or folders, each with its share or its options:
`center`, `{block: 1, half: 1}`, `{brush: {max_width: 20, share: 2}}`."""


class Train(Section):
    """How long, on how many photographs at once, and what is kept on the way."""

    steps: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="steps of each phase; 0 leaves it out"
    )
    batch: Positive = Field(16, description="photographs a step, over all workers")
    lr_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="factor on the paper's learning rates")
    ema: Fraction = Field(0.0, description="decay of the averaged generator weights; 0 = none")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: forward passes and losses under autocast"
    )
    tf32: bool = Field(False, description="TensorFloat-32 matrix products and convolutions on GPUs")
    channels_last: bool = Field(False, description="memory layout of images and weights: faster on most GPUs")
    compile: bool = Field(False, description="torch.compile the networks")
    checkpoint_every: Positive = 500
    log_every: Positive = 20
    keep: Positive = Field(2, description="checkpoints kept")


class Scaling(Section):
    """Workers of one training and what each may use."""

    workers: Positive | tuple[Positive, Positive] = Field(
        1,
        description="or [least, most]: as many as the cluster holds, more when nodes come and fewer when they go",
    )
    at_once: Positive | None = Field(
        None,
        description="photographs that a worker computes on at once; more of its part of the batch are accumulated",
    )
    resize_every: Annotated[float, Field(ge=1)] = Field(
        60.0,
        description="seconds between two looks for room for more workers or fewer; they change at checkpoints",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="worker groups lost before training gives up"
    )

    @model_validator(mode="after")
    def _least_first(self) -> Scaling:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers = [{self.least_workers}, {self.most_workers}]: give [least, most]")
        return self

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


WORDS = ("generated", "canny", "none")  # edge_connect's `edges`


class ModelSection(BaseModel):
    """One model to train. Every field that is not named here is an option of the model: the lambdas, `width`..."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str
    seed: int | None = None
    masks: Masks | None = None
    edges: Edges | Literal["generated", "canny", "none"] | None = Field(
        None, description="its own edges section; or, in one word, edge_connect's option of that name"
    )
    train: Train | None = None
    register_as: str | None = Field(
        None, description="name in the registry; `none` trains without registering"
    )

    @property
    def options(self) -> dict[str, Any]:
        own = {"edges": self.edges} if isinstance(self.edges, str) else {}
        return dict(self.model_extra or {}) | own

    @field_validator("edges", mode="wrap")
    @classmethod
    def _word_or_section(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        return value if isinstance(value, str) and value in WORDS else validate(value)


class Distance(Section):
    """The Frechet and kernel distances: which layer of which frozen features, on how many crops."""

    features: str = "efficientnet_lite0"
    weights: str | None = None
    sha256: str | None = None
    layer: str | None = Field(None, description="a layer of the feature stack; none = its default")
    crops: Positive = Field(4, description="fixed crops a photograph")


class Evaluation(Section):
    """One protocol for every model and baseline: fixed masks, fixed seeds."""

    masks: tuple[str, ...] = ("center",)
    split: Literal["train", "val", "test"] = "test"
    count: Positive = Field(1000, description="photographs at most")
    seed: int = 0
    sigma: float = 2.0
    metric: str = Field("psnr_rgb_hole", description="the figure that makes a champion")
    distance: Distance | None = Distance()
    samples: Positive = Field(6, description="rows of the sample grid")


class Domain(Section):
    """The values that one field of a sweep takes: exactly one of these."""

    grid: tuple[Any, ...] | None = Field(None, description="every one of them; a plain list means this")
    choice: tuple[Any, ...] | None = Field(None, description="one of them, drawn")
    uniform: tuple[float, float] | None = Field(None, description="drawn evenly between two numbers")
    loguniform: tuple[float, float] | None = Field(None, description="its logarithm is drawn evenly")

    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return {"grid": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one(self) -> Domain:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError("give one of grid: [...], choice: [...], uniform: [a, b], loguniform: [a, b]")
        values = self.values or self.range
        if not values:
            raise ValueError("is empty: name at least one value, for example [0.001, 0.01]")
        if self.range and not self.range[0] < self.range[1]:
            raise ValueError(f"the range {list(self.range)} is empty: the smaller number comes first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform begins above 0")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        return self.grid or self.choice or ()

    @property
    def range(self) -> tuple[float, float] | None:
        return self.uniform or self.loguniform


class Budget(Section):
    """When a sweep starts no further trial; those that run are finished. The first limit that is met counts."""

    trials: Positive | None = None
    minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="of this sweep's own time")
    steps: Positive | None = Field(None, description="training steps of all trials together")


class Sweep(Section):
    """Which fields take which values, how they are searched, and what decides."""

    fields: dict[str, Domain] = Field(
        description="recipe path -> values; the field `seed` repeats every setting"
    )
    constraints: tuple[str, ...] = Field(
        (),
        description="such as model.lambda_adv <= model.lambda_rec / 10: settings that break one are left out",
    )
    model: str | None = Field(None, description="which of the recipe's models; none = its only one")
    search: Literal["grid", "random", "optuna"] = "grid"
    scheduler: Literal["none", "asha", "median", "pbt"] = Field(
        "none", description="asha, median: end trials that fall behind; pbt: copy the best, change the fields"
    )
    every: Positive | None = Field(None, description="steps between two looks of the scheduler")
    reduction: Annotated[int, Field(ge=2)] = Field(3, description="asha keeps one in this many")
    metrics: tuple[str, ...] = Field(
        ("psnr_rgb_hole", "fd"), description="of the evaluation; the first decides"
    )
    split: Literal["train", "val", "test"] = Field("val", description="photographs that decide")
    train: dict[str, Any] = Field({}, description="what trials do not share with `train`: steps, say")
    budget: Budget = Budget()
    at_once: Positive | None = Field(None, description="trials side by side; none = as the cluster allows")

    @model_validator(mode="after")
    def _whole(self) -> Sweep:
        if not self.fields:
            raise ValueError(
                "fields is empty: name at least one, for example  fields: {edges.sigma: [1, 2, 3]}"
            )
        if not self.metrics:
            raise ValueError("metrics is empty: name at least one, such as psnr_rgb_hole")
        ranges = [path for path, domain in self.fields.items() if domain.range]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"search: grid cannot take the range of {ranges[0]}: list values, or search: random"
            )
        if self.search != "grid" and not (self.budget.trials or self.budget.minutes or self.budget.steps):
            raise ValueError(
                f"search: {self.search} goes on for ever: give a budget, for example  budget: {{trials: 20}}"
            )
        if self.scheduler != "none" and self.every is None:
            raise ValueError(f"scheduler: {self.scheduler} needs `every`, the steps between two of its looks")
        if self.scheduler == "pbt":
            fixed = [path for path in self.fields if ".lambda_" not in path and path != "seed"]
            if fixed:
                raise ValueError(
                    f"scheduler: pbt changes fields during a training, which {fixed[0]} cannot be: only lambdas"
                )
        return self


class Recipe(Section):
    """What one run is made of. `storage` and `tracking` say where; they do not change what comes out."""

    name: str
    storage: str = "runs"
    tracking: str | None = Field(
        None, description="MLflow's address; none: MLFLOW_TRACKING_URI, or a file by the storage"
    )
    experiment: str = "inpaint"
    seed: int = 0
    data: Data = Data()
    edges: Edges = Edges()
    masks: Masks = {"center": 1.0}
    train: Train = Train()
    scaling: Scaling = Scaling()
    models: dict[str, ModelSection]
    evaluate: Evaluation = Evaluation()
    sweep: Sweep | None = None

    @model_validator(mode="before")
    @classmethod
    def _models(cls, raw: Any) -> Any:
        """`model: {...}` is one model; in `models:` the key names the model unless `name` does."""
        if not isinstance(raw, Mapping):
            return raw
        raw = dict(raw)
        single = raw.pop("model", None)
        if single is not None:
            if "models" in raw:
                raise ValueError("give either `model` or `models`, not both")
            if not isinstance(single, Mapping) or "name" not in single:
                raise ValueError("`model` needs a name, for example  model: {name: context_encoder}")
            raw["models"] = {single["name"]: single}
        models = raw.get("models")
        if isinstance(models, Mapping):
            raw["models"] = {
                key: {"name": key, **(section or {})} if isinstance(section or {}, Mapping) else section
                for key, section in models.items()
            }
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not self.models:
            raise ValueError("models is empty: name at least one, for example  models: {context_encoder: {}}")
        if self.data.val + self.data.test >= 1:
            raise ValueError("data.val + data.test leave nothing to train on: keep their sum under 1")
        for key in self.models:
            train = self.train_of(key)
            batch = train.batch
            if train.checkpoint_every % train.log_every:
                raise ValueError(
                    f"train.checkpoint_every = {train.checkpoint_every} is no multiple of train.log_every = "
                    f"{train.log_every}: a resumed curve would have other means"
                )
            if batch < self.scaling.most_workers:
                raise ValueError(
                    f"train.batch = {batch} of model {key} has no photograph for each of scaling.workers = "
                    f"{self.scaling.most_workers}"
                )
            if batch % self.data.streams:
                raise ValueError(
                    f"train.batch = {batch} of model {key} is no multiple of data.streams = {self.data.streams}"
                )
        return self

    def train_of(self, key: str) -> Train:
        """The `train` section of one model: the recipe's, with the fields its own section gives."""
        own = self.models[key].train
        return self.train if own is None else self.train.model_copy(update=own.model_dump(exclude_unset=True))

    def masks_of(self, key: str) -> Masks:
        own = self.models[key].masks
        return self.masks if own is None else own

    def edges_of(self, key: str) -> Edges:
        own = self.models[key].edges
        return own if isinstance(own, Edges) else self.edges

    def seed_of(self, key: str) -> int:
        own = self.models[key].seed
        return self.seed if own is None else own

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)

    @property
    def digest(self) -> str:
        """Identifies what is computed: where it is kept, tracked and scaled has no part in it."""
        body = self.model_dump(mode="json", exclude={"storage", "tracking", "experiment", "scaling"})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
