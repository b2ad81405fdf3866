"""What a sweep found: its fields, its trials with their scores, and which values are best. Plain data, kept as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from pipelines.evaluation.metrics import higher_is_better

SEED = "seed"  # the field whose values are repetitions of one setting
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"

Setting = tuple[tuple[str, Any], ...]
"""(recipe path, value) of every swept field but the seed, in the sweep's order."""


@dataclass(frozen=True)
class Trial:
    """One training of a sweep. `scores` are of its evaluation on held-out photographs; empty unless finished."""

    number: int
    values: dict[str, Any]
    """recipe path -> value, the seed's too."""
    state: str
    """finished, stopped (by the scheduler), or failed."""
    reason: str = ""
    """Why it failed, or what stopped it, in one line."""
    steps: int = 0
    seconds: float = 0.0
    """Wall clock, with what it waited for."""
    scores: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, PSNR in held-out holes in dB) at its checkpoints."""
    changes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(step, values from there on) where population-based training changed them."""
    evaluation: str = ""
    """Folder of its evaluation in the storage."""
    weights: str = ""
    """Folder of its weights in the storage."""
    run: str = ""
    """Its MLflow run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", {path: hashable(value) for path, value in self.values.items()})

    @property
    def setting(self) -> Setting:
        return tuple((path, value) for path, value in self.values.items() if path != SEED)


@dataclass(frozen=True)
class Group:
    """The finished trials of one setting: mean and spread of each metric over its seeds."""

    setting: Setting
    trials: tuple[Trial, ...]

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.setting)

    def mean(self, metric: str) -> float:
        """nan when a trial has no such score."""
        return fmean(trial.scores.get(metric, math.nan) for trial in self.trials)

    def spread(self, metric: str) -> float:
        """The sample standard deviation over the seeds; 0 with one, nan when a trial has no such score."""
        found = [trial.scores.get(metric, math.nan) for trial in self.trials]
        if not all(map(math.isfinite, found)):
            return math.nan
        return stdev(found) if len(found) > 1 else 0.0


@dataclass(frozen=True)
class SweepResult:
    """Everything a sweep's report is drawn from."""

    name: str
    model: str
    """The recipe's key of the model that was swept."""
    fields: dict[str, dict[str, Any]]
    """recipe path -> as the recipe says: {"grid": [...]}, {"uniform": [a, b]}, {"loguniform": [a, b]}, {"choice": [...]}."""
    metrics: tuple[str, ...]
    """The first one says which setting is best."""
    trials: tuple[Trial, ...]
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """classical method -> metric -> score on the same photographs and masks."""
    split: str = "val"
    photographs: int = 0
    about: dict[str, str] = field(default_factory=dict)
    """What readers want to know beside: search, scheduler, minutes, commit, command, steps."""

    @property
    def groups(self) -> list[Group]:
        """The finished trials by setting, in the order of their first trial."""
        found: dict[Setting, list[Trial]] = {}
        for trial in self.trials:
            if trial.state == FINISHED:
                found.setdefault(trial.setting, []).append(trial)
        return [Group(setting, tuple(trials)) for setting, trials in found.items()]

    @property
    def ranked(self) -> list[Group]:
        """Best first, by the mean of the first metric; settings without one last."""
        return ranked(self.groups, self.metrics[0])

    @property
    def best(self) -> Group | None:
        order = [group for group in self.ranked if math.isfinite(group.mean(self.metrics[0]))]
        return order[0] if order else None

    @property
    def front(self) -> list[Group]:
        """The settings that no other beats in all metrics (Pareto), by the first metric, best first."""

        def dominates(a: Group, b: Group) -> bool:
            pairs = [(better(m)(a.mean(m), b.mean(m)), better(m)(b.mean(m), a.mean(m))) for m in self.metrics]
            return any(here for here, _ in pairs) and not any(there for _, there in pairs)

        whole = [g for g in self.ranked if all(math.isfinite(g.mean(m)) for m in self.metrics)]
        return [g for g in whole if not any(dominates(other, g) for other in whole)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> SweepResult:
        data: dict[str, Any] = json.loads(text)
        trials = [
            Trial(
                **{
                    **trial,
                    "curve": [(int(step), score) for step, score in trial["curve"]],
                    "changes": [(int(step), values) for step, values in trial["changes"]],
                }
            )
            for trial in data["trials"]
        ]
        return cls(**{**data, "metrics": tuple(data["metrics"]), "trials": tuple(trials)})


def hashable(value: Any) -> Any:
    """A list of sigmas as a tuple of them; a mapping as text."""
    if isinstance(value, list | tuple):
        return tuple(map(hashable, value))
    return json.dumps(value) if isinstance(value, dict) else value


def ranked(groups: list[Group], metric: str) -> list[Group]:
    def place(group: Group) -> tuple[bool, float]:
        mean = group.mean(metric)
        return not math.isfinite(mean), -mean if higher_is_better(metric) else mean

    return sorted(groups, key=place)


def better(metric: str) -> Callable[[float, float], bool]:
    """Whether the first of two scores is the better one."""
    return (lambda a, b: a > b) if higher_is_better(metric) else (lambda a, b: a < b)


def in_words(values: Mapping[str, Any]) -> str:
    """`edges.sigma 2, model.lambda_adv 0.001`."""
    return ", ".join(
        f"{path} {value:.4g}" if isinstance(value, float) else f"{path} {value}"
        for path, value in values.items()
    )


def best_name(sweep: str) -> str:
    """The file of a sweep's best recipe."""
    return re.sub(r"[^\w.-]+", "-", f"{sweep}-best.yaml")
