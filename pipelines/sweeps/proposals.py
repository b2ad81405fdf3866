"""What a sweep tries next, from its ledger alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from ray.tune.search import Searcher

from pipelines.evaluation.metrics import higher_is_better
from pipelines.recipe import Domain, Recipe
from pipelines.sweeps.ledger import RUNNING, Entry, Ledger
from pipelines.sweeps.result import FAILED, FINISHED, SEED, Trial
from pipelines.sweeps.space import Values, keeps, settings, sweep_of

TRIES = 50  # proposals of values that were had before, or break a constraint, before a search is at its end


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
