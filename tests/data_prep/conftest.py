from __future__ import annotations

import cv2
import numpy as np
import pytest

from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, write_partition_tars
from data_prep.sources import open_source
from data_prep.storage import open_storage


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 23 smooth colour images of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for number in range(23):
        height, width = rng.integers(40, 90, 2).tolist()
        coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"photo {number:02d}.png"), image)
    return folder


@pytest.fixture(scope="session")
def shards(photos, tmp_path_factory):
    """The photographs as shards: 32 + 4 pixels, at most five per partition, nearly all in the train split."""
    out = open_storage(tmp_path_factory.mktemp("shards"))
    source, options = open_source(str(photos)), ShardOptions(size=32, margin=4, format="png", val=0.2, test=0)
    names = source.names()
    results = [
        write_partition_tars(source, names[i : i + 5], i // 5, out, options) for i in range(0, len(names), 5)
    ]
    merge_partitions(results, options, source.uri, out)
    return out
