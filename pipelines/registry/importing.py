"""From a public implementation's checkpoint to a version in the registry: read safely, mapped by `layouts`, registered.

Only what completes is imported: critics and optimisers have no part in a registered program.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from models import build_model
from models.base import Model
from pipelines import tracking
from pipelines.registry.exporting import register
from pipelines.registry.layouts import LAYOUTS, Layout, Options, Part, State
from pipelines.resources import file_sha256
from pipelines.tracking import Tracking

SUFFIXES = ("", ".pt", ".pth", ".ckpt", ".safetensors")  # of what a folder is searched for
SHOWN = 5  # keys of each kind of mismatch
COUNTER = "num_batches_tracked"  # files written before torch 0.4.1 have none, and it completes nothing
# Spectral norm as a parametrization, and as the hook that public files were written with.
SPECTRAL = {
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}
NAME = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, SPECTRAL))}|[^.]+)")


@dataclass(frozen=True)
class Imported:
    """A model with a checkpoint's weights, in evaluation mode, and what is to be said and recorded of it."""

    model: Model
    size: int
    """Side of its training photographs in pixels."""
    files: tuple[tuple[str, str], ...]
    """Name and sha256 of each file used."""
    options: Options
    """Those read off the file, and those given."""
    layout: Layout


@dataclass(frozen=True)
class Checkpoint:
    """A state dict, and the file that it was in."""

    file: Path
    state: State


def import_checkpoint(
    name: str, files: Sequence[str | Path], settings: Mapping[str, Any] | None = None, size: int | None = None
) -> Imported:
    """The model `name` with the weights of `files`: checkpoints of its public implementation, or folders of them.

    settings: options of the model that no shape tells, or to overrule. size: the training size in pixels, where it is
    not the implementation's usual one. ValueError in one line: an unknown name or option; a file that is missing,
    damaged or holds more than tensors; tensors that are missing, not used or of another shape, with the first of them.
    """
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(LAYOUTS)}"
        raise ValueError(f"no layout {name!r} to import from: {hint}")
    layout = LAYOUTS[name]
    found, config = _collect(name, layout, files)
    options = {
        **layout.options({network: c.state for network, c in found.items()}, config),
        **(settings or {}),
    }
    with torch.device("meta"):
        plain = build_model(name, **options)
    wanted = [part for part in layout.parts if part.network in plain.networks]
    if missing := [part.file for part in wanted if part.network not in found]:
        have = ", ".join(checkpoint.file.name for checkpoint in found.values())
        raise ValueError(f"{name} needs {' and '.join(missing)} too: name it beside {have}, or their folder")
    filled: dict[str, State] = {}
    for part in wanted:
        checkpoint = found[part.network]
        shapes = plain.networks[part.network].state_dict()
        filled[part.network], problems = _match(checkpoint.state, shapes, part.modules(options), part.ignored)
        if problems:
            raise ValueError(_refusal(checkpoint.file, name, layout, problems))
        for key, value in filled[part.network].items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{checkpoint.file} is damaged: {key} holds numbers that are not finite")
    if "generator" in filled:
        filled["generator"], options = layout.finish(filled["generator"], options)
    model = build_model(name, **options).eval()
    for network, state in filled.items():
        counters = {k: v for k, v in model.networks[network].state_dict().items() if k.endswith(COUNTER)}
        model.networks[network].load_state_dict(counters | state)
    used = {found[part.network].file for part in wanted}
    side = layout.size(options, config) if size is None else size
    if not isinstance(side, int) or side < 1:
        raise ValueError(f"a training size of {side!r} pixels is none: give --size")
    return Imported(
        model, side, tuple((file.name, file_sha256(file)) for file in sorted(used)), options, layout
    )


def register_import(
    imported: Imported, tracking_to: Tracking, name: str | None = None, sigma: float = 2.0
) -> str:
    """The version of `name` (None: the model's) that these weights are: the same ones again are the same version.

    sigma: Canny's, of models that take edges. ValueError: a name that is none, or the registry.
    """
    model = imported.model
    metadata: dict[str, Any] = {"size": imported.size, "imported": imported.layout.source}
    if model.takes_edges:
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma {sigma:g} is not positive")
        metadata["sigma"] = sigma
    key = _content(imported, metadata)
    names, digests = (", ".join(column) for column in zip(*imported.files, strict=True))
    params = {"layout": model.name, "source": imported.layout.source, "files": names, "sha256": digests}
    # other files of the same weights have a run of their own: parameters cannot change
    run_key = hashlib.sha256(f"{key} {names} {digests}".encode()).hexdigest()
    run = tracking.open_run(tracking_to, run_key, f"import-{model.name}")
    with tracking.running(tracking_to, run) as client:
        tracking.log_params(client, run, params | imported.options | metadata)
        return register(
            model,
            name=name or model.name,
            run_id=run,
            step_key=key,
            tags={"inpaint.imported": imported.layout.source, "inpaint.files": names},
            metadata=metadata,
            tracking_uri=tracking_to.uri,
        )


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a model from `OPTION=VALUE`, the value in YAML. ValueError: one that is not of that form."""
    settings = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {text!r}: expected OPTION=VALUE, for example --set edges=canny")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {key}: {value!r} is not a YAML value") from None
    return settings


# -- files -----------------------------------------------------------------------------------------------------


def _collect(
    name: str, layout: Layout, files: Sequence[str | Path]
) -> tuple[dict[str, Checkpoint], dict[str, Any]]:
    """The checkpoint of each of the layout's parts, by network, and what a configuration file says."""
    found: dict[str, Checkpoint] = {}
    config: dict[str, Any] = {}
    strange: list[Checkpoint] = []
    for path, named in _paths(files):
        if path.suffix == ".json":
            config |= _read_json(path)
            continue
        for state in _state_dicts(path):
            for mark, reason in layout.refused:
                if _has(state, mark):
                    raise ValueError(f"{path} cannot become {name}: {reason}")
            part = next((part for part in layout.parts if _has(_renamed(part, state), part.mark)), None)
            if part is None:
                if named and not _has(state, layout.left_out):
                    strange.append(Checkpoint(path, state))
            elif part.network in found:
                raise ValueError(
                    f"{found[part.network].file} and {path} both hold the {part.network}: name one of them"
                )
            else:
                found[part.network] = Checkpoint(path, _renamed(part, state))
    if strange:
        file, state = strange[0].file, strange[0].state
        for other, its in LAYOUTS.items():
            if other != name and any(_has(_renamed(part, state), part.mark) for part in its.parts):
                raise ValueError(f"{file} cannot become {name}: it looks like {other}'s ({its.source})")
        if len(layout.parts) > 1 or found:
            known = " or ".join(part.file for part in layout.parts)
            raise ValueError(
                f"{file} cannot become {name}: its tensors ({_listed(state)}) are not those of {known} of {layout.source}"
            )
        found[layout.parts[0].network] = strange[0]  # to say what it lacks
    if not found:
        where = ", ".join(str(file) for file in files)
        raise ValueError(
            f"{where}: no generator of {layout.source} there (one is called {layout.parts[0].file})"
        )
    return found, config


