"""What a sweep tries next, and its ledger: one small JSON file a trial in the storage, which outlives any process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

from ray.tune.search import Searcher

from data_prep.storage import Storage
from pipelines.metrics import higher_is_better
from pipelines.recipe import Domain, Recipe
from pipelines.space import Link, Values, keeps, settings, sweep_of
from pipelines.sweep_result import FAILED, FINISHED, SEED, Trial

RUNNING = "running"
TRIES = 50  # proposals of values that were had before, or break a constraint, before a search is at its end


@dataclass
class Entry:
    """A trial as far as it got."""

    trial: Trial
    first: Values = field(default_factory=dict)
    """The values that it began with; the trial has those that population-based training left it."""
    chain: list[Link] = field(default_factory=list)
    """The parts of its training, which it goes on from."""
    looks: list[tuple[int, float]] = field(default_factory=list)
    """(step, score) that the scheduler has seen."""


class Ledger:
    """The trials of a sweep, as far as they got; written by the sweep's own process only."""

    def __init__(self, storage: Storage, folder: str, steps: int) -> None:
        self.storage, self.folder, self.steps = storage, folder, steps
        self.entries: dict[int, Entry] = {}
        for key, _ in storage.list(folder):
            if key.endswith(".json") and key.rpartition("/")[2][:4].isdigit():
                entry = json.loads(storage.read(key))
                trial = Trial(**entry.pop("trial"))
                self.entries[trial.number] = Entry(trial, **entry)
        self.before = self._clock()
        self.began = time.monotonic()

    def write(self, entry: Entry) -> None:
        self.entries[entry.trial.number] = entry
        text = json.dumps(asdict(entry), indent=1)
        self.storage.write(f"{self.folder}/{entry.trial.number:04d}.json", text.encode())
        self.storage.write(f"{self.folder}/clock.json", json.dumps({"seconds": self.seconds}).encode())

    @property
    def trials(self) -> list[Trial]:
        return [entry.trial for _, entry in sorted(self.entries.items())]

    @property
    def seconds(self) -> float:
        """Of this sweep in all its lives."""
        return self.before + time.monotonic() - self.began

    @property
    def over(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state != RUNNING]

    def allows(self, recipe: Recipe, number: int) -> bool:
        """Whether the budget has room for one more trial."""
        budget = sweep_of(recipe).budget
        done = sum(self.steps if trial.state == RUNNING else trial.steps for trial in self.trials)
        return not (
            (budget.trials is not None and number >= budget.trials)
            or (budget.minutes is not None and self.seconds >= 60 * budget.minutes)
            or (budget.steps is not None and done + self.steps > budget.steps)
        )

    def _clock(self) -> float:
        try:
            return float(json.loads(self.storage.read(f"{self.folder}/clock.json"))["seconds"])
        except (FileNotFoundError, ValueError):
            return 0.0


class Proposals(Searcher):
    """Ray Tune's source of trials. A trial that was begun is proposed again with the values that it had; nothing else
    is carried from one life of a sweep to the next."""

    def __init__(self, recipe: Recipe, ledger: Ledger) -> None:
        super().__init__()
        self.recipe, self.ledger, self.next = recipe, ledger, 0
        self.listed: Iterator[Values] | None = None
        self.taken: list[Values] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"listed": None, "taken": []}  # Tune pickles its searcher, a generator cannot be

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        while (known := self.ledger.entries.get(self.next)) and known.trial.state != RUNNING:
            self.next += 1
        number = self.next
        if known is None:
            values = self.propose(number) if self.ledger.allows(self.recipe, number) else None
            if values is None:
                return Searcher.FINISHED
            known = Entry(Trial(number, values, RUNNING), values)
            self.ledger.write(known)
        self.next += 1
        return {"number": number, "values": known.chain[-1][1] if known.chain else known.trial.values}

    def propose(self, number: int) -> Values | None:
        if sweep_of(self.recipe).search == "optuna":
            return propose_by_optuna(self.recipe, self.ledger.trials, number)
        if self.listed is None:
            self.listed = settings(self.recipe)
        self.taken += islice(self.listed, number + 1 - len(self.taken))
        return self.taken[number] if number < len(self.taken) else None

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """The ledger knows."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a later life goes by."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


def propose_by_optuna(recipe: Recipe, trials: Sequence[Trial], number: int) -> Values | None:
    """What a tree-structured Parzen estimator makes of the trials so far: a pure function of them and the seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = sweep_of(recipe)
    fields = {path: domain for path, domain in sweep.fields.items() if path != SEED}
    fixed = {SEED: sweep.fields[SEED].values[0]} if SEED in sweep.fields else {}
    distributions = {path: _distribution(domain) for path, domain in fields.items()}
    before = [trial.values for trial in trials]
    for attempt in range(TRIES):
        sampler = optuna.samplers.TPESampler(
            seed=recipe.seed * 100_003 + number * TRIES + attempt, multivariate=True, constant_liar=True
        )
        up = [higher_is_better(metric) for metric in sweep.metrics]
        directions: list[Literal["maximize", "minimize"]] = [
            "maximize" if each else "minimize" for each in up
        ]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for trial in trials:
            study.add_trial(_known(trial, distributions, fields, sweep.metrics))
        asked = study.ask(distributions).params
        values = {path: _back(domain, asked[path]) for path, domain in fields.items()} | fixed
        if Trial(number, values, RUNNING).values not in before and keeps(recipe, values):
            return values
    return None


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if domain.range:
        return FloatDistribution(*domain.range, log=domain.loguniform is not None)
    return CategoricalDistribution([json.dumps(value) for value in domain.values])


def _back(domain: Domain, value: Any) -> Any:
    return float(value) if domain.range else json.loads(value)


def _known(
    trial: Trial, distributions: dict[str, Any], fields: dict[str, Domain], metrics: tuple[str, ...]
) -> Any:
    import optuna
    from optuna.trial import TrialState, create_trial

    params = {p: trial.values[p] if fields[p].range else json.dumps(trial.values[p]) for p in distributions}
    scores = [trial.scores[metric] for metric in metrics if metric in trial.scores]
    if trial.state == FINISHED and len(scores) == len(metrics):
        return create_trial(params=params, distributions=distributions, values=scores)
    if trial.state == RUNNING:
        return create_trial(params=params, distributions=distributions, state=TrialState.RUNNING)
    if trial.state != FAILED and len(metrics) == 1 and metrics[0].startswith("psnr") and trial.curve:
        step, score = trial.curve[-1]
        pruned = optuna.trial.TrialState.PRUNED
        values = {int(step): float(score)}
        return create_trial(
            params=params, distributions=distributions, state=pruned, intermediate_values=values
        )
    return create_trial(params=params, distributions=distributions, state=TrialState.FAIL)
