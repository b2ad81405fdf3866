"""The sections of a recipe: data, edges, training, scaling, models, evaluation. Typed, frozen, no unknown fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pipelines.names import check_model_name


class Section(BaseModel):
    """Frozen, without unknown fields, infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # valid for NumPy's, torch's and the stream's generators


class Data(Section):
    """The photographs, and how the shards store them."""

    source: str = Field(
        "bundled", description="a folder, s3://bucket/prefix, a listing (.txt file) in one, or `bundled`"
    )
    root: str | None = Field(
        None,
        description="folder or s3://... to which the names in a listing are relative; none = the listing's folder",
    )
    size: Annotated[int, Field(ge=32)] = Field(256, description="side of a training crop, in pixels")
    margin: Annotated[int, Field(ge=0)] = Field(
        0, description="pixels that the short side has more than `size`, for random crops"
    )
    crop: Literal["none", "square"] = Field(
        "none", description="none: keep the aspect ratio; square: centre crop"
    )
    format: Literal["jpg", "png", "original"] = Field(
        "jpg", description="original: store the files unchanged, and resize whenever they are read"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="of JPEG")
    val: Fraction = Field(0.1, description="fraction of the photographs for validation")
    test: Fraction = Field(0.1, description="fraction of the photographs for the test set")
    partition_size: PositiveInt = Field(
        1000, description="photographs per sharding task; each task writes its own tars for each split"
    )
    max_shard_mb: Annotated[float, Field(gt=0)] = Field(256, description="maximum size of a tar in megabytes")
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="fraction of unusable files above which sharding fails; files like .DS_Store do not count",
    )
    flip: bool = Field(True, description="mirror photographs at random in training")
    streams: PositiveInt = Field(
        2,
        description="independent sample streams per epoch; if it is a multiple of the number of workers, each worker "
        "reads its own shards",
    )
    threads: PositiveInt = Field(1, description="decoding threads of a training worker")
    cache_gb: Annotated[float, Field(ge=0)] = Field(
        20,
        description="gigabytes of disk per machine to cache a bucket's tars; 0 = one request per photograph",
    )
    cache_dir: str | None = Field(
        None, description="folder of that cache; none = the system's temporary folder"
    )
    max_unreadable_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.001, description="fraction of unreadable samples in the shards above which training fails"
    )


class Edges(Section):
    """Canny's sigma (of several, one is chosen at random per photograph), and whether it sees the hole in training."""

    sigma: tuple[Annotated[float, Field(ge=0, le=20)], ...] = Field(
        (2.0,), description="standard deviation of Canny's Gaussian in pixels, 0 = no blur; or several"
    )
    mode: Literal["full", "masked", "none"] = Field(
        "full",
        description="full: Canny on the whole photograph, as in the released code; masked: only outside the hole",
    )
    precompute: bool = Field(
        True, description="false: compute full edges during training instead of storing tars"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_scalar(cls, value: Any) -> Any:
        if value == "none":
            return {"mode": "none"}
        if isinstance(value, Mapping) and isinstance(value.get("sigma"), int | float):
            return {**value, "sigma": [value["sigma"]]}
        return value

    @model_validator(mode="after")
    def _check_not_empty(self) -> Edges:
        if not self.sigma:
            raise ValueError("give at least one sigma")
        return self


Scalar = bool | int | float | str | None
Masks = Annotated[
    dict[str, float | dict[str, Scalar | list[float | str]]],
    BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value),
]
"""Kinds of masks (center, box, block, region, brush, box_and_brush, half, lama_thin, lama_medium, lama_thick, mat_small,
mat_large) or folders -> weight or options, such as `center`, `{block: 1, half: 1}`,
`{brush: {max_width: 20, weight: 2}}`, `{photos/masks: {hole: 2}}`."""


class Train(Section):
    """Steps, batch size, precision, checkpoints and logging."""

    steps: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="steps per phase; 0 skips the phase"
    )
    batch: PositiveInt = Field(16, description="photographs per step, over all workers")
    lr_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="factor on the paper's learning rates")
    ema_decay: Fraction = Field(0.0, description="decay of the generators' moving average; 0 = none")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: forward passes and losses run under autocast; auto: precision and memory layout of the "
        "model's table for this hardware",
    )
    tf32: bool = Field(False, description="TensorFloat-32 matrix products and convolutions on GPUs")
    channels_last: bool = Field(False, description="memory layout of images and weights: faster on most GPUs")
    compile: bool = Field(False, description="torch.compile the networks")
    checkpoint_every: PositiveInt = Field(500, description="steps between checkpoints")
    log_every: PositiveInt = Field(20, description="steps between points of the curves")
    keep_checkpoints: PositiveInt = Field(
        2, description="number of last checkpoints to keep, besides the best"
    )

    @model_validator(mode="after")
    def _check_layout(self) -> Train:
        if self.precision == "auto" and self.channels_last:
            raise ValueError(
                "channels_last: precision = auto chooses the memory layout; leave one of them out"
            )
        return self


