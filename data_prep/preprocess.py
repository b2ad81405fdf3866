"""Preprocesses a photograph for storage in a shard and decodes it again: cropped, resized, encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import cv2
import numpy as np

from data_prep.images import MAX_PIXELS, PhotoError, decode_photo, image_suffix

MAX_ASPECT_RATIO = 16  # above it, an image is a strip and not a photograph

cv2.setNumThreads(1)  # there is one task per core


@dataclass(frozen=True)
class ShardOptions:
    """How photographs are stored: the short side becomes size + margin pixels."""

    size: int = 256
    """pixels of the training crop"""
    margin: int = 0
    """pixels of the short side beyond the crop, for random crops"""
    crop: Literal["none", "square"] = "none"
    """none keeps the aspect ratio; square cuts the centre square first"""
    format: Literal["jpg", "png", "original"] = "jpg"
    """original stores the files' own bytes; they are cropped and resized whenever they are read"""
    quality: int = 95
    """of the JPEGs, 1 to 100; colour is never subsampled"""
    val: float = 0.1
    """fraction of the photographs for validation"""
    test: float = 0.1
    """fraction of the photographs for the test set"""
    max_pixels: int = MAX_PIXELS
    """a photograph with more is rejected"""
    max_shard_mb: float = 256
    """maximum megabytes of a tar, unless a single photograph is larger"""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ShardOptions:
        """The options among `values`, which may have others too: a recipe's section or a command's arguments."""
        return cls(**{option.name: values[option.name] for option in fields(cls) if option.name in values})

    def __post_init__(self) -> None:
        rules = {
            "size": (self.size >= 8, "at least 8 pixels"),
            "margin": (self.margin >= 0, "0 or more pixels"),
            "crop": (self.crop in ("none", "square"), "none or square"),
            "format": (self.format in ("jpg", "png", "original"), "jpg, png or original"),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "val": (0 <= self.val < 1, "0 to below 1"),
            "test": (
                0 <= self.test < 1 and self.val + self.test < 1,
                "0 to below 1, and below 1 together with val",
            ),
            "max_pixels": (self.max_pixels > 0, "above 0"),
            "max_shard_mb": (self.max_shard_mb > 0, "megabytes, above 0"),
        }
        for name, (is_valid, rule) in rules.items():
            if not is_valid:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}: {rule}")


def preprocess(photo: np.ndarray, options: ShardOptions) -> np.ndarray:
    """A photograph uint8 [H,W,3] as it is stored or trained on: cropped, its short side size + margin pixels.

    Raises PhotoError if it is too small or too elongated.
    """
    target = options.size + options.margin
    height, width = photo.shape[:2]
    short_side = min(height, width)
    if max(height, width) > MAX_ASPECT_RATIO * short_side:
        raise PhotoError(
            f"a strip: {width} x {height} is longer than {MAX_ASPECT_RATIO} times its short side"
        )
    if short_side * 4 < target:
        raise PhotoError(
            f"too small: {width} x {height}; a quarter of {target} (data.size + data.margin) is the least"
        )
    if options.crop == "square":
        top, left = (height - short_side) // 2, (width - short_side) // 2
        photo = photo[top : top + short_side, left : left + short_side]
        height = width = short_side
    shape = max(target, round(height * target / short_side)), max(target, round(width * target / short_side))
    if shape != photo.shape[:2]:
        method = cv2.INTER_AREA if short_side > target else cv2.INTER_CUBIC
        photo = cv2.resize(photo, shape[::-1], interpolation=method)
    return photo


def encode_photo(data: bytes, options: ShardOptions) -> tuple[bytes, str, tuple[int, int]]:
    """(bytes to store of a file, their suffix, the (height, width) that they decode to)."""
    short_side = options.size + options.margin
    photo = preprocess(decode_photo(data, options.max_pixels, short_side=short_side), options)
    shape = photo.shape[:2]
    if options.format == "original":
        return data, image_suffix(data), shape  # type: ignore[return-value]
    jpeg_settings = [
        cv2.IMWRITE_JPEG_QUALITY,
        options.quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    bgr = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(f".{options.format}", bgr, jpeg_settings if options.format == "jpg" else [])[1]
    return encoded.tobytes(), options.format, shape  # type: ignore[return-value]


def decode_sample(data: bytes) -> np.ndarray:
    """A photograph stored as JPEG or PNG, as uint8 RGB [H,W,3]. Raises ValueError if it is damaged."""
    photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if photo is None:
        raise ValueError("a stored photograph cannot be decoded: the shards are damaged, rebuild them")
    return photo


def make_sample_decoder(options: ShardOptions) -> Callable[[bytes], np.ndarray]:
    """A function from bytes stored with these options to uint8 RGB [H,W,3], the short side size + margin pixels."""
    if options.format != "original":
        return decode_sample
    short_side = options.size + options.margin
    return lambda data: preprocess(decode_photo(data, options.max_pixels, short_side), options)
