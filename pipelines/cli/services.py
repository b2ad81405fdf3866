"""The command `inpaint services`: the MLflow and S3 servers that a cluster needs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli.arguments import AddCommand, port_number

if TYPE_CHECKING:
    from pipelines.cluster.service_process import ServerCommand, ServiceRecord

SERVICES = ("mlflow", "s3")
TITLES = {"mlflow": "MLflow", "s3": "S3, bucket s3://inpaint,"}
SECRETS = {"mlflow": "address and password", "s3": "address and keys"}


def add_services(add: AddCommand) -> None:
    services = add(
        "services",
        "run, list and stop the MLflow and S3 servers that a cluster needs",
        "services mlflow --detach",
    )
    services.set_defaults(run="pipelines.cli.services:services_command")
    actions = services.add_subparsers(dest="action", metavar="ACTION", required=True)

    def server(name: str, text: str, port: int) -> argparse.ArgumentParser:
        command = add(name, text, f"services {name} --folder {name} --detach", actions)
        command.add_argument(
            "--folder", metavar="DIR", default=name, help="folder for all its data (%(default)s)"
        )
        command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
        command.add_argument("--port", type=port_number, default=port, help="(%(default)s)")
        command.add_argument(
            "--from-environment",
            action="store_true",
            help="read the secrets from environment variables (for containers)",
        )
        command.add_argument(
            "--detach",
            action="store_true",
            help=f"return when it answers; it continues without this terminal, with its output in DIR/{name}.log",
        )
        return command

    mlflow = server("mlflow", "run an MLflow server with user accounts, until Ctrl-C or with --detach", 5000)
    mlflow.description = (
        (mlflow.description or "")
        + """ It also serves the artifacts.
The administrator's password is generated and stored, with the URI, in DIR/mlflow.env (mode 600): source that file.
To choose it, write MLFLOW_TRACKING_PASSWORD='...' into that file before the first start;
the environment variable is only read with --from-environment."""
    )
    mlflow.add_argument(
        "--backend-store-uri", metavar="URI", help="database (default: an SQLite file in the folder)"
    )
    mlflow.add_argument(
        "--artifacts-destination",
        metavar="URI",
        help="where to store artifacts, such as s3://bucket/prefix (default: the folder)",
    )
    mlflow.add_argument(
        "--allowed-hosts", metavar="HOST:PORT,...", help="host names to accept (default: MLflow's)"
    )
    s3 = server("s3", "run an S3 server on a folder (JuiceFS gateway), until Ctrl-C or with --detach", 9000)
    s3.description = (
        (s3.description or "")
        + """ The bucket is s3://inpaint.
Its keys are generated and stored, with the URL, in DIR/s3.env (mode 600): source that file.
To choose them, write AWS_ACCESS_KEY_ID='...' and AWS_SECRET_ACCESS_KEY='...' into that file before a start;
the environment variables are only read with --from-environment."""
    )

    def selection(name: str, text: str, example: str) -> None:
        command = add(name, text, f"services {example}", actions)
        command.add_argument("service", nargs="?", choices=SERVICES, help="only this service")
        command.add_argument(
            "--folder", metavar="DIR", help="only servers of this folder (default: all detached servers)"
        )

    selection("status", "show which servers run; exit status 0 if all do", "status")
    selection("stop", "stop detached servers, and no other processes", "stop s3 --folder services")


def services_command(args: argparse.Namespace) -> int:
    """Run a server, `status` or `stop`. A server in the foreground replaces this process."""
    if args.action == "status":
        return _status(args)
    return _stop(args) if args.action == "stop" else _serve(args)


def _serve(args: argparse.Namespace) -> int:
    from pipelines.cluster import service_process

    folder = Path(args.folder).resolve()
    with service_process.locked(folder, args.action) as lock:
        server = _prepare(args, folder)
        secrets = f"{SECRETS[args.action]} are in {folder}/{args.action}.env: source it"
        if not args.detach:
            print(f"{TITLES[args.action]} at {server.uri}; {secrets}. Ctrl-C ends it.", flush=True)
            service_process.exec_server(server, lock)
        record = service_process.start_detached(server, lock)
    print(f"{TITLES[args.action]} runs at {record.uri} (process {record.pid}); {secrets}")
    print(f"log: {record.log}\nstop it: inpaint services stop {args.action} --folder {args.folder}")
    return 0


def _prepare(args: argparse.Namespace, folder: Path) -> ServerCommand:
    from pipelines.cluster import services

    if args.action == "s3":
        return services.prepare_s3(folder, args.port, args.host, args.from_environment)
    return services.prepare_mlflow(
        folder,
        args.port,
        args.backend_store_uri,
        args.artifacts_destination,
        args.host,
        args.allowed_hosts,
        args.from_environment,
    )


def _records(args: argparse.Namespace) -> list[ServiceRecord]:
    from pipelines.cluster.service_process import list_records

    records = list_records(Path(args.folder).resolve() if args.folder else None)
    return [record for record in records if args.service in (None, record.service)]


def _status(args: argparse.Namespace) -> int:
    from pipelines.cli.text import format_table

    records = _records(args)
    if not records:
        print(f"no {_described(args)} was started; inpaint services s3 --detach starts one")
        return 1
    rows = [
        {
            "service": record.service,
            "state": "running" if record.is_running else "ended",
            "address": record.uri,
            "process": str(record.pid),
            "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(record.started_at)),
            "log": record.log or f"none: in the foreground, on {record.folder}",
        }
        for record in records
    ]
    print("\n".join(format_table(rows)))
    return 0 if all(record.is_running for record in records) else 1


def _stop(args: argparse.Namespace) -> int:
    from pipelines.cluster import service_process

    records = _records(args)
    for record in records:
        if not record.log:
            if record.is_running:
                raise service_process.ServiceError(
                    f"the {record.service} server of {record.folder} runs in the foreground (process {record.pid}): "
                    "end it with Ctrl-C in its terminal"
                )
            continue
        count = service_process.stop(record)
        ended = f"{count} process{'' if count == 1 else 'es'}"
        state = f"is stopped: {ended}" if count else "had ended already"
        print(f"the {record.service} server of {record.folder} {state}")
    if not records:
        print(f"no {_described(args)} runs")
    return 0


def _described(args: argparse.Namespace) -> str:
    service = f"{args.service} server" if args.service else "server"
    return f"{service} of {args.folder}" if args.folder else f"detached {service}"
