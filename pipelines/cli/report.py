"""The command `inpaint report`. Reads only the storage, as `status` does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli.arguments import AddCommand, add_recipe_command

if TYPE_CHECKING:
    from data_prep.storage import Storage
    from pipelines.report_files import ReportFile

DEFAULT_FOLDER = "reports"


def add_report(add: AddCommand) -> None:
    report = add_recipe_command(
        add,
        "report",
        "find the newest report of a run or a sweep; from a bucket it is copied to this machine",
        "report demo --storage s3://bucket/runs --open",
        optional_help=", or only its name (default: all recipes of the storage)",
    )
    report.add_argument("--open", action="store_true", help="open the report in the browser")
    report.add_argument(
        "--list", action="store_true", help="list all reports with date and recipe, newest first"
    )
    report.add_argument(
        "--out",
        metavar="FOLDER",
        default=DEFAULT_FOLDER,
        help="folder to which a bucket's report is copied (default: %(default)s)",
    )
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(run="pipelines.cli.report:report_command")


def report_command(args: argparse.Namespace) -> int:
    from pipelines.cli.reporting import relative_path
    from pipelines.report_files import as_local_file, headline, list_reports, newest_report, run_names

    name, storage, digest = _find_storage(args)
    newest = newest_report(storage, name, digest)  # raises an error in one line if there is none
    if args.list:
        names = None if name is None else run_names(name)
        _print_list(storage, list_reports(storage, names, digest), args.json)
        return 0
    path = as_local_file(storage, newest, Path(args.out).expanduser())
    if args.json:
        print(json.dumps(_as_json(storage, newest) | {"path": str(path.absolute())}))
    else:
        for sentence in headline(storage, newest.key):
            print(sentence)
        print(f"{newest.name}, {newest.date_text}: {relative_path(path)}")
    if args.open:
        _open_in_browser(path)
    return 0


def _find_storage(args: argparse.Namespace) -> tuple[str | None, Storage, str | None]:
    """(recipe's name or None for all, storage, digest of the run or None for the newest) from the command line.

    Options other than the name choose one run of the recipe, as in `inpaint status`.
    """
    from pipelines.cli.status import find_run_of_recipe, overrides_only_name, parse_run_name
    from pipelines.recipe.load import recipe_from_args, recipe_path
    from pipelines.report_files import ReportError, keys_digest

    if not (args.recipe and args.set and recipe_path(args.recipe)) or overrides_only_name(args):
        return *parse_run_name(args), None
    recipe = recipe_from_args(args)
    workflow = find_run_of_recipe(recipe, only_named=False)
    keys = [step.key for step in workflow.status()]
    if None in keys:
        raise ReportError(
            f"the run of {recipe.name} with these options is not finished, so it has no report: see inpaint status"
        )
    return recipe.name, workflow.storage, keys_digest(keys)


def _print_list(storage: Storage, reports: list[ReportFile], as_json: bool) -> None:
    from pipelines.cli.reporting import display_path
    from pipelines.cli.text import print_table

    if as_json:
        print(json.dumps([_as_json(storage, report) for report in reports]))
        return
    rows = [[report.date_text, report.name, display_path(storage, report.key)] for report in reports]
    print_table(["date", "recipe", "report"], rows)


def _as_json(storage: Storage, report: ReportFile) -> dict[str, str | None]:
    path = storage.local_path(report.key)
    return {
        "recipe": report.name,
        "date": report.date.isoformat() if report.date else None,
        "report": str(path) if path else f"{storage.uri}/{report.key}",
    }


def _open_in_browser(path: Path) -> None:
    import webbrowser

    try:
        opened = webbrowser.open(path.absolute().as_uri())
    except webbrowser.Error:
        opened = False
    if not opened:
        raise ValueError(f"no browser can be started here: open {path.absolute()} yourself")
