"""A model ready to complete photographs: from the registry (its exported program) or from a checkpoint folder."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.pytorch
import numpy as np
import torch
import yaml
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model as ModelFile
from PIL import Image, ImageOps
from torch import Tensor

from data_prep.canny import canny_edges
from data_prep.sources import to_rgb
from models import build_model, model_type
from models.base import Model
from pipelines.errors import in_a_line
from pipelines.registry.program import PROGRAM, clean_program
from pipelines.registry.versions import FORMS, RegistryError, connected, fetch, find_version
from pipelines.training.weights import DESCRIPTION, WEIGHTS, load_weights

SAFE = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
}


@dataclass(frozen=True)
class LoadedModel:
    """`complete` takes photographs as they come; the rest says what the model is."""

    program: Callable[[Tensor], Tensor]
    """float32 [B,5,H,W] -> [B,3,H,W]."""
    name: str
    version: str | None
    """None for a checkpoint folder."""
    metadata: dict[str, Any] = field(default_factory=dict)
    check_hole: Callable[[Tensor], None] | None = None
    """Takes the mask [1,1,H,W]; ValueError when the model cannot fill it."""
    device: str = "cpu"

    @property
    def needs_edges(self) -> bool:
        return bool(self.metadata.get("needs_edges"))

    @property
    def takes_edges(self) -> bool:
        """Whether a person may draw edges inside the hole."""
        return bool(self.metadata.get("takes_edges", self.needs_edges))

    @property
    def sigma(self) -> float | None:
        """Canny's sigma of the edges it was trained on."""
        value = self.metadata.get("sigma")
        return None if value is None else float(value)

    @property
    def size(self) -> int | None:
        """Side of its training crops in pixels."""
        value = self.metadata.get("size")
        return None if value is None else int(value)

    def known_edges(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Canny's edges outside the hole, at the model's sigma: bool [H,W]. ValueError when that is not on record."""
        if self.sigma is None:
            raise ValueError(
                f"{self.name} takes edges, but its sigma is not on record: give the edges yourself"
            )
        return canny_edges(image, self.sigma, mask=mask)

    def refuses(self, hole: np.ndarray) -> str | None:
        """Why the model cannot fill a hole, bool [H,W]; None when it can."""
        try:
            if self.check_hole:
                self.check_hole(torch.from_numpy(hole[None, None].astype(np.float32)))
        except ValueError as error:
            return str(error)
        return None

    def complete(self, image: Any, mask: Any, edge: Any = None) -> np.ndarray:
        """The completed photograph, uint8 [H,W,3]; known pixels are bit for bit those of `image` in RGB.

        image: uint8 [H,W,3], or grey [H,W], RGBA (laid on white), 16-bit, bool, float in [0,1], or a PIL image.
        mask [H,W]: 1 (or 255, or True) = hole. edge [H,W]: outside the hole the known edges, inside it what a
        person drew; None: Canny outside the hole, and the model draws inside. What the hole holds is never read.
        ValueError in one line: shapes that do not go together, nothing known, a hole that the model cannot fill.
        """
        image, hole = as_rgb(image), as_hole(mask)
        if hole.shape != image.shape[:2]:
            raise ValueError(
                f"the mask is {_size(hole)}, the photograph {_size(image)}: they must be the same"
            )
        if not hole.any():
            return image.copy()
        if hole.all():
            raise ValueError(
                "the mask covers the whole photograph: nothing known is left to go by; is it inverted?"
            )
        if edge is None:
            edges = self.known_edges(image, hole) if self.needs_edges else np.zeros_like(hole)
        else:
            edges = np.asarray(edge).reshape(np.shape(edge)[:2]) > 0
            if edges.shape != hole.shape:
                raise ValueError(
                    f"the edges are {_size(edges)}, the photograph {_size(image)}: they must be the same"
                )
        if refusal := self.refuses(hole):
            raise ValueError(refusal)
        x = np.empty((1, 5, *hole.shape), np.float32)
        x[0, :3] = np.where(hole[..., None], 0, image).transpose(2, 0, 1) / np.float32(255)
        x[0, 3], x[0, 4] = hole, edges
        with torch.inference_mode():
            y = self.program(torch.from_numpy(x).to(self.device))[0].permute(1, 2, 0).cpu().numpy()
        return np.where(hole[..., None], np.round(y * 255).clip(0, 255).astype(np.uint8), image)


def load_model(uri: str | Path, *, tracking_uri: str | None = None, device: str = "cpu") -> LoadedModel:
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint folder (model.safetensors and model.json).

    Nothing is unpickled, and no code comes with a model. RegistryError in one line: no such name, alias or version
    (with those there are), a server that does not answer, a damaged checkpoint, an address of another form.
    """
    text = str(uri)
    if text.startswith("models:"):
        return _load_version(text, tracking_uri, device)
    if Path(text).is_dir():
        return _load_checkpoint(Path(text), device)
    raise RegistryError(f"{text!r} is no model: {FORMS}")


def _load_version(uri: str, tracking_uri: str | None, device: str) -> LoadedModel:
    with connected(tracking_uri) as client, safely():
        version = find_version(client, uri)
        with tempfile.TemporaryDirectory(prefix="inpaint-model-") as folder:
            try:
                described, program = load_program(version, folder, device)
            except RegistryError:
                raise
            except (OSError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError) as error:
                raise RegistryError(
                    f"{uri} (version {version.version}) cannot be read from {version.source}: {_line(error)}"
                ) from error
    metadata = dict(described.metadata or {})
    return LoadedModel(program, version.name, str(version.version), metadata, _checker(metadata), device)


def load_program(version: ModelVersion, folder: str, device: str = "cpu") -> tuple[ModelFile, Any]:
    """A version's description and its program, downloaded to `folder`; within `connected` and `safely`.

    RegistryError in one line, before anything is loaded: files that hold, or name, more than an exported program.
    """
    for part in ("MLmodel", "data"):  # its checkpoint is as large again, and not needed
        fetch(version, part, folder)
    try:
        described = ModelFile.load(folder)
        flavor = described.flavors["pytorch"]
        if flavor.get("code") or flavor.get("model_data") != "data":  # MLflow would import from there
            raise ValueError("its MLmodel names code or files of its own")
        if others := sorted({path.name for path in Path(folder, "data").iterdir()} - {PROGRAM}):
            raise ValueError(f"it holds {others[0]}: a pickled model, or code")
        clean_program(Path(folder, "data", PROGRAM))
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, FileNotFoundError) as error:
        raise RegistryError(
            f"{version.name} version {version.version} is refused, no exported program alone: {_line(error)}"
        ) from error
    return described, mlflow.pytorch.load_model(folder, device=device)


