"""Writes the reports of runs and sweeps into their storage, once per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.manifest import Manifest, count_text, describe_exclusions, load_manifest
from data_prep.uris import path_from_sqlite_url, quote_for_shell, redact_uri
from pipelines.contracts import RegisterOutputs, ShardOutputs, StepKind, SweepOutputs, TrainOutputs
from pipelines.durable.steps import step_key
from pipelines.durable.workflow import read_manifest
from pipelines.provenance import code_version, describe_environment
from pipelines.report_files import format_date, headline, keys_digest, list_reports, report_key
from pipelines.tracking.pages import experiment_page, run_page, version_page

if TYPE_CHECKING:
    from data_prep.storage import Storage
    from pipelines.durable.workflow import RunResults, StepStatus, Workflow
    from pipelines.evaluation.results import EvaluationResult
    from pipelines.recipe import Recipe
    from pipelines.run_report import ReportData, TrainingCurves
    from pipelines.tracking_address import Tracking


@dataclass(frozen=True)
class WrittenReport:
    """A report in the storage, and the sentences in which it says what came out (none in one of an earlier release)."""

    key: str
    sentences: Sequence[str]


def write_run_report(
    recipe: Recipe, workflow: Workflow, results: RunResults, evaluation: EvaluationResult, tracking: Tracking
) -> WrittenReport:
    """Write the report of a finished run if it does not exist."""
    storage, steps = workflow.storage, workflow.plan()
    digest = keys_digest([step.key for step in steps])
    # without a date, and without a verdict: written by an earlier release
    if existing := [report for report in list_reports(storage, [recipe.name], digest) if report.date]:
        return WrittenReport(existing[0].key, headline(storage, existing[0].key))
    from pipelines.run_report import report_html

    ended = end_time(storage, [step.key or "" for step in steps])
    data = run_report_data(recipe, workflow, results, evaluation, tracking, steps, ended)
    key = report_key(recipe.name, ended, digest)
    storage.write(key, report_html(data).encode())
    return WrittenReport(key, data.summary)


def store_sweep_report(workflow: Workflow, outputs: SweepOutputs) -> WrittenReport:
    """Copy a sweep's report to the other reports, if it is not there."""
    storage, steps = workflow.storage, workflow.plan()
    digest = keys_digest([step.key for step in steps])
    if existing := list_reports(storage, [workflow.name], digest):
        key = existing[0].key
    else:
        key = report_key(workflow.name, end_time(storage, [step.key or "" for step in steps]), digest)
        storage.copy(outputs.report, key)
    return WrittenReport(key, headline(storage, key))


def end_time(storage: Storage, step_keys: Sequence[str]) -> datetime:
    """When the last of these finished steps ended."""
    manifests = [read_manifest(storage, key) for key in step_keys]
    return max(
        datetime.fromisoformat(manifest.started).astimezone(UTC) + timedelta(seconds=manifest.seconds)
        for manifest in manifests
    )


def run_report_data(
    recipe: Recipe,
    workflow: Workflow,
    results: RunResults,
    evaluation: EvaluationResult,
    tracking: Tracking,
    steps: Sequence[StepStatus],
    ended: datetime,
) -> ReportData:
    """The contents of a run's report. `ended`: when its last step ended."""
    from pipelines.plots.svg import StepNode
    from pipelines.run_report import ReportData, link

    storage = workflow.storage
    needs = {step.id: tuple(id.name for id in step.needs) for step in workflow.steps}
    trained = results.of_kind(StepKind.TRAIN, TrainOutputs)
    versions = results.of_kind(StepKind.REGISTER, RegisterOutputs)
    (shards,) = results.of_kind(StepKind.SHARD, ShardOutputs).values()
    manifest = load_manifest(storage.subfolder(shards.folder))
    experiment = find_experiment(tracking, [outputs.run_id for outputs in trained.values()])
    curves = {
        f"{StepKind.TRAIN}-{key}": load_curves(
            storage, outputs, run_page(tracking.uri, experiment, outputs.run_id) if experiment else ""
        )
        for key, outputs in trained.items()
    }
    return ReportData(
        title=f"inpaint: {recipe.name}",
        summary=[
            *verdict_sentences(evaluation, recipe.evaluate.metric, versions),
            *(f"Warning, {step}: {text}." for step, model in curves.items() for text in model.warnings),
        ],
        facts=head_facts(recipe, workflow, manifest, tracking, experiment, steps, ended),
        recipe=recipe.to_yaml(),
        evaluation=evaluation,
        curves=curves,
        steps=[
            StepNode(s.name, needs[s.id], s.seconds, s.state, s.key or "", s.id.kind, s.id.subject)
            for s in steps
        ],
        versions=[
            {
                "name": v.name,
                "version": link(v.version, version_page(tracking.uri, v.name, v.version)),
                "champion": "yes" if v.champion else "no",
                "reason": v.reason,
            }
            for v in versions.values()
        ],
        environment=describe_environment(),
        photographs=describe_photographs(manifest),
    )


