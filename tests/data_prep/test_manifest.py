"""The stored fields of manifest.json and edges.json; errors name the damaged field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.edge_maps import load_edge_manifest, write_edge_manifest
from data_prep.manifest import Duplicate, Reject, ShardEntry, load_manifest, write_manifest
from data_prep.shards import plan_shards
from data_prep.sources import open_source
from data_prep.storage import open_storage

STORED: dict[str, Any] = {
    "version": 3,
    "source": "/photos",
    "options": {
        "size": 256,
        "margin": 0,
        "crop": "none",
        "format": "jpg",
        "quality": 95,
        "val": 0.1,
        "test": 0,
        "max_pixels": 134217728,
        "max_shard_mb": 256,
    },
    "digest": "d" * 64,
    "splits": {"train": 2, "val": 0, "test": 0},
    "partitions": 1,
    "shards": [
        {
            "name": "train-00000.tar",
            "count": 2,
            "bytes": 9,
            "sha256": "a" * 64,
            "split": "train",
            "partition": 0,
        }
    ],
    "rejects": [{"name": "caf\udce9.txt", "reason": "empty file (0 bytes)"}],
    "duplicates": [{"name": "b.jpg", "duplicate_of": "a.jpg"}],
}


def test_a_manifest_of_release_0_1_0_is_read_and_not_added_to(tmp_path: Path) -> None:
    stored = json.loads(json.dumps(STORED)) | {"version": 2}
    stored["slices"] = stored.pop("partitions")
    stored["options"]["shard_mb"] = stored["options"].pop("max_shard_mb")
    stored["options"]["crop"] = "keep"
    stored["shards"][0]["slice"] = stored["shards"][0].pop("partition")
    stored["duplicates"][0]["same_as"] = stored["duplicates"][0].pop("duplicate_of")
    storage, today = open_storage(tmp_path / "old"), open_storage(tmp_path / "today")
    storage.write("manifest.json", json.dumps(stored).encode())
    today.write("manifest.json", json.dumps(STORED).encode())
    manifest = load_manifest(storage)
    assert manifest.version == 2
    assert replace(manifest, version=3) == load_manifest(today)
    with pytest.raises(ValueError, match=r"release 0\.1\.0, which can be read but not added to"):
        plan_shards(open_source("bundled"), storage, manifest.options, 100)
    del stored["slices"]
    storage.write("manifest.json", json.dumps(stored).encode())
    with pytest.raises(ValueError, match=r"is damaged \(partitions is missing"):
        load_manifest(storage)


def test_a_stored_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("manifest.json", json.dumps(STORED, indent=1).encode())
    manifest = load_manifest(storage)
    assert manifest.shards == (ShardEntry("train-00000.tar", 2, 9, "a" * 64, "train", 0),)
    assert manifest.rejects == (Reject("caf\udce9.txt", "empty file (0 bytes)"),)
    assert manifest.duplicates == (Duplicate("b.jpg", "a.jpg"),)
    assert (manifest.options.size, manifest.left_out) == (256, None)
    write_manifest(storage, manifest)
    rewritten = json.loads(storage.read("manifest.json"))
    assert rewritten == STORED
    assert list(rewritten) == list(STORED)
    assert list(rewritten["shards"][0]) == list(STORED["shards"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": 3}, "damaged .digest is 3, should be text.: remove it and run `inpaint shard SOURCE"),
        ({"shards": [{"name": "x.tar"}]}, r"damaged .shards\[0\].count is missing"),
        ({"more": 1}, "damaged .more is not known here"),
        ({"version": 1, "slices": 1}, "has shards of version 1, this is 3: rebuild the shards"),
    ],
)
def test_the_error_names_the_damaged_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    storage = open_storage(tmp_path)
    storage.write("manifest.json", json.dumps({**STORED, **change}).encode())
    with pytest.raises(ValueError, match=message) as error:
        load_manifest(storage)
    assert "\n" not in str(error.value)


def test_edges_of_another_version_and_damaged_edges_are_rejected(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    write_edge_manifest([], 2, "d", storage)
    record = json.loads(storage.read("edges.json"))
    assert record == {"version": 1, "sigma": 2, "shards_digest": "d", "shards": []}
    for change, message in (
        ({"version": 9}, "edges of version 9, this is 1"),
        ({"sigma": "2"}, "sigma is '2'"),
    ):
        storage.write("edges.json", json.dumps({**record, **change}).encode())
        with pytest.raises(ValueError, match=message):
            load_edge_manifest(storage, "d")
