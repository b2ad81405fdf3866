"""Dataclasses to JSON and back, with strict types and one-line errors.

Unknown fields are errors, and so are text for a number and a number for text. An integer is accepted for a float and a
list for a tuple, as JSON has no other; NaN and infinities are accepted as floats. A field with a default may be missing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

_ERROR_TEXTS = {  # by pydantic's error type, without Python's words
    "missing": "is missing",
    "unexpected_keyword_argument": "is not known here",
    "dataclass_type": "is not an object with named fields",
    "too_long": "is followed by something else",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "dict_type": "should be an object with named fields",
    "mapping_type": "should be an object with named fields",
}


class RecordError(ValueError):
    """Stored JSON that does not match its class: "CONTEXT, PROBLEM" in one line.

    `problem` names the field and what is wrong with it: "shards[3].count is 'x', should be a whole number".
    """

    def __init__(self, context: str, problem: str) -> None:
        super().__init__(f"{context}, {problem}")
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordError, (str(self).removesuffix(f", {self.problem}"), self.problem)


def to_json(value: Any) -> Any:
    """A dataclass as an argument for `json.dumps`: dicts, lists, text and numbers, in the order of the fields."""
    (record,) = _adapter(type(value)).dump_python((value,), mode="json", warnings="none")
    return record


def from_json(kind: type[T], data: Any, context: str) -> T:
    """Parsed JSON as an instance of the dataclass `kind`. `context` begins the error: "step train", say.

    Raises RecordError, a ValueError.
    """
    return decode(kind, json.dumps(data), context)


def decode(kind: type[T], text: bytes | str, context: str) -> T:
    """JSON text as an instance of the dataclass `kind`. `context` begins the error: "manifest.json in /data", say.

    Raises RecordError, a ValueError.
    """
    from pydantic import ValidationError  # imported here: it takes a tenth of a second, too long for --help

    adapter = _adapter(kind)
    encoded = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    try:
        try:
            # strict also for pydantic's own models
            (value,) = adapter.validate_json(b"[%s]" % encoded, strict=True)
        except ValidationError as error:
            if error.errors(include_url=False)[0]["type"] != "json_invalid" or b"\\u" not in encoded:
                raise
            # File names that are not UTF-8 contain lone surrogates, which pydantic's parser rejects. Validate strictly
            # with the surrogates replaced, then convert the original data.
            data = [json.loads(encoded)]
            adapter.validate_json(json.dumps(data, ensure_ascii=False).encode(errors="replace"), strict=True)
            (value,) = _adapter(kind, strict=False).validate_python(data)
    except ValidationError as error:
        raise RecordError(context, _describe_error(error)) from None
    except (ValueError, RecursionError) as error:  # from json.loads
        raise RecordError(context, f"is not JSON: {error}") from None
    return value


def _new_adapter(kind: Any, strict: bool = True) -> TypeAdapter[Any]:
    """Adapter for a tuple of one `kind`: pydantic accepts no config for a plain dataclass, only for its container."""
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(extra="forbid", strict=strict, ser_json_inf_nan="constants")
    return TypeAdapter(tuple[kind], config=config)


_adapter: Callable[..., TypeAdapter[Any]] = functools.cache(_new_adapter)


def _describe_error(error: Any) -> str:
    """The first of pydantic's errors: the field, its value if that is short, and what is wrong."""
    first, *others = error.errors(include_url=False)
    field, message, value = _field_path(first["loc"][1:]), first["msg"], first["input"]
    if first["type"] == "json_invalid":
        problem = f"is not JSON: {message.removeprefix('Invalid JSON: ')}"
    elif first["loc"] == (0,) and first["type"] == "missing":
        problem = "is not JSON: it is empty"
    else:
        text = _ERROR_TEXTS.get(first["type"]) or message.removeprefix("Input ").removeprefix("Value error, ")
        if isinstance(value, str | int | float | None) and len(repr(value)) < 60 and text[:2] != "is":
            field = f"{field} is {value!r},"
        elif field and first["type"] == "value_error":
            field += ":"
        problem = f"{field} {text}".strip()
    return " ".join(problem.split()) + (f" (and {len(others)} more)" if others else "")


def _field_path(path: Sequence[str | int]) -> str:
    """("shards", 3, "count") as shards[3].count."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
