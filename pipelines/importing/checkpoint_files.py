"""Reads weight files from untrusted sources safely: unpickles only tensors, plain values and, as empty placeholders,
NumPy values. Refuses anything else with one line that says what the file is and what to do."""

from __future__ import annotations

import io
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# of the files that are read in a folder
SUFFIXES = ("", ".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar", ".pkl")
MAX_DEPTH = 8  # of nested dictionaries
MAX_CONTAINERS = 100_000  # dictionaries and lists in a file
SAVE_COMMAND = "torch.save(model.state_dict(), 'weights.pth')"
# Globals in pickles of NumPy values. None of them is called: NumpyPlaceholder replaces each.
NUMPY_NAMES = (
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",  # of their bytes, in pickle protocol 2
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}{bits}DType" for kind in ("Int", "UInt", "Float") for bits in (8, 16, 32, 64)),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Complex64", "Complex128", "Str", "Bytes")),
)
MAGIC_BYTES: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull` in that repository",
    ),
    (
        b"<!doctype",
        "is a web page (HTML): the link led to a page about the weights; download the file itself",
    ),
    (b"<html", "is a web page (HTML): the link led to a page about the weights; download the file itself"),
    (b"<?xml", "is XML, such as the error message of a storage server: download the weights again"),
    (
        b"\x89HDF",
        "is HDF5, as Keras writes it: only PyTorch's state dicts are imported (torch.save or safetensors)",
    ),
    (b"\x1f\x8b", "is compressed (gzip): unpack it and name the file inside"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it and name the file inside"),
    (b"Rar!", "is a RAR archive: unpack it and name the file inside"),
)
TENSORFLOW_PROBLEM = (
    "is a TensorFlow file: only PyTorch's state dicts are imported (torch.save or safetensors)"
)
UNSUPPORTED_SUFFIXES = {
    ".onnx": "is an ONNX program, whose weights have lost their names: import the checkpoint that it was exported from",
    ".t7": "is a file of Torch 7 (Lua): only PyTorch's state dicts are imported (torch.save or safetensors)",
    ".caffemodel": "is a Caffe model: only PyTorch's state dicts are imported (torch.save or safetensors)",
    **dict.fromkeys((".pb", ".meta", ".index", ".data-00000-of-00001"), TENSORFLOW_PROBLEM),
}


class UnsafeCheckpoint(ValueError):
    """A file that holds more than tensors and plain values; `strings` are the strings in its pickles."""

    def __init__(self, message: str, strings: set[str]) -> None:
        super().__init__(message)
        self.strings = strings


class OptimizerStateOnly(ValueError):
    """A file that holds only an optimizer's state."""


class NumpyPlaceholder:
    """Replaces a NumPy value, which is not needed."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors in a file, on the CPU, by path: the keys of the dictionaries around a tensor, joined by `/`, as in
    `state_dict/generator/encoder.1.weight`. Optimizer states are skipped; float16 and bfloat16 become float32.

    ValueError: not a weight file, no weights in it (OptimizerStateOnly: only an optimizer's state), or more than can be
    read safely (UnsafeCheckpoint).
    """
    try:
        if problem := _file_problem(path):
            raise ValueError(f"{path} {problem}")
        loaded = load_file(path) if _is_safetensors(path) else _unpickle(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, or not a safetensors file ({error}): download it again"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if isinstance(loaded, Tensor):
        raise ValueError(f"{path} holds a single tensor, not a state dict: save it with {SAVE_COMMAND}")
    if not isinstance(loaded, Mapping | list | tuple):
        raise ValueError(
            f"{path} holds a value of type {type(loaded).__name__}, not a state dict: save it with {SAVE_COMMAND}"
        )
    containers = list(_walk_containers(loaded, "", set()))
    items = [
        (prefix, *item)
        for prefix, container in containers
        if not _is_optimizer(container)
        for item in _key_value_pairs(container)
    ]
    try:
        tensors = {
            f"{prefix}/{key}" if prefix else key: _to_plain_tensor(value)
            for prefix, key, value in items
            if isinstance(value, Tensor)
        }
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if tensors:
        return tensors
    if any(_is_optimizer(container) for _, container in containers):
        raise OptimizerStateOnly(
            f"{path} holds only an optimizer's state, no network: name the file of the generator's weights"
        )
    if not loaded:
        raise ValueError(f"{path} holds an empty {type(loaded).__name__}, no weights")
    if any(isinstance(value, NumpyPlaceholder) for _, _, value in items):
        raise ValueError(f"{path} holds NumPy arrays, not tensors: save a state dict with {SAVE_COMMAND}")
    keys = ", ".join(key for key, _ in _key_value_pairs(loaded))
    raise ValueError(
        f"{path} holds no tensors ({keys[:200]}): it must be a state dict, as {SAVE_COMMAND} writes it"
    )


def _key_value_pairs(node: Any) -> list[tuple[str, Any]]:
    """(key, value) of a dictionary, (index, value) of a list."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node)
    return [(str(key), value) for key, value in pairs]


def _walk_containers(node: Any, path: str, visited: set[int]) -> Iterator[tuple[str, Any]]:
    """(path, container) of all nested dictionaries and lists, each once; those inside optimizer states are skipped.

    visited: the ids of the containers that were yielded.
    """
    if not isinstance(node, Mapping | list | tuple) or id(node) in visited or len(visited) >= MAX_CONTAINERS:
        return
    visited.add(id(node))
    yield path, node
    if not _is_optimizer(node):
        for key, value in _key_value_pairs(node):
            if path.count("/") < MAX_DEPTH:
                yield from _walk_containers(value, f"{path}/{key}" if path else key, visited)


def _is_optimizer(node: Any) -> bool:
    return isinstance(node, Mapping) and "param_groups" in node and "state" in node


def _to_plain_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_meta:
        raise ValueError("holds the shapes of tensors only (device meta), no numbers")
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


# -- file formats ----------------------------------------------------------------------------------------------


def _file_problem(path: Path) -> str:
    """Why a file is clearly not a weight file, from its first bytes and its name; '': it may be one."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "is empty (0 bytes): download it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, problem in MAGIC_BYTES:
        if text[: len(magic)].lower() == magic.lower():
            return problem
    for suffix, problem in UNSUPPORTED_SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            return problem
    if start[257:262] == b"ustar":
        return "is a tar archive: unpack it and name the file inside"
    if start[:1] == b"\x08" and (b"pytorch" in start[:64] or b"onnx" in start[:64].lower()):
        return UNSUPPORTED_SUFFIXES[".onnx"]
    if start[:4] == b"PK\x03\x04":
        return _zip_problem(path)
    pickle_0 = start.startswith((b"(", b"c"))  # pickles of protocol 0 are text, too
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]+", start) and not pickle_0:
        words = " ".join(start[:60].decode().split())
        return f'is text, not weights ("{words}{"..." if len(start) > 60 else ""}")'
    return ""


def _zip_problem(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "is damaged: its end is missing, as after an interrupted download; download it again"
    members = [name.partition("/")[2] for name in names]
    if "constants.pkl" in members and any(name.startswith("code/") for name in members):
        return (
            "is a TorchScript program, which runs code when it is loaded; if you trust it, save only its weights: "
            "torch.save(torch.jit.load(file).state_dict(), 'weights.pth')"
        )
    if any(name.endswith("archive_format") for name in names) or any("serialized_" in name for name in names):
        return "is an exported program (torch.export), not a state dict: import the checkpoint that it was made from"
    if "data.pkl" not in members:
        listing = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        return f"is a zip archive ({listing}): unpack it and name the file inside"
    return ""


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts with the length of a JSON header and `{`, or has the suffix and is not a pickle or zip."""
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix.lower() == ".safetensors" and start[:2] not in (b"PK", b"\x80\x02"):
        return True
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 10**8


def _unpickle(path: Path) -> Any:
    try:
        placeholders: list[Any] = [(NumpyPlaceholder, name) for name in NUMPY_NAMES]
        # pass an open file: given a path, torch picks the format by the file's name
        with (
            path.open("rb") as file,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(placeholders),
        ):
            warnings.simplefilter("ignore")  # about pickle protocols that it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # an untrusted file can raise anything
        # torch's own message is replaced: it suggests an unsafe load
        classes, strings, protocol = _scan_pickles(path)
        reason = _unsafe_reason(error, classes, protocol)
        raise UnsafeCheckpoint(f"{path} is refused: {reason}", strings) from None


def _unsafe_reason(error: Exception, classes: set[str], protocol: int) -> str:
    """Why torch.load refused the file, from its `error` and the `classes` and pickle `protocol` found in the file."""
    refused_global = re.search(r"GLOBAL (\S+)", str(error))
    if "Unsupported operand" in str(error) and protocol > 2:
        return f"it is a pickle of protocol {protocol}, but only protocol 2 is read: save its state dict with {SAVE_COMMAND}"
    if not refused_global:
        return "it is damaged, or not a state dict; only tensors and plain values are read"
    if any(name.startswith("torch.nn.modules.") for name in classes):
        return (
            f"it holds a whole model as a Python object ({refused_global[1]}), which runs code when it is loaded; "
            f"where that code is installed, save only its weights: {SAVE_COMMAND}"
        )
    return (
        f"it holds a Python object ({refused_global[1]}), not only tensors, and loading it can run code; if you trust the "
        "file, save only its state dict: torch.save(torch.load(file, weights_only=False)['state_dict'], 'weights.pth')"
    )


def _scan_pickles(path: Path) -> tuple[set[str], set[str], int]:
    """The globals in a file's pickles, their strings, and the highest pickle protocol; nothing is executed."""
    classes: set[str] = set()
    strings: set[str] = set()
    protocol = 0
    stream: BinaryIO
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                stream = io.BytesIO(archive.read(data))
        else:  # files of torch before 1.6 consist of several pickles
            stream = path.open("rb")
        with stream:
            while True:
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name == "PROTO" and isinstance(argument, int):
                        protocol = max(protocol, argument)
                    elif opcode.name == "GLOBAL":
                        classes.add(str(argument).replace(" ", "."))
                    elif isinstance(argument, str) and len(argument) < 200:
                        strings.add(argument)
    except Exception:  # after the pickles come the tensors' bytes
        return classes, strings, protocol
