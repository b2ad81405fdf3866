"""A source with any number of crops of the bundled photographs, for the data benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import cv2
import numpy as np

from data_prep.left_out import LeftOut
from data_prep.sources import PhotoSource, bundled_photo

PHOTOS = ("astronaut", "coffee", "hubble", "motorcycle", "china", "flower", "chelsea")
DISTINCT_CROPS = 64


class Crops(PhotoSource):
    """`count` JPEGs of 480 x 360 pixels cropped from the bundled photographs, all with different bytes."""

    uri = "crops"

    def __init__(self, count: int) -> None:
        self.count = count

    def list_photos(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
        return ((f"{number:06d}.jpg", "") for number in range(self.count))

    def read(self, name: str) -> bytes:
        """The name is appended to the JPEG, where decoders ignore it, to make the bytes unique."""
        return _jpeg(int(name[:-4]) % DISTINCT_CROPS) + name.encode()


@functools.cache
def _jpeg(crop_index: int) -> bytes:
    rng = np.random.default_rng(crop_index)
    photo = bundled_photo(PHOTOS[crop_index % len(PHOTOS)])
    top = int(rng.integers(max(1, photo.shape[0] - 360)))
    left = int(rng.integers(max(1, photo.shape[1] - 480)))
    crop = cv2.resize(photo[top : top + 360, left : left + 480], (480, 360))
    return cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
