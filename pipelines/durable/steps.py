"""Durable steps on plain Ray tasks: kill anything, run again, and finished steps are found finished.

In the storage, a folder or a bucket, and nowhere else:

    manifests/<key>.json      written once, after success: the step's value and its outputs. It makes a step finished
    work/<key>/a<attempt>/    what an attempt writes; those of other attempts are deleted
    work/<key>/stable/        what survives attempts: the checkpoints of a training
    attempts/<key>/<n>.json   where and when attempt n began, how it ended, its traceback
    leases/<key>.lock         which driver is at it now (lease.py)

A step's key is a hash of its name, version, config and its inputs' keys and values, so a changed recipe runs what it
changed and what follows from it. Only the driver that holds a step's lease writes its manifest; a stray task of a
killed driver writes in its own attempt's folder, which nothing names. Planning and looking need no Ray.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.durable import lease
from pipelines.durable.lease import StorageBusy as StorageBusy

if TYPE_CHECKING:
    from data_prep.storage import Storage

Value = dict[str, Any]
Show = Callable[[str, str, float, float, str], None]  # step, state, done, total, note


class StepFailed(RuntimeError):
    """One line: which step failed, why, and where its traceback is kept."""


@dataclass(frozen=True)
class Step:
    """A piece of work that happens once for its key.

    `run` is an importable function from a StepContext to a JSON-able value, whose "outputs" name what it wrote (keys
    of the storage); a value names no other step's work folder. `outside`, "module:function", takes (value, key,
    local) and says whether what the step did outside the storage (a model version, say) is still there.
    """

    name: str
    run: Callable[[StepContext], Value]
    config: Mapping[str, Any]
    needs: Sequence[str] = ()
    version: int = 1
    retries: int = 2
    local: Mapping[str, Any] = field(default_factory=dict)  # JSON-able, and no part of the key
    outside: str | None = None
    memory: str = ""  # what to say when its process was ended for its memory


@dataclass
class StepContext:
    """What a step is told: `work` is this attempt's folder in the storage, `stable` the one of all attempts."""

    key: str
    name: str
    attempt: int
    config: Value
    local: Value
    storage: Storage
    manifests: dict[str, Value]  # of the steps that it needs
    work: str
    stable: str
    progress: Callable[..., None]  # (done, total, note="")

    @property
    def inputs(self) -> dict[str, Value]:
        """The values of the steps that it needs."""
        return {name: manifest["value"] for name, manifest in self.manifests.items()}


@dataclass(frozen=True)
class StepStatus:
    name: str
    key: str | None  # None: not known before the steps that it needs are finished
    state: str  # finished, running, to run, waiting
    why: str = ""
    seconds: float | None = None
    attempts: int = 0
    errors: tuple[str, ...] = ()  # of the attempts that ended badly, oldest first

    @property
    def error(self) -> str:
        """Why the last attempt failed; '' when it did not."""
        return self.errors[-1] if self.errors and self.state != "finished" else ""


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def step_key(step: Step, inputs: Mapping[str, Value]) -> str:
    """sha256 over all that a step's result depends on, given its inputs' manifests; the name is for readers.

    The attempt that an input's work folder is of does not count: doing lost work again changes no key.
    """
    told = {}
    for name, manifest in inputs.items():
        folder = f"work/{manifest['key']}"
        told[name] = [
            manifest["key"],
            re.sub(rf"{re.escape(folder)}/a\d+", folder, canonical(manifest["value"])),
        ]
    told_all = {"name": step.name, "version": step.version, "config": step.config, "inputs": told}
    return f"{hashlib.sha256(canonical(told_all).encode()).hexdigest()[:16]}-{step.name}"


