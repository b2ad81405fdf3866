"""The result of a sweep: its fields, its trials with their scores, and the best values. Plain data, stored as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from pipelines.evaluation.metrics import higher_is_better

SEED = "seed"  # the field whose values repeat one setting
MAX_RUN_NAME_CHARS = 100
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"

FieldValues = dict[str, Any]
"""recipe path -> value."""
Segment = tuple[int, FieldValues]
"""A segment of a training run: the step at which it ends, and the values that it ran with."""
Setting = tuple[tuple[str, Any], ...]
"""(recipe path, value) of each swept field except the seed, in the sweep's order."""


@dataclass(frozen=True)
class TrialRecord:
    """One training run of a sweep. `scores` come from its evaluation on held-out photographs; empty unless finished."""

    number: int
    values: dict[str, Any]
    """recipe path -> value, including the seed."""
    state: str
    """running, finished, stopped (by the scheduler) or failed."""
    reason: str = ""
    """Why it failed or was stopped, in one line."""
    steps: int = 0
    seconds: float = 0.0
    """Wall-clock time, waiting included."""
    scores: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation PSNR in the holes, in dB) at its checkpoints."""
    changes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(step, values from that step on) where population-based training changed them."""
    evaluation: str = ""
    """The folder of its evaluation in the storage."""
    weights: str = ""
    """The folder of its weights in the storage."""
    run: str = ""
    """Its MLflow run id."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", {path: as_hashable(value) for path, value in self.values.items()})

    @property
    def setting(self) -> Setting:
        return tuple((path, value) for path, value in self.values.items() if path != SEED)


@dataclass(frozen=True)
class TrialGroup:
    """The finished trials of one setting, one per seed, with mean and standard deviation of each metric."""

    setting: Setting
    trials: tuple[TrialRecord, ...]

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.setting)

    def mean(self, metric: str) -> float:
        """The mean over the seeds; nan if a trial lacks the score."""
        return fmean(trial.scores.get(metric, math.nan) for trial in self.trials)

    def std(self, metric: str) -> float:
        """The sample standard deviation over the seeds; 0 for one seed, nan if a trial lacks the score."""
        scores = [trial.scores.get(metric, math.nan) for trial in self.trials]
        if not all(map(math.isfinite, scores)):
            return math.nan
        return stdev(scores) if len(scores) > 1 else 0.0


@dataclass(frozen=True)
class SweepResult:
    """All data of a sweep's report."""

    name: str
    model: str
    """The recipe's key of the swept model."""
    fields: dict[str, dict[str, Any]]
    """recipe path -> search space as in the recipe: {"grid": [...]}, {"choice": [...]}, {"uniform": [a, b]} or
    {"loguniform": [a, b]}."""
    metrics: tuple[str, ...]
    """The first metric decides which setting is best."""
    trials: tuple[TrialRecord, ...]
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """classical method -> metric -> score on the same photographs and masks."""
    split: str = "val"
    photographs: int = 0
    about: dict[str, str] = field(default_factory=dict)
    """Facts for the reader: search, scheduler, minutes, commit, command, steps."""

    @property
    def groups(self) -> list[TrialGroup]:
        """The finished trials grouped by setting, in the order of each setting's first trial."""
        trials_by_setting: dict[Setting, list[TrialRecord]] = {}
        for trial in self.trials:
            if trial.state == FINISHED:
                trials_by_setting.setdefault(trial.setting, []).append(trial)
        return [TrialGroup(setting, tuple(trials)) for setting, trials in trials_by_setting.items()]

    @property
    def ranked_groups(self) -> list[TrialGroup]:
        """Best first, by the mean of the first metric; groups without a finite mean last."""
        return rank_groups(self.groups, self.metrics[0])

    @property
    def best_group(self) -> TrialGroup | None:
        ranked = [group for group in self.ranked_groups if math.isfinite(group.mean(self.metrics[0]))]
        return ranked[0] if ranked else None

    @property
    def pareto_front(self) -> list[TrialGroup]:
        """The Pareto front over all metrics, best first by the first metric."""

        def dominates(a: TrialGroup, b: TrialGroup) -> bool:
            a_better = [comparator(m)(a.mean(m), b.mean(m)) for m in self.metrics]
            b_better = [comparator(m)(b.mean(m), a.mean(m)) for m in self.metrics]
            return any(a_better) and not any(b_better)

        complete = [g for g in self.ranked_groups if all(math.isfinite(g.mean(m)) for m in self.metrics)]
        return [g for g in complete if not any(dominates(other, g) for other in complete)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> SweepResult:
        data: dict[str, Any] = json.loads(text)
        trials = [
            TrialRecord(
                **{
                    **trial,
                    "curve": [(int(step), score) for step, score in trial["curve"]],
                    "changes": [(int(step), values) for step, values in trial["changes"]],
                }
            )
            for trial in data["trials"]
        ]
        return cls(**{**data, "metrics": tuple(data["metrics"]), "trials": tuple(trials)})


def as_hashable(value: Any) -> Any:
    """The value in a hashable form: a list becomes a tuple, a mapping its JSON."""
    if isinstance(value, list | tuple):
        return tuple(map(as_hashable, value))
    return json.dumps(value) if isinstance(value, dict) else value


def rank_groups(groups: list[TrialGroup], metric: str) -> list[TrialGroup]:
    def sort_key(group: TrialGroup) -> tuple[bool, float]:
        mean = group.mean(metric)
        return not math.isfinite(mean), -mean if higher_is_better(metric) else mean

    return sorted(groups, key=sort_key)


def comparator(metric: str) -> Callable[[float, float], bool]:
    """A function that tells whether the first of two scores is better than the second."""
    return (lambda a, b: a > b) if higher_is_better(metric) else (lambda a, b: a < b)


def format_values(values: Mapping[str, Any]) -> str:
    """`edges.sigma 2, model.lambda_adv 0.001`."""
    return ", ".join(
        f"{path} {value:.4g}" if isinstance(value, float) else f"{path} {value}"
        for path, value in values.items()
    )


def trial_run_name(values: Mapping[str, Any]) -> str:
    """`sigma=2 lambda_adv2=0.1 seed=0`: the name of a trial's MLflow run. Fields of the same last name get their path."""
    short_names = [path.rpartition(".")[2] for path in values]
    parts = []
    for name, (path, value) in zip(short_names, values.items(), strict=True):
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if isinstance(value, list | tuple):
            text = ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
        parts.append(f"{path if short_names.count(name) > 1 else name}={text}")
    name = " ".join(parts)
    return name if len(name) <= MAX_RUN_NAME_CHARS else f"{name[: MAX_RUN_NAME_CHARS - 1]}…"


def best_recipe_file(sweep_name: str) -> str:
    """The file name of a sweep's best recipe."""
    return re.sub(r"[^\w.-]+", "-", f"{sweep_name}-best.yaml")
