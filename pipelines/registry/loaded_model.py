"""A loaded model that completes photographs of any usual type. torch is imported at the first completion: that takes
seconds, and registry look-ups do not need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from data_prep.canny import canny_edges
from data_prep.images import to_rgb
from data_prep.mask_reading import image_to_mask
from data_prep.mask_values import AmbiguousMask

if TYPE_CHECKING:
    import torch

    from pipelines.weights import CheckpointInfo


class ModelFacts:
    """A model as its record describes it: enough to check holes and to compute edges without its program."""

    name: str
    info: CheckpointInfo
    """Its recorded options and training settings."""
    check_hole: Callable[[torch.Tensor], None] | None
    """Takes the mask [1,1,H,W] and raises ValueError if the model cannot fill it; None: it fills every hole."""

    @property
    def needs_edges(self) -> bool:
        return bool(self.info.needs_edges)

    @property
    def takes_edges(self) -> bool:
        """Whether the model uses edges that a user draws inside the hole."""
        takes_edges = self.info.takes_edges
        return self.needs_edges if takes_edges is None else takes_edges

    @property
    def sigma(self) -> float | None:
        """Canny's sigma, in pixels, of the edges that it was trained on; None: not on record."""
        return None if self.info.sigma is None else float(self.info.sigma)

    @property
    def size(self) -> int | None:
        """Side of its training crops in pixels; None: not on record."""
        return self.info.size

    @property
    def resamples_hole(self) -> bool:
        """Whether it resamples the surroundings of a hole to its training size; False: also if its class is unknown."""
        from models import model_class

        try:
            return model_class(self.info.name).resamples_hole
        except ValueError:  # of another release, or of another project
            return False

    def edges_outside_hole(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Canny edges outside the hole at the model's sigma: bool [H,W]. ValueError: the sigma is not on record."""
        if self.sigma is None:
            raise ValueError(
                f"{self.name} takes edges, but its sigma is not on record: pass the edges yourself"
            )
        return canny_edges(image, self.sigma, mask=mask)

    def hole_error(self, hole: np.ndarray) -> str | None:
        """The reason why the model cannot fill the hole, bool [H,W]; None if it can."""
        try:
            if self.check_hole:
                import torch

                self.check_hole(torch.from_numpy(hole[None, None].astype(np.float32)))
        except ValueError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class VersionFacts(ModelFacts):
    """A registered version without its program."""

    name: str
    version: str
    info: CheckpointInfo
    check_hole: Callable[[torch.Tensor], None] | None = None


@dataclass(frozen=True, repr=False)
class LoadedModel(ModelFacts):
    """A model from the registry or a checkpoint folder; `complete` fills the hole of a photograph."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    """float32 [B,5,H,W] -> [B,3,H,W]."""
    name: str
    version: str | None
    """None for a checkpoint folder."""
    info: CheckpointInfo
    """Its recorded options and training settings."""
    check_hole: Callable[[torch.Tensor], None] | None = None
    """Takes the mask [1,1,H,W] and raises ValueError if the model cannot fill it; None: it fills every hole."""
    device: str = "cpu"
    aliases: tuple[str, ...] = ()
    """The version's aliases when it was loaded."""

    def __repr__(self) -> str:
        """One line: name, version, aliases, Canny's sigma, training size and device, as far as they are on record."""
        origin = f"version {self.version}" if self.version else "from a checkpoint folder"
        parts = (
            f"{self.name} {origin}" + (f" ({', '.join(self.aliases)})" if self.aliases else ""),
            "" if self.sigma is None else f"sigma {self.sigma:g}",
            "" if self.size is None else f"{self.size} px",
            self.device,
        )
        return f"LoadedModel({', '.join(filter(None, parts))})"

    def complete(self, image: Any, mask: Any, edge: Any = None) -> np.ndarray:
        """The completed photograph, uint8 [H,W,3]. Known pixels equal those of `image` converted to RGB.

        image: uint8 [H,W,3], or grey [H,W], RGBA (composited on white), 16-bit, bool, float in [0,1], or a PIL image.
        Pixels inside the hole are never read.
        mask [H,W]: 1 (or 255, or True) = hole.
        edge [H,W]: known edges outside the hole and a user's edges inside it; None: Canny edges outside the hole, and
        the model predicts those inside.
        ValueError: shapes differ, the mask covers everything, or the model cannot fill the hole.
        """
        image, hole = to_rgb_array(image), to_hole_mask(mask)
        if hole.shape != image.shape[:2]:
            raise ValueError(
                f"the mask is {_format_size(hole)}, the photograph {_format_size(image)}: they must be the same"
            )
        if not hole.any():
            return image.copy()
        if hole.all():
            raise ValueError(
                "the mask covers the whole photograph, so no known pixels are left: is it inverted?"
            )
        if edge is None:
            edges = self.edges_outside_hole(image, hole) if self.needs_edges else np.zeros_like(hole)
        else:
            edges = np.asarray(edge).reshape(np.shape(edge)[:2]) > 0
            if edges.shape != hole.shape:
                raise ValueError(
                    f"the edges are {_format_size(edges)}, the photograph {_format_size(image)}: they must be the same"
                )
        if reason := self.hole_error(hole):
            raise ValueError(reason)
        x = np.empty((1, 5, *hole.shape), np.float32)
        x[0, :3] = np.where(hole[..., None], 0, image).transpose(2, 0, 1) / np.float32(255)
        x[0, 3], x[0, 4] = hole, edges
        import torch

        with torch.inference_mode():
            y = self.forward(torch.from_numpy(x).to(self.device))[0].permute(1, 2, 0).cpu().numpy()
        return np.where(hole[..., None], np.round(y * 255).clip(0, 255).astype(np.uint8), image)


@dataclass(frozen=True)
class LoadedModelMethod:
    """Evaluates a loaded model as a method, with edges at the sigma that it was trained on."""

    model: LoadedModel

    @property
    def sigma(self) -> float | None:
        return self.model.sigma if self.model.needs_edges else None

    @property
    def uses_true_edges(self) -> bool:
        return bool(self.model.info.true_edges)

    def __call__(self, image: np.ndarray, mask: np.ndarray, edge: np.ndarray | None) -> np.ndarray:
        return self.model.complete(image, mask, edge)


def largest_training_size(models: Iterable[LoadedModel]) -> int:
    """The largest training size of the models in pixels; 256 if none is on record."""
    return max((model.size or 0 for model in models), default=0) or 256


def to_rgb_array(image: Any) -> np.ndarray:
    """uint8 RGB [H,W,3] from an array (see LoadedModel.complete) or a PIL image of any mode.

    ValueError: another shape, or values out of range.
    """
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"an array {np.shape(image)} is not a photograph: pass uint8 [H,W,3]")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257).astype(np.uint8)
    elif np.issubdtype(pixels.dtype, np.floating):
        if not (np.nanmin(pixels) >= 0 and np.nanmax(pixels) <= 1):
            raise ValueError("a photograph of floats must be in [0,1]; or pass uint8")
        pixels = np.round(np.nan_to_num(pixels) * 255).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"a photograph of {pixels.dtype} must be in 0..255; or pass uint8")
        pixels = pixels.astype(np.uint8)
    if pixels.shape[2] in (2, 4):  # alpha, on white
        alpha = pixels[..., -1:].astype(np.uint16)
        pixels = ((pixels[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def to_hole_mask(mask: Any) -> np.ndarray:
    """bool [H,W], True = hole, from a mask [H,W] or [H,W,1].

    1, 255 or True = hole, with a threshold at half the range. With class numbers, 0 and one other, the other one is the
    hole. PIL images are read like mask files. ValueError: it is ambiguous which value is the hole.
    """
    values = np.asarray(_read_mask_image(mask) if isinstance(mask, Image.Image) else mask)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise ValueError(f"an array {values.shape} is not a mask: pass [H,W], 1 = hole")
    hole = np.asarray(values >= (0.5 if values.size == 0 or values.max() <= 1 else 128))
    if values.dtype.kind in "iu" and values.any() and not hole.any():
        return _read_mask_image(Image.fromarray(values.astype(np.int32))) > 0
    return hole


def _read_mask_image(image: Image.Image) -> np.ndarray:
    try:
        return image_to_mask(image)
    except AmbiguousMask as error:
        raise ValueError(f"the mask: {error}; pass an array, 1 = hole") from None


def _format_size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
