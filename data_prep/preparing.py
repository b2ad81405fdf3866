"""A photograph as it is stored in a shard and read from it again: cropped, resized, encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import cv2
import numpy as np

from data_prep.sources import MAX_PIXELS, PhotoError, decode_photo, suffix_of

LONGEST = 16  # a photograph more elongated than this is a strip, not a photograph

cv2.setNumThreads(1)  # a slice is one task's work; tasks run side by side


@dataclass(frozen=True)
class ShardOptions:
    """How photographs are stored: the short side becomes size + margin pixels."""

    size: int = 256
    """pixels: the training crop"""
    margin: int = 0
    """pixels more than the crop, for random crops"""
    crop: Literal["keep", "square"] = "keep"
    """keep the aspect, or cut the centre square first"""
    format: Literal["jpg", "png", "original"] = "jpg"
    """original keeps the files' own bytes; they are cropped and resized whenever they are read"""
    quality: int = 95
    """of the JPEGs, 1 to 100; colour is never subsampled"""
    val: float = 0.1
    """share of the photographs that validate"""
    test: float = 0.1
    """share of the photographs that are held out"""
    max_pixels: int = MAX_PIXELS
    """a photograph with more is rejected"""
    shard_mb: float = 256
    """megabytes of a tar at most, unless one photograph alone has more"""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> ShardOptions:
        """Those that `told` names, which may name more: a recipe's section, a manifest's options, a command's."""
        return cls(**{option.name: told[option.name] for option in fields(cls) if option.name in told})

    def __post_init__(self) -> None:
        rules = {
            "size": (self.size >= 8, "at least 8 pixels"),
            "margin": (self.margin >= 0, "0 or more pixels"),
            "crop": (self.crop in ("keep", "square"), "keep or square"),
            "format": (self.format in ("jpg", "png", "original"), "jpg, png or original"),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "val": (0 <= self.val < 1, "0 to below 1"),
            "test": (
                0 <= self.test < 1 and self.val + self.test < 1,
                "0 to below 1, and below 1 together with val",
            ),
            "max_pixels": (self.max_pixels > 0, "above 0"),
            "shard_mb": (self.shard_mb > 0, "megabytes, above 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}: {rule}")


def prepare(photo: np.ndarray, options: ShardOptions) -> np.ndarray:
    """A photograph uint8 [H,W,3] as it is stored or trained on: cropped, its short side size + margin pixels.

    Raises PhotoError for what is too small or too long.
    """
    target = options.size + options.margin
    height, width = photo.shape[:2]
    short = min(height, width)
    if max(height, width) > LONGEST * short:
        raise PhotoError(f"a strip: {width} x {height} is longer than {LONGEST} times its short side")
    if short * 4 < target:
        raise PhotoError(
            f"too small: {width} x {height}; a quarter of {target} (data.size + data.margin) is the least"
        )
    if options.crop == "square":
        top, left = (height - short) // 2, (width - short) // 2
        photo = photo[top : top + short, left : left + short]
        height = width = short
    shape = max(target, round(height * target / short)), max(target, round(width * target / short))
    if shape != photo.shape[:2]:
        method = cv2.INTER_AREA if short > target else cv2.INTER_CUBIC
        photo = cv2.resize(photo, shape[::-1], interpolation=method)
    return photo


def encode(data: bytes, options: ShardOptions) -> tuple[bytes, str, tuple[int, int]]:
    """What is stored of a file, its suffix, and the (height, width) that it is read with."""
    photo = prepare(decode_photo(data, options.max_pixels, short_side=options.size + options.margin), options)
    shape = photo.shape[:2]
    if options.format == "original":
        return data, suffix_of(data), shape  # type: ignore[return-value]
    settings = [
        cv2.IMWRITE_JPEG_QUALITY,
        options.quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    bgr = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(f".{options.format}", bgr, settings if options.format == "jpg" else [])[1]
    return encoded.tobytes(), options.format, shape  # type: ignore[return-value]


def decode_sample(data: bytes) -> np.ndarray:
    """A photograph stored as JPEG or PNG, as uint8 RGB [H,W,3]. ValueError when it is damaged."""
    photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if photo is None:
        raise ValueError("a stored photograph cannot be decoded: the shards are damaged, make them again")
    return photo


def sample_decoder(manifest: Mapping[str, Any]) -> Callable[[bytes], np.ndarray]:
    """What makes uint8 RGB [H,W,3], the short side size + margin pixels, of these shards' stored bytes."""
    options = ShardOptions.of(manifest["options"])
    if options.format != "original":
        return decode_sample
    short_side = options.size + options.margin
    return lambda data: prepare(decode_photo(data, options.max_pixels, short_side), options)
