"""The command `inpaint status`. Reads only the storage; needs neither the photographs nor MLflow nor Ray."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli.arguments import AddCommand, add_recipe_command
from pipelines.cli.text import format_seconds, print_table

NAME_OPTION = "name="  # of --set

if TYPE_CHECKING:
    from data_prep.storage import Storage
    from pipelines.durable.run_status import StepProgress
    from pipelines.durable.workflow import Workflow
    from pipelines.recipe import Recipe


def add_status(add: AddCommand) -> None:
    status = add_recipe_command(
        add,
        "status",
        "show the status of a run, read from its storage",
        "status demo --storage s3://bucket/runs",
        optional_help=", or only its name (default: all runs of the storage)",
    )
    status.set_defaults(run="pipelines.cli.status:status_command")


def status_command(args: argparse.Namespace) -> int:
    from pipelines.durable import run_status
    from pipelines.recipe.load import recipe_from_args, recipe_path

    if args.recipe and args.set and recipe_path(args.recipe):
        workflow = find_run_of_recipe(recipe_from_args(args), overrides_only_name(args))
        _print_status(workflow, run_status.load_progress(workflow.storage, workflow.name))
        return 0
    name, storage = parse_run_name(args)
    runs = run_status.list_runs(storage)
    names = [run for run in runs if name is None or run in (name, f"{name}-sweep")]
    if not names:
        raise ValueError(_no_run_message(name, storage, runs))
    for index, run in enumerate(names):
        if len(names) > 1:
            print(("\n" if index else "") + run)
        _print_status(run_status.load_workflow(storage, run), run_status.load_progress(storage, run))
    return 0


def overrides_only_name(args: argparse.Namespace) -> bool:
    """Whether the options of --set say nothing but the run's name."""
    return all(option.startswith(NAME_OPTION) for option in args.set)


def find_run_of_recipe(recipe: Recipe, only_named: bool) -> Workflow:
    """The stored run with the options of this recipe. ValueError in one line if there is none.

    `only_named`: only the name was overridden. Then the last run of that name is shown, even if its options differ.
    """
    from pipelines.contracts import NON_RECIPE_FIELDS
    from pipelines.durable import run_status
    from pipelines.pipeline import build_workflow
    from pipelines.sweeps.workflow import build_sweep
    from pipelines.tracking.runs import TrackingError, resolve_tracking

    try:
        tracking = resolve_tracking(recipe.tracking_uri, recipe.experiment, recipe.storage)
    except TrackingError:
        tracking = None
    workflow = (build_workflow if recipe.sweep is None else build_sweep)(recipe, tracking, listing_digest="")
    if stored_run := run_status.find_run(workflow, NON_RECIPE_FIELDS):
        return stored_run
    name, storage = workflow.name, workflow.storage
    if name not in (runs := run_status.list_runs(storage)):
        raise ValueError(_no_run_message(name, storage, runs))
    last_run = run_status.load_workflow(storage, name)
    differences = "; ".join(run_status.list_differences(last_run, workflow, NON_RECIPE_FIELDS)[:3])
    if only_named:
        print(f"{name} was started with options that differ from the recipe's in {differences}:")
        return last_run
    raise ValueError(
        f"no run of {name} with these options was started in {storage.uri}; the last one differs in {differences}: "
        "without --set, that one is shown"
    )


def _no_run_message(name: str | None, storage: Storage, runs: list[str]) -> str:
    existing = f"it has {', '.join(runs)}" if runs else "it has no runs"
    return f"no run{f' of {name}' if name else ''} was started in {storage.uri}: {existing}"


def parse_run_name(args: argparse.Namespace) -> tuple[str | None, Storage]:
    """Run name and storage from the command line, also if the recipe's file does not exist on this machine."""
    from data_prep.storage import open_storage
    from pipelines.recipe import Recipe
    from pipelines.recipe.load import RecipeError, recipe_from_args

    if args.recipe is None:
        return None, open_storage(args.storage or Recipe.model_fields["storage"].default)
    try:
        recipe = recipe_from_args(args)
    except RecipeError:
        if not args.storage:
            raise
        names = [text.removeprefix(NAME_OPTION) for text in args.set if text.startswith(NAME_OPTION)]
        if len(names) < len(args.set):
            raise RecipeError(
                f"there is no recipe {args.recipe!r} here, so --set cannot be applied; "
                "without --set, the last run of that name is shown"
            ) from None
        return names[-1] if names else Path(args.recipe).stem, open_storage(args.storage)
    return recipe.name, open_storage(recipe.storage)


def _print_status(workflow: Workflow, progress: dict[str, StepProgress]) -> None:
    from pipelines.contracts import StepKind
    from pipelines.durable.run_status import seconds_since

    steps = workflow.status()
    rows = []
    for step in steps:
        note = step.error or step.reason
        if step.state == "running" and step.name in progress:
            note = f"{_format_progress(progress[step.name])}; {note}"
        rows.append([step.name, step.state, str(step.attempts or ""), format_seconds(step.seconds), note])
    print_table(["step", "state", "attempts", "seconds", "note"], rows)
    for step in steps:
        if step.state == "running" and step.name in progress:
            for event in progress[step.name].notes:
                print(f"{step.name}: {event.text} ({seconds_since(event.at):.0f} s ago)")
    for step in steps:
        if step.id.kind == StepKind.SWEEP and step.key:
            _print_trials(workflow, step.key)


def _format_progress(progress: StepProgress) -> str:
    parts = [f"{progress.done:g}/{progress.total:g} ({progress.done / progress.total:.0%})"]
    parts += [f"ETA {progress.eta}"] if progress.eta else []
    parts += [progress.note] if progress.note else []
    return ", ".join([*parts, f"{progress.age_seconds:.0f} s ago"])


def _print_trials(workflow: Workflow, key: str) -> None:
    from pipelines.sweeps.results import format_values
    from pipelines.sweeps.trial_store import TrialStore, trial_store_folder

    trials = TrialStore(workflow.storage, trial_store_folder(key), 0).records
    rows = [
        [
            f"trial {trial.number}",
            trial.state,
            str(trial.steps or ""),
            format_seconds(trial.seconds or None),
            format_values(trial.values),
            trial.reason,
        ]
        for trial in trials
    ]
    if rows:
        print()
        print_table(["trial", "state", "steps", "seconds", "values", "note"], rows)
