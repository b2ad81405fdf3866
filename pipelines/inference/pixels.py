"""A photograph's values in the file's own type: conversion to model input, filling of the hole, other formats."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

COLOR_NAMES = {"grey": "grey", "rgb": "RGB", "cmyk": "CMYK", "ycbcr": "YCbCr", "lab": "CIE Lab"}
PILLOW_MODES = {"grey": "L", "rgb": "RGB", "cmyk": "CMYK", "ycbcr": "YCbCr", "lab": "LAB"}
COLOR_CHANNELS = {"grey": 1, "rgb": 3, "cmyk": 4, "ycbcr": 3, "lab": 3}
WHITE_QUANTILE = 0.99  # quantile of float values that decides their white point: highlights may lie above it
MAX_UINT16 = 65535
UINT16_TO_UINT8 = ((np.arange(MAX_UINT16 + 1) + 128) // 257).astype(np.uint8)  # nearest 8-bit values
QUANTILE_SAMPLES = 1 << 20  # evenly spaced values from which the quantile is taken


@dataclass
class Pixels:
    """Values [H,W,C], upright: color channels, then extra channels."""

    values: np.ndarray
    """bool (grey only), uint8, uint16, or any other numeric type of a TIFF."""
    color_space: str
    """grey, rgb, cmyk, ycbcr or lab."""
    extra_channels: tuple[str, ...] = ()
    """The channels after the colors: alpha, premultiplied (alpha already multiplied into the colors) or other."""
    black: float = 0.0
    white: float = 1.0
    """The values of black and white."""

    def __post_init__(self) -> None:
        if len(self.extra_channels) + COLOR_CHANNELS[self.color_space] != self.values.shape[2]:
            raise ValueError(
                f"{self.values.shape[2]} channels do not make a {COLOR_NAMES[self.color_space]} photograph"
            )
        self.fit_range(None)

    @property
    def _colors(self) -> np.ndarray:
        return self.values[..., : COLOR_CHANNELS[self.color_space]]

    @property
    def alpha_index(self) -> int | None:
        """Index of the alpha channel; None if there is none."""
        for number, name in enumerate(self.extra_channels, start=COLOR_CHANNELS[self.color_space]):
            if name != "other":
                return number
        return None

    @property
    def has_open_range(self) -> bool:
        """Whether the data type does not define white."""
        return self.values.dtype not in (np.bool_, np.uint8, np.uint16)

    def fit_range(self, known: np.ndarray | None) -> None:
        """Set black and white: from the data type or, for open ranges, from the known pixels (bool [H,W]; None: all)."""
        if not self.has_open_range:
            is_bool = self.values.dtype == np.bool_
            self.black, self.white = 0.0, 1.0 if is_bool else float(np.iinfo(self.values.dtype).max)
            return
        colors = self._colors if known is None else self._colors[known]
        colors = colors[np.isfinite(colors)].astype(np.float64)
        low, high = (float(colors.min()), float(colors.max())) if colors.size else (0.0, 1.0)
        self.black, self.white = low, high
        if self.values.dtype.kind == "f":
            sample = colors[:: colors.size // QUANTILE_SAMPLES + 1]
            white_values = (1.0, 255.0)
            white_level = float(np.quantile(sample, WHITE_QUANTILE)) if sample.size else 0.0
        else:
            white_values, white_level = (255.0, 65535.0), high
        white = next((value for value in white_values if low >= 0 and white_level <= value), None)
        if white is not None:
            self.black, self.white = 0.0, white
        elif low == high:
            self.white = low + 1

    def model_rgb(self) -> np.ndarray:
        """uint8 RGB [H,W,3], composed on white: the model's input."""
        colors = self._to_uint8(self._colors)
        if self.alpha_index is None:
            return self._colors_to_rgb(colors)
        alpha = self._to_uint8(self.values[..., self.alpha_index], is_alpha=True)
        if "premultiplied" in self.extra_channels:
            colors = _divide_by_alpha(colors, alpha)
        rgba = Image.fromarray(np.dstack([self._colors_to_rgb(colors), alpha]))
        white = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))

    def with_filled_hole(self, rgb: np.ndarray, hole: np.ndarray) -> Pixels:
        """A copy with `rgb` (uint8 [H,W,3]) in the hole (bool [H,W]), opaque there; all other values unchanged."""
        result = replace(self, values=self.values.copy())
        result.black, result.white = self.black, self.white
        if self.values.dtype == np.bool_:
            gray = np.where(hole, cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8(255) * self.values[..., 0])
            dithered = np.asarray(Image.fromarray(gray).convert("1"))
            result.values[hole, 0] = dithered[hole]
            return result
        colors = self._rgb_to_colors(rgb[hole], hole)
        result.values[hole, : colors.shape[1]] = self._from_uint8(colors)
        if self.alpha_index is not None:
            result.values[hole, self.alpha_index] = self._max_alpha(~hole)
        return result

    def flatten_on_white(self) -> Pixels:
        """Composed on white, 8 bits per channel: grey, RGB, or CMYK without extra channels."""
        if self.color_space == "cmyk" and self.alpha_index is None:
            return Pixels(np.ascontiguousarray(self._to_uint8(self._colors)), "cmyk")
        rgb = self.model_rgb()
        return Pixels(rgb[..., :1].copy(), "grey") if self.color_space == "grey" else Pixels(rgb, "rgb")

    def to_rgb(self) -> Pixels:
        """CMYK, YCbCr or Lab as RGB, 8 bits per channel; alpha is kept."""
        colors = self._colors_to_rgb(self._to_uint8(self._colors))
        if self.alpha_index is None:
            return Pixels(colors, "rgb")
        alpha = self._to_uint8(self.values[..., self.alpha_index], is_alpha=True)
        return Pixels(
            np.dstack([colors, alpha]),
            "rgb",
            (self.extra_channels[self.alpha_index - COLOR_CHANNELS[self.color_space]],),
        )

    def to_uint16(self) -> tuple[Pixels, bool]:
        """Values of an open range as uint16, and whether they are unchanged (else they are scaled)."""
        low, high = float(np.nanmin(self._colors)), float(np.nanmax(self._colors))
        if self.values.dtype.kind in "ui" and low >= 0 and high <= 65535 and not self.extra_channels:
            pixels = Pixels(self.values.astype(np.uint16), self.color_space)
            pixels.white = self.white
            return pixels, True
        colors = np.clip(_normalize(self._colors, self.black, self.white), 0, 1) * 65535
        channels = [np.round(colors)]
        if self.alpha_index is not None:
            alpha = _normalize(self.values[..., self.alpha_index], 0, self._max_alpha(None))
            channels.append(np.round(np.clip(alpha, 0, 1) * 65535)[..., None])
        values = np.concatenate(channels, axis=2).astype(np.uint16)
        extra_channels = (
            ()
            if self.alpha_index is None
            else (self.extra_channels[self.alpha_index - COLOR_CHANNELS[self.color_space]],)
        )
        return Pixels(values, self.color_space, extra_channels), False

    def unpremultiply(self) -> Pixels:
        """Divide premultiplied colors by alpha (uint8 or uint16)."""
        if "premultiplied" not in self.extra_channels or self.alpha_index is None:
            return self
        max_value = np.iinfo(self.values.dtype).max
        alpha = self.values[..., self.alpha_index, None].astype(np.float64)
        colors = np.round(np.minimum(self._colors * (max_value / np.maximum(alpha, 1)), max_value)).astype(
            self.values.dtype
        )
        return Pixels(np.dstack([colors, self.values[..., self.alpha_index]]), self.color_space, ("alpha",))

    def drop_other_channels(self) -> Pixels:
        """Only the color channels and alpha."""
        if "other" not in self.extra_channels:
            return self
        indices = [
            *range(COLOR_CHANNELS[self.color_space]),
            *([] if self.alpha_index is None else [self.alpha_index]),
        ]
        extra_channels = tuple(name for name in self.extra_channels if name != "other")[:1]
        result = replace(
            self, values=np.ascontiguousarray(self.values[..., indices]), extra_channels=extra_channels
        )
        result.black, result.white = self.black, self.white
        return result

    def _to_uint8(self, values: np.ndarray, is_alpha: bool = False) -> np.ndarray:
        """The values scaled to uint8, same shape."""
        if values.dtype == np.uint8:
            return values
        if values.dtype == np.bool_:
            return values.astype(np.uint8) * np.uint8(255)
        if values.dtype == np.uint16 and self.white == MAX_UINT16:
            return np.asarray(UINT16_TO_UINT8[values])
        black, white = (0.0, self._max_alpha(None)) if is_alpha else (self.black, self.white)
        normalized = _normalize(values, black, white)
        return np.asarray(np.clip(normalized * 255 + 0.5, 0, 255).astype(np.uint8))

    def _from_uint8(self, uint8_values: np.ndarray) -> np.ndarray:
        """uint8 values scaled to this photograph's range; the inverse of `_to_uint8`."""
        if self.values.dtype == np.uint8:
            return uint8_values
        values = self.black + uint8_values * ((self.white - self.black) / 255)
        return values if self.values.dtype.kind == "f" else np.round(values)

    def _max_alpha(self, known: np.ndarray | None) -> float:
        if not self.has_open_range or self.alpha_index is None:
            return self.white
        alpha = (
            self.values[..., self.alpha_index] if known is None else self.values[known][:, self.alpha_index]
        )
        max_alpha = float(np.nanmax(alpha, initial=0))
        return 1.0 if max_alpha <= 1 else max_alpha

    def _colors_to_rgb(self, uint8_values: np.ndarray) -> np.ndarray:
        """uint8 RGB [H,W,3] of uint8 values in this color space."""
        if self.color_space == "rgb":
            return np.ascontiguousarray(uint8_values)
        if self.color_space == "grey":
            return np.repeat(uint8_values, 3, axis=2)
        return np.asarray(_pillow_image(PILLOW_MODES[self.color_space], uint8_values).convert("RGB"))

    def _rgb_to_colors(self, rgb: np.ndarray, hole: np.ndarray) -> np.ndarray:
        """uint8 [N,C] in this color space of uint8 RGB [N,3]."""
        if self.color_space == "rgb" or not len(rgb):
            return rgb
        if self.color_space == "grey":
            return cv2.cvtColor(rgb[None], cv2.COLOR_RGB2GRAY)[0][:, None]
        if self.color_space == "cmyk":
            return _rgb_to_cmyk(rgb, self._to_uint8(self._colors[~hole]))
        image = Image.fromarray(rgb[None]).convert(PILLOW_MODES[self.color_space])
        return np.frombuffer(image.tobytes(), np.uint8).reshape(len(rgb), -1)


