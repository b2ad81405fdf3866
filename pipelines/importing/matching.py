"""Maps the tensors of a file to our networks: finds the tensors of one network, under whatever prefixes and wrappers,
and converts their names and their norms (spectral norm, weight norm) to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.checkpoint_layout import StateDict

MAX_LISTED_KEYS = 5  # in messages, for each kind of mismatch
BATCH_NORM_COUNTER = "num_batches_tracked"  # files of torch before 0.4.1 have none; inference does not use it
# Parts that DataParallel, torch.compile, FSDP and activation checkpointing insert anywhere in names.
WRAPPER_NAMES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGE_PREFIX = re.compile(r"(?:^|[._])(?:ema|swa|averaged?|shadow)(?:[._]|$)", re.IGNORECASE)
# Names under spectral norm: as a parametrization (ours), and as the hook that public files were written with.
HOOK_NAMES = {
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}
WEIGHT_NORM_NAMES = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
TENSOR_NAME = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, HOOK_NAMES))}|[^.]+)")


@dataclass(frozen=True)
class NetworkTensors:
    """The tensors of one network in a file."""

    prefix: str
    """The prefix of their names in the file, or ''."""
    state: StateDict
    dictionaries: dict[str, str]
    """name -> path of the dictionary in the file that holds the tensor."""

    def equals(self, other: NetworkTensors) -> bool:
        return self.state.keys() == other.state.keys() and all(
            torch.equal(tensor, other.state[name]) for name, tensor in self.state.items()
        )


def normalize_key(key: str) -> str:
    """A tensor's path as a name: parts joined by `.`, without the parts of wrappers, norms named as hooks name them."""
    name = ".".join(part for part in re.split(r"[./]", key) if part not in WRAPPER_NAMES)
    match = TENSOR_NAME.fullmatch(name)
    return f"{match[1]}.{HOOK_NAMES.get(match[2], match[2])}" if match else name


def _suffix_pattern(signature_pattern: str) -> re.Pattern[str]:
    """A regular expression for names that end in `signature_pattern`, with or without spectral norm; group 1: prefix."""
    return re.compile(rf"(?:(.*)\.)?(?:{signature_pattern})(?:_orig)?")


def contains_key(names: Mapping[str, object] | Sequence[str], signature_pattern: str) -> bool:
    """Whether one of the normalized names ends in `signature_pattern`, a regular expression."""
    pattern = _suffix_pattern(signature_pattern)
    return any(pattern.fullmatch(name) for name in names)


def find_networks(tensors: Mapping[str, Tensor], signature_pattern: str) -> list[NetworkTensors]:
    """The networks with a tensor that matches `signature_pattern`, under any prefix; equal ones once."""
    keys: dict[str, str] = {}
    for key in tensors:
        name = normalize_key(key)
        if name in keys:  # both with and without a wrapper: these are two networks
            name = key.replace("/", ".")
        keys[name] = key
    matches = map(_suffix_pattern(signature_pattern).fullmatch, keys)
    prefixes = list(dict.fromkeys(match[1] or "" for match in matches if match))
    networks: list[NetworkTensors] = []
    for prefix in prefixes:
        nested = tuple(f"{p}." for p in prefixes if p != prefix and f"{p}.".startswith(prefix))
        names = {
            name[len(prefix) + 1 if prefix else 0 :]: key
            for name, key in keys.items()
            if (not prefix or name.startswith(f"{prefix}.")) and not name.startswith(nested)
        }
        network = NetworkTensors(
            prefix,
            {name: tensors[key] for name, key in names.items()},
            {name: key.rpartition("/")[0] for name, key in names.items()},
        )
        if not any(network.equals(other) for other in networks):
            networks.append(network)
    return networks


def averaged_networks(networks: Sequence[NetworkTensors]) -> list[NetworkTensors]:
    """The networks whose prefix says that they are moving averages."""
    return [network for network in networks if AVERAGE_PREFIX.search(network.prefix)]


def match_tensors(
    tensors: NetworkTensors,
    network: nn.Module,
    module_names: Sequence[str],
    ignored_pattern: str = r"(?!)",
    zero_pattern: str = r"(?!)",
) -> tuple[StateDict, list[str], list[str]]:
    """Rename and convert the tensors to a state dict of `network`.

    module_names: the public implementation's modules with tensors, in the order of ours. ignored_pattern: regular
    expression for public tensors that are not weights. zero_pattern: for public names of tensors that are 0 in our
    network if the file has none.
    Returns the state dict, the problems found, and the dictionaries in the file that are not part of the network.
    """
    expected = network.state_dict()
    our_keys = {key: _split_key(key) for key in expected}
    public_modules = dict(
        zip(dict.fromkeys(module for module, _ in our_keys.values()), module_names, strict=True)
    )
    state = _convert_spectral_norm(tensors.state, network, public_modules)
    mapped: StateDict = {}
    used, missing, wrong = set(), [], []
    for key, target in expected.items():
        module, suffix = our_keys[key]
        name = f"{public_modules[module]}.{HOOK_NAMES.get(suffix, suffix)}"
        used.add(name)
        if name not in state:
            if re.fullmatch(zero_pattern, name):
                mapped[key] = torch.zeros(target.shape)
            elif suffix != BATCH_NORM_COUNTER:
                missing.append(name)
        elif state[name].shape != target.shape:
            wrong.append(f"{name} {list(state[name].shape)} instead of {list(target.shape)}")
        elif target.is_floating_point() and not state[name].is_floating_point():
            wrong.append(f"{name} of {str(state[name].dtype).removeprefix('torch.')}")
        elif suffix in HOOK_NAMES and not state[name].any():
            wrong.append(f"{name} of nothing but 0, which has no norm")
        else:
            mapped[key] = state[name]
    dictionaries = tensors.dictionaries
    used_dictionaries = {dictionaries[name] for name in used & dictionaries.keys()}
    unused = [
        name
        for name, tensor in state.items()
        if name not in used
        and not re.fullmatch(ignored_pattern, name)
        and (name not in dictionaries or dictionaries[name] in used_dictionaries)
        and (tensor.ndim or "." in name)  # scalars without a module are counters: steps, epochs, n_averaged
    ]
    mismatches = ((missing, "missing"), (unused, "not used"), (wrong, "of another shape or type"))
    problems = [f"{len(keys)} {problem} ({format_keys(keys)})" for keys, problem in mismatches if keys]
    skipped = dict.fromkeys(d for d in dictionaries.values() if d not in used_dictionaries)
    return mapped, problems, list(skipped)


