"""The commands `inpaint run`, `plan`, `sweep` and `train`.

Heavy imports are inside the functions: --help loads this module, and `plan` or a finished run must not load Ray.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import notices
from pipelines.cli.arguments import AddCommand, add_recipe_command, command_line, positive_int

if TYPE_CHECKING:
    from pipelines.contracts import StepKind, SweepOrigin
    from pipelines.durable.workflow import RunResults, Workflow
    from pipelines.parent_run import ParentRun
    from pipelines.recipe import Recipe
    from pipelines.tracking_address import Tracking


def add_run(add: AddCommand) -> None:
    run = add_recipe_command(
        add,
        "run",
        "run the whole pipeline: shard, edges, train, evaluate, register",
        "run demo --set data.source=photos",
    )
    run.set_defaults(run="pipelines.cli.runs:run_command")


def add_plan(add: AddCommand) -> None:
    plan = add_recipe_command(
        add,
        "plan",
        "show which steps would run and why; with --photos, estimate storage and GPU hours",
        "plan edge_connect --photos 8000000",
    )
    plan.add_argument(
        "--photos",
        metavar="N",
        type=positive_int,
        help="estimate shards, storage and GPU hours for this number of photographs",
    )
    plan.set_defaults(run="pipelines.cli.runs:plan_command")


def add_sweep(add: AddCommand) -> None:
    sweep = add_recipe_command(
        add,
        "sweep",
        "search for the best values of the recipe's sweep block, such as loss weights or sigma",
        "sweep edge_connect-sigma --set data.source=photos",
    )
    sweep.add_argument(
        "--register", action="store_true", help="then train, evaluate and register the best recipe"
    )
    sweep.set_defaults(run="pipelines.cli.runs:sweep_command")


def add_train(add: AddCommand) -> None:
    train = add_recipe_command(
        add, "train", "run the pipeline up to the trained weights", "train demo --set seed=1"
    )
    train.set_defaults(run="pipelines.cli.runs:train_command")


def run_command(args: argparse.Namespace) -> int:
    from pipelines.contracts import StepKind

    return _run_recipe(args, until=StepKind.REGISTER)


def train_command(args: argparse.Namespace) -> int:
    from pipelines.contracts import StepKind

    return _run_recipe(args, until=StepKind.TRAIN)


def plan_command(args: argparse.Namespace) -> int:
    from pipelines.cli.text import format_seconds, print_table
    from pipelines.recipe.load import recipe_from_args

    if args.photos:
        from pipelines.estimate import format_estimate

        print("\n".join(format_estimate(recipe_from_args(args), args.photos)))
        return 0
    recipe, workflow = _load_workflow(args)
    steps = workflow.plan()
    rows = [[step.name, step.state, format_seconds(step.seconds), step.reason] for step in steps]
    print_table(["step", "state", "seconds", "why"], rows)
    if any(step.state != "finished" for step in steps):
        _check_before_run(recipe, workflow, download=False)
    return 0


def sweep_command(args: argparse.Namespace) -> int:
    from pipelines.contracts import StepKind
    from pipelines.recipe.load import recipe_from_args

    recipe = recipe_from_args(args)
    until = StepKind.REGISTER if args.register else StepKind.SWEEP
    best = _run_sweep(args, recipe, _resolve_tracking(recipe), until)
    return _run_pipeline(args, *best, until) if args.register else 0


def _run_recipe(args: argparse.Namespace, until: StepKind) -> int:
    from pipelines.recipe.load import recipe_from_args

    recipe = recipe_from_args(args)
    if recipe.sweep is None:
        return _run_pipeline(args, recipe, None, until)
    return _run_pipeline(args, *_run_sweep(args, recipe, _resolve_tracking(recipe), until), until)


def _run_sweep(
    args: argparse.Namespace, recipe: Recipe, tracking: Tracking, until: StepKind
) -> tuple[Recipe, SweepOrigin]:
    """Run the sweep unless it is cached; return the best recipe and its origin. `until`: last step of the pipeline."""
    from pipelines.cli.summary import print_sweep_summary
    from pipelines.contracts import StepKind, SweepOrigin, SweepOutputs
    from pipelines.sweeps.results import format_values
    from pipelines.sweeps.space import best_recipe
    from pipelines.sweeps.workflow import SWEEP, build_sweep

    started_at = time.monotonic()
    workflow = build_sweep(recipe, tracking, evaluates=until == StepKind.REGISTER)
    _print_left_out(workflow)
    results = _cached_results(args, recipe, workflow)
    if results is None:
        results = _run_with_display(args, recipe, tracking, workflow)
        print(f"sweep finished in {time.monotonic() - started_at:.0f} s")
    else:
        print(f"the sweep is cached in {workflow.storage.uri}")
    outputs = results.of(SWEEP, SweepOutputs)
    print_sweep_summary(workflow, outputs)
    return best_recipe(recipe, outputs.best_values), SweepOrigin(
        recipe.name, outputs.run_id, format_values(outputs.best_values)
    )


def _run_pipeline(
    args: argparse.Namespace, recipe: Recipe, origin: SweepOrigin | None, until: StepKind
) -> int:
    from pipelines.contracts import StepKind, TrainOutputs
    from pipelines.pipeline import build_workflow

    started_at = time.monotonic()
    tracking = _resolve_tracking(recipe)
    workflow = build_workflow(recipe, tracking, until, origin)
    if origin is None:  # a sweep has printed it
        _print_left_out(workflow)
    results = _cached_results(args, recipe, workflow)
    if results is None:
        results = _run_with_display(args, recipe, tracking, workflow)
        print(f"finished in {time.monotonic() - started_at:.0f} s")
    else:
        print(f"all steps are cached in {workflow.storage.uri}; nothing to do")
    if until == StepKind.REGISTER:
        from pipelines.cli.summary import print_summary

        print_summary(recipe, workflow, results, tracking)
    else:
        from pipelines.cli.summary import print_photographs

        print_photographs(workflow, results)
        for key, trained in results.of_kind(StepKind.TRAIN, TrainOutputs).items():
            print(f"{StepKind.TRAIN}-{key}: {workflow.storage.uri}/{trained.weights}")
    return 0


def _print_left_out(workflow: Workflow) -> None:
    """Print the files of the source that the shard step leaves out."""
    from pipelines.cli.summary import print_left_out
    from pipelines.pipeline import SHARD_ID

    (left_out,) = (step.settings.left_out for step in workflow.steps if step.id == SHARD_ID)
    print_left_out(left_out)


def _cached_results(args: argparse.Namespace, recipe: Recipe, workflow: Workflow) -> RunResults | None:
    """The results of a run whose steps are all cached; None if any is not."""
    from pipelines.durable import run_status

    results = workflow.finished_outputs()
    if results is not None:
        run_status.save_workflow(
            workflow, command_line(args), recipe.to_yaml()
        )  # another run may have started since
    return results


def _run_with_display(
    args: argparse.Namespace, recipe: Recipe, tracking: Tracking, workflow: Workflow
) -> RunResults:
    """Check, then run the workflow on Ray under its lease, with progress on the terminal and in the storage."""
    from data_prep.uris import redact_uri
    from pipelines.check_masks import check_recipe_masks
    from pipelines.cli.progress import ProgressDisplay, mask_reading_display
    from pipelines.cli.reporting import photograph_notes
    from pipelines.cluster.ray_address import resolve_head
    from pipelines.cluster.session import ray_session
    from pipelines.contracts import StepKind
    from pipelines.durable import run_status
    from pipelines.durable.runner import run_workflow
    from pipelines.durable.steps import StepEvent
    from pipelines.errors import doing
    from pipelines.parent_run import open_parent_run
    from pipelines.tracking import runs as mlflow_runs

    _check_before_run(recipe, workflow)
    resolve_head(os.environ.get("RAY_ADDRESS"))  # fail on a bad address before anything starts
    workflow.storage.check_writable()
    with mask_reading_display() as on_masks:
        check_recipe_masks(_recipes_to_train(recipe), workflow.storage, on_masks)
    with workflow.acquire_lease(lambda text: print(f"  {text}", flush=True)) as leases:
        run_status.save_workflow(workflow, command_line(args), recipe.to_yaml())
        notices.announce("opening the run in MLflow")
        with doing(f"opening a run in MLflow at {redact_uri(tracking.uri)}"):
            parent = open_parent_run(recipe, tracking, args.command)
        print(f"recipe {recipe.name}: storage {workflow.storage.uri}, MLflow {parent.address}", flush=True)
        with (
            mlflow_runs.finish_run_on_exit(tracking, parent.run_id),
            ray_session(args.debug, recipe.name),
            ProgressDisplay() as display,
            run_status.StatusWriter(workflow) as status_writer,
        ):
            _check_resources(recipe)

            def on_event(event: StepEvent) -> None:
                name = f"{event.step}/{event.substep}" if event.substep else event.step
                display(name, event.state, event.done, event.total, event.note)
                status_writer(event)
                if event.kind == StepKind.SHARD and event.state == "finished":
                    for line in photograph_notes(workflow):
                        display(name, "note", note=line)

            parent_settings = workflow.with_settings(parent_run_id=parent.run_id)
            results = run_workflow(parent_settings, on_event, leases)
            _log_results(parent, recipe, workflow, results)
            return results


def _log_results(parent: ParentRun, recipe: Recipe, workflow: Workflow, results: RunResults) -> None:
    """Log the final scores, the dataset and the report to the MLflow run of the recipe."""
    from pipelines.cli.reporting import store_sweep_report, write_run_report
    from pipelines.contracts import EvaluateOutputs, StepKind, SweepOutputs
    from pipelines.evaluation.results import EvaluationResult
    from pipelines.evaluation.tables import table_markdown
    from pipelines.parent_run import log_report, log_results

    storage = workflow.storage
    log_results(parent, recipe, storage, results)
    for outputs in results.of_kind(StepKind.SWEEP, SweepOutputs).values():
        report = store_sweep_report(workflow, outputs)
        log_report(parent, storage.read(report.key).decode(), "\n\n".join(report.sentences))
    for evaluated in results.of_kind(StepKind.EVALUATE, EvaluateOutputs).values():
        evaluation = EvaluationResult.load(storage.subfolder(evaluated.folder).read)
        report = write_run_report(recipe, workflow, results, evaluation, parent.tracking)
        summary = "\n\n".join([*report.sentences, table_markdown(evaluation)])
        log_report(parent, storage.read(report.key).decode(), summary)


def _check_before_run(recipe: Recipe, workflow: Workflow, download: bool = True) -> None:
    """Check everything that can be checked before a run. Imports torch; ValueError in one line.

    `download` False: skip the check of weights that are not downloaded yet.
    """
    from pipelines.check_recipe import check_recipe
    from pipelines.errors import doing
    from pipelines.sweeps.workflow import check_sweep

    with doing("checking the recipe"):
        (check_recipe if recipe.sweep is None else check_sweep)(recipe, download)
    if workflow.storage.local_path() is None and recipe.data.cache_gb and recipe.data.cache_dir:
        _check_cache_folder(Path(recipe.data.cache_dir))
    for note in workflow.check():
        print(f"  note: {note}", flush=True)


def _recipes_to_train(recipe: Recipe) -> Iterable[Recipe]:
    """The recipe; of a sweep, the recipes of its trials that differ in their masks."""
    if recipe.sweep is None:
        return [recipe]
    from pipelines.sweeps.space import boundary_recipes  # imports torch

    return boundary_recipes(recipe, "masks")


def _check_cache_folder(folder: Path) -> None:
    """Check that the cache folder is writable, if workers run on this machine."""
    import tempfile

    from data_prep.os_errors import explain_os_error
    from pipelines.cluster.ray_address import is_cluster_address

    if is_cluster_address(os.environ.get("RAY_ADDRESS")):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"data.cache_dir {folder} cannot be used: {explain_os_error(error)}") from None


def _check_resources(recipe: Recipe) -> None:
    """Check that the workers fit on the Ray cluster; only print a note for a remote cluster, which may grow."""
    import ray

    from pipelines.cluster.capacity import infeasible_reason
    from pipelines.cluster.ray_address import is_cluster_address

    missing = infeasible_reason(recipe.scaling, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if missing and not is_cluster_address(os.environ.get("RAY_ADDRESS")):
        raise ValueError(missing)
    if missing:
        print(f"  note: training waits until the cluster grows: {missing}", flush=True)


def _load_workflow(args: argparse.Namespace) -> tuple[Recipe, Workflow]:
    from pipelines.pipeline import build_workflow
    from pipelines.recipe.load import recipe_from_args
    from pipelines.sweeps.workflow import build_sweep

    recipe = recipe_from_args(args)
    return recipe, (build_workflow if recipe.sweep is None else build_sweep)(
        recipe, _resolve_tracking(recipe)
    )


def _resolve_tracking(recipe: Recipe) -> Tracking:
    from pipelines.tracking.moved_storage import relocate_if_moved
    from pipelines.tracking.runs import resolve_tracking

    tracking = resolve_tracking(recipe.tracking_uri, recipe.experiment, recipe.storage)
    relocate_if_moved(tracking.uri)  # also if all steps are cached: the database moves with its storage
    return tracking
