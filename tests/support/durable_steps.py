"""Minimal steps for tests; in a module of their own, so that Ray's workers can import them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from data_prep.records import to_json
from pipelines.durable.steps import NoInputs, NoOutputs, Step, StepContext, StepId

DEADLINE_SECONDS = 120.0


@dataclass(frozen=True)
class Number:
    n: int


@dataclass(frozen=True)
class NoConfig:
    pass


@dataclass(frozen=True)
class MarkerOutputs:
    mark: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeetConfig:
    own_file: str
    other_file: str


@dataclass(frozen=True)
class FailConfig:
    mode: str


@dataclass(frozen=True)
class PathConfig:
    path: str


@dataclass(frozen=True)
class OwnerSettings:
    owner: str = ""


@dataclass(frozen=True)
class SumOutputs:
    files: tuple[str, ...]
    folder: str
    sum: int


@dataclass(frozen=True)
class SumInputs:
    summands: tuple[SumOutputs, ...] = ()


@dataclass(frozen=True)
class TimeOutputs:
    seconds: float
    files: tuple[str, ...] = ()


Context = StepContext[Any, Any, Any]


def add_step(name: str, n: int, *needs: str, **options: Any) -> Step:
    """A step that adds a number to the sums of the steps `needs`."""
    ids = tuple(StepId(need) for need in needs)
    return Step(
        StepId(name),
        "support.durable_steps:write",
        Number(n),
        {"summands": ids} if ids else {},
        SumInputs,
        SumOutputs,
        **options,
    )


def make_step(function: str, config: Any, name: str = "s", outputs: type = NoOutputs, **options: Any) -> Step:
    """A step that runs a function of this module."""
    return Step(StepId(name), f"support.durable_steps:{function}", config, outputs_type=outputs, **options)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def write(ctx: StepContext[Number, SumInputs, Any]) -> SumOutputs:
    text = json.dumps([ctx.name, to_json(ctx.config), to_json(ctx.inputs), ctx.settings], sort_keys=True)
    file = f"{ctx.attempt_folder}/out.json"
    ctx.storage.write(file, text.encode())
    return SumOutputs((file,), ctx.attempt_folder, ctx.config.n + sum(s.sum for s in ctx.inputs.summands))


def meet(ctx: StepContext[MeetConfig, NoInputs, Any]) -> NoOutputs:
    Path(ctx.config.own_file).touch()
    wait_for(Path(ctx.config.other_file))
    return NoOutputs()


@ray.remote(num_cpus=1)
def raise_value_error(text: str) -> None:
    raise ValueError(text)


def fail(ctx: StepContext[FailConfig, SumInputs, Any]) -> Any:
    match ctx.config.mode:
        case "nested":
            ray.get(raise_value_error.remote("photos/x y.png: no photograph\nand more"))
        case "plain":
            raise FloatingPointError("the loss is nan")
        case "type":
            return SumOutputs((), "", "7")  # type: ignore[arg-type]
        case "other":
            return TimeOutputs(1.0)
        case "ghost":
            return SumOutputs((f"{ctx.attempt_folder}/ghost.bin",), "", 1)
        case "foreign":
            return SumOutputs((), ctx.inputs.summands[0].folder, 1)
    raise ConnectionError("the server is away")


def die_twice(ctx: StepContext[NoConfig, NoInputs, Any]) -> NoOutputs:
    existing = {key.removeprefix(f"work/{ctx.key}/") for key, _ in ctx.storage.list(f"work/{ctx.key}")}
    assert existing == {f"stable/{n}" for n in range(1, ctx.attempt)}, existing
    ctx.storage.write(f"{ctx.attempt_folder}/left.bin", b"over")
    ctx.storage.write(f"{ctx.persistent_folder}/{ctx.attempt}", b"")
    if path := ctx.storage.local_path(ctx.persistent_folder):
        (path / ".tmp-0123").write_bytes(b"half")
    if ctx.attempt < 3:
        os._exit(7)
    return NoOutputs((f"{ctx.attempt_folder}/left.bin",))


def report_much(ctx: StepContext[PathConfig, NoInputs, Any]) -> TimeOutputs:
    start = time.monotonic()
    for n in range(100_000):
        ctx.progress(n, 100_000, "much")
    ctx.progress(100_000, 100_000, "last")
    seconds = time.monotonic() - start
    wait_for(Path(ctx.config.path))
    return TimeOutputs(seconds)


def stay(ctx: StepContext[PathConfig, NoInputs, Any]) -> NoOutputs:
    """Never ends in its first attempt."""
    while ctx.attempt == 1:
        Path(ctx.config.path).touch()
        time.sleep(0.01)
    return NoOutputs()


def lose_lease(ctx: StepContext[NoConfig, NoInputs, Any]) -> NoOutputs:
    ctx.storage.delete(f"leases/{ctx.key}.lock")
    return NoOutputs()


def mark(ctx: StepContext[PathConfig, NoInputs, Any]) -> MarkerOutputs:
    Path(ctx.config.path).write_text(ctx.key)
    return MarkerOutputs(ctx.config.path)


def still_marked(outputs: MarkerOutputs, key: str, settings: OwnerSettings) -> bool:
    path = Path(outputs.mark)
    return path.exists() and path.read_text() == key and settings == OwnerSettings("test")
