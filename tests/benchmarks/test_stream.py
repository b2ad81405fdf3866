"""The stream beside a bare loop that decodes the same JPEGs one by one. `make bench` prints the ratios."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.shards import ShardOptions, assemble, read_index, write_slice
from data_prep.sources import bundled_photo
from data_prep.storage import open_storage
from data_prep.stream import Stream

SIZE, BATCH = 256, 16


class Crops:
    """256 crops of 272 to 400 pixels of the bundled photographs."""

    uri = "crops"

    def read(self, name: str) -> bytes:
        rng = np.random.default_rng(int(name))
        photo = bundled_photo(("astronaut", "coffee", "hubble", "motorcycle")[int(name) % 4])
        side = int(rng.integers(272, 400))
        top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
        return cv2.imencode(".png", photo[top : top + side, left : left + side])[1].tobytes()

    def group(self, name: str) -> None:
        return None


@pytest.mark.benchmark
def test_stream_against_a_bare_decoding_loop(tmp_path, capsys):
    cv2.setNumThreads(1)
    shards, edges = open_storage(tmp_path / "shards"), open_storage(tmp_path / "edges")
    options = ShardOptions(size=SIZE, margin=16, val=0, test=0)
    parts = [
        write_slice(Crops(), [str(n) for n in range(start, start + 64)], start // 64, shards, options)
        for start in range(0, 256, 64)
    ]
    manifest = assemble(parts, options, "crops", shards)
    made = [write_edge_shard(shards, entry, 2.0, edges) for entry in manifest["shards"]]
    assemble_edges(made, 2.0, manifest["digest"], edges)

    def bare() -> int:
        count = 0
        for entry in manifest["shards"]:
            index, tar = read_index(shards, entry["name"]), shards.read(entry["name"])
            for offset, size in zip(index["offsets"], index["sizes"]):
                cv2.imdecode(np.frombuffer(tar, np.uint8, size, offset), cv2.IMREAD_COLOR_RGB)
                count += 1
        return count

    def stream(**changes) -> int:
        made = Stream(shards, "train", size=SIZE, batch=BATCH, streams=2, **{"masks": "center", **changes})
        return sum(len(batch["keys"]) for batch in made.batches(0, 256 // BATCH))

    cases = {
        "bare decoding loop": bare,
        "stream, centre masks": stream,
        "stream, box and brush": lambda: stream(masks="box_and_brush"),
        "stream, stored edges": lambda: stream(edges={2.0: edges}, edge_source="full"),
        "stream, masked edges": lambda: stream(edge_source="masked"),
        "stream, stored edges, 2 threads": lambda: stream(edges={2.0: edges}, edge_source="full", threads=2),
    }
    rates = {}
    for _ in range(5):
        for name, call in cases.items():
            start = time.perf_counter()
            count = call()
            rates[name] = max(rates.get(name, 0), count / (time.perf_counter() - start))
    base = rates["bare decoding loop"]
    with capsys.disabled():
        print(f"\nPhotographs a second, {SIZE} px crops of JPEGs")
        for name, rate in rates.items():
            print(f"{name:34s} {rate:8.0f} {rate / base:6.2f} of the bare loop")
    assert (
        rates["stream, centre masks"] > 0.3 * base
    )  # which neither reads, crops, nor makes floats and masks
