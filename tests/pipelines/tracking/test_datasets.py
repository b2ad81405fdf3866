"""The photographs of a run as MLflow's dataset inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, write_partition_tars
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from pipelines.tracking import runs
from pipelines.tracking.datasets import log_dataset
from pipelines.tracking.runs import resolve_tracking


@pytest.fixture
def shards(tmp_path: Path) -> Storage:
    source, options = open_source("bundled", tile_size=32), ShardOptions(size=32, format="png", test=0.5)
    storage = open_storage(tmp_path / "shards")
    partition = write_partition_tars(source, source.names()[:12], 0, storage, options)
    merge_partitions([partition], options, "s3://ann:secret@bucket/photos/", storage)
    return storage


def test_a_run_has_its_photographs_as_dataset(tmp_path: Path, shards: Storage) -> None:
    tracking = resolve_tracking(None, "inpaint", str(tmp_path))
    client, run = tracking.client(), runs.open_run(tracking, "key", "train")
    manifest = json.loads(shards.read("manifest.json"))
    for _ in range(2):  # a second attempt of the step
        log_dataset(client, run, shards)
        log_dataset(client, run, shards, "train")
        log_dataset(client, run, shards, "test")
    inputs = client.get_run(run).inputs.dataset_inputs
    contexts = {entry.dataset.name: entry.tags[0].value for entry in inputs}
    assert contexts == {"photos": "training", "photos/train": "training", "photos/test": "testing"}
    assert len(inputs) == 3
    for entry in inputs:
        assert entry.dataset.digest == manifest["digest"][:36]
        assert "secret" not in entry.dataset.source
        assert json.loads(entry.dataset.source)["uri"] == "s3://bucket/photos/"
    (train,) = [entry.dataset for entry in inputs if entry.dataset.name == "photos/train"]
    assert json.loads(train.profile)["num_rows"] == manifest["splits"]["train"]
