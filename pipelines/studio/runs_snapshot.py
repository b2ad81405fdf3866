"""All runs and sweeps of a storage as the studio's pages show them, read from the storage alone.

A run is *running* while a process holds its lease and one of its steps is running, *waiting* while a process holds the
lease and none is, such as while Ray starts. Otherwise it is *finished* if all its steps are, *failed* if the last attempt
of a step failed, and *interrupted* if it ended without an error: it was stopped, or its process or machine died.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta

from data_prep.storage import Storage, StorageError, open_storage
from data_prep.uris import is_s3_uri, quote_for_shell
from pipelines.durable import lease, run_status
from pipelines.durable.lease import LeaseHolder
from pipelines.durable.run_status import StepProgress
from pipelines.durable.workflow import run_lease
from pipelines.errors import explain_error
from pipelines.recipe import Recipe, Sweep
from pipelines.report_files import REPORTS_FOLDER, headline, list_reports
from pipelines.shipped_recipes import shipped_recipes
from pipelines.studio.run_views import (
    DAMAGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUN,
    RUNNING,
    SWEEP,
    WAITING,
    EarlierRun,
    RegisteredVersion,
    Report,
    RunsSnapshot,
    RunView,
    StepView,
    TrialView,
)
from pipelines.studio.seen_workflow import (
    ATTEMPTS,
    LEASES,
    MANIFESTS,
    SeenRecord,
    SeenWorkflow,
    parse_seen_record,
)
from pipelines.studio.storage_files import StorageFiles
from pipelines.sweeps.results import SweepResult, TrialRecord
from pipelines.sweeps.trial_store import is_trial_file, parse_trial, trial_store_folder

LISTED = (run_status.STATUS_FOLDER, MANIFESTS, ATTEMPTS, LEASES, REPORTS_FOLDER)
BUCKET_THREADS = 8  # that read from a bucket at once
DEFAULT_METRICS: tuple[str, ...] = Sweep.model_fields["metrics"].default
DEFAULT_STORAGE: str = Recipe.model_fields["storage"].default
SWEEP_SUFFIX = "-sweep"  # of the name of a sweep's run


class RunsReader:
    """Reads the runs of a storage again and again: `check` and `load` are the arguments of `Cached`."""

    def __init__(self, storage_uri: str) -> None:
        self.storage = open_storage(storage_uri)
        self.files = StorageFiles(self.storage)
        self.trial_folders: set[str] = set()
        """Folders of the trials of sweeps that are not finished."""

    def check(self) -> Hashable:
        """List the folders; what it returns differs when a run has changed, or when a process that held a run died."""
        for folder in (*LISTED, *sorted(self.trial_folders)):
            self.files.list_folder(folder)
        names = [name.removesuffix(".lock") for name in self.files.names(LEASES)]
        holders = tuple(str(self._holder(name)) for name in names)
        return self.files.state((*LISTED, *sorted(self.trial_folders))), holders

    def load(self) -> RunsSnapshot:
        """The runs as `check` found them, newest first. One that cannot be read has its reason and no steps."""
        names = run_status.run_names(self.files.names(run_status.STATUS_FOLDER))
        reports = self._reports()
        if self.storage.local_path() is None:
            with ThreadPoolExecutor(BUCKET_THREADS) as pool:
                runs = list(pool.map(lambda name: self._run(name, reports.get(name, ())), names))
        else:
            runs = [self._run(name, reports.get(name, ())) for name in names]
        runs.sort(key=lambda run: (run.is_active, run.last_activity), reverse=True)
        return RunsSnapshot(self.storage.uri, tuple(runs))

    def _holder(self, name: str) -> LeaseHolder | None:
        """The live holder of a lease."""
        if not self.files.exists(LEASES, f"{name}.lock"):
            return None
        try:
            return lease.current_holder(self.storage, name)
        except (OSError, StorageError):  # of another user
            return None

    def _reports(self) -> dict[str, tuple[Report, ...]]:
        """Run -> its reports, newest first."""
        found: dict[str, tuple[Report, ...]] = {}
        for report in list_reports(self.storage):
            file = report.key.rpartition("/")[2]
            try:
                sentences = self.files.computed(REPORTS_FOLDER, file, headline)
            except StorageError:  # removed since, or not readable
                continue
            shown = Report(file, report.date_text, tuple(sentences))
            found[report.name] = (*found.get(report.name, ()), shown)
        return found

    def _run(self, name: str, reports: tuple[Report, ...]) -> RunView:
        try:
            return self._readable_run(name, reports)
        except (ValueError, StorageError, OSError) as error:
            command = likely_command(name, name.endswith(SWEEP_SUFFIX), self.storage)
            return RunView(name, DAMAGED, problem=explain_error(error), reports=reports, command=command)

    def _readable_run(self, name: str, reports: tuple[Report, ...]) -> RunView:
        record = self._record(f"{name}{run_status.SUFFIX}")
        workflow = SeenWorkflow(name, record.steps, self.storage, files=self.files)
        steps = self._steps(workflow)
        holder = self._holder(run_lease(name))
        state = run_state(steps, bool(holder))
        is_sweep = any(step.kind == "sweep" for step in steps)
        metrics, trials = self._trials(workflow, steps)
        history = self._history(name)
        begun = _begun(record, history, steps)
        command, is_recorded = record.run.command, bool(record.run.command)
        return RunView(
            name,
            state,
            kind=SWEEP if is_sweep else RUN,
            begun=begun,
            ended="" if state in (RUNNING, WAITING) else max(_ended(steps), begun),
            holder=str(holder) if holder else "",
            held_since=_iso(holder.since) if holder else "",
            steps=steps,
            metrics=metrics,
            trials=trials,
            reports=reports,
            versions=_versions(workflow, steps),
            command=command or likely_command(name, is_sweep, self.storage),
            is_command_recorded=is_recorded,
            recipe=record.run.recipe,
            earlier=self._earlier(workflow, record, history),
        )

    def _record(self, file: str) -> SeenRecord:
        return self.files.decoded(run_status.STATUS_FOLDER, file, parse_seen_record)

    def _history(self, name: str) -> list[SeenRecord]:
        """The records of all runs of this name, as far as they can be read."""
        records = []
        for file in self.files.names_below(run_status.STATUS_FOLDER, name):
            try:
                records.append(self._record(f"{name}/{file}"))
            except (ValueError, StorageError):
                continue
        return records

    def _steps(self, workflow: SeenWorkflow) -> tuple[StepView, ...]:
        progress = self._progress(workflow.name)
        return tuple(
            replace(view, progress=progress.get(view.name)) if view.state == RUNNING else view
            for view in workflow.step_views()
        )

    def _progress(self, name: str) -> dict[str, StepProgress]:
        try:
            file = f"{name}{run_status.PROGRESS_SUFFIX}"
            return self.files.decoded(run_status.STATUS_FOLDER, file, _parse_progress)
        except (ValueError, StorageError):  # none yet
            return {}

    def _trials(
        self, workflow: SeenWorkflow, steps: tuple[StepView, ...]
    ) -> tuple[tuple[str, ...], tuple[TrialView, ...]]:
        """The metrics of a sweep and its trials by number; empty for a run."""
        sweeps = [view for view in steps if view.kind == "sweep" and view.key]
        if not sweeps:
            return (), ()
        view = sweeps[0]
        config = next(step.config for step in workflow.steps if step.name == view.name)
        metrics = _sweep_metrics(config)
        folder = trial_store_folder(view.key)
        if view.state == FINISHED:
            self.trial_folders.discard(folder)
        else:
            self.trial_folders.add(folder)
        if folder not in self.files.fingerprints:
            self.files.list_folder(folder)
        records = []
        for file in self.files.names(folder):
            if is_trial_file(file):
                try:
                    records.append(self.files.decoded(folder, file, parse_trial).record)
                except (ValueError, StorageError) as error:
                    records.append(TrialRecord(int(file[:4]), {}, DAMAGED, explain_error(error)))
        if view.state in (FAILED, INTERRUPTED):  # nobody wrote the ends of its trials
            records = [
                replace(record, state=INTERRUPTED) if record.state == RUNNING else record
                for record in records
            ]
        result = SweepResult(workflow.name, "", {}, metrics, tuple(records))
        best = result.best_group.setting if result.best_group else None
        return metrics, tuple(
            TrialView(record, record.state == FINISHED and record.setting == best) for record in records
        )

    def _earlier(
        self, workflow: SeenWorkflow, current: SeenRecord, history: Iterable[SeenRecord]
    ) -> tuple[EarlierRun, ...]:
        """The other runs of this name, newest first, and in which steps they differ from the last one."""
        earlier = []
        for record in history:
            if record.history_key == current.history_key:
                continue
            other = SeenWorkflow(workflow.name, record.steps, self.storage, files=self.files)
            if differences := run_status.list_differences(other, workflow):
                state = run_state(tuple(other.step_views()), False)
                earlier.append(EarlierRun(record.run.begun, state, tuple(differences), record.run.command))
        return tuple(sorted(earlier, key=lambda run: run.begun, reverse=True))


def run_state(steps: Iterable[StepView], is_held: bool) -> str:
    """The state of a run, as the head of this module defines it. `is_held`: whether a process holds its lease."""
    states = {step.state for step in steps}
    if states <= {FINISHED}:
        return FINISHED
    if is_held:
        return RUNNING if RUNNING in states else WAITING
    return FAILED if FAILED in states else INTERRUPTED


def likely_command(name: str, is_sweep: bool, storage: Storage) -> str:
    """The command of a run whose record has none: it starts a shipped recipe of its name, or a file of its name."""
    recipe = name.removesuffix(SWEEP_SUFFIX) if is_sweep else name
    file = recipe if recipe in shipped_recipes() else f"{recipe}.yaml"
    return f"inpaint {'sweep' if is_sweep else 'run'} {file}{storage_option(storage.uri)}"


def storage_option(uri: str) -> str:
    """`--storage` for a command in the folder in which the studio was started; '' for the default, `runs`."""
    address = uri if is_s3_uri(uri) else os.path.relpath(uri)
    return "" if address == DEFAULT_STORAGE else f" --storage {quote_for_shell(address)}"


def _iso(at: str) -> str:
    """A time that a holder wrote; '' if it is none."""
    try:
        return datetime.fromisoformat(at).isoformat()
    except ValueError:
        return ""


def _begun(record: SeenRecord, history: Iterable[SeenRecord], steps: Iterable[StepView]) -> str:
    recorded = [other.run.begun for other in history if other.history_key == record.history_key]
    return next(filter(None, recorded), "") or min(
        (step.started for step in steps if step.started), default=""
    )


def _ended(steps: Iterable[StepView]) -> str:
    """When the last step ended: UTC, ISO 8601; '' if none ran."""
    ends = []
    for step in steps:
        try:
            ends.append(datetime.fromisoformat(step.started) + timedelta(seconds=step.seconds or 0.0))
        except ValueError:  # it never started
            continue
    return max(ends).isoformat(timespec="seconds") if ends else ""


def _versions(workflow: SeenWorkflow, steps: Iterable[StepView]) -> tuple[RegisteredVersion, ...]:
    values = (
        workflow.outputs(step.key) for step in steps if step.kind == "register" and step.state == FINISHED
    )
    return tuple(
        RegisteredVersion(
            str(value["name"]),
            str(value["version"]),
            bool(value.get("champion")),
            str(value.get("reason", "")),
        )
        for value in values
        if "name" in value and "version" in value
    )


def _sweep_metrics(config: object) -> tuple[str, ...]:
    """The metrics that rank the trials, from the config of the sweep step; the recipe's default if it names none."""
    node = config
    for part in ("recipe", "sweep", "metrics"):
        node = node.get(part) if isinstance(node, dict) else None
    return tuple(map(str, node)) if isinstance(node, list) and node else DEFAULT_METRICS


def _parse_progress(text: bytes, key: str) -> dict[str, StepProgress]:
    return run_status.parse_progress(text)
