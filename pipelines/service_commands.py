"""`inpaint services ...` and `inpaint submit`: the arguments, and what is done with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_services(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser of `services`; add(name, text, example, to) makes one command, with --debug."""
    services = add(
        "services", "start the servers that a cluster needs beside Ray, in the foreground", "services s3"
    )
    actions = services.add_subparsers(dest="action", metavar="SERVICE", required=True)

    def action(name: str, text: str, port: int, example: str) -> argparse.ArgumentParser:
        command = add(name, text, f"services {name} {example}".rstrip(), actions)
        command.add_argument(
            "--folder",
            metavar="DIR",
            default="services",
            help="what it keeps, and its credentials (%(default)s)",
        )
        command.add_argument("--host", default="127.0.0.1", help="the address it listens at (%(default)s)")
        command.add_argument("--port", type=int, default=port, help="(%(default)s)")
        return command

    s3 = action(
        "s3", "S3-compatible storage over a folder of this machine (JuiceFS)", 9000, "--folder services"
    )
    s3.add_argument("--bucket", default="inpaint", help="the name in the command it prints (%(default)s)")
    mlflow = action(
        "mlflow", "an MLflow server with a database, users and passwords, and artifacts through it", 5000, ""
    )
    mlflow.add_argument("--backend", metavar="URI", help="the database (default: SQLite in the folder)")
    mlflow.add_argument(
        "--artifacts", metavar="URI", help="a folder or s3://bucket/prefix (default: artifacts in the folder)"
    )
    mlflow.add_argument(
        "--allowed-hosts", metavar="HOST:PORT,...", help="names it may be reached by (default: MLflow's)"
    )


def add_submit(add_recipe: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser of `submit`; add_recipe(name, text, example) makes a command that takes a recipe."""
    submit = add_recipe(
        "submit",
        "run a recipe on a cluster as a Ray job, and follow it; credentials are the cluster's, none travel",
        "submit edge_connect --address http://localhost:8265 --storage s3://bucket/runs",
        nargs="?",  # none with --attach
    )
    submit.add_argument(
        "--address", metavar="URL", required=True, help="the cluster's dashboard, http://HEAD:8265"
    )
    submit.add_argument("--no-wait", action="store_true", help="print the job's id instead of following it")
    submit.add_argument("--attach", metavar="ID", help="follow this job instead of submitting one")


def submit(args: argparse.Namespace) -> int:
    from pipelines.reading import check_recipe, recipe_of
    from pipelines.submitting import SubmitError, follow, how_to_attach
    from pipelines.submitting import submit as submit_recipe

    if args.attach:
        return follow(args.address, args.attach)
    if args.recipe is None:
        raise SubmitError("name a recipe to submit, or --attach ID to follow a job")
    recipe = recipe_of(args)
    check_recipe(recipe)
    job = submit_recipe(recipe, args.address)
    print(f"submitted {job}\n{how_to_attach(args.address, job)}", flush=True)
    return 0 if args.no_wait else follow(args.address, job)


def services(args: argparse.Namespace) -> int:
    from pipelines.services import serve_mlflow, serve_s3

    folder = Path(args.folder)
    if args.action == "s3":
        serve_s3(folder, args.host, args.port, args.bucket)
    serve_mlflow(folder, args.host, args.port, args.backend, args.artifacts, args.allowed_hosts)
