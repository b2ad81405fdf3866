"""A durable step: its id, its typed config, inputs and outputs, and the key computed from them.

A step's key is a hash of its name, version and config and of its inputs' keys and outputs. So a changed recipe runs the
changed steps and those that depend on them. Does not need Ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from data_prep.records import from_json, to_json

if TYPE_CHECKING:
    from data_prep.storage import Storage
    from pipelines.contracts import ProgressCallback

T = TypeVar("T")
Config = TypeVar("Config")
Inputs = TypeVar("Inputs")
Settings = TypeVar("Settings")
STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


class StepFailed(RuntimeError):
    """A step failed. One line: the step, the reason, and where its traceback is stored."""


@dataclass(frozen=True, order=True)
class StepId:
    """Identifies a step of a workflow. `subject` tells steps of one kind apart; "" if there is only one."""

    kind: str
    subject: str = ""

    @property
    def name(self) -> str:
        """`train-edge_connect`, for people, files and MLflow. Never parsed."""
        return f"{self.kind}-{self.subject}" if self.subject else str(self.kind)


InputIds = Mapping[str, StepId | tuple[StepId, ...] | Mapping[Any, StepId]]
"""Field of the inputs' dataclass -> the step whose outputs it holds; or a tuple of steps, or a mapping of them."""


@dataclass(frozen=True)
class StepEvent:
    """A state change or progress report of a step.

    States: cached (finished in an earlier run), running, retry, finished, failed; stopped for a substep; note for a remark
    of Step.check, or for what happens meanwhile, such as a lost worker. `substep`: a part of the step that is displayed
    beside it, such as one trial of a sweep.
    """

    id: StepId
    state: str
    done: float = 0
    total: float = 0
    note: str = ""
    substep: str = ""

    @property
    def step(self) -> str:
        return self.id.name

    @property
    def kind(self) -> str:
        return self.id.kind


OnEvent = Callable[[StepEvent], None]


@dataclass(frozen=True)
class NoInputs:
    """Inputs of a step that needs no other step."""


