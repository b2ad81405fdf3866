"""An exported program (.pt2) read as data: what could run code when torch loads it is refused, the rest written anew.

torch.export.load is no reader for strangers' files: it unpickles what the archive says it should, evaluates the strings
that sizes are written in, and takes any function of torch, such as torch.os.system, for an operator. A program of ours
needs none of that. It is written anew so that torch reads what was checked here, however its reader of zips may differ.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import in_a_line

PROGRAM = "model.pt2"  # as MLflow names it
WEIGHTS, CONSTANTS = "data/weights/", "data/constants/"
CONFIGS = {
    f"{WEIGHTS}model_weights_config.json": "weight",
    f"{CONSTANTS}model_constants_config.json": "tensor",
}
GRAPH, EXAMPLE = "models/model.json", "data/sample_inputs/model.pt"
TEXTS = ("archive_format", "archive_version", ".data/version", "byteorder", ".data/serialization_id")
TENSORS = re.compile(rf"{WEIGHTS}weight_\d+|{CONSTANTS}tensor_\d+")

PLAIN = re.compile(r"[\w.+-]*", re.ASCII)  # can neither end a quoted string nor call anything
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# sympy's and torch's constructors that expressions of sizes are made of
SIZES = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Abs|Where"
    "|ToFloat|TruncTo(Int|Float)|FloorToInt|CeilToInt|IntTrueDiv|FloatTrueDiv|PowByNatural|(Une|E)quality"
    "|(Strict)?(Less|Greater)Than|And|Or|Not|Eq|Ne|Le|Lt|Ge|Gt"
)
ON_SIZES = re.compile(
    r"_operator\.(eq|ne|le|lt|ge|gt|neg|pos|add|sub|mul|floordiv|truediv|mod|pow|and_|or_)|math\.(trunc|ceil|floor)"
    r"|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)
FORBIDDEN = frozenset(["from_file"])  # operators of aten that reach beyond tensors


def clean_program(path: Path) -> None:
    """Write the program at `path` anew, with nothing in it but tensors, and operators on tensors and sizes.

    What tracing noted about the code that it came from is left out. ValueError in one line: what else it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            root, _, _ = names[0].partition("/")
            if twice := [name for name, n in Counter(map(str.lower, names)).items() if n > 1]:
                raise ValueError(f"its record {twice[0]} is there twice")
            if not PLAIN.fullmatch(root) or not all(name.startswith(f"{root}/") for name in names):
                raise ValueError("its records are not in one folder")
            there = {name.removeprefix(f"{root}/"): name for name in names}
            part = path.with_name(f"{path.name}.part")
            with zipfile.ZipFile(part, "w") as cleaned:
                for record, name in there.items():
                    cleaned.writestr(name, _checked(record, archive.read(name), there))
    except (zipfile.BadZipFile, IndexError, KeyError, NotImplementedError, EOFError) as error:
        raise ValueError(f"it is no exported program: {in_a_line(error)[:200]}") from None
    except RecursionError:
        raise ValueError("it is no exported program: it is nested without end") from None
    os.replace(part, path)


def _checked(record: str, content: bytes, there: dict[str, str]) -> bytes:
    if record in TEXTS:
        if not PLAIN.fullmatch(content.decode("ascii", "replace").strip()):
            raise ValueError(f"its record {record} is no word")
    elif record in CONFIGS:
        return _tensors(record, _parsed(record, content), there)
    elif record == GRAPH:
        graph = _parsed(record, content)
        if not isinstance(graph, dict):
            raise ValueError(f"its record {record} is no program")
        return json.dumps(_data({**graph, "guards_code": []}, "")).encode()  # torch derives them anew
    elif record == EXAMPLE:
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:  # of a foreign file, every kind; torch's own text advises to read it unsafely
            raise ValueError(f"its record {record} is a pickle of other things than tensors") from None
    elif not TENSORS.fullmatch(record):
        raise ValueError(f"its record {record!r} does not belong in a program")
    return content


def _tensors(record: str, config: Any, there: dict[str, str]) -> bytes:
    """A table of tensors: all of them plain bytes that are there."""
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"its record {record} is no table of tensors")
    folder = record.rpartition("/")[0]
    for entry in entries.values():
        place = entry.get("path_name")
        if entry.get("use_pickle") is not False or not re.fullmatch(rf"{CONFIGS[record]}_\d+", str(place)):
            raise ValueError(f"its record {folder}/{place} is a pickle")
        if f"{folder}/{place}" not in there:
            raise ValueError(f"its record {folder}/{place} is missing")
    return json.dumps(_data(config, "")).encode()


def _data(value: Any, key: str) -> Any:
    """What the graph says under `key`, checked by what torch makes of it."""
    if isinstance(value, dict):
        for name in value:
            _plain(name)
        return {name: {} if name == "metadata" else _data(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_data(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    if key == "target":
        _operator(value)
    elif key == "expr_str":
        _size(value)
    elif key in ("in_spec", "out_spec", "context"):  # JSON in a string
        return json.dumps(_data(_parsed(key, value.encode()), ""))
    elif key not in ("as_string", "as_strings"):  # arguments of operators, which torch quotes
        _plain(value)
    return value


def _plain(text: str) -> None:
    """Names of tensors and modules become Python code."""
    if not PLAIN.fullmatch(text):
        raise ValueError(f"it names something {text[:60]!r}")


def _operator(target: str) -> None:
    match = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if match and match[1] not in FORBIDDEN:
        packet = getattr(torch.ops.aten, match[1], None)
        if isinstance(getattr(packet, match[2], None), torch._ops.OpOverload):
            return
    if not ON_SIZES.fullmatch(target):
        raise ValueError(f"it calls {target[:60]!r}, which is no operator on tensors")


def _size(text: str) -> None:
    """An expression of sizes in sympy's constructors: sympy evaluates it."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        raise ValueError(f"it has the size {text[:60]!r}") from None
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if SIZES.fullmatch(name):
                pass
            case ast.Name(id=name) if SIZES.fullmatch(name):
                pass
            case ast.Constant(value=str() as name) if IDENTIFIER.fullmatch(name) or _is_number(name):
                pass
            case ast.Constant(value=bool() | int() | float()):
                pass
            case ast.Expression() | ast.keyword() | ast.UnaryOp() | ast.USub() | ast.Load():
                pass
            case _:
                raise ValueError(f"it has the size {text[:60]!r}")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text) is not None


def _parsed(record: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise ValueError(f"its record {record} is no JSON") from None