class Scaling(Section):
    """The workers of one training run and the resources of each."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1,
        description="number of workers, or [min, max]: as many as fit on the cluster, adapted as nodes join and leave",
    )
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="photographs per forward pass; gradients are accumulated over the worker's batch",
    )
    resize_interval_s: Annotated[float, Field(ge=1)] = Field(
        60.0,
        description="seconds between checks for free or lost nodes; the number of workers changes at checkpoints",
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(
        0, description="GPUs of each worker; 0 = CPUs only"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(
        1, description="CPUs of each worker, and torch's threads in it"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="lost worker groups after which training fails"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Scaling:
        if self.min_workers > self.max_workers:
            raise ValueError(f"workers = [{self.min_workers}, {self.max_workers}]: give [min, max]")
        return self

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class ModelConfig(BaseModel):
    """One model to train. All other fields are options of the model: the lambdas, `width`..."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str = Field(description="the network: one of the models below; default: the key")
    seed: Seed | None = Field(None, description="none = the recipe's")
    masks: Masks | None = Field(None, description="masks for training this model; none = the recipe's")
    edges: Edges | None = Field(None, description="edges section of this model; none = the recipe's")
    train: Train | None = Field(None, description="fields of `train` that differ for this model")
    register_as: str | None = Field(None, description="name in the registry; `none`: do not register")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @field_validator("register_as")
    @classmethod
    def _check_register_as(cls, value: str | None) -> str | None:
        return check_model_name(value) if value and value != "none" else value


class DistanceConfig(Section):
    """The Frechet and kernel distances: frozen features, their layer, and the number of crops."""

    features: str = Field(
        "efficientnet_lite0", description="feature network: efficientnet_lite0, vgg16 or vgg19"
    )
    weights: str | None = Field(
        None,
        description="its weights, a path, s3://... or https://...; none = the package's (efficientnet_lite0)",
    )
    sha256: str | None = Field(None, description="SHA-256 of the weights file; needed with https://")
    layer: str | None = Field(None, description="layer of the feature stack; none = its default")
    crops_per_photo: PositiveInt = Field(4, description="fixed crops per photograph")


class WeightsFile(Section):
    """A file with the weights of a network; in recipes also as text, `PATH_OR_URI` or `PATH_OR_URI#sha256=HEX`."""

    weights: str = Field(description="a path, file://, s3://... or https://...")
    sha256: str | None = Field(None, description="SHA-256 of the file; needed with https://")

    @model_validator(mode="before")
    @classmethod
    def _accept_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        address, mark, sha256 = value.partition("#sha256=")
        return {"weights": address, "sha256": sha256} if mark else {"weights": address}

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, value: str) -> str:
        if not value:
            raise ValueError("give the path or address of a weights file")
        return value

    @field_validator("sha256")
    @classmethod
    def _check_sha256(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise ValueError(f"{value!r} is no SHA-256: give 64 hexadecimal digits")
        return value and value.lower()


class FeatureWeights(Section):
    """The weights of the networks of published scores, which no package carries. Each is none, text or a section."""

    alexnet: WeightsFile | None = Field(
        None, description="torchvision's AlexNet, for `lpips_alex`; none = it is not computed"
    )
    vgg16: WeightsFile | None = Field(
        None, description="torchvision's VGG-16, for `lpips_vgg`; none = it is not computed"
    )
    inception: WeightsFile | None = Field(
        None,
        description="the Inception v3 of FID, for `fid`, `kid_inception`, `p_ids_percent` and `u_ids_percent`; none = "
        "these are not computed",
    )

    @property
    def networks(self) -> dict[str, WeightsFile]:
        """The networks with weights, by name."""
        files = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: file for name, file in files.items() if file is not None}


class EvaluationConfig(Section):
    """One protocol for all models and baselines: fixed masks, fixed seeds.

    The section of a recipe, the config of the evaluation steps, and an argument of `pipelines.evaluation.evaluate`.
    """

    masks: tuple[str, ...] = Field(("center",), description="kinds, folders or frozen sets (.tar) of masks")
    split: Literal["train", "val", "test"] = Field("test", description="split that is scored")
    max_photos: PositiveInt | None = Field(
        1000, description="maximum number of photographs (the first ones); none = all"
    )
    seed: Seed = Field(0, description="decides the fixed masks and crops")
    sigma: Annotated[float, Field(ge=0, le=20)] = Field(
        2.0, description="Canny's, for edges outside the hole, for models without a sigma of their own"
    )
    metric: str = Field("psnr_rgb_hole", description="metric that decides which version becomes champion")
    distance: DistanceConfig | None = Field(
        DistanceConfig(), description="features and crops of `fd` and `kid`; none = neither"
    )
    features: FeatureWeights | None = Field(
        None, description="weights for LPIPS, FID, KID, P-IDS and U-IDS; none = these are not computed"
    )
    grid_rows: Annotated[int, Field(ge=0)] = Field(
        6, description="rows of the sample grid: evenly spaced photographs; 0 = no grid"
    )
    hole: Scalar | list[float | str] = Field(
        None,
        description="pixel values that mean hole in mask folders; none = white, or all that is not black",
    )

    @model_serializer(mode="wrap")
    def _omit_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer fields that are None: evaluations from before these fields keep their step keys."""
        newer = ("hole", "features")
        return {key: value for key, value in dump(self).items() if key not in newer or value is not None}