def describe_network(state: Mapping[str, Tensor], with_name: bool = True) -> str:
    """The number of convolutions and the input channels of the first one (with its name if `with_name`), in words."""
    layers = [(name, t) for name, t in state.items() if t.ndim == 4 and _is_weight(name)]
    if not layers:
        return "no convolutions"
    name, first = layers[0]
    first_layer = f"the first ({_split_key(name)[0]})" if with_name else "the first"
    return f"{len(layers)} convolution{'s' * (len(layers) > 1)}, {first_layer} of {first.shape[1]} channels"


def format_keys(keys: Sequence[str] | StateDict) -> str:
    first_keys = list(keys)[:MAX_LISTED_KEYS]
    return ", ".join(first_keys) + (" ..." if len(keys) > MAX_LISTED_KEYS else "")


def _is_weight(name: str) -> bool:
    match = TENSOR_NAME.fullmatch(name)
    return match is not None and HOOK_NAMES.get(match[2], match[2]) in ("weight", "weight_orig")


def _split_key(key: str) -> tuple[str, str]:
    """(module, name in the module) of a state dict key."""
    match = TENSOR_NAME.fullmatch(key)
    assert match is not None  # every tensor of our networks belongs to a module
    return match[1], match[2]


# -- norms of weights ----------------------------------------------------------------------------------------------


def _convert_spectral_norm(
    state: StateDict, network: nn.Module, public_modules: Mapping[str, str]
) -> StateDict:
    """The tensors with spectral norm added where our network has it and removed elsewhere; the function is the same.

    public_modules: our module -> theirs.
    """
    state = dict(state)
    for module, name in public_modules.items():
        layer = network.get_submodule(module)
        transposed = isinstance(layer, nn.ConvTranspose2d)
        if parametrize.is_parametrized(layer, "weight"):
            # torch 0.4.1 stored it beside weight_orig and weight_u
            weight = state.pop(f"{name}.weight", None)
            if weight is not None:
                state[f"{name}.weight_orig"] = weight
                state[f"{name}.weight_u"], state[f"{name}.weight_v"] = _unit_norm_vectors(weight, transposed)
        elif f"{name}.weight" not in state:
            keys = [f"{name}.{suffix}" for suffix in ("weight_orig", "weight_u", "weight_v")]
            if all(key in state for key in keys):
                weight, u, v = (state.pop(key) for key in keys)
                matrix, u, v = _as_matrix(weight, transposed), u.to(weight).flatten(), v.to(weight).flatten()
                shapes_match = (len(u), len(v)) == matrix.shape
                state[f"{name}.weight"] = weight / torch.dot(u, matrix @ v) if shapes_match else weight
    return state


def _as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """The weight as the matrix of spectral norm: one row per output channel."""
    return (weight.movedim(1, 0) if transposed else weight).flatten(1)


def _unit_norm_vectors(weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """u and v for which spectral norm divides by 1 and leaves the weight unchanged: its first singular vectors, with v
    divided by the singular value."""
    matrix = _as_matrix(weight, transposed).double()
    if not matrix.any() or not torch.isfinite(matrix).all():
        return weight.new_zeros(matrix.shape[0]), weight.new_zeros(matrix.shape[1])
    v = matrix[matrix.norm(dim=1).argmax()]
    for _ in range(20):  # power iteration; an approximation suffices, as v is scaled afterwards
        u = nn.functional.normalize(matrix @ v, dim=0)
        v = nn.functional.normalize(matrix.T @ u, dim=0)
    return u.to(weight.dtype), (v / (u @ matrix @ v)).to(weight.dtype)


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with weight norm (torch.nn.utils.weight_norm) removed: weight = v * g / |v|, where the norm is over the
    dimensions in which g has size 1."""
    folded = dict(tensors)
    for key, g in tensors.items():
        for length, direction in WEIGHT_NORM_NAMES:
            prefix = key.removesuffix(length)
            v = folded.get(f"{prefix}{direction}")
            if key.endswith(f".{length}") and v is not None and v.ndim == g.ndim:
                dims = [dim for dim in range(v.ndim) if g.shape[dim] == 1]
                del folded[key], folded[f"{prefix}{direction}"]
                norm = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
                folded[f"{prefix}weight"] = v * (g / norm)
    return folded