@dataclass(frozen=True)
class NoOutputs:
    """Outputs of a step that other steps do not use."""

    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A unit of work that runs once per key. Raises ValueError in one line if the config has wrong types.

    `function` and `still_valid` are "module:object" and resolved where they run, so that a finished workflow loads
    neither Ray nor torch. `function` takes a StepContext and returns `outputs_type`, a dataclass whose `files` lists the
    files that it wrote (keys of the storage). Outputs must not name another step's work folder. `still_valid` takes
    (outputs, key, settings) and returns whether the step's effects outside the storage, such as a model version, still
    exist. The driver calls `check` with the outputs: it raises ValueError if later steps cannot use them, and returns a
    remark for the user or ''.
    """

    id: StepId
    function: str
    config: Any
    inputs: InputIds = field(default_factory=dict)
    inputs_type: type = NoInputs
    outputs_type: type = NoOutputs
    settings: Any = None  # a dataclass that can be pickled; not part of the key
    version: int = 1
    retries: int = 2
    still_valid: str = ""
    check: Callable[[Any], str] | None = None
    memory_hint: str = ""  # advice for the case that Ray kills its process because memory ran out

    def __post_init__(self) -> None:
        try:
            # Sort the keys: the order of masks decides which of them are sampled.
            data = json.loads(canonical_json(to_json(self.config)))
            config = from_json(type(self.config), data, f"step {self.name}, config")
        except ValueError as error:  # includes pydantic's errors for values that JSON cannot hold
            text = " ".join(str(error).split())
            raise ValueError(
                text if text.startswith("step ") else f"step {self.name}, config: {text}"
            ) from None
        object.__setattr__(self, "config", config)

    @property
    def name(self) -> str:
        return self.id.name

    @property
    def needs(self) -> tuple[StepId, ...]:
        """The steps whose outputs this step takes."""
        return tuple(self._input_ids())

    @property
    def config_json(self) -> dict[str, Any]:
        config: dict[str, Any] = to_json(self.config)
        return config

    def map_inputs(self, convert: Callable[[StepId], T]) -> dict[str, Any]:
        """The inputs with every step id converted: field -> one value, a list, or a dict by subject."""
        values: dict[str, Any] = {}
        for name, ids in self.inputs.items():
            if isinstance(ids, StepId):
                values[name] = convert(ids)
            elif isinstance(ids, Mapping):
                values[name] = {str(subject): convert(id) for subject, id in ids.items()}
            else:
                values[name] = [convert(id) for id in ids]
        return values

    def read_inputs(self, manifests: Mapping[StepId, StepManifest]) -> Any:
        """The inputs, decoded from the manifests of the steps in `needs`."""
        values = self.map_inputs(lambda id: manifests[id].value)
        return from_json(self.inputs_type, values, f"step {self.name}, inputs")

    def read_outputs(self, value: Mapping[str, Any]) -> Any:
        return from_json(self.outputs_type, value, f"step {self.name}, outputs")

    def _input_ids(self) -> Iterator[StepId]:
        for ids in self.inputs.values():
            if isinstance(ids, StepId):
                yield ids
            else:
                yield from ids.values() if isinstance(ids, Mapping) else ids

    def input_error(self) -> str:
        """Why the inputs do not match the fields of `inputs_type`; '' if they do."""
        if not dataclasses.is_dataclass(self.inputs_type):
            return ""
        fields = {f.name: f for f in dataclasses.fields(self.inputs_type)}
        if unknown := [name for name in self.inputs if name not in fields]:
            return f"{self.inputs_type.__name__} has no field {unknown[0]!r}"
        missing = [
            name
            for name, f in fields.items()
            if name not in self.inputs
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        return f"its input {missing[0]!r} is missing" if missing else ""


@dataclass(frozen=True)
class OutputFile:
    """A file that a step wrote: its key in the storage and its size."""

    key: str
    bytes: int


@dataclass(frozen=True)
class StepManifest:
    """manifests/<key>.json. A step is finished when its manifest exists."""

    step: str
    key: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    """Name of each step that it needed -> that step's key."""
    value: dict[str, Any]
    """The step's outputs as JSON."""
    outputs: tuple[OutputFile, ...]
    started: str
    seconds: float
    attempt: int
    host: str = ""


@dataclass
class StepContext(Generic[Config, Inputs, Settings]):
    """The argument of a step's function. `attempt_folder`: this attempt's folder in the storage; `persistent_folder`:
    one for all attempts of the step."""

    id: StepId
    key: str
    attempt: int
    config: Config
    inputs: Inputs
    settings: Settings
    storage: Storage
    attempt_folder: str
    persistent_folder: str
    progress: ProgressCallback
    input_manifests: Mapping[StepId, StepManifest] = field(default_factory=dict)
    """Manifests of the steps that it needs, for a step that runs a workflow of its own on their outputs."""

    @property
    def name(self) -> str:
        return self.id.name


def attempt_folder(key: str, attempt: int) -> str:
    """The folder of one attempt of the step with this key."""
    return f"work/{key}/a{attempt}"


def persistent_folder(key: str) -> str:
    """The folder that all attempts of the step with this key share."""
    return f"work/{key}/stable"


def canonical_json(value: Any) -> str:
    """The value as JSON; equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def record_bytes(value: Any) -> bytes:
    """A manifest, or another record, as the text of its file."""
    return json.dumps(to_json(value), indent=1, sort_keys=True, ensure_ascii=False).encode()


def step_key(step: Step, inputs: Mapping[StepId, StepManifest]) -> str:
    """A sha256 of everything that the step's outputs depend on, given its inputs' manifests, and the step's name.

    Attempt numbers in the paths of inputs do not count: to repeat lost work changes no key.
    """

    def describe_input(id: StepId) -> list[str]:
        manifest = inputs[id]
        folder = f"work/{manifest.key}"
        return [manifest.key, re.sub(rf"{re.escape(folder)}/a\d+", folder, canonical_json(manifest.value))]

    hashed = {
        "name": step.name,
        "version": step.version,
        "config": step.config_json,
        "inputs": step.map_inputs(describe_input),
    }
    return f"{hashlib.sha256(canonical_json(hashed).encode()).hexdigest()[:16]}-{step.name}"
