"""What the data benchmarks read: real photographs of the bundled kind, as many as are asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import cv2
import numpy as np

from data_prep.sources import Source, bundled_photo

PHOTOS = ("astronaut", "coffee", "hubble", "motorcycle", "china", "flower", "chelsea")
KINDS = 64  # different crops


class Crops(Source):
    """`count` JPEGs of 480 x 360 pixels cut from the bundled photographs; each has bytes of its own."""

    uri = "crops"

    def __init__(self, count: int) -> None:
        self.count = count

    def listing(self) -> Iterator[tuple[str, str]]:
        return ((f"{number:06d}.jpg", "") for number in range(self.count))

    def read(self, name: str) -> bytes:
        """The number stands behind the picture's end, where no decoder looks."""
        return _jpeg(int(name[:-4]) % KINDS) + name.encode()


@functools.cache
def _jpeg(kind: int) -> bytes:
    rng = np.random.default_rng(kind)
    photo = bundled_photo(PHOTOS[kind % len(PHOTOS)])
    top = int(rng.integers(max(1, photo.shape[0] - 360)))
    left = int(rng.integers(max(1, photo.shape[1] - 480)))
    crop = cv2.resize(photo[top : top + 360, left : left + 480], (480, 360))
    return cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
