"""`python -m gpu`: runs the parts in order of importance and writes the results after each."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from gpu import fast, right, streaming
from gpu.kit import Part, Settings, free_memory, write_results

PARTS = {
    "gradients": right.gradients,
    "speed": fast.speed,
    "ranks": right.ranks,
    "exported": right.exported,
    "checkpoints": right.checkpoints,
    "memory": right.memory,
    "attention": right.attention,
    "scores": right.scores,
    "split": streaming.split,
    "stream": streaming.stream,
    "batch_sizes": fast.batch_sizes,
    "determinism": right.determinism,
    "minute": streaming.minute,
    "compiled": fast.compiled,
}
SECONDS = 300.0  # of all parts
SPEED_SECONDS = 110.0  # of the speed table at most


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu", description=__doc__, epilog="example: python -m gpu --only gradients speed"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results ($OUT, or gpu-results)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts (%(default)s)")
    parser.add_argument("--vgg16", type=Path, help="weights file; without it random weights")
    parser.add_argument("--vgg19", type=Path, help="weights file; without it random weights")
    parser.add_argument("--toy", action="store_true", help="the smallest models, to test this programme")
    args = parser.parse_args(arguments)
    out = args.out or Path(os.environ.get("OUT") or "gpu-results")
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: path for name in ("vgg16", "vgg19") if (path := getattr(args, name))}
    settings = Settings(torch.device(args.device), out, args.toy, weights)
    if not settings.on_gpu and not args.toy:
        print("no GPU: torch.cuda.is_available() is false; --toy tests the programme itself on the CPU")
        return 2
    parts: dict[str, Part] = {}
    end = time.monotonic() + args.seconds
    for name in args.only or PARTS:
        start = time.monotonic()
        settings.deadline = min(end, start + SPEED_SECONDS) if name == "speed" else end
        if start > end:
            parts[name] = Part(notes=["out of time: not run"])
            continue
        print(f"{name} ... ({end - start:.0f} s left)", flush=True)
        try:
            parts[name] = PARTS[name](settings)
        except Exception as error:  # the other parts are still worth their minutes
            traceback.print_exc()
            parts[name] = Part(failures=[f"{type(error).__name__}: {str(error).splitlines()[0]}"])
        parts[name].seconds = time.monotonic() - start
        free_memory(settings.device)
        write_results(settings, parts)
        failures = parts[name].failures
        print(f"{name}: {'failed' if failures else 'passed'} in {parts[name].seconds:.1f} s", flush=True)
        for failure in failures:
            print(f"  {failure}")
    write_results(settings, parts)
    print(f"results: {out / 'gpu.md'}, {out / 'gpu.json'}")
    return 1 if any(part.failures for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
