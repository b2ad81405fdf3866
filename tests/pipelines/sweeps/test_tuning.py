"""What Ray Tune is told of a sweep, and what is kept of what its trials report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from data_prep.storage import open_storage
from pipelines.durable.attempt import Board, Progress
from pipelines.reading import parse_recipe
from pipelines.sweeps.ledger import RUNNING, Entry, Ledger
from pipelines.sweeps.result import FAILED, FINISHED, STOPPED, Trial
from pipelines.sweeps.trial import Trials
from pipelines.sweeps.tuning import Books, changes, room, scheduler

FIELD = "model.lambda_adv"


class Here:
    """A board in this process."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.report = SimpleNamespace(remote=lambda *report: self.seen.append(report))


@pytest.fixture
def board() -> Here:
    return Here()


@pytest.fixture
def trials(tmp_path: Path, board: Here) -> Trials:
    model = {"name": "context_encoder", "size": 32, "width": 0.1, "overlap": 0}
    sweep = {"fields": {FIELD: [0.1, 0.2]}, "scheduler": "asha", "every": 10}
    recipe = parse_recipe({"name": "test", "data": {"size": 32}, "model": model, "sweep": sweep})
    storage = open_storage(str(tmp_path))
    progress = Progress(board, "sweep")
    return Trials("key", recipe, storage, {}, {"trials": "trials"}, 100, 200, "", None, progress)


@pytest.fixture
def ledger(trials: Trials) -> Ledger:
    found = Ledger(trials.storage, "trials", 100)
    for number in range(3):
        found.write(Entry(Trial(number, {FIELD: 0.1 * number}, RUNNING)))
    return found


def test_successive_halving_goes_on_with_what_it_saw_before(trials: Trials, ledger: Ledger) -> None:
    """Three earlier trials were at 20, 21 and 22 dB after the first look: of six, the best two go on."""
    for number in range(3):
        ledger.write(Entry(Trial(number, {}, STOPPED), looks=[(110, 20.0 + number)]))

    def decision(halving: TrialScheduler, name: str, score: float) -> str:
        trial: Any = SimpleNamespace(trial_id=name)
        halving.on_trial_add(None, trial)  # type: ignore[arg-type]
        return halving.on_trial_result(None, trial, {"trained": 10, "val": score})  # type: ignore[arg-type]

    told = scheduler(trials, ledger)
    assert decision(told, "worse", 20.5) == TrialScheduler.STOP
    assert decision(told, "better", 23.0) == TrialScheduler.CONTINUE
    fresh = scheduler(trials, Ledger(trials.storage, "nothing", 100))
    assert decision(fresh, "first", 20.5) == TrialScheduler.CONTINUE


def test_the_ledger_holds_what_trials_report_and_how_they_ended(trials: Trials, ledger: Ledger) -> None:
    books = Books(ledger, trials, 3, None)

    def report(number: int, **result: Any) -> Any:
        trial = Named(number)
        books.on_trial_result(0, [], trial, {"run": "", **result})
        return trial

    part = {"chain": [(110, {FIELD: 0.1})], "val": 19.0, "curve": [(110, 19.0)]}
    report(1, steps=110, seconds=5.0, **part)
    whole = {
        "chain": [(110, {FIELD: 0.1}), (200, {FIELD: 0.3})],
        "val": 21.0,
        "scores": {"psnr_rgb_hole": 22.0},
    }
    report(1, steps=200, seconds=9.0, **whole)
    report(2, steps=100, seconds=3.0, failed="the loss is not finite")
    books.on_trial_complete(0, [], report(0, steps=110, seconds=4.0, **part))

    again = Ledger(trials.storage, "trials", 100)
    states = [(trial.state, trial.reason, trial.steps, trial.seconds) for trial in again.trials]
    assert states == [
        (STOPPED, "fell behind after 110 steps at 19.00 dB", 110, 4.0),
        (FINISHED, "", 200, 9.0),
        (FAILED, "the loss is not finite", 100, 3.0),
    ]
    assert again.trials[1].values == {FIELD: 0.3}
    assert again.trials[1].changes == [[100, {FIELD: 0.1}], [110, {FIELD: 0.3}]]
    assert again.entries[1].looks == [[110, 19.0], [200, 21.0]]


def test_a_trial_whose_process_died_has_its_reason(trials: Trials, ledger: Ledger) -> None:
    books = Books(ledger, trials, 3, None)
    trial = Named(0)
    trial.error = MemoryError("the machine ran out of memory")
    books.on_trial_error(0, [], trial)
    assert ledger.trials[0].state == FAILED
    assert "out of memory" in ledger.trials[0].reason
    assert "3 times" in ledger.trials[0].reason


def test_changes_of_a_chain() -> None:
    a, b = {FIELD: 1.0}, {FIELD: 2.0}
    assert changes([(10, a), (20, a)], 0) == []
    assert changes([(10, a), (20, b), (30, b), (40, a)], 5) == [(5, a), (10, b), (30, a)]


def test_the_number_at_once_follows_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(workers: int, cpus: float, gpus: float) -> int:
        return room({"workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus})

    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 32.0, "GPU": 4.0})
    assert (fits(1, 1, 0), fits(2, 1, 0), fits(2, 4, 1), fits(1, 1, 0.5), fits(8, 1, 1)) == (32, 16, 2, 8, 1)


def test_parts_of_a_step_are_told_beside_it(board: Here) -> None:
    there = Board()
    progress = Progress(SimpleNamespace(report=SimpleNamespace(remote=there.report)), "sweep")
    part = progress.child("trial 1")
    for report in ((progress, (1, 4, "best")), (part, (1, 1, "20 dB", FINISHED))):
        report[0](*report[1])
        report[0].timer.join()
    assert there.read() == {
        "sweep": ("running", 1, 4, "best"),
        "sweep/trial 1": (FINISHED, 1, 1, "20 dB"),
    }


class Named:
    """Ray Tune's trial, as far as a callback looks at it."""

    def __init__(self, number: int) -> None:
        self.number, self.error = number, Exception()

    def __str__(self) -> str:
        return f"trial-{self.number:04d}"

    def get_error(self) -> Exception:
        return self.error
