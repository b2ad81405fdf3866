"""`inpaint submit`, `cluster` and `services`: the arguments, and what is done with them."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

RECIPE = "name of a shipped recipe, or a YAML file"


def add_services(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parsers; add(name, text, example, to) makes one command, with --debug."""
    _add_submit(add)
    _add_cluster(add)
    _add_servers(add)


def _add_submit(add: Callable[..., argparse.ArgumentParser]) -> None:
    submit = add(
        "submit",
        "run a recipe as a job of a Ray cluster, and follow it; Ctrl-C detaches",
        "submit deepfill_v2 --address http://head:8265 --storage s3://bucket/runs --tracking https://mlflow:5000 \\\n"
        "  --set data.source=s3://bucket/photographs --set scaling.gpus_per_worker=1",
    )
    submit.description = """Run a recipe as a job of a Ray cluster, and follow it. Ctrl-C detaches; the job goes on.

What travels is the recipe and this package's source: never data, credentials or your environment.
The credentials of S3 and MLflow belong to the cluster. The token is looked for where Ray does:
RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token."""
    submit.add_argument("recipe", metavar="RECIPE", nargs="?", help=RECIPE)
    submit.add_argument(
        "--address",
        metavar="URL",
        help="the head's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)",
    )
    submit.add_argument(
        "--set", metavar="KEY.SUB=VALUE", action="append", default=[], help="override a field; repeatable"
    )
    submit.add_argument("--storage", help="s3://bucket/prefix, or a folder that all nodes share")
    submit.add_argument("--tracking", help="MLflow's address")
    submit.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="follow the job to its end; the exit status is the job's",
    )
    submit.add_argument("--attach", metavar="ID", help="follow a job that was submitted before")


def _add_cluster(add: Callable[..., argparse.ArgumentParser]) -> None:
    cluster = add(
        "cluster", "a Ray cluster of several nodes on this machine, and leaving one", "cluster up --nodes 3"
    )
    actions = cluster.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, example: str) -> argparse.ArgumentParser:
        command = add(name, text, f"cluster {example}", actions)
        command.add_argument("--name", default="local", help="(%(default)s)")
        return command

    up = action(
        "up",
        "start a cluster on loopback, behind a token, with dashboard and Jobs API",
        "up --nodes 3",
    )
    up.description = (up.description or "") + (
        " Its jobs have\nthe environment of this command: set the AWS and MLflow variables before."
    )
    up.add_argument("--nodes", type=_positive, default=3, help="(%(default)s)")
    up.add_argument("--cpus-per-node", type=_positive, default=1, help="(%(default)s)")
    action("down", "end what `up` started, and nothing else", "down")
    action("status", "which nodes are alive; exit status 0 when all are", "status")
    leave = add(
        "leave",
        "say to a cluster that this machine, one of its nodes, is about to end",
        "cluster leave --seconds 90",
        actions,
    )
    leave.description = (leave.description or "") + (
        " For any Ray cluster, from where a\nmachine's end is known beforehand: spot machines, pods that are moved. "
        "Trainings leave a checkpoint."
    )
    leave.add_argument("--seconds", type=_positive, default=90, help="until it ends (%(default)s)")
    leave.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the head's, not the dashboard's (default: RAY_ADDRESS, or the node's own)",
    )
    leave.add_argument(
        "--wait", action="store_true", help="return when nothing runs here any more, or the seconds are over"
    )


def _add_servers(add: Callable[..., argparse.ArgumentParser]) -> None:
    services = add("services", "the servers that a cluster needs beside it", "services mlflow")
    actions = services.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, port: int) -> argparse.ArgumentParser:
        command = add(name, text, f"services {name} --folder {name}", actions)
        command.add_argument("--folder", metavar="DIR", default=name, help="where it keeps all (%(default)s)")
        command.add_argument("--host", default="127.0.0.1", help="the address it listens at (%(default)s)")
        command.add_argument("--port", type=_positive, default=port, help="(%(default)s)")
        command.add_argument(
            "--from-environment",
            action="store_true",
            help="take its secrets from the environment, where it has one of its own: in a container",
        )
        return command

    mlflow = action(
        "mlflow",
        "run an MLflow server with users, until Ctrl-C",
        5000,
    )
    mlflow.description = (
        (mlflow.description or "")
        + """ Artifacts go through it.
The administrator's password is generated and kept, with the address, in DIR/mlflow.env (mode 600): source it.
To choose it, write MLFLOW_TRACKING_PASSWORD='...' into that file before the first start;
the environment's is not taken unless that is asked for."""
    )
    mlflow.add_argument(
        "--backend-store-uri", metavar="URI", help="its database (default: an SQLite file in the folder)"
    )
    mlflow.add_argument(
        "--artifacts",
        metavar="URI",
        help="where it keeps artifacts, as s3://bucket/prefix (default: the folder)",
    )
    mlflow.add_argument(
        "--allowed-hosts", metavar="HOST:PORT,...", help="names it may be reached by (default: MLflow's)"
    )
    s3 = action("s3", "run an S3 server on a folder, until Ctrl-C: JuiceFS's gateway", 9000)
    s3.description = (
        (s3.description or "")
        + """ The bucket is s3://inpaint.
Its keys are generated and kept, with the address, in DIR/s3.env (mode 600): source it.
To choose them, write AWS_ACCESS_KEY_ID='...' and AWS_SECRET_ACCESS_KEY='...' into that file before a start;
the environment's are not taken unless that is asked for."""
    )