def head_facts(
    recipe: Recipe,
    workflow: Workflow,
    manifest: Manifest,
    tracking: Tracking,
    experiment: str,
    steps: Sequence[StepStatus],
    ended: datetime,
) -> dict[str, str]:
    """The rows at the head of a run's report. `experiment`: its id in MLflow, '' if unknown."""
    from pipelines.durations import format_duration
    from pipelines.run_report import link

    size, code, seconds = manifest.options.size, code_version(), sum(step.seconds or 0.0 for step in steps)
    if page := experiment_page(tracking.uri, experiment) if experiment else "":
        mlflow = link(f"experiment {tracking.experiment}", page)
    elif path_from_sqlite_url(tracking.uri):
        mlflow = f"mlflow ui --backend-store-uri {quote_for_shell(tracking.uri)}"
    else:
        mlflow = redact_uri(tracking.uri)
    commit = code.get("commit", "")[:12] + (" and changes" if code.get("dirty") == "true" else "")
    facts = {
        "date": format_date(ended),
        "recipe": recipe.name,
        "source": manifest.source,
        "photographs": f"{count_text(manifest)}; {size} x {size} pixels",
        "commit": commit,
        "duration": f"{format_duration(seconds)} of computation in {len(steps)} steps",
        "storage": workflow.storage.uri,
        "MLflow": mlflow,
    }
    return {name: value for name, value in facts.items() if value}


def verdict_sentences(
    evaluation: EvaluationResult, metric: str, versions: Mapping[str, RegisterOutputs]
) -> list[str]:
    """One sentence per trained model, in the metric that decides. `versions`: the model's key -> its version."""
    from pipelines.evaluation.verdict import trained_methods, verdict

    return [
        verdict(evaluation, method, metric).sentence(
            f"{versions[method].name} version {versions[method].version}" if method in versions else method
        )
        for method in trained_methods(evaluation.methods)
    ]


def describe_photographs(manifest: Manifest, max_listed: int = 10) -> dict[str, str]:
    """Report rows about a source: photographs per split, and the names of rejects, duplicates and left-out files."""
    from data_prep.left_out import printable

    splits = ", ".join(f"{count} {split}" for split, count in manifest.splits.items())
    facts = {"source": printable(manifest.source), "photographs": splits}
    return facts | describe_exclusions(manifest, max_listed)


def find_experiment(tracking: Tracking, run_ids: Sequence[str]) -> str:
    """The id of the runs' experiment on an MLflow server; '' for a database, or if the server does not say."""
    if not experiment_page(tracking.uri, "0"):
        return ""
    from mlflow.exceptions import MlflowException

    for run_id in filter(None, run_ids):
        try:
            return str(tracking.client().get_run(run_id).info.experiment_id)
        except MlflowException:  # deleted, or out of reach: a report without links is still a report
            return ""
    return ""


def load_curves(storage: Storage, trained: TrainOutputs, url: str = "") -> TrainingCurves:
    """The stored curves of a training run, one line per metric, and what is found in them. `url`: its page in MLflow."""
    from pipelines.run_report import TrainingCurves
    from pipelines.training.curve_warnings import curve_warnings
    from pipelines.training.curves import read_curves

    curves = read_curves(storage, trained.weights)
    lines: dict[str, list[tuple[float, float]]] = {}
    for step, values in curves.points:
        for name, number in values.items():
            lines.setdefault(name, []).append((step, number))
    phases = [(start, name) for name, start, end in curves.phases if end > start]
    warnings = [warning.text for warning in curve_warnings(curves.points, curves.phases)]
    return TrainingCurves(lines, phases, url, warnings)


def photograph_notes(workflow: Workflow) -> list[str]:
    """What the finished shard step of a workflow made of the source: counts, then the first rejects and duplicates."""
    (step,) = (step for step in workflow.steps if step.id.kind == StepKind.SHARD)
    outputs = step.read_outputs(read_manifest(workflow.storage, step_key(step, {})).value)
    manifest = load_manifest(workflow.storage.subfolder(outputs.folder))
    exclusions = describe_exclusions(manifest, max_listed=3)
    lines = [f"{kind}: {exclusions[kind]}" for kind in ("rejects", "duplicates") if exclusions[kind] != "0"]
    return [count_text(manifest), *lines]


def display_path(storage: Storage, key: str) -> str:
    path = storage.local_path(key)
    return f"{storage.uri}/{key}" if path is None else relative_path(path)


def relative_path(path: Path) -> str:
    """The path relative to the working directory if it is below it, as a command-line argument."""
    try:
        relative = str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
    return f"./{relative}" if relative.startswith("-") else relative  # else it would be parsed as an option
