"""`inpaint services ...`: the arguments, and what is done with them."""

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


def services(args: argparse.Namespace) -> int:
    from pipelines.services import serve_mlflow, serve_s3

    folder = Path(args.folder)
    if args.action == "s3":
        serve_s3(folder, args.host, args.port, args.bucket)
    serve_mlflow(folder, args.host, args.port, args.backend, args.artifacts, args.allowed_hosts)
