"""Shared by all commands: argparse types with a range, help texts, and the functions that add a command."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.cli.parser import FIELD_PATTERN


def integer(minimum: int, maximum: float = math.inf) -> Callable[[str], int]:
    """argparse type: integers from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        _check_range(text, value, minimum, maximum)
        return value

    return parse


def number(minimum: float, maximum: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """argparse type: numbers from `minimum` (if `exclusive`, above it) to `maximum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            suggestion = f"; did you mean {text.replace(',', '.')}?" if text.count(",") == 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a number{suggestion}") from None
        if not math.isfinite(value) or (exclusive and value == minimum):
            raise argparse.ArgumentTypeError(f"{text!r} is not above {minimum:g}")
        _check_range(text, value, minimum, maximum)
        return value

    return parse


def _check_range(text: str, value: float, minimum: float, maximum: float) -> None:
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is too small: at least {minimum:g}")
    if value > maximum:
        raise argparse.ArgumentTypeError(f"{text!r} is too large: at most {maximum:g}")


def recipe_name(text: str) -> str:
    """argparse type: a recipe's name or file; a field of a recipe without --set in front of it is refused."""
    if FIELD_PATTERN.match(text) and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text!r} is a field of the recipe: give it as --set {shlex.quote(text)}, after the recipe's name"
        )
    return text


positive_int = integer(1)
non_negative_int = integer(0)
seed_int = integer(0, 2**63 - 1)  # the recipe's range
fraction = number(0, 1)
port_number = integer(1, 65535)

HOLE_HELP = (
    "value of the hole in mask images: a grey level or class number (2), levels (128-255) or a colour ('#ff0000'); "
    "repeatable (default: white, or of two colours the one that is not black)"
)
MODEL_HELP = "a checkpoint folder, NAME@ALIAS, NAME/VERSION, or NAME (its champion, else its newest version)"
RECIPE_HELP = "name of a shipped recipe or a YAML file"

AddCommand = Callable[..., argparse.ArgumentParser]
"""add(name, help_text, example, subparsers=commands of inpaint): calls `add_command`."""


def add_command(subparsers: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    """Add a command with --debug. The caller sets its default `run` to the "module:function" that runs it."""
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"example: inpaint {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(prog=command.prog)  # for errors: the whole command, such as `inpaint models show`
    return command


def add_recipe_command(
    add: AddCommand, name: str, help_text: str, example: str, optional_help: str = ""
) -> argparse.ArgumentParser:
    """Add a command that takes a recipe; `optional_help`, if given, makes it optional and says what happens then."""
    command = add(name, help_text, example)
    command.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?" if optional_help else None,
        type=recipe_name,
        help=RECIPE_HELP + optional_help,
    )
    command.add_argument(
        "--set", metavar="KEY.SUB=VALUE", action="append", default=[], help="override a field; repeatable"
    )
    command.add_argument("--storage", help="folder or s3://bucket/prefix for all outputs of a run")
    command.add_argument("--tracking-uri", help="MLflow tracking URI")
    return command


def command_line(args: argparse.Namespace) -> str:
    """The command as typed, quoted for a shell. Its values have no credentials: `load_recipe` refuses them."""
    words = ["inpaint", args.command, args.recipe]
    words += [word for change in args.set for word in ("--set", change)]
    words += ["--storage", args.storage] if args.storage else []
    words += ["--tracking-uri", args.tracking_uri] if args.tracking_uri else []
    words += ["--register"] if getattr(args, "register", False) else []
    return shlex.join(words)


def registry_address(args: argparse.Namespace) -> str:
    """--tracking-uri, else MLFLOW_TRACKING_URI, else the default database in the folder `runs`."""
    from pipelines.tracking.runs import resolve_tracking

    return resolve_tracking(args.tracking_uri, "inpaint", "runs").uri
