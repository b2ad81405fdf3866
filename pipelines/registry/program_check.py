"""Sanitizes an exported program (.pt2): refuses all that could run code in torch.export.load and rewrites the rest.

torch.export.load is unsafe for untrusted files: it unpickles what the archive tells it to, evaluates the strings that
sizes are written in, and accepts any function under `torch`, such as torch.os.system, as an operator. Our programs need
none of that. The archive is rewritten because torch's zip reader might read other bytes than the ones checked here.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import error_text

PROGRAM_FILE = "model.pt2"  # MLflow's name
WEIGHTS_FOLDER, CONSTANTS_FOLDER = "data/weights/", "data/constants/"
TENSOR_TABLES = {
    f"{WEIGHTS_FOLDER}model_weights_config.json": "weight",
    f"{CONSTANTS_FOLDER}model_constants_config.json": "tensor",
}
GRAPH_RECORD, EXAMPLE_RECORD = "models/model.json", "data/sample_inputs/model.pt"
TEXT_RECORDS = ("archive_format", "archive_version", ".data/version", "byteorder", ".data/serialization_id")
TENSOR_RECORD = re.compile(rf"{WEIGHTS_FOLDER}weight_\d+|{CONSTANTS_FOLDER}tensor_\d+")

SAFE_NAME = re.compile(r"[\w.+-]*", re.ASCII)  # it can neither end a quoted string nor call a function
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# constructors of sympy and torch that size expressions consist of
SIZE_FUNCTIONS = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Abs|Where"
    "|ToFloat|TruncTo(Int|Float)|FloorToInt|CeilToInt|IntTrueDiv|FloatTrueDiv|PowByNatural|(Une|E)quality"
    "|(Strict)?(Less|Greater)Than|And|Or|Not|Eq|Ne|Le|Lt|Ge|Gt"
)
SIZE_OPERATORS = re.compile(
    r"_operator\.(eq|ne|le|lt|ge|gt|neg|pos|add|sub|mul|floordiv|truediv|mod|pow|and_|or_)|math\.(trunc|ceil|floor)"
    r"|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)
OPERATOR_TYPE = type(torch.ops.aten.add.Tensor)
FORBIDDEN_OPERATORS = frozenset(["from_file"])  # of aten, that access more than tensors


def sanitize_program(path: Path) -> None:
    """Rewrite the program at `path` with nothing in it but tensors, and operators on tensors and sizes.

    Metadata of the traced code is dropped. ValueError: the program holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            root, _, _ = names[0].partition("/")
            if duplicates := [name for name, n in Counter(map(str.lower, names)).items() if n > 1]:
                raise ValueError(f"its record {duplicates[0]} occurs twice")
            if not SAFE_NAME.fullmatch(root) or not all(name.startswith(f"{root}/") for name in names):
                raise ValueError("its records are not in one folder")
            records = {name.removeprefix(f"{root}/"): name for name in names}
            temporary = path.with_name(f"{path.name}.part")
            with zipfile.ZipFile(temporary, "w") as sanitized:
                for record, name in records.items():
                    sanitized.writestr(name, _sanitize_record(record, archive.read(name), records))
    except (zipfile.BadZipFile, IndexError, KeyError, NotImplementedError, EOFError) as error:
        raise ValueError(f"it is not an exported program: {error_text(error)[:200]}") from None
    except RecursionError:
        raise ValueError("it is not an exported program: it is nested too deeply") from None
    os.replace(temporary, path)


def _sanitize_record(record: str, content: bytes, records: Collection[str]) -> bytes:
    """The content of one record, checked and rewritten. `records`: the names of all records."""
    if record in TEXT_RECORDS:
        if not SAFE_NAME.fullmatch(content.decode("ascii", "replace").strip()):
            raise ValueError(f"its record {record} is not a single word")
    elif record in TENSOR_TABLES:
        return _sanitize_tensor_table(record, _parse_json(record, content), records)
    elif record == GRAPH_RECORD:
        graph = _parse_json(record, content)
        if not isinstance(graph, dict):
            raise ValueError(f"its record {record} is not a program")
        without_guards = {**graph, "guards_code": []}  # torch derives the guards
        return json.dumps(_sanitize_value(without_guards, "")).encode()
    elif record == EXAMPLE_RECORD:
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:  # an untrusted file can raise anything; torch's message suggests an unsafe load
            raise ValueError(f"its record {record} is a pickle of other things than tensors") from None
    elif not TENSOR_RECORD.fullmatch(record):
        raise ValueError(f"its record {record!r} does not belong in a program")
    return content


def _sanitize_tensor_table(record: str, config: Any, records: Collection[str]) -> bytes:
    """The table of weights or constants; each of them must be an existing record of plain bytes."""
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"its record {record} is not a table of tensors")
    folder = record.rpartition("/")[0]
    for entry in entries.values():
        name = entry.get("path_name")
        if entry.get("use_pickle") is not False or not re.fullmatch(
            rf"{TENSOR_TABLES[record]}_\d+", str(name)
        ):
            raise ValueError(f"its record {folder}/{name} is a pickle")
        if f"{folder}/{name}" not in records:
            raise ValueError(f"its record {folder}/{name} is missing")
    return json.dumps(_sanitize_value(config, "")).encode()


def _sanitize_value(value: Any, key: str) -> Any:
    """A value of the graph's JSON, checked according to how torch uses the field `key`."""
    if isinstance(value, dict):
        for name in value:
            _check_name(name)
        return {
            name: {} if name == "metadata" else _sanitize_value(inner, name) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_sanitize_value(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    if key == "target":
        _check_operator(value)
    elif key == "expr_str":
        _check_size_expression(value)
    elif key in ("in_spec", "out_spec", "context"):  # JSON in a string
        return json.dumps(_sanitize_value(_parse_json(key, value.encode()), ""))
    elif key not in ("as_string", "as_strings"):  # string arguments of operators: torch quotes them
        _check_name(value)
    return value


def _check_name(text: str) -> None:
    """Torch generates Python code from the names of tensors and modules."""
    if not SAFE_NAME.fullmatch(text):
        raise ValueError(f"it has the invalid name {text[:60]!r}")


def _check_operator(target: str) -> None:
    match = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if match and match[1] not in FORBIDDEN_OPERATORS:
        packet = getattr(torch.ops.aten, match[1], None)
        if isinstance(getattr(packet, match[2], None), OPERATOR_TYPE):
            return
    if not SIZE_OPERATORS.fullmatch(target):
        raise ValueError(f"it calls {target[:60]!r}, which is not an operator on tensors")


def _check_size_expression(text: str) -> None:
    """A size expression may call only the constructors in SIZE_FUNCTIONS: sympy evaluates it."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        raise ValueError(f"it has the invalid size {text[:60]!r}") from None
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if SIZE_FUNCTIONS.fullmatch(name):
                pass
            case ast.Name(id=name) if SIZE_FUNCTIONS.fullmatch(name):
                pass
            case ast.Constant(value=str() as name) if IDENTIFIER.fullmatch(name) or _is_number(name):
                pass
            case ast.Constant(value=bool() | int() | float()):
                pass
            case ast.Expression() | ast.keyword() | ast.UnaryOp() | ast.USub() | ast.Load():
                pass
            case _:
                raise ValueError(f"it has the invalid size {text[:60]!r}")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text) is not None


def _parse_json(record: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise ValueError(f"its record {record} is not JSON") from None
