"""Release 0.1.0's numbers are reproduced: the names of weights, the order of samples, masks and edges, the bits of
training, the protocol and scores of the demo."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compatibility.conftest import Release
from compatibility.digests import EDGES, MASKS, SMALLEST, of_batch, of_names, of_tensors
from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.preprocess import ShardOptions, make_sample_decoder
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import open_source
from data_prep.storage import Storage, open_storage
from data_prep.stream import BatchStream
from models import build_model, list_models
from models.base import make_schedule
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.photographs import split_photographs
from pipelines.recipe.load import load_recipe
from pipelines.registry.version_record import protocol_tags
from pipelines.training.learner import Learner

SIGMA = 1.5


@dataclasses.dataclass(frozen=True)
class Data:
    """Shards of the release's photographs, and their edges."""

    shards: Storage
    edges: Storage
    digest: str

    def stream(self, size: int, batch: int, masks: Any, **overrides: Any) -> BatchStream:
        edges = {SIGMA: self.edges}
        settings = {"streams": 2, "edge_source": "full", "sigmas": (SIGMA,), **overrides}
        return BatchStream(
            self.shards, "train", size=size, batch_size=batch, masks=masks, edges=edges, **settings
        )


def make_shards(
    uri: str, folder: Path, options: ShardOptions, partition_size: int
) -> tuple[Storage, dict[str, Any]]:
    """The shards of the photographs at `uri`, `each` photographs a slice, and their manifest."""
    source, out = open_source(uri, options.size), open_storage(folder)
    slices, _ = plan_shards(source, out, options, partition_size)
    return out, merge_partitions(
        [write_partition(source, piece, out, options) for piece in slices], options, source.uri, out
    )


@pytest.fixture(scope="module")
def data(archive: Release, tmp_path_factory: pytest.TempPathFactory) -> Data:
    options = ShardOptions(size=64, format="original", val=0.1, test=0.25)
    shards, manifest = make_shards(str(archive.photos), tmp_path_factory.mktemp("shards"), options, 20)
    edges = open_storage(tmp_path_factory.mktemp("edges"))
    decode = make_sample_decoder(manifest.options)
    edge_records = [
        write_edge_tars(shards, entry, {SIGMA: edges}, decode)[SIGMA] for entry in manifest.shards
    ]
    write_edge_manifest(edge_records, SIGMA, manifest.digest, edges)
    return Data(shards, edges, manifest.digest)


def test_no_model_of_the_release_is_gone(release_numbers: dict[str, Any]) -> None:
    assert set(release_numbers["networks"]) <= set(list_models())


@pytest.mark.parametrize("name", SMALLEST)
def test_weights_keep_their_names_and_shapes(name: str, release_numbers: dict[str, Any]) -> None:
    for label, options in (("default", {}), ("smallest", SMALLEST[name])):
        with torch.device("meta"):
            model = build_model(name, **options)
        state, expected = model.state_dict(), release_numbers["networks"][name][label]
        parameters = {
            key: sum(parameter.numel() for parameter in network.parameters())
            for key, network in model.networks.items()
        }
        assert parameters == expected["parameters"]
        assert (len(state), of_names(state)) == (expected["tensors"], expected["names"])


def test_shards_of_the_same_photographs_are_the_same(data: Data, release_numbers: dict[str, Any]) -> None:
    assert data.digest == release_numbers["shards"]


@pytest.mark.parametrize("source", EDGES)
@pytest.mark.parametrize("masks", MASKS)
def test_batches_are_the_same(masks: str, source: str, data: Data, release_numbers: dict[str, Any]) -> None:
    for rank in (0, 1):
        stream = data.stream(48, 6, MASKS[masks], seed=3, rank=rank, world_size=2, edge_source=source)
        for step in (0, 1):
            expected = release_numbers["batches"][f"{masks}, {source}, rank {rank}, step {step}"]
            assert of_batch(stream.batch_at(step).as_dict()) == expected, f"rank {rank}, step {step}"


@pytest.mark.usefixtures("same_bits", "one_thread")
@pytest.mark.parametrize("name", SMALLEST)
def test_training_gives_the_same_bits(name: str, data: Data, release_numbers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build_model(name, **SMALLEST[name])
    schedule = make_schedule(model, {phase.name: phase.critic_steps + 1 for phase in model.phases})
    learner = Learner(model, schedule, 0, ema_decay=0.9)
    stream = data.stream(64, 4, MASKS["center"])
    for step in range(schedule.total_steps):
        learner.step(step, stream.batch_at(step).as_dict())
    averages = {f"average.{key}": value for key, value in learner.ema.items()}
    assert of_tensors({**model.state_dict(), **averages}) == release_numbers["trainings"][name]


@pytest.mark.slow
def test_the_demo_is_scored_under_the_same_protocol(
    release_numbers: dict[str, Any], same_machine: bool, tmp_path: Path
) -> None:
    expected, recipe = release_numbers["demo"], load_recipe("demo")
    options = ShardOptions.from_mapping(recipe.data.model_dump())
    release_options = {key: value for key, value in expected["options"].items() if key != "shard_mb"}
    release_options |= {"max_shard_mb": expected["options"]["shard_mb"], "crop": "none"}  # was: keep
    assert release_options.items() <= dataclasses.asdict(options).items()
    shards, manifest = make_shards(recipe.data.source, tmp_path, options, recipe.data.partition_size)
    assert (manifest.digest, manifest.splits) == (expected["shards"], expected["splits"])

    method = {"mean_colour": baseline_methods()["mean_colour"]}
    evaluation = evaluate(method, split_photographs(shards, recipe.evaluate.split), recipe.evaluate)
    protocol = {key: value for key, value in evaluation.protocol.to_dict().items() if key != "versions"}
    assert json.loads(json.dumps(protocol)) == expected["protocol"]
    assert protocol_tags(evaluation.protocol) == expected["tags"]

    scores = evaluation.to_metrics("mean_colour")
    assert scores.keys() == expected["mean_colour"].keys()
    tolerance = 0 if same_machine else 1e-6
    differing = {
        name: (value, scores[name])
        for name, value in expected["mean_colour"].items()
        if not math.isclose(value, scores[name], rel_tol=tolerance)
    }
    assert differing == {}
