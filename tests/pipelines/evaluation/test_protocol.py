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


@pytest.mark.parametrize(
    "extra", [{}, {"hole": ["2"]}, {"features": {"alexnet": "a" * 64}}], ids=["white", "hole", "features"]
)
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


def frozen_protocol(path: str, digest: str, seed: int = 3, masks_sha256: str = "b" * 64) -> Protocol:
    record = {"digest": digest * 64, "masks": {"brush": {}}, "count": 9, "size": 64, "seed": 0}
    return replace(PROTOCOL, masks=(path,), masks_sha256=masks_sha256, seed=seed, frozen_masks={path: record})


def test_a_frozen_set_counts_by_its_digest_and_not_by_its_path() -> None:
    one, moved = frozen_protocol("sets/a.tar", "1"), frozen_protocol("s3://bucket/b.tar", "1", seed=4)
    assert one.comparable_with(moved)
    assert one.digest == moved.digest
    assert not one.comparable_with(frozen_protocol("sets/a.tar", "2", masks_sha256="c" * 64))
    mixed = [replace(one, masks=("sets/a.tar", "brush"), seed=seed) for seed in (3, 4)]
    assert not mixed[0].comparable_with(mixed[1]), "the seed decides the masks of the kind"
    stored = json.loads(json.dumps(one.to_dict()))
    assert from_json(Protocol, stored, "x") == Protocol.from_record(stored) == one


def test_protocols_without_frozen_sets_keep_their_digest() -> None:
    """Versions of earlier releases stay comparable with new ones."""
    assert PROTOCOL.digest == "2a12e71b4cab"
    assert "frozen_masks" not in PROTOCOL.to_dict()


def test_why_two_protocols_cannot_be_compared_is_said_in_words() -> None:
    assert PROTOCOL.differences(PROTOCOL) == []
    photographs = replace(PROTOCOL, photographs=3, sizes=("32x32",), photographs_sha256="c" * 64)
    assert PROTOCOL.differences(photographs) == [f"other photographs ({'a' * 12} and {'c' * 12})"]
    masks = replace(PROTOCOL, masks=("box",), masks_sha256="d" * 64, seed=4)
    assert PROTOCOL.differences(masks) == [f"other masks ({'b' * 12} and {'d' * 12})"]
    both = replace(photographs, masks_sha256="d" * 64)
    assert [reason.partition(" (")[0] for reason in PROTOCOL.differences(both)] == [
        "other photographs",
        "other masks",
    ]
    seed = replace(PROTOCOL, seed=4, hole=("2",), metrics={"psnr_rgb": "20 log10", "new": "?"})
    assert PROTOCOL.differences(seed) == [
        "seeds 3 and 4",
        "other definitions of metrics (new, psnr_rgb)",
        "hole values none and 2",
    ]
    assert PROTOCOL.digests == f"photographs {'a' * 12}, masks {'b' * 12}"
