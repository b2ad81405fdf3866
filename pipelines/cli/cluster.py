"""The commands `inpaint submit` and `cluster`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from data_prep.uris import is_s3_uri
from pipelines.cli.arguments import RECIPE_HELP, AddCommand, positive_int, recipe_name

DEFAULT_NODES = 3


def add_cluster_commands(add: AddCommand) -> None:
    """Add submit and cluster."""
    _add_submit(add)
    _add_cluster(add)


def _add_submit(add: AddCommand) -> None:
    submit = add(
        "submit",
        "run a recipe as a Ray job and follow its logs; Ctrl-C detaches",
        "submit deepfill_v2 --address http://head:8265 --storage s3://bucket/runs --tracking-uri https://mlflow:5000 \\\n"
        "  --set data.source=s3://bucket/photographs --set scaling.gpus_per_worker=1",
    )
    submit.set_defaults(run="pipelines.cli.cluster:submit_command")
    submit.description = """Run a recipe as a job of a Ray cluster and follow its logs. Ctrl-C detaches; the job continues.

Only the recipe and this package's source are uploaded: never data, credentials or your environment.
The cluster must have its own credentials for S3 and MLflow. The token is read where Ray reads it:
RAY_AUTH_TOKEN, the file in RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    submit.add_argument("recipe", metavar="RECIPE", nargs="?", type=recipe_name, help=RECIPE_HELP)
    submit.add_argument(
        "--address",
        metavar="URL",
        help="URL of the head's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)",
    )
    submit.add_argument(
        "--set", metavar="KEY.SUB=VALUE", action="append", default=[], help="override a field; repeatable"
    )
    submit.add_argument("--storage", help="s3://bucket/prefix or a folder that all nodes share")
    submit.add_argument("--tracking-uri", help="MLflow tracking URI")
    submit.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="follow the job until it ends and exit with its status",
    )
    submit.add_argument("--attach", metavar="ID", help="follow a job that is already submitted")


def _add_cluster(add: AddCommand) -> None:
    cluster = add("cluster", "run a local multi-node Ray cluster, or drain this node", "cluster up --nodes 3")
    cluster.set_defaults(run="pipelines.cli.cluster:cluster_command")
    actions = cluster.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, example: str) -> argparse.ArgumentParser:
        command = add(name, text, f"cluster {example}", actions)
        command.add_argument("--name", default="local", help="(%(default)s)")
        return command

    up = action(
        "up",
        "start a cluster on loopback, protected by a token, with dashboard and Jobs API",
        "up --nodes 3",
    )
    up.description = (up.description or "") + (
        " Its jobs get\nthis command's environment: set the AWS and MLflow variables first."
    )
    up.add_argument(
        "--nodes",
        type=positive_int,
        help=f"({DEFAULT_NODES}); a cluster that is up gets more nodes, not fewer",
    )
    up.add_argument("--cpus-per-node", type=positive_int, default=1, help="(%(default)s)")
    action("down", "stop the processes that `up` started, and no others", "down")
    action("status", "show which nodes are alive; exit status 0 if all are", "status")
    leave = add(
        "leave",
        "drain this node: tell the cluster that it will shut down soon",
        "cluster leave --seconds 90",
        actions,
    )
    leave.description = (leave.description or "") + (
        " Works with any\nRay cluster; for machines that know their shutdown in advance, such as spot instances. "
        "Training writes\na checkpoint first."
    )
    leave.add_argument("--seconds", type=positive_int, default=90, help="until the shutdown (%(default)s)")
    leave.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of the head, not of the dashboard (default: RAY_ADDRESS or the local node's head)",
    )
    leave.add_argument(
        "--wait", action="store_true", help="return when no work is left on this node, or after --seconds"
    )


def submit_command(args: argparse.Namespace) -> int:
    from pipelines.cluster import jobs

    address = (args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "").rstrip("/")
    if not address:
        raise ValueError("--address is missing: give the head's dashboard, for example http://head:8265")
    if (args.recipe is None) == (args.attach is None):
        raise ValueError("give a RECIPE to submit, or --attach ID to follow a job")
    job_id, message = args.attach, ""
    if job_id is None:
        job_id, status_command = _submit_job(args, address)
        message = f"job {job_id} is submitted to {address}\nits status, from any machine: {status_command}"
    if not args.wait:
        print(f"{message}\nfollow its logs: {jobs.attach_command(job_id, address)}".strip())
        return 0
    with jobs.catch_interrupt() as interrupt:
        if message:
            print(message, flush=True)
        try:
            jobs.follow_logs(job_id, address, interrupt)
        except KeyboardInterrupt:
            print(
                f"\ndetached; the job continues. Follow it again: {jobs.attach_command(job_id, address)}\n"
                f"or stop it: ray job stop {job_id} --address {address}",
                file=sys.stderr,
            )
            return 130
    return 0