def _normalize(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Scale values to 0 at black and 1 at white; NaN becomes black."""
    float_values: np.ndarray = np.asarray(values, np.float64 if values.itemsize > 2 else np.float32)
    normalized = (float_values - black) / (white - black)
    return (
        np.nan_to_num(normalized, nan=0.0, posinf=1.0, neginf=0.0) if values.dtype.kind == "f" else normalized
    )


def _divide_by_alpha(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    divided = colors.astype(np.uint16) * 255 // np.maximum(alpha, 1)[..., None]
    return np.minimum(divided, 255).astype(np.uint8)


def _rgb_to_cmyk(rgb: np.ndarray, known: np.ndarray) -> np.ndarray:
    """uint8 CMYK [N,4] that Pillow converts back to `rgb`, with the fraction of black ink of the known pixels [M,4]."""
    complements = 255 - known.astype(np.float64)
    darkness = 255 - complements[:, :3].max(axis=1, initial=0) * complements[:, 3] / 255
    black_fraction = (
        min(1.0, known[:, 3].mean() / darkness.mean()) if len(known) and darkness.mean() > 0 else 0.0
    )
    rgb_float = rgb.astype(np.float64)
    lightness = rgb_float.max(axis=1, keepdims=True)
    black = np.round(black_fraction * (255 - lightness))
    inks = np.round(255 - 255 * rgb_float / np.maximum(255 - black, 1))
    return np.clip(np.concatenate([inks, black], axis=1), 0, 255).astype(np.uint8)


def _pillow_image(mode: str, uint8_values: np.ndarray) -> Image.Image:
    """A Pillow image in a mode that Image.fromarray does not infer."""
    return Image.frombytes(
        mode, (uint8_values.shape[1], uint8_values.shape[0]), np.ascontiguousarray(uint8_values).tobytes()
    )
