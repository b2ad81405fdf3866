"""What the commands of the command line do. Heavy imports are inside: looking something up must not load Ray."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli.data_commands import data as data
from pipelines.cli.data_commands import masks as masks
from pipelines.cli.model_commands import models as models
from pipelines.cli.model_text import table
from pipelines.cli.service_commands import cluster as cluster
from pipelines.cli.service_commands import services as services
from pipelines.cli.service_commands import submit as submit
from pipelines.reading import RecipeError, check_recipe, recipe_of
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from data_prep.storage import Storage
    from pipelines.durable.record import Reported
    from pipelines.durable.steps import Workflow
    from pipelines.tracking import Tracking


def run(args: argparse.Namespace) -> int:
    return _run(args, until="register")


def train(args: argparse.Namespace) -> int:
    return _run(args, until="train")


def plan(args: argparse.Namespace) -> int:
    if args.size:
        from pipelines.training.sizing import lines

        print("\n".join(lines(recipe_of(args), args.size)))
        return 0
    workflow = _workflow(args)
    rows = [[s.name, s.state, _seconds(s.seconds), s.why] for s in workflow.plan()]
    _print_table(["step", "state", "seconds", "why"], rows)
    return 0


def status(args: argparse.Namespace) -> int:
    """From the storage alone: neither the photographs nor MLflow nor a Ray need be within reach."""
    from pipelines.durable import record

    name, storage = _named(args)
    runs = record.names(storage)
    wanted = [run for run in runs if name is None or run in (name, f"{name}-sweep")]
    if not wanted:
        there = f"it has {', '.join(runs)}" if runs else "it has none at all"
        raise ValueError(f"no run{f' of {name}' if name else ''} was begun in {storage.uri}: {there}")
    for number, run in enumerate(wanted):
        if len(wanted) > 1:
            print(("\n" if number else "") + run)
        _print_status(record.kept(storage, run), record.reported(storage, run))
    return 0


def _named(args: argparse.Namespace) -> tuple[str | None, Storage]:
    """The run and the storage that a command line names, also where the recipe's file is not."""
    from data_prep.storage import open_storage

    if args.recipe is None:
        return None, open_storage(args.storage or Recipe.model_fields["storage"].default)
    try:
        recipe = recipe_of(args)
    except RecipeError:
        if not args.storage:
            raise
        return Path(args.recipe).stem, open_storage(args.storage)
    return recipe.name, open_storage(recipe.storage)


def _print_status(workflow: Workflow, reported: dict[str, Reported]) -> None:
    steps = workflow.status()
    rows = []
    for step in steps:
        note = step.error or step.why
        if step.state == "running" and step.name in reported:
            note = f"{_progress(reported[step.name])}; {note}"
        rows.append([step.name, step.state, str(step.attempts or ""), _seconds(step.seconds), note])
    _print_table(["step", "state", "attempts", "seconds", "note"], rows)
    for step in steps:
        if step.name == "sweep" and step.key:
            _print_trials(workflow, step.key)


def _progress(report: Reported) -> str:
    from pipelines.cli.progress import eta

    left = eta(report.done - report.first, report.total - report.first, report.seconds)
    parts = [f"{report.done:g}/{report.total:g} ({report.done / report.total:.0%})"]
    parts += [f"ETA {left}"] if left else []
    return ", ".join([*parts, *([report.note] if report.note else []), f"{report.ago:.0f} s ago"])


def _print_trials(workflow: Workflow, key: str) -> None:
    from pipelines.sweeps.ledger import Ledger
    from pipelines.sweeps.result import in_words

    trials = Ledger(workflow.storage, f"work/{key}/stable/trials", 0).trials
    rows = [
        [
            f"trial {t.number}",
            t.state,
            str(t.steps or ""),
            _seconds(t.seconds or None),
            in_words(t.values),
            t.reason,
        ]
        for t in trials
    ]
    if rows:
        print()
        _print_table(["trial", "state", "steps", "seconds", "values", "note"], rows)