def _load_checkpoint(folder: Path, device: str) -> LoadedModel:
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise RegistryError(f"{folder} is no checkpoint folder: it has no {name}")
    try:
        model, metadata = load_weights(folder)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RegistryError(f"the checkpoint {folder} cannot be loaded: {_line(error)}") from error
    edges = {name: getattr(model, name) for name in ("needs_edges", "takes_edges", "true_edges")}
    metadata |= {"model": model.name, **edges}
    module = model.completion().to(device).eval()
    return LoadedModel(module, model.name, None, metadata, model.check_hole, device)


def _checker(metadata: dict[str, Any]) -> Callable[[Tensor], None] | None:
    """The model's own check of a hole: it needs the model's options, not its weights."""
    try:
        if model_type(metadata["model"]).check_hole is Model.check_hole:
            return None  # it takes any
        with torch.device("meta"):
            model: Model = build_model(metadata["model"], **metadata.get("options", {}))
    except (KeyError, TypeError, ValueError) as error:  # registered by another release of this project
        logging.getLogger(__name__).warning("holes are not checked beforehand: %s", _line(error))
        return None
    return model.check_hole


def as_rgb(image: Any) -> np.ndarray:
    """uint8 RGB [H,W,3] of an array or a PIL image of any mode; ValueError when it is neither."""
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"an array {np.shape(image)} is no photograph: give uint8 [H,W,3]")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257).astype(np.uint8)
    elif np.issubdtype(pixels.dtype, np.floating):
        if not (np.nanmin(pixels) >= 0 and np.nanmax(pixels) <= 1):
            raise ValueError("a photograph of floats must be in [0,1]; or give uint8")
        pixels = np.round(np.nan_to_num(pixels) * 255).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"a photograph of {pixels.dtype} must be in 0..255; or give uint8")
        pixels = pixels.astype(np.uint8)
    if pixels.shape[2] in (2, 4):  # alpha, on white
        alpha = pixels[..., -1:].astype(np.uint16)
        pixels = ((pixels[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def as_hole(mask: Any) -> np.ndarray:
    """bool [H,W] of a mask [H,W] or [H,W,1], 1, 255 or True = hole (anything between is cut at half)."""
    values = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise ValueError(f"an array {values.shape} is no mask: give [H,W], 1 = hole")
    return values >= (0.5 if values.size == 0 or values.max() <= 1 else 128)


@contextmanager
def safely() -> Iterator[None]:
    """Has MLflow and torch unpickle nothing but tensors, and run no code that comes with a model."""
    before = {key: os.environ.get(key) for key in SAFE}
    os.environ.update(SAFE)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                os.environ.pop(key)
            else:
                os.environ[key] = old


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _line(error: BaseException) -> str:
    return in_a_line(error)[:300]
