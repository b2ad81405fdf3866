"""What `inpaint` is and has: its versions, the shipped recipes, and scripts that complete its commands in a shell."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from textwrap import TextWrapper, wrap
from typing import Any

from pipelines.cli.arguments import AddCommand

SHELLS = ("bash", "zsh", "fish")
MAX_COMMIT_CHARS = 12
WIDTH = 200  # columns of output that is not a terminal's
FOLDER_ARGUMENTS = {"DIR", "FOLDER", "SHARDS", "SOURCE", "DEST", "storage"}
FILE_ARGUMENTS = {"FILE", "FILE_OR_FOLDER", "PHOTO", "MASK", "MODEL", "A", "B", "DIR_OR_KIND"}
"""Arguments (metavar, else the option's name) that are completed with folders, and with files and folders."""
RECIPE_FUNCTION = {"bash": "_inpaint_recipe_or_file", "zsh": "_inpaint_recipe", "fish": "(_inpaint_recipe)"}
RECIPE_SCRIPT = {
    "bash": """
_inpaint_recipe_or_file() {  # $1: the word before the cursor
  compgen -W "NAMES" -- "$1"
  compgen -f -X '!*.y*ml' -- "$1"
  compgen -d -- "$1"
}
""",
    "zsh": """
_inpaint_recipe() {
  compadd -- NAMES
  _files -g '*.(yaml|yml)'
}
""",
    "fish": """
function _inpaint_recipe
  printf '%s\\n' NAMES
  __fish_complete_path (commandline -ct)
end
""",
}
"""Shell -> the function that completes RECIPE with the shipped recipes (NAMES) and YAML files, and its definition."""


def add_recipes(add: AddCommand) -> None:
    recipes = add("recipes", "list the recipes that come with inpaint", "recipes")
    recipes.add_argument("--json", action="store_true", help="print JSON")
    recipes.set_defaults(run="pipelines.cli.overview:recipes_command")


def add_completion(add: AddCommand) -> None:
    completion = add(
        "completion",
        "print a script that completes commands, options and recipes in your shell",
        "completion bash",
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    completion.set_defaults(run="pipelines.cli.overview:completion_command")


def recipes_command(args: argparse.Namespace) -> int:
    from pipelines.shipped_recipes import GROUPS, describe_recipes

    recipes = describe_recipes()
    if args.json:
        print(json.dumps([asdict(recipe) for recipe in recipes], indent=1))
        return 0
    indent = max(len(recipe.name) for recipe in recipes) + 4
    columns = shutil.get_terminal_size((WIDTH, 0)).columns
    lines = TextWrapper(
        columns, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )
    blocks = [
        [
            "\n".join(wrap(heading, columns)),
            *(
                lines.fill(f"  {recipe.name}".ljust(indent) + recipe.description)
                for recipe in recipes
                if recipe.group == group
            ),
        ]
        for group, heading in GROUPS.items()
    ]
    print("\n\n".join("\n".join(block) for block in blocks))
    return 0


class ShowVersion(argparse.Action):
    """An option that prints the versions and exits. Imports none of the libraries."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(version_text())
        parser.exit()


def version_text() -> str:
    """Two lines: inpaint's version and commit, if it is known; Python's and the main libraries'."""
    from pipelines.provenance import code_version, package_versions

    versions, code = package_versions(), code_version()
    commit = ""
    if code:
        changes = ", with uncommitted changes" if code["dirty"] == "true" else ""
        commit = f" (commit {code['commit'][:MAX_COMMIT_CHARS]}{changes})"
    libraries = {"Python": "python", "torch": "torch", "Ray": "ray", "MLflow": "mlflow"}
    return f"inpaint {versions['inpaint-pipelines']}{commit}\n" + ", ".join(
        f"{name} {versions[key]}" for name, key in libraries.items()
    )


def completion_command(args: argparse.Namespace) -> int:
    import shtab

    from pipelines.shipped_recipes import shipped_recipes

    for argument in args.parser.all_arguments():
        name = argument.metavar or argument.dest
        if name == "RECIPE":
            argument.complete = RECIPE_FUNCTION
        elif name in FOLDER_ARGUMENTS:
            argument.complete = shtab.DIRECTORY
        elif name in FILE_ARGUMENTS:
            argument.complete = shtab.FILE
    preamble = RECIPE_SCRIPT[args.shell].replace("NAMES", " ".join(shipped_recipes()))
    print(shtab.complete(args.parser, args.shell, preamble=preamble))
    return 0
