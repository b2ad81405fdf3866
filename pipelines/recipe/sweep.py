"""The section `sweep` of a recipe: fields with their values, search, scheduler, budget."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.recipe.sections import PositiveInt, Section


class Domain(Section):
    """The values of one field of a sweep; exactly one of these is given."""

    grid: tuple[Any, ...] | None = Field(None, description="all of these values; a plain list means this")
    choice: tuple[Any, ...] | None = Field(None, description="one of these values at random")
    uniform: tuple[float, float] | None = Field(None, description="uniform between two numbers")
    loguniform: tuple[float, float] | None = Field(None, description="log-uniform between two numbers")

    @model_validator(mode="before")
    @classmethod
    def _accept_list(cls, value: Any) -> Any:
        return {"grid": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _check_exactly_one(self) -> Domain:
        kinds = self.model_dump(exclude_none=True)
        if len(kinds) != 1:
            raise ValueError("give one of grid: [...], choice: [...], uniform: [a, b], loguniform: [a, b]")
        values = self.values or self.bounds
        if not values:
            raise ValueError("is empty: name at least one value, for example [0.001, 0.01]")
        if self.bounds and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"the range {list(self.bounds)} is empty: the smaller number comes first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform begins above 0")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        return self.grid or self.choice or ()

    @property
    def bounds(self) -> tuple[float, float] | None:
        return self.uniform or self.loguniform


class Budget(Section):
    """Limits after which a sweep starts no more trials; running trials finish. The first limit reached counts."""

    trials: PositiveInt | None = Field(None, description="number of trials, failed ones too")
    minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="run time of this sweep")
    steps: PositiveInt | None = Field(None, description="training steps, summed over all trials")


class Sweep(Section):
    """Fields with their values, search, scheduler, metrics and budget."""

    fields: dict[str, Domain] = Field(
        description="recipe path -> values; with the field `seed`, every setting is repeated per seed"
    )
    constraints: tuple[str, ...] = Field(
        (),
        description="such as model.lambda_adv <= model.lambda_rec / 10: settings that break one are left out",
    )
    model: str | None = Field(None, description="key of the model to sweep; none = the recipe's only model")
    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="grid: all combinations; random; optuna: learns from finished trials"
    )
    scheduler: Literal["none", "asha", "median", "pbt"] = Field(
        "none",
        description="asha, median: stop bad trials early; pbt: copy good trials and change their fields",
    )
    report_every: PositiveInt | None = Field(None, description="steps between two reports to the scheduler")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(3, description="asha keeps one in this many trials")
    metrics: tuple[str, ...] = Field(
        ("psnr_rgb_hole", "fd"), description="metrics of the evaluation; the first one ranks the trials"
    )
    split: Literal["train", "val", "test"] = Field("val", description="split on which trials are compared")
    train: dict[str, Any] = Field(
        {}, description="fields of `train` that are different in trials, such as steps"
    )
    budget: Budget = Field(Budget(), description="no trial starts after the first limit; running ones finish")
    max_concurrent_trials: PositiveInt | None = Field(
        None, description="maximum number of concurrent trials; none = as many as fit on the cluster"
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Sweep:
        if not self.fields:
            raise ValueError(
                "fields is empty: name at least one, for example  fields: {edges.sigma: [1, 2, 3]}"
            )
        if not self.metrics:
            raise ValueError("metrics is empty: name at least one, such as psnr_rgb_hole")
        ranges = [path for path, domain in self.fields.items() if domain.bounds]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"search: grid cannot take the range of {ranges[0]}: list values, or search: random"
            )
        if self.search != "grid" and not (self.budget.trials or self.budget.minutes or self.budget.steps):
            raise ValueError(
                f"search: {self.search} never ends by itself: give a budget, for example  budget: {{trials: 20}}"
            )
        if self.scheduler != "none" and self.report_every is None:
            raise ValueError(
                f"scheduler: {self.scheduler} needs `report_every`, the steps between two reports"
            )
        if self.scheduler == "pbt":
            fixed = [path for path in self.fields if ".lambda_" not in path and path != "seed"]
            if fixed:
                raise ValueError(
                    f"scheduler: pbt changes fields during training, and {fixed[0]} cannot change: only lambdas can"
                )
        return self