def submit(args: argparse.Namespace) -> int:
    from pipelines.cluster import submitting

    address = (args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "").rstrip("/")
    if not address:
        raise ValueError("--address is missing: give the head's dashboard, for example http://head:8265")
    if (args.recipe is None) == (args.attach is None):
        raise ValueError("give a RECIPE to submit, or --attach ID to follow a job")
    job, told = args.attach, ""
    if job is None:
        job, look = _submit(args, address)
        told = f"job {job} is submitted to {address}\nhow far it is, from anywhere: {look}"
    if not args.wait:
        print(f"{told}\nfollow it: {submitting.reattach(job, address)}".strip())
        return 0
    with submitting.noted_interrupt() as left:
        if told:
            print(told, flush=True)
        try:
            submitting.follow(job, address, left)
        except KeyboardInterrupt:
            print(
                f"\ndetached; the job goes on. Follow it again: {submitting.reattach(job, address)}\n"
                f"or end it: ray job stop {job} --address {address}",
                file=sys.stderr,
            )
            return 130
    return 0


def _submit(args: argparse.Namespace, address: str) -> tuple[str, str]:
    """The id of the new job, and the command that looks at its run."""
    from pipelines.cluster import submitting
    from pipelines.reading import recipe_of

    recipe, notes = submitting.portable(recipe_of(args), address)
    if recipe.tracking is None and "://" in recipe.storage and not recipe.storage.startswith("file:"):
        notes.append("no tracking is given: the job takes the cluster's MLFLOW_TRACKING_URI")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    look = shlex.join(["inpaint", "status", recipe.name, "--storage", recipe.storage])
    return submitting.submit(recipe, address), look


def cluster(args: argparse.Namespace) -> int:
    """`up`, `down` and `status` of a local cluster, and `leave` of any."""
    return {"up": _up, "down": _down, "status": _status, "leave": _leave}[args.action](args)


def _up(args: argparse.Namespace) -> int:
    from pipelines.cli.progress import Show
    from pipelines.cluster import local_cluster

    with local_cluster.hold(args.name):
        found = local_cluster.find(args.name)
        if found is not None and found.up:
            missing = found.wanted - sum(node.alive for node in found.nodes)
            if missing:
                local_cluster.replenish(found)
            again = f", {missing} of them started again" if missing else ""
            print(f"cluster {found.name} is up already, with {found.wanted} nodes{again}")
        else:
            if found is not None:
                local_cluster.end(found)  # its head died
            with Show() as show:
                show("cluster", "running", 0, args.nodes, "nodes")
                found = local_cluster.start(
                    args.name,
                    args.nodes,
                    args.cpus_per_node,
                    lambda n, of: show("cluster", "running", n, of, "nodes"),
                )
                show("cluster", "finished", note=f"{args.nodes} nodes of {args.cpus_per_node} CPUs")
    print(f"dashboard and Jobs API: {found.jobs}\ntoken: {found.token} (readable by you alone)\nnext:")
    print(f"  inpaint submit demo --address {found.jobs}")
    print("or, for plain Ray:")
    for key, value in (*local_cluster.environment(found).items(), ("RAY_API_SERVER_ADDRESS", found.jobs)):
        print(f"  export {key}={value}")
    print("  ray job submit --working-dir . -- inpaint run demo --storage /tmp/runs")
    print(f"or join it from here: RAY_ADDRESS={found.address} inpaint run demo")
    name = "" if args.name == "local" else f" --name {args.name}"
    print(f"end it: inpaint cluster down{name}")
    return 0


def _down(args: argparse.Namespace) -> int:
    from pipelines.cluster import local_cluster

    with local_cluster.hold(args.name):
        found = local_cluster.find(args.name)
        if found is None:
            print(f"cluster {args.name} is not up")
            return 0
        count = local_cluster.end(found)
    print(f"cluster {args.name} is down: {count} processes ended")
    return 0


def _status(args: argparse.Namespace) -> int:
    from pipelines.cli.model_text import table
    from pipelines.cluster import local_cluster

    found = local_cluster.find(args.name)
    if found is None:
        print(f"cluster {args.name} is not up; inpaint cluster up starts it")
        return 1
    rows = [
        {"node": node.name, "state": "alive" if node.alive else "dead", "process": str(node.pid)}
        for node in found.nodes
    ]
    print("\n".join(table(rows)))
    counted = found.counted() if found.up else 0
    print(
        f"{counted} of {found.wanted} nodes are counted by the head at {found.jobs}, token in {found.token}"
    )
    return 0 if counted == found.wanted and all(node.alive for node in found.nodes) else 1


def _leave(args: argparse.Namespace) -> int:
    from pipelines.cluster.leaving import leave

    count = leave(args.seconds, args.address, args.wait)
    print(
        f"{count} {'node' if count == 1 else 'nodes'} of this machine will end within {args.seconds} s: announced"
    )
    return 0


def services(args: argparse.Namespace) -> int:
    """Becomes the server: does not return."""
    from pipelines.cluster import services as servers

    folder = Path(args.folder).resolve()
    if args.action == "mlflow":
        servers.mlflow(
            folder,
            args.port,
            args.backend_store_uri,
            args.artifacts,
            args.host,
            args.allowed_hosts,
            args.from_environment,
        )
    else:
        servers.s3(folder, args.port, args.host, args.from_environment)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
