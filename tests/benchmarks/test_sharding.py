"""Sharding against a bare loop that decodes, resizes and encodes the same photographs; two workers against one; and a
worker's peak memory after a thousand and after fifty thousand photographs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray
from photographs import Crops

from data_prep.preprocess import ShardOptions
from data_prep.shards import write_partition_tars
from data_prep.storage import open_storage
from pipelines.data.shard_tasks import shard_photographs

OPTIONS = ShardOptions(size=256)
MANY_PHOTOS, FEW_PHOTOS = 50_000, 1_000


def best_seconds(call: Callable[[], object], repeats: int = 4) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.benchmark
def test_one_worker_against_a_bare_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.setNumThreads(1)
    source = Crops(500)
    names = source.names()
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]

    def bare() -> None:
        for name in names:
            photo = cv2.imdecode(np.frombuffer(source.read(name), np.uint8), cv2.IMREAD_COLOR)
            cv2.imencode(".jpg", cv2.resize(photo, (341, 256), interpolation=cv2.INTER_AREA), settings)

    ours = best_seconds(lambda: write_partition_tars(source, names, 0, open_storage(tmp_path), OPTIONS))
    theirs = best_seconds(bare)
    with capsys.disabled():
        print(f"\nSharding, one core: {500 / ours:.0f} photographs/s, bare loop {500 / theirs:.0f}/s")
        print(f"ratio {theirs / ours:.2f}")
    assert theirs / ours >= 0.85


@pytest.mark.benchmark
def test_two_workers_against_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    source = Crops(4000)
    for name in source.names():
        (folder / name).write_bytes(source.read(name))
    seconds = {}
    for workers in (1, 2, 1, 2):
        with ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False):
            warm_up = open_storage(tmp_path / f"warm-{workers}-{len(seconds)}")
            shard_photographs(str(folder), warm_up, OPTIONS, 125, lambda *_: None)  # starts the workers
            out = open_storage(tmp_path / f"out-{workers}-{len(seconds)}")
            duration = best_seconds(
                lambda out=out: shard_photographs(str(folder), out, OPTIONS, 125, lambda *_: None), 1
            )
            seconds[workers] = min(seconds.get(workers, duration), duration)
            warm_up.delete_tree("partitions")
    ratio = seconds[1] / seconds[2]
    with capsys.disabled():
        print(
            f"\nSharding 4000 photographs: one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s, {ratio:.2f}"
        )
    assert ratio >= 1.7


WORKER_SCRIPT = r"""
import re, sys
from photographs import Crops
from data_prep.preprocess import ShardOptions
from data_prep.shards import write_partition_tars
from data_prep.storage import open_storage
count, folder = int(sys.argv[1]), sys.argv[2]
source, out = Crops(count), open_storage(folder)
names = source.names()
for number in range(count // 1000):
    result = write_partition_tars(source, names[number::count // 1000], number, out, ShardOptions(size=256))
    for entry in result.shards:
        out.delete(entry.name)
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
def test_peak_memory_of_a_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {}
    for count in (FEW_PHOTOS, MANY_PHOTOS):
        command = [sys.executable, "-c", WORKER_SCRIPT, str(count), str(tmp_path)]
        process = subprocess.run(
            command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
        )
        peaks[count] = int(process.stdout) / 1024
    with capsys.disabled():
        print(
            f"\nA sharding worker's peak memory: {peaks[FEW_PHOTOS]:.0f} MB after {FEW_PHOTOS} photographs,",
            end=" ",
        )
        print(f"{peaks[MANY_PHOTOS]:.0f} MB after {MANY_PHOTOS}")
    assert peaks[MANY_PHOTOS] < 400
    assert peaks[MANY_PHOTOS] < 1.1 * peaks[FEW_PHOTOS]
