"""How long the commands take that a person waits for, as a Markdown table: wall time and CPU time, the best of several
rounds in which all commands alternate.

python tests/benchmarks/command_latency.py            a small demo is run first, and 500 versions are registered
python tests/benchmarks/command_latency.py --rounds 9 --versions 50
"""

from __future__ import annotations

import argparse
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

INPAINT = (sys.executable, "-m", "pipelines")
MLFLOW_SEARCH = """
import mlflow
from mlflow import MlflowClient
client = MlflowClient({uri!r}, registry_uri={uri!r})
versions = client.search_model_versions()
assert len(versions) >= {count}, len(versions)
"""
"""The yardstick: importing MLflow, and one search by its client for all versions."""
LOOKUPS = ("models list", "models show facades", "models show facades@champion", "models history facades")
BEST = "models best facades --metric psnr --masks center --band 20-30"
RATIO_LIMIT = 1.3  # of a look-up to the yardstick, in CPU time and in wall time
YARDSTICK = "importing MLflow and one search"


@dataclass(frozen=True)
class Latency:
    """Seconds of a command, with Python's start: the best of all rounds."""

    wall: float
    cpu: float

    def best(self, other: Latency | None) -> Latency:
        return self if other is None else Latency(min(self.wall, other.wall), min(self.cpu, other.cpu))


def run_once(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Latency:
    """Run a command. AssertionError with its output: it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return Latency(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(
    commands: Mapping[str, Sequence[str]], folder: Path, environment: Mapping[str, str], rounds: int
) -> dict[str, Latency]:
    """The best of `rounds` rounds, after one that is not counted; in a round each command runs once."""
    best: dict[str, Latency] = {}
    for round_number in range(-1, rounds):
        for name, command in commands.items():
            latency = run_once(command, folder, environment)
            if round_number >= 0:
                best[name] = latency.best(best.get(name))
    return best


def lookup_commands(uri: str, versions: int) -> dict[str, Sequence[str]]:
    """The yardstick and the look-ups in a registry that registry_versions.create_versions has filled."""
    commands: dict[str, Sequence[str]] = {
        YARDSTICK: (sys.executable, "-c", MLFLOW_SEARCH.format(uri=uri, count=versions))
    }
    return commands | {
        f"inpaint {command}": (*INPAINT, *command.split(), "--tracking-uri", uri)
        for command in (*LOOKUPS, BEST)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--versions", type=int, default=500, help="in the registry (%(default)s)")
    args = parser.parse_args()
    from registry_versions import champion, create_versions

    from support.cluster_harness import DEMO, clean_environment

    demo = tuple("data.source=bundled" if word == "data.source=photos" else word for word in DEMO)
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="inpaint-latency-") as name:
        folder = Path(name)
        print("running a small demo ...", file=sys.stderr, flush=True)
        first = run_once((*INPAINT, "run", *demo), folder, environment)
        print(f"registering {args.versions} versions ...", file=sys.stderr, flush=True)
        uri = f"sqlite:///{folder}/registry.db"
        (folder / "registry").mkdir()
        create_versions(uri, args.versions)
        champion(uri, (folder / "registry").as_uri())
        plain = {
            f"inpaint {command}": (*INPAINT, *command.split())
            for command in ("--help", "--version", "recipes")
        }
        on_run = {
            f"inpaint {command}": (*INPAINT, *command.split()[:1], *demo)
            for command in ("plan demo", "status demo")
        }
        commands = {**plain, **on_run, "inpaint run demo, all steps cached": (*INPAINT, "run", *demo)}
        commands |= lookup_commands(uri, args.versions)
        print(f"measuring {len(commands)} commands, {args.rounds} rounds ...", file=sys.stderr, flush=True)
        latencies = measure(commands, folder, environment, args.rounds)
    print(f"The first run of the small demo: {first.wall:.0f} s\n")
    print("| command | seconds | CPU seconds |\n|:--|--:|--:|")
    for command, latency in latencies.items():
        print(
            f"| {command if command == YARDSTICK else f'`{command}`'} | {latency.wall:.2f} | {latency.cpu:.2f} |"
        )


if __name__ == "__main__":
    main()