def shard(args: argparse.Namespace) -> int:
    from data_prep.preparing import ShardOptions
    from data_prep.storage import open_storage
    from pipelines.cli.progress import Show
    from pipelines.cluster.session import ray_session
    from pipelines.data.fanout import shard_photographs

    options = ShardOptions.of(vars(args))
    out = open_storage(args.dest)
    out.check_writable()
    with ray_session(args.debug), Show() as show:
        report = _reporter(show, "shard")
        manifest = shard_photographs(
            args.source, out, options, args.shard_photos, report, args.max_rejects, args.root
        )
        show("shard", "finished", note=_splits(manifest["splits"]))
    for reject in manifest["rejects"]:
        print(f"  rejected {reject['name']}: {reject['reason']}")
    print(
        f"{len(manifest['shards'])} shards in {out.uri}, {len(manifest['rejects'])} rejects, "
        f"{len(manifest['duplicates'])} duplicates (manifest.json lists them)"
    )
    return 0


def sweep(args: argparse.Namespace) -> int:
    recipe = recipe_of(args)
    best = _sweep(args, recipe, _tracking_for(recipe))
    return _chain(args, *best, until="register") if args.register else 0


def edges(args: argparse.Namespace) -> int:
    from data_prep.storage import open_storage
    from pipelines.cli.progress import Show
    from pipelines.cluster.session import ray_session
    from pipelines.data.fanout import make_edges

    shards = open_storage(args.shards)
    with ray_session(args.debug), Show() as show:
        outs = {sigma: shards.sub(f"edges/sigma-{sigma:g}") for sigma in args.sigma}
        make_edges(shards, outs, _reporter(show, "edges"))
        show("edges", "finished", note=", ".join(f"sigma {sigma:g}" for sigma in outs))
    print(f"edge tars in {shards.uri}/edges")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from pipelines.evaluation.scoring import score_models

    score_models(
        args.models,
        images=args.images,
        masks=args.masks,
        tracking_uri=_tracking(args),
        size=args.size,
        count=args.count,
        seed=args.seed,
        split=args.split,
        classical=not args.no_baselines,
        samples=args.samples,
        out=Path(args.out),
    )
    return 0


def fill(args: argparse.Namespace) -> int:
    from pipelines import registry
    from pipelines.cli.progress import Show
    from pipelines.filling.fill import fill as fill_photograph

    model = registry.load_model(args.model, tracking_uri=_tracking(args))
    with Show() as show:
        done = fill_photograph(
            model,
            args.image,
            args.mask,
            args.out,
            invert=True if args.invert_mask else None,
            dilate=args.dilate,
            max_side=args.max_side,
            blend=args.blend,
            edges_path=args.edges,
            progress=lambda done, windows: show("fill", "running", done, windows, "windows"),
        )
    print("\n".join(done["lines"]))
    return 0


def import_(args: argparse.Namespace) -> int:
    from pipelines.registry.importing import import_checkpoint, parse_settings, register_import
    from pipelines.tracking import shown, tracking_for

    imported = import_checkpoint(args.layout, args.files, parse_settings(args.set), args.size)
    name = args.register_as or args.layout
    where = tracking_for(args.tracking, "inpaint", "runs")
    version = register_import(imported, where, name, args.sigma)
    values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in imported.options.items()}
    layout, options = imported.layout, ", ".join(f"{key} {value}" for key, value in values.items())
    files = ", ".join(file for file, _ in imported.files)
    print(f"{name} version {version}, candidate: {files} of {layout.source} ({options})")
    for note in (*layout.notes, f"that repository's licence: {layout.licence}"):
        print(f"  note: {note}")
    tracking = f" --tracking {shown(args.tracking)}" if args.tracking else ""
    print(f"next: inpaint fill models:/{name}/{version} photo.jpg mask.png --out filled.png{tracking}")
    return 0


def _run(args: argparse.Namespace, until: str) -> int:
    recipe = recipe_of(args)
    if recipe.sweep is None:
        return _chain(args, recipe, None, until)
    return _chain(args, *_sweep(args, recipe, _tracking_for(recipe)), until)


