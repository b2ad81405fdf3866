"""Entry point of `inpaint`: builds the parser, runs the command and prints errors in one line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any, NoReturn

from data_prep.network import bypass_proxy_for_loopback, enable_long_retries
from pipelines import notices
from pipelines.cli.arguments import AddCommand, add_command
from pipelines.cli.cluster import add_cluster_commands
from pipelines.cli.data import add_data, add_edges, add_shard
from pipelines.cli.evaluate import add_evaluate, add_import
from pipelines.cli.fill import add_fill
from pipelines.cli.masks import add_masks
from pipelines.cli.models import add_models
from pipelines.cli.overview import ShowVersion, add_completion, add_recipes
from pipelines.cli.parser import Parser
from pipelines.cli.report import add_report
from pipelines.cli.runs import add_plan, add_run, add_sweep, add_train
from pipelines.cli.services import add_services
from pipelines.cli.status import add_status
from pipelines.cli.studio import add_studio
from pipelines.cluster.ray_address import is_ray_job

COMMANDS: tuple[Callable[[AddCommand], None], ...] = (
    *(add_run, add_plan, add_status, add_report, add_sweep, add_train, add_recipes),
    *(add_shard, add_edges, add_data, add_masks),
    *(add_evaluate, add_fill, add_import),
    *(add_models, add_studio, add_cluster_commands, add_services),
    add_completion,
)
"""Functions that add the commands, in the order of --help."""

TERMINATED = 128 + signal.SIGTERM
"""The exit status after SIGTERM."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 error (one line on stderr), 2 wrong usage, 130 interrupted, 143 terminated."""
    args = build_parser().parse_args(argv)
    bypass_proxy_for_loopback()
    if is_ray_job(os.environ):  # nobody watches a job
        enable_long_retries()
    os.environ.setdefault("WDS_SECURE", "1")  # webdataset: no shell in URLs, no unpickling
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # no notices for a program that calls main() or reads JSON
    quiet = argv is not None or getattr(args, "json", False)
    try:
        with _exit_on_sigterm(), notices.command(startup_notice(args), quiet):
            sys.exit(resolve_name(args.run)(args))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if args.debug:
            raise
        from pipelines.errors import user_message

        print(f"{args.prog}: {user_message(error)}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Inside this context, SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt: leases are released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = False

    def handle(number: int, frame: object) -> NoReturn:
        nonlocal received
        received = True
        sys.exit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except SystemExit:
        if received:
            print("\nterminated; the same command resumes", file=sys.stderr)
            sys.exit(TERMINATED)  # Ray replaces the status
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def startup_notice(args: argparse.Namespace) -> str:
    """The notice to print if a command's start takes long."""
    match args.command, getattr(args, "action", None):
        case (("run" | "train" | "sweep" | "plan"), _):
            return f"reading the recipe {args.recipe}"
        case "status", _:
            return "reading the status of the runs"
        case "report", _:
            return "looking for reports"
        case "shard", _:
            return f"looking for photographs in {args.source}"
        case (("edges" | "data"), _):
            return f"reading the shards in {args.shards}"
        case "evaluate", _:
            return f"loading {', '.join(args.models)}"
        case "fill", _:
            return f"reading {args.photo}"
        case "import", _:
            return f"reading {', '.join(args.files)}"
        case "submit", _:
            return f"looking up the job {args.attach}" if args.attach else f"preparing a job of {args.recipe}"
        case (("recipes" | "completion"), _):
            return "reading the recipes"
        case "masks", _:
            return "drawing masks"
        case "services", ("status" | "stop"):
            return "looking for servers"
        case "services", server:
            return f"starting the {server} server"
        case "models", _:
            return f"reading {getattr(args, 'model', 'the models')} from the registry"
        case "studio", _:
            return "starting the studio"
        case "cluster", "up":
            return f"starting the cluster {args.name}"
        case "cluster", "down":
            return f"stopping the cluster {args.name}"
        case "cluster", "leave":
            return "connecting to the cluster's head"
        case _, action:
            return f"{args.command} {action or ''}".rstrip()


def build_parser() -> Parser:
    top = Parser(
        prog="inpaint",
        description="Train inpainting models on your photographs and register them in MLflow.",
        epilog="example: inpaint run demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=ShowVersion, help="show the versions of inpaint and its libraries")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help_text: str, example: str, subparsers: Any = commands) -> argparse.ArgumentParser:
        return add_command(subparsers, name, help_text, example)

    for add_parsers in COMMANDS:
        add_parsers(add)
    top.set_defaults(parser=top)  # for the command `completion`
    return top