@dataclass(frozen=True)
class Workflow:
    """Steps over a storage, each after those that it needs. Raises ValueError in one line when they make no chain.

    `given` are manifests of steps that are finished already, by name: a part of another workflow can be gone on from.
    """

    name: str
    steps: Sequence[Step]
    storage: Storage
    given: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: set[str] = set(self.given)
        for step in self.steps:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", step.name) or step.name in known:
                raise ValueError(f"step {step.name!r}: names are unique, of letters, digits and ._+=-")
            if missing := [name for name in step.needs if name not in known]:
                raise ValueError(f"step {step.name!r} needs {missing[0]!r}, which is no step before it")
            try:
                canonical([step.config, step.local])
            except (TypeError, ValueError) as error:
                raise ValueError(f"step {step.name!r}: its config is no JSON: {error}") from error
            known.add(step.name)

    def hold(self, tell: Callable[[str], None] = lambda text: None) -> lease.Lease:
        """The lease on the whole workflow; StorageBusy when another driver has it. Tells when it has to wait for it."""
        return lease.outwait(self.storage, f"run-{self.name}", tell)

    def run(self, progress: Show = lambda *_: None, held: lease.Lease | None = None) -> dict[str, Value]:
        """Do what is not done yet; every step's value. Ray is initialised by the caller.

        `progress` is called with (step, state, done, total, note), states: cached (found finished), running, retry,
        finished, failed. Raises StepFailed when nothing independent of the failed step is left to do, StorageBusy
        when another driver is at work on this workflow (unless the caller already `held` it) or on one of its steps.
        """
        from pipelines.durable.driver import Driver  # imports Ray

        with held or self.hold():
            return Driver(self, progress).drive()

    def finished(self) -> dict[str, Value] | None:
        """Every step's value when all are finished and their outputs there; None otherwise."""
        values = {}
        for step, _, manifest, _ in self._survey():
            if manifest is None:
                return None
            values[step.name] = manifest["value"]
        return values

    def keys(self) -> dict[str, str]:
        """The keys known so far."""
        return {step.name: key for step, key, _, _ in self._survey() if key}

    def plan(self) -> list[StepStatus]:
        """What `run` would do and why, and how earlier attempts ended: from the storage alone."""
        return [self._status(*found) for found in self._survey()]

    status = plan

    def inspect(self, step: Step, key: str) -> tuple[Value | None, str]:
        """The manifest that makes the step finished; or None and what is wrong with it, '' when there is none."""
        try:
            manifest = json.loads(self.storage.read(f"manifests/{key}.json"))
        except FileNotFoundError:
            return None, ""
        except ValueError:
            return None, "its manifest is unreadable"
        expected = {output["key"]: output["bytes"] for output in manifest["outputs"]}
        for name, size in self.sizes(key, expected).items():
            if size != expected[name]:
                is_now = "is missing" if size is None else f"has {size} bytes instead of {expected[name]}"
                return None, f"output {name} {is_now}"
        if step.outside:
            module, _, function = step.outside.partition(":")
            still_there = getattr(importlib.import_module(module), function)
            if not still_there(manifest["value"], key, dict(step.local)):
                return None, f"what it did outside the storage is gone ({function})"
        return manifest, ""

    def sizes(self, key: str, outputs: Iterable[str]) -> dict[str, int | None]:
        """The bytes of a step's outputs, None for a missing one."""
        there = dict(self.storage.list(f"work/{key}"))  # one request in a bucket, however many outputs
        return {name: there[name] if name in there else self.storage.size(name) for name in outputs}

    def attempts(self, key: str) -> list[Value]:
        """The records of a step's attempts, oldest first."""
        names = [name for name, _ in self.storage.list(f"attempts/{key}")]
        records = [json.loads(self.storage.read(name)) for name in names]
        return sorted(records, key=lambda record: record["attempt"])

    def _survey(self) -> Iterator[tuple[Step, str | None, Value | None, str]]:
        """Each step with its key once its inputs are known, and its manifest or the reason why it has none."""
        done: dict[str, Value] = dict(self.given)
        for step in self.steps:
            if missing := [name for name in step.needs if name not in done]:
                yield step, None, None, f"after {', '.join(missing)}"
                continue
            key = step_key(step, {name: done[name] for name in step.needs})
            manifest, why = self.inspect(step, key)
            if manifest:
                done[step.name] = manifest
            yield step, key, manifest, why

    def _status(self, step: Step, key: str | None, manifest: Value | None, why: str) -> StepStatus:
        if key is None:
            return StepStatus(step.name, None, "waiting", why)
        records = self.attempts(key)
        if manifest is None and (by := lease.holder(self.storage, key)) is not None:
            state, why = "running", f"process {by.get('pid')} on {by.get('host')} since {by.get('since')}"
        else:
            state = "finished" if manifest else "to run"
        over = records[:-1] if state == "running" else records
        good = manifest["attempt"] if manifest else 0  # its driver may have died before it noted the success
        errors = tuple(
            f"attempt {r['attempt']}: {r['error']}" for r in over if r["error"] and r["attempt"] != good
        )
        if state == "to run" and not why:
            why = errors[-1] if errors else self._changes(step, key)
        seconds = manifest["seconds"] if manifest else None
        return StepStatus(step.name, key, state, why, seconds, len(records), errors)

    def _changes(self, step: Step, key: str) -> str:
        """Why a step without any attempt runs: it is new, or something is not as when it last ran."""
        name = re.compile(rf"manifests/[0-9a-f]{{16}}-{re.escape(step.name)}\.json")
        found = [
            self.storage.read(other) for other, _ in self.storage.list("manifests") if name.fullmatch(other)
        ]
        if not found:
            return "never ran"
        last = max((json.loads(text) for text in found), key=lambda manifest: manifest["started"])
        now = json.loads(canonical(step.config))
        changed = [n for n in {**now, **last["config"]} if now.get(n) != last["config"].get(n)]
        changed += ["version"] if last["version"] != step.version else []
        return f"changed since {last['started']}: {', '.join(sorted(changed)) or 'what it needs'}"
