"""Ray Tune Searcher that proposes the next trial from the stored trial records only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from ray.tune.search import Searcher

from pipelines.evaluation.metrics import higher_is_better
from pipelines.recipe import Domain, Recipe
from pipelines.sweeps.results import FAILED, FINISHED, SEED, FieldValues, TrialRecord
from pipelines.sweeps.space import iter_settings, satisfies_constraints, sweep_section
from pipelines.sweeps.trial_store import RUNNING, StoredTrial, TrialStore

MAX_PROPOSALS = 50  # invalid or repeated ones in a row, after which the search ends


class TrialSearcher(Searcher):
    """Proposes trials to Ray Tune. An unfinished trial is proposed again with its last values. Nothing but the trial
    store survives an interrupted sweep."""

    def __init__(self, recipe: Recipe, store: TrialStore) -> None:
        super().__init__()
        self.recipe, self.store, self.next_number = recipe, store, 0
        self.settings: Iterator[FieldValues] | None = None
        self.listed_settings: list[FieldValues] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"settings": None, "listed_settings": []}  # generators cannot be pickled

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        while (stored := self.store.by_number.get(self.next_number)) and stored.record.state != RUNNING:
            self.next_number += 1
        number = self.next_number
        if stored is None:
            values = (
                self.next_values(number)
                if self.store.within_budget(sweep_section(self.recipe).budget, number)
                else None
            )
            if values is None:
                return Searcher.FINISHED
            stored = StoredTrial(TrialRecord(number, values, RUNNING), values)
            self.store.write(stored)
        self.next_number += 1
        return {
            "number": number,
            "values": stored.segments[-1][1] if stored.segments else stored.record.values,
        }

    def next_values(self, number: int) -> FieldValues | None:
        """The values of a new trial; None if the search is exhausted."""
        if sweep_section(self.recipe).search == "optuna":
            return propose_by_optuna(self.recipe, self.store.records, number)
        if self.settings is None:
            self.settings = iter_settings(self.recipe)
        self.listed_settings += islice(self.settings, number + 1 - len(self.listed_settings))
        return self.listed_settings[number] if number < len(self.listed_settings) else None

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Does nothing: the callback writes the store."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: an interrupted sweep resumes from the trial store."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, as save."""


def propose_by_optuna(recipe: Recipe, trials: Sequence[TrialRecord], number: int) -> FieldValues | None:
    """The proposal of a tree-structured Parzen estimator (Optuna's TPESampler), given the trials so far.

    A pure function of the trials and the recipe's seed. None if no proposal is new and satisfies the constraints.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = sweep_section(recipe)
    fields = {path: domain for path, domain in sweep.fields.items() if path != SEED}
    fixed = {SEED: sweep.fields[SEED].values[0]} if SEED in sweep.fields else {}
    distributions = {path: _optuna_distribution(domain) for path, domain in fields.items()}
    earlier_values = [trial.values for trial in trials]
    for attempt in range(MAX_PROPOSALS):
        sampler = optuna.samplers.TPESampler(
            seed=(recipe.seed * 100_003 + number * MAX_PROPOSALS + attempt) % 2**32,
            multivariate=True,
            constant_liar=True,
        )
        directions: list[Literal["maximize", "minimize"]] = [
            "maximize" if higher_is_better(metric) else "minimize" for metric in sweep.metrics
        ]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for trial in trials:
            study.add_trial(_frozen_trial(trial, distributions, fields, sweep.metrics))
        params = study.ask(distributions).params
        values = {path: _from_optuna(domain, params[path]) for path, domain in fields.items()} | fixed
        is_new = TrialRecord(number, values, RUNNING).values not in earlier_values
        if is_new and satisfies_constraints(recipe, values):
            return values
    return None


def _optuna_distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if domain.bounds:
        return FloatDistribution(*domain.bounds, log=domain.loguniform is not None)
    return CategoricalDistribution([json.dumps(value) for value in domain.values])


def _from_optuna(domain: Domain, value: Any) -> Any:
    return float(value) if domain.bounds else json.loads(value)


def _frozen_trial(
    trial: TrialRecord, distributions: dict[str, Any], fields: dict[str, Domain], metrics: tuple[str, ...]
) -> Any:
    import optuna
    from optuna.trial import TrialState, create_trial

    params = {p: trial.values[p] if fields[p].bounds else json.dumps(trial.values[p]) for p in distributions}
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
