"""`python -m bfloat16`: scan bfloat16 convolutions on this CPU, each in a process that a crash may end.

example: python -m bfloat16 --minutes 5 --isa avx512_bf16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from bfloat16.cases import MAX_ERROR, OUTPUTS, Case, model_cases, random_cases
from pipelines.recipe.load import load_recipe, shipped_recipes

ISAS = {"amx": "AVX512_CORE_AMX", "avx512_bf16": "AVX512_CORE_BF16", "avx512": "AVX512_CORE"}
ROOT = Path(__file__).parents[2]
READY = "ready\n"
MALLOC_CHECKER = "libc_malloc_debug.so.0"  # glibc's: aborts when a block was written past its end


class Worker:
    """A process that computes the errors of cases, started again after a crash. A context manager: ends the process."""

    def __init__(self, isa: str | None) -> None:
        checked = {"LD_PRELOAD": MALLOC_CHECKER, "MALLOC_CHECK_": "3"}
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.environment = {**os.environ, **checked, "PYTHONPATH": path}
        if isa:
            self.environment["ONEDNN_MAX_CPU_ISA"] = ISAS[isa]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bfloat16", "--worker"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )
        assert process.stdout
        if process.stdout.readline() != READY:
            raise RuntimeError(f"{' '.join(command)} did not start: it ended with {process.wait()}")
        return process

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def fault(self, case: Case) -> str | None:
        """What is wrong with a case; None: nothing."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asdict(case)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.process = self._start()
            return f"the process ended with {code}"
        errors, repeatable = json.loads(line)
        wrong = [f"{name} {error:.2g}" for name, error in zip(OUTPUTS, errors) if not error <= MAX_ERROR]
        return ", ".join(wrong) or (None if repeatable else "other bits each time")


def serve() -> None:
    """The worker's side: cases as JSON lines -> errors as JSON lines."""
    print(READY, end="", flush=True)
    torch.use_deterministic_algorithms(True)  # fills unwritten memory with NaN where torch allocates it
    for line in sys.stdin:
        print(json.dumps(Case(**json.loads(line)).errors()), flush=True)


def timed(cases: Iterable[Case], seconds: float) -> Iterator[Case]:
    end = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end:
            return
        yield case


def all_model_cases() -> list[Case]:
    """The proven convolutions of the recipes' models at the recipe's size; of small ones also at 96 and 128 px."""
    cases: dict[Case, None] = {}
    for name in shipped_recipes():
        sizes: tuple[int | None, ...] = (None,)
        if name.endswith("-small"):
            needs_power_of_two = "size" in next(iter(load_recipe(name).models.values())).options
            sizes = (None, 128) if needs_power_of_two else (None, 96, 128)
        for size in sizes:
            cases |= dict.fromkeys(model_cases(name, size))
    return list(cases)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bfloat16", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--minutes", type=float, default=5, help="of random cases, half of them outside the proven set (5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random cases (0)")
    parser.add_argument(
        "--isa", choices=ISAS, help="limit oneDNN to these instructions (all that the CPU has)"
    )
    parser.add_argument("--models", action="store_true", help="first scan the convolutions of all models")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve()
        return 0
    with Worker(arguments.isa) as worker:
        failures = scan(worker, arguments.minutes, arguments.seed, arguments.models)
    print(f"torch {torch.__version__}: {failures} faults inside the proven set")
    return 1 if failures else 0


def scan(worker: Worker, minutes: float, seed: int, models: bool) -> int:
    """Print what is wrong; returns the number of faults inside the proven set."""
    failures, half = 0, 30 * minutes
    groups: dict[str, Iterable[Case]] = {
        "convolutions of the models": all_model_cases() if models else (),
        "random, inside the proven set": timed(random_cases(seed, proven=True), half),
        "random, outside it": timed(random_cases(seed, proven=False), half),
    }
    for title, cases in groups.items():
        counts: Counter[bool] = Counter()
        for case in cases:
            fault = worker.fault(case)
            counts[fault is None] += 1
            if fault:
                print(f"  {case.describe()}: {fault}", flush=True)
                failures += case.is_proven()
        if counts:
            print(f"{title}: {counts.total()} cases, {counts[False]} wrong", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