def _paths(files: Sequence[str | Path]) -> Iterator[tuple[Path, bool]]:
    """The files, those in folders too, each with whether it was named itself."""
    for given in map(Path, files):
        if given.is_dir():
            for path in sorted(given.iterdir()):
                readable = path.suffix in SUFFIXES or path.name == "config.json"
                if path.is_file() and readable and not path.name.startswith("."):
                    yield path, False
        elif given.is_file():
            yield given, True
        else:
            raise ValueError(f"there is no file {given}")


def _state_dicts(path: Path) -> Iterator[State]:
    """The state dicts in a file: the file itself, or what it has under names such as `generator`.

    Nothing but tensors and plain values is unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            with warnings.catch_warnings():  # of pickle protocols that it goes on to refuse
                warnings.simplefilter("ignore")
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a foreign file, every kind; torch's own text advises to read it unsafely
        said = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"it holds a Python object ({said[1]}), not only tensors" if said else "damaged, or no state dict"
        )
        raise ValueError(f"{path} is refused, {what}: only what can be read safely is imported") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    for candidate in (loaded, *loaded.values()):
        if isinstance(candidate, Mapping):
            state = {
                _public(key): value
                for key, value in candidate.items()
                if isinstance(key, str) and isinstance(value, Tensor)
            }
            if state:
                yield state


def _public(key: str) -> str:
    """A key without what wrappers add, and with spectral norm as public files have it."""
    key = key.removeprefix("module.")
    match = NAME.fullmatch(key)
    return f"{match[1]}.{SPECTRAL.get(match[2], match[2])}" if match else key


def _renamed(part: Part, state: State) -> State:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in part.renames:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _has(state: State, mark: str) -> bool:
    return any(re.fullmatch(mark, key) for key in state)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return read if isinstance(read, dict) else {}


# -- tensors ---------------------------------------------------------------------------------------------------


def _match(
    state: State, shapes: Mapping[str, Tensor], modules: Sequence[str], ignored: str
) -> tuple[State, list[str]]:
    """Their tensors under our names, and what is wrong: ours are `shapes`, theirs in modules of the same order."""
    ours = {key: _split(key) for key in shapes}
    theirs = dict(zip(dict.fromkeys(module for module, _ in ours.values()), modules, strict=True))
    filled: State = {}
    used, missing, wrong = set(), [], []
    for key, wanted in shapes.items():
        module, suffix = ours[key]
        name = f"{theirs[module]}.{SPECTRAL.get(suffix, suffix)}"
        used.add(name)
        if name not in state:
            if suffix != COUNTER:
                missing.append(name)
        elif state[name].shape != wanted.shape:
            wrong.append(f"{name} {list(state[name].shape)} instead of {list(wanted.shape)}")
        else:
            filled[key] = state[name]
    unused = [key for key in state if key not in used and not re.fullmatch(ignored, key)]
    kinds = ((missing, "missing"), (unused, "not used"), (wrong, "of another shape"))
    return filled, [f"{len(keys)} {what} ({_listed(keys)})" for keys, what in kinds if keys]


def _split(key: str) -> tuple[str, str]:
    """A tensor's module and its name in it."""
    match = NAME.fullmatch(key)
    assert match is not None  # every tensor of our networks lies in a module
    return match[1], match[2]


def _listed(keys: Sequence[str] | State) -> str:
    first = list(keys)[:SHOWN]
    return ", ".join(first) + (" ..." if len(keys) > SHOWN else "")


def _refusal(file: Path, name: str, layout: Layout, problems: Sequence[str]) -> str:
    return f"{file} cannot become {name}, as {layout.source} lays it out: tensors are {'; '.join(problems)}"


def _content(imported: Imported, metadata: Mapping[str, Any]) -> str:
    """The key of what is registered: the completing networks' tensors, not the files that they came in."""
    about = {"model": imported.model.name, "options": imported.options, **metadata}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for part in imported.layout.parts:
        if part.network in imported.model.networks:
            for key, value in imported.model.networks[part.network].state_dict().items():
                digest.update(f"{part.network}.{key} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
