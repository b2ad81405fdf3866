"""The recipe: all sections, the constraints between them, and the digest of what is computed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, model_validator

from pipelines.names import check_experiment_name, check_run_name
from pipelines.recipe.sections import (
    Data,
    Edges,
    EvaluationConfig,
    Masks,
    ModelConfig,
    Scaling,
    Section,
    Seed,
    Train,
)
from pipelines.recipe.sweep import Sweep


class Recipe(Section):
    """All that defines a run. `storage` and `tracking_uri` say where results are stored; they do not change them."""

    name: Annotated[str, AfterValidator(check_run_name)] = Field(
        description="of the run in reports, in MLflow and in `inpaint status`"
    )
    storage: str = Field(
        "runs",
        description="folder or s3://bucket/prefix for all that a run writes; relative to where it starts",
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow's tracking URI; none = MLFLOW_TRACKING_URI, or a database beside the storage",
    )
    experiment: Annotated[str, AfterValidator(check_experiment_name)] = Field(
        "inpaint", description="experiment in MLflow that the runs belong to"
    )
    seed: Seed = Field(0, description="decides initial weights, order of the photographs, crops and masks")
    data: Data = Field(Data(), description="the photographs, and how they are stored")
    edges: Edges = Field(Edges(), description="Canny edges")
    masks: Masks = Field({"center": 1.0}, description="masks for training")
    train: Train = Field(Train(), description="steps, batch, precision, checkpoints")
    scaling: Scaling = Field(Scaling(), description="workers and their resources")
    models: dict[str, ModelConfig] = Field(description="the models to train: key -> section")
    evaluate: EvaluationConfig = Field(
        EvaluationConfig(), description="photographs, masks and metrics of the scores"
    )
    sweep: Sweep | None = Field(None, description="values to try; none = `inpaint sweep` has nothing to do")

    @model_validator(mode="before")
    @classmethod
    def _normalize_models(cls, raw: Any) -> Any:
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
    def _check_consistency(self) -> Recipe:
        if not self.models:
            raise ValueError("models is empty: name at least one, for example  models: {context_encoder: {}}")
        if self.data.val + self.data.test >= 1:
            raise ValueError("data.val + data.test leave nothing to train on: their sum must be below 1")
        for key in self.models:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", key):
                raise ValueError(
                    f"models.{key}: steps are named after it, so only letters, digits and ._+=- are allowed; choose the "
                    "network with `name:`"
                )
            train = self.train_for(key)
            batch = train.batch
            if train.checkpoint_every % train.log_every:
                raise ValueError(
                    f"train.checkpoint_every = {train.checkpoint_every} is not a multiple of train.log_every = "
                    f"{train.log_every}: the curves of a resumed run would have other means"
                )
            if batch < self.scaling.max_workers:
                raise ValueError(
                    f"train.batch = {batch} of model {key} is less than one photograph for each of scaling.workers = "
                    f"{self.scaling.max_workers}"
                )
            if batch % self.data.streams:
                raise ValueError(
                    f"train.batch = {batch} of model {key} is not a multiple of data.streams = {self.data.streams}"
                )
        return self

    def train_for(self, key: str) -> Train:
        """The `train` section of one model: the recipe's, with the fields that the model's own section sets."""
        section = self.models[key].train
        if section is None:
            return self.train
        return self.train.model_copy(update=section.model_dump(exclude_unset=True))

    def masks_for(self, key: str) -> Masks:
        """The masks of one model: its own, or the recipe's."""
        masks = self.models[key].masks
        return self.masks if masks is None else masks

    def edges_for(self, key: str) -> Edges:
        """The `edges` section of one model: its own, or the recipe's."""
        edges = self.models[key].edges
        return self.edges if edges is None else edges

    def seed_for(self, key: str) -> int:
        """The seed of one model: its own, or the recipe's."""
        seed = self.models[key].seed
        return self.seed if seed is None else seed

    def to_yaml(self) -> str:
        """The recipe without default values."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)

    def computed_fields(self) -> dict[str, Any]:
        """The fields, defaults included, that say what is computed: without storage, tracking and scaling."""
        return self.model_dump(mode="json", exclude={"storage", "tracking_uri", "experiment", "scaling"})

    @property
    def digest(self) -> str:
        """Digest of `computed_fields`."""
        return hashlib.sha256(json.dumps(self.computed_fields(), sort_keys=True).encode()).hexdigest()