def _sweep(args: argparse.Namespace, recipe: Recipe, tracking: Tracking) -> tuple[Recipe, dict[str, str]]:
    """Sweep, unless it is found finished; the best recipe, and where it is from."""
    from pipelines.cli.outcome import show_sweep
    from pipelines.sweeps.result import in_words
    from pipelines.sweeps.space import best_recipe, check_sweep
    from pipelines.sweeps.workflow import build_sweep

    began = time.monotonic()
    check_sweep(recipe)
    workflow = build_sweep(recipe, tracking)
    values = _found(workflow)
    if values is None:
        values = _work(args, recipe, tracking, workflow)
        print(f"sweep finished in {time.monotonic() - began:.0f} s")
    else:
        print(f"the sweep was found finished in {workflow.storage.uri}")
    found = values["sweep"]
    show_sweep(workflow, found)
    origin = {"name": recipe.name, "run": found["run"], "values": in_words(found["best"])}
    return best_recipe(recipe, found["best"]), origin


def _chain(args: argparse.Namespace, recipe: Recipe, origin: dict[str, str] | None, until: str) -> int:
    from pipelines.workflow import build_workflow

    began = time.monotonic()
    tracking = _tracking_for(recipe)
    workflow = build_workflow(recipe, tracking, until, origin)
    values = _found(workflow)
    if values is None:
        values = _work(args, recipe, tracking, workflow)
        print(f"finished in {time.monotonic() - began:.0f} s")
    else:
        print(f"everything was found finished in {workflow.storage.uri}; nothing to do")
    if until == "register":
        from pipelines.cli.outcome import show_outcome

        show_outcome(recipe, workflow, values, tracking)
    else:
        for name, value in values.items():
            if "weights" in value:
                print(f"{name}: {workflow.storage.uri}/{value['weights']}")
    return 0


def _found(workflow: Workflow) -> dict[str, Any] | None:
    """The values of a run that is finished already."""
    from pipelines.durable import record

    values = workflow.finished()
    if values is not None:
        record.keep(workflow)  # it may not be the one that was begun last
    return values


def _work(args: argparse.Namespace, recipe: Recipe, tracking: Tracking, workflow: Workflow) -> dict[str, Any]:
    from pipelines import tracking as mlflow_runs
    from pipelines.cli.progress import Show
    from pipelines.cluster.session import ray_session
    from pipelines.durable import record
    from pipelines.workflow import with_parent

    check_recipe(recipe)
    workflow.storage.check_writable()
    with workflow.hold(lambda text: print(f"  {text}", flush=True)) as held:
        record.keep(workflow)
        tags = {"inpaint.recipe": recipe.to_yaml()[:5000]}
        parent = mlflow_runs.open_run(tracking, recipe.digest, recipe.name, tags=tags)
        print(
            f"recipe {recipe.name}: storage {workflow.storage.uri}, MLflow {mlflow_runs.shown(tracking.uri)}",
            flush=True,
        )
        with (
            mlflow_runs.running(tracking, parent),
            ray_session(args.debug),
            Show() as show,
            record.Diary(workflow) as diary,
        ):

            def tell(*report: Any) -> None:
                show(*report)
                diary(*report)

            return with_parent(workflow, parent).run(tell, held)


def _workflow(args: argparse.Namespace) -> Workflow:
    from pipelines.sweeps.workflow import build_sweep
    from pipelines.workflow import build_workflow

    recipe = recipe_of(args)
    return (build_workflow if recipe.sweep is None else build_sweep)(recipe, _tracking_for(recipe))


def _tracking_for(recipe: Recipe) -> Tracking:
    from pipelines.tracking import tracking_for

    return tracking_for(recipe.tracking, recipe.experiment, recipe.storage)


def _tracking(args: argparse.Namespace) -> str:
    """--tracking, else MLFLOW_TRACKING_URI, else what a recipe without either uses here."""
    from pipelines.tracking import tracking_for

    return tracking_for(getattr(args, "tracking", None), "inpaint", "runs").uri


def _reporter(show: Any, name: str) -> Any:
    return lambda done, total, note="": show(name, "running", done, total, note)


def _splits(splits: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in splits.items())


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    print("\n".join(table([dict(zip(head, row, strict=True)) for row in rows])), flush=True)