def _submit_job(args: argparse.Namespace, address: str) -> tuple[str, str]:
    """The id of the new job, and the command that shows the status of its run."""
    from pipelines.cluster import jobs
    from pipelines.recipe.load import recipe_from_args

    recipe = recipe_from_args(args)
    client = jobs.connect(
        address
    )  # a head that is down is the error, not a path that its cluster would not have
    recipe, notes = jobs.make_portable(recipe, address)
    if recipe.tracking_uri is None and is_s3_uri(recipe.storage):
        notes.append("no tracking URI is given: the job uses the cluster's MLFLOW_TRACKING_URI")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    status_command = shlex.join(["inpaint", "status", recipe.name, "--storage", recipe.storage])
    return jobs.submit(recipe, client), status_command


def cluster_command(args: argparse.Namespace) -> int:
    """Run `up`, `down` or `status` of a local cluster, or `leave` of any cluster."""
    return {"up": _up, "down": _down, "status": _status, "leave": _leave}[args.action](args)


def _up(args: argparse.Namespace) -> int:
    from pipelines.cli.progress import ProgressDisplay
    from pipelines.cluster import local_cluster

    name = _name_option(args)
    with local_cluster.locked(args.name), ProgressDisplay() as display:

        def progress(ready: int, total: int) -> None:
            display("cluster", "running", ready, total, "nodes")

        cluster = local_cluster.load(args.name)
        if cluster is not None and cluster.is_running:
            started = local_cluster.repair(cluster, args.nodes, progress)
            changes = f", {started} of them started now" if started else ""
            print(f"cluster {cluster.name} is up already, with {cluster.target_nodes} nodes{changes}")
            if args.nodes and args.nodes < cluster.target_nodes:
                print(f"note: for fewer nodes, end it first: inpaint cluster down{name}", file=sys.stderr)
        else:
            if cluster is not None:
                local_cluster.stop(cluster)  # its head has died
            nodes = args.nodes or DEFAULT_NODES
            progress(0, nodes)
            cluster = local_cluster.start(args.name, nodes, args.cpus_per_node, progress)
            display("cluster", "finished", note=f"{nodes} nodes of {args.cpus_per_node} CPUs")
    print(
        f"dashboard and Jobs API: {cluster.jobs_url}\ntoken: {cluster.token_file} (readable only by you)\nnext:"
    )
    print(f"  inpaint submit demo --address {cluster.jobs_url}")
    print("or, for plain Ray:")
    for key, value in (
        *local_cluster.cluster_env_vars(cluster).items(),
        ("RAY_API_SERVER_ADDRESS", cluster.jobs_url),
    ):
        print(f"  export {key}={value}")
    print("  ray job submit --working-dir . -- inpaint run demo --storage /tmp/runs")
    print(f"or run on it from this machine: RAY_ADDRESS={cluster.address} inpaint run demo")
    print(f"stop it: inpaint cluster down{name}")
    return 0


def _name_option(args: argparse.Namespace) -> str:
    """The option that names the cluster in another command; '' for the default name."""
    return "" if args.name == "local" else f" --name {args.name}"


def _down(args: argparse.Namespace) -> int:
    from pipelines.cluster import local_cluster

    with local_cluster.locked(args.name):
        cluster = local_cluster.load(args.name)
        if cluster is None:
            print(f"cluster {args.name} is not up")
            return 0
        ended = local_cluster.stop(cluster)
    print(f"cluster {args.name} is down: {ended} processes stopped")
    return 0


def _status(args: argparse.Namespace) -> int:
    from pipelines.cli.text import format_table
    from pipelines.cluster import local_cluster

    cluster = local_cluster.load(args.name)
    if cluster is None:
        print(f"cluster {args.name} is not up; inpaint cluster up starts it")
        return 1
    states = cluster.node_states()
    rows = [
        {
            "node": state.node.name,
            "state": state.state,
            "process": str(state.node.pid),
            "CPUs": f"{state.cpus:g}",
        }
        for state in states
    ]
    print("\n".join(format_table(rows)))
    alive = sum(state.state == "alive" for state in states)
    cpus = sum(state.cpus for state in states)
    what = "the others" if cluster.is_running else "the cluster, whose head has died,"
    up = f"inpaint cluster up{_name_option(args)}"
    remedy = "" if alive == cluster.target_nodes else f"; {up} starts {what} again"
    print(f"{alive} of {cluster.target_nodes} nodes are alive, with {cpus:g} CPUs{remedy}")
    print(f"dashboard and Jobs API: {cluster.jobs_url}; token: {cluster.token_file}")
    return 0 if alive == cluster.target_nodes else 1


def _leave(args: argparse.Namespace) -> int:
    from pipelines.cluster.drain import drain_local_nodes

    drained = drain_local_nodes(args.seconds, args.address, args.wait)
    print(f"announced: {drained} node(s) on this machine will shut down within {args.seconds} s")
    return 0
