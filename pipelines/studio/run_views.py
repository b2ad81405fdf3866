"""What the studio's pages show of runs, steps, trials and reports. Plain data: equal values mean equal pages."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from pipelines.durable.run_status import StepProgress
from pipelines.sweeps.results import TrialRecord

RUNNING, WAITING, FINISHED, FAILED, INTERRUPTED = "running", "waiting", "finished", "failed", "interrupted"
DAMAGED = "unreadable"
TO_RUN = "to run"
STATES = (RUNNING, WAITING, FINISHED, FAILED, INTERRUPTED, DAMAGED)
RUN, SWEEP = "run", "sweep"


@dataclass(frozen=True)
class StepView:
    """A step of a run."""

    name: str
    kind: str
    subject: str
    needs: tuple[str, ...]
    state: str
    """finished, running, failed, interrupted, to run, or waiting for other steps."""
    reason: str = ""
    """Why it is in that state, such as the process that runs it."""
    key: str = ""
    """'': unknown until the steps that it needs are finished."""
    started: str = ""
    """Of the last attempt: UTC, ISO 8601; '' if there was none."""
    seconds: float | None = None
    """Of the last attempt; None while it runs, and if there was none."""
    attempts: int = 0
    errors: tuple[str, ...] = ()
    """Of the failed attempts, oldest first, without their numbers."""
    progress: StepProgress | None = None
    host: str = ""

    @property
    def error(self) -> str:
        """Why the last attempt failed; '' if it did not, or if the step runs again."""
        return self.errors[-1] if self.errors and self.state in (FAILED, INTERRUPTED) else ""

    @property
    def earlier_errors(self) -> list[str]:
        """What else went wrong in earlier attempts, oldest first."""
        return [error for error in dict.fromkeys(self.errors[:-1]) if error != self.error]

    @property
    def fraction(self) -> float:
        """The part of its work that is done: 0 to 1."""
        if self.state == FINISHED:
            return 1.0
        if self.progress is None or not self.progress.total:
            return 0.0
        return min(1.0, self.progress.done / self.progress.total)

    @property
    def elapsed(self) -> float | None:
        """Its seconds; of a running step those so far, by this machine's clock."""
        return seconds_since(self.started) if self.state == RUNNING and self.started else self.seconds


@dataclass(frozen=True)
class TrialView:
    """A trial of a sweep."""

    record: TrialRecord
    is_best: bool
    """Whether it has the best setting of the finished trials."""


@dataclass(frozen=True)
class Report:
    """A report in the storage."""

    file: str
    """Its name in the folder of reports."""
    date: str
    sentences: tuple[str, ...]
    """What came out."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version that the run registered."""

    name: str
    version: str
    champion: bool
    """Whether it became the champion then."""
    reason: str


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run of the same name, with other options."""

    begun: str
    state: str
    differences: tuple[str, ...]
    """Its steps that the last run configures otherwise."""
    command: str


@dataclass(frozen=True)
class RunView:
    """A run or a sweep."""

    name: str
    state: str
    problem: str = ""
    """Why it cannot be read; '' if it can."""
    kind: str = RUN
    begun: str = ""
    """UTC, ISO 8601; ''."""
    ended: str = ""
    """When its last step ended; '' while it runs."""
    holder: str = ""
    """The process that runs it."""
    held_since: str = ""
    """UTC, ISO 8601."""
    steps: tuple[StepView, ...] = ()
    metrics: tuple[str, ...] = ()
    """Of a sweep; the first one ranks its trials."""
    trials: tuple[TrialView, ...] = ()
    reports: tuple[Report, ...] = ()
    """Newest first."""
    versions: tuple[RegisteredVersion, ...] = ()
    command: str = ""
    is_command_recorded: bool = False
    """False: a guess from its name."""
    recipe: str = ""
    """As YAML, with its overrides; '' if it was not recorded."""
    earlier: tuple[EarlierRun, ...] = ()

    @property
    def is_active(self) -> bool:
        return self.state in (RUNNING, WAITING)

    @property
    def last_activity(self) -> str:
        """The last start, for sorting: UTC, ISO 8601; ''."""
        return max([self.begun, *(step.started for step in self.steps)])

    @property
    def fraction(self) -> float:
        """The mean over its steps of what is done: 0 to 1."""
        return sum(step.fraction for step in self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def finished_steps(self) -> int:
        return sum(step.state == FINISHED for step in self.steps)

    @property
    def running_steps(self) -> list[StepView]:
        return [step for step in self.steps if step.state == RUNNING]

    @property
    def eta(self) -> str:
        """Remaining time of the running step that has most left to do, as h:mm:ss; '' if unknown."""
        etas = [step.progress.eta for step in self.running_steps if step.progress]
        return max(etas, key=lambda text: (text.count(":"), len(text), text), default="")

    @property
    def seconds(self) -> float | None:
        """Computation so far: the sum over its steps. None if none has run."""
        elapsed = [step.elapsed for step in self.steps if step.elapsed is not None]
        return sum(elapsed) if elapsed else None

    @property
    def errors(self) -> list[tuple[str, str]]:
        """(step, why it failed) for each step that failed or was interrupted."""
        return [(step.name, step.error) for step in self.steps if step.error]

    @property
    def last_error(self) -> str:
        """The reason that the list shows: the first failed step's, else the first interrupted one's."""
        failed = [step for step in self.steps if step.error]
        failed.sort(key=lambda step: step.state != FAILED)
        if self.problem or not failed:
            return self.problem
        name, error = failed[0].name, failed[0].error
        return error if error.startswith(name) else f"{name}: {error}"

    @property
    def trial_counts(self) -> dict[str, int]:
        """State -> number of trials."""
        counts: dict[str, int] = {}
        for trial in self.trials:
            counts[trial.record.state] = counts.get(trial.record.state, 0) + 1
        return counts


@dataclass(frozen=True)
class RunsSnapshot:
    """The runs of a storage."""

    storage_uri: str
    runs: tuple[RunView, ...] = ()
    """Running ones first, then newest first."""

    @cached_property
    def by_name(self) -> dict[str, RunView]:
        return {run.name: run for run in self.runs}


def seconds_since(at: str) -> float:
    """Seconds since a time in ISO 8601, by this machine's clock; 0 if it is none."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
