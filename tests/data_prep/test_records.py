"""Stored JSON is decoded strictly; errors are one line and name the field."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import pytest

from data_prep.records import RecordError, decode, from_json, to_json


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    name: str
    count: int


@dataclass(frozen=True)
class Outer:
    ratio: float
    inner: tuple[Inner, ...]
    sizes: dict[int, tuple[float, ...]] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    color: Color = Color.RED
    kind: Literal["a", "b"] = "a"
    other: Inner | None = None
    checked: Outer | None = None
    free: Any = None

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise ValueError(f"ratio is {self.ratio}: 0 or more")


FULL = Outer(
    0.5,
    (Inner("x", 1), Inner("y", 2)),
    {256: (1.0, 2.0)},
    {"s": 0.25},
    Color.RED,
    "b",
    Inner("z", 3),
    Outer(1.0, ()),
    {"k": [1, "t", None]},
)
PLAIN: dict[str, Any] = {"ratio": 1, "inner": [{"name": "x", "count": 1}]}


def test_records_survive_a_round_trip() -> None:
    record = to_json(FULL)
    assert list(record) == ["ratio", "inner", "sizes", "shares", "color", "kind", "other", "checked", "free"]
    assert decode(Outer, json.dumps(record), "it") == from_json(Outer, record, "it") == FULL
    assert decode(Outer, json.dumps(record, indent=1).encode(), "it") == FULL


def test_integers_are_accepted_as_floats_and_fields_with_defaults_may_be_missing() -> None:
    value = from_json(Outer, PLAIN, "it")
    assert value == Outer(1.0, (Inner("x", 1),))
    assert type(value.ratio) is float


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_nan_and_infinities_survive(number: float) -> None:
    value = from_json(Outer, to_json(Outer(1.0, (), shares={"s": number})), "it")
    assert repr(value.shares["s"]) == repr(number)


@pytest.mark.parametrize("name", ["caf\udce9.jpg", "😀\udcff\\udcff \u10dc80", "plain é \\ud800"])
def test_file_names_that_are_not_utf_8_survive(name: str) -> None:
    value = Outer(1.0, (Inner(name, 1),), {3: (1.0,)}, other=Inner("x", 1))
    assert from_json(Outer, to_json(value), "it") == value
    invalid = to_json(value)
    invalid["other"]["count"] = "1"
    with pytest.raises(RecordError, match=r"^it, other\.count is '1', should be a whole number$"):
        from_json(Outer, invalid, "it")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ratio": "1"}, "ratio is '1', should be a number"),
        ({"ratio": -1}, "ratio is -1.0: 0 or more"),
        ({"checked": {"ratio": -1, "inner": []}}, "checked: ratio is -1.0: 0 or more"),
        ({"inner": [{"name": "x", "count": 1.5}]}, "inner[0].count is 1.5, should be a whole number"),
        ({"inner": [{"name": "x", "count": True}]}, "inner[0].count is True, should be a whole number"),
        ({"inner": [{"name": 4, "count": 1}]}, "inner[0].name is 4, should be text"),
        ({"inner": [{"name": "x"}]}, "inner[0].count is missing"),
        ({"inner": [{"name": "x", "count": 1, "more": 2}]}, "inner[0].more is not known here"),
        ({"inner": [3]}, "inner[0] is not an object with named fields"),
        ({"inner": {}}, "inner should be a list"),
        ({"wrong": 1, "ratio": "x"}, "ratio is 'x', should be a number (and 1 more)"),
        ({"color": "blue"}, "color is 'blue', should be 'red'"),
        ({"kind": "c"}, "kind is 'c', should be 'a' or 'b'"),
    ],
)
def test_the_error_is_one_line_and_names_the_field(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_json(Outer, {**PLAIN, **change}, "step train")
    assert caught.value.problem == problem
    assert str(caught.value) == f"step train, {problem}"
    unpickled = pickle.loads(pickle.dumps(caught.value))
    assert (str(unpickled), unpickled.problem) == (str(caught.value), problem)


@pytest.mark.parametrize("text", ["", "{", '{"a": "\\', "\0", "[1, 2", "nothing"])
def test_text_that_is_not_json_is_rejected(text: str) -> None:
    with pytest.raises(RecordError, match=r"^it, is not JSON: [^\n]+$"):
        decode(Outer, text, "it")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}, {}", "[" * 100_000, '["\\u0041"' * 100_000])
def test_json_that_is_not_a_record_is_rejected(text: str) -> None:
    with pytest.raises(RecordError, match=r"^it, [^\n]+$"):
        decode(Outer, text, "it")


@pytest.mark.slow
def test_decoding_many_entries_is_nearly_as_fast_as_parsing() -> None:
    entries = [{"name": f"folder/photograph-{n}.jpg", "count": n} for n in range(20_000)]
    text = json.dumps({"ratio": 1, "inner": entries})
    decode(Outer, json.dumps(PLAIN), "it")

    def measure_seconds(call: Any) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    assert (
        measure_seconds(lambda: decode(Outer, text, "it"))
        < 15 * measure_seconds(lambda: json.loads(text)) + 0.1
    )
