"""Protocols: their stored form, records of other releases, and which of them are comparable."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_prep.records import RecordError, from_json
from pipelines.evaluation.protocol import Protocol

RECORD = {
    "photographs": 2,
    "sizes": ["64x64"],
    "photographs_sha256": "a" * 64,
    "masks": ["center", "photos/masks"],
    "masks_sha256": "b" * 64,
    "seed": 3,
    "edges": "none",
    "hole_contents": "black",
    "mean": "over photographs",
    "metrics": {"psnr_rgb": "10 log10"},
    "bands": "(lo, hi]",
    "distance": {"features": "vgg19", "name": "vgg19.relu3_1", "size": None},
    "versions": {"torch": "2.13.0"},
    "true_edges": ["study"],
}
PROTOCOL = from_json(Protocol, RECORD, "evaluation.json, protocol")


@pytest.mark.parametrize("extra", [{}, {"hole": ["2"]}], ids=["white", "hole"])
def test_reading_and_storing_keeps_every_field(extra: dict[str, object]) -> None:
    record = RECORD | extra
    protocol = from_json(Protocol, record, "evaluation.json, protocol")
    assert json.loads(json.dumps(protocol.to_dict())) == record
    assert Protocol.from_record(record) == protocol


def test_evaluation_files_are_decoded_strictly() -> None:
    for change, message in (
        ({"seed": "3"}, "seed is '3', should be a whole number"),
        ({"sead": 3}, "sead is not known here"),
    ):
        with pytest.raises(RecordError, match=r"^evaluation\.json, protocol, ") as error:
            from_json(Protocol, RECORD | change, "evaluation.json, protocol")
        assert message in str(error.value)


def test_a_record_of_another_release_may_lack_fields_and_have_unknown_ones() -> None:
    protocol = Protocol.from_record({"masks": ["box"], "seed": 7, "unheard_of": 1})
    assert (protocol.masks, protocol.seed, protocol.hole, protocol.distance) == (("box",), 7, (), None)


def test_scores_are_comparable_if_photographs_masks_and_definitions_are_equal() -> None:
    same = replace(PROTOCOL, versions={"torch": "3"}, true_edges=(), distance=None)
    assert PROTOCOL.comparable_with(same)
    for other in (
        replace(PROTOCOL, seed=4),
        replace(PROTOCOL, hole=("2",)),
        replace(PROTOCOL, metrics={}),
        replace(PROTOCOL, masks_sha256="c"),
    ):
        assert not PROTOCOL.comparable_with(other)
