"""Records of shards where pydantic is missing: the programme reads only those that it has just written."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from data_prep import records


def work_without_pydantic() -> None:
    """Replace the functions of data_prep/records.py, before other modules import them; nothing if pydantic is there."""
    try:
        import pydantic  # noqa: F401
    except ImportError:
        records.to_json = to_json
        records.decode = decode
        records.from_json = lambda kind, data, context: _build(kind, data)  # type: ignore[assignment]


def to_json(value: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(value)))


def decode(kind: type, text: bytes | str, context: str) -> Any:
    return _build(kind, json.loads(text))


def _build(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{key: _build(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _build(arguments[1], item) for key, item in value.items()}
    if origin in (Union, types.UnionType) and value is not None:
        return _build(next(a for a in arguments if a is not types.NoneType), value)
    return value
