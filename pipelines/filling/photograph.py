"""A photograph's file: read in any mode, written back with nothing changed but the hole."""

from __future__ import annotations

import io
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from data_prep.sources import PhotoError, decode_photo, has_alpha

LOSSLESS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
LOSSY = {".jpg": "JPEG", ".jpeg": "JPEG"}
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # what EXIF's orientations ask for
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class Photograph:
    """What the model sees, and what of the file must be kept beside it."""

    rgb: np.ndarray
    """uint8 [H,W,3], upright, transparency on white."""
    stored: np.ndarray
    """What is written where nothing is filled: uint8 [H,W] or [H,W,2 to 4], or uint16 [H,W] (grey of 16 bits)."""
    turn: Image.Transpose | None = None
    """How the file's pixels were turned to be upright."""
    profile: bytes | None = None
    notes: list[str] = field(default_factory=list)

    def completed(self, filled: np.ndarray, hole: np.ndarray) -> np.ndarray:
        """`stored` with `filled` (uint8 RGB [H,W,3]) in the hole, which becomes opaque."""
        out = self.stored.copy()
        colour = filled[hole]
        if out.ndim == 3 and out.shape[2] >= 3:
            out[..., :3][hole] = colour
        else:
            grey = cv2.cvtColor(colour[None], cv2.COLOR_RGB2GRAY)[0]
            values = grey if out.dtype == np.uint8 else grey.astype(np.uint16) * 257
            if out.ndim == 2:
                out[hole] = values
            else:
                out[..., 0][hole] = values
        if out.ndim == 3 and out.shape[2] in (2, 4):
            out[..., -1][hole] = 255
        return out


def read_photograph(path: Path) -> Photograph:
    """Any image file that `decode_photo` reads. ValueError in one line names the file and what is wrong with it."""
    data = read_bytes(path, "photograph")
    try:
        rgb = decode_photo(data)
    except PhotoError as error:
        raise ValueError(f"{path} cannot be read as a photograph: {error}") from None
    with Image.open(io.BytesIO(data)) as image:
        deep = ";16" in str(image.tile)
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        mode, info = image.mode, image.info
        upright = ImageOps.exif_transpose(image)
        notes = [] if turn is None else ["the photograph is turned upright, as its EXIF orientation asks"]
        if mode.startswith("I"):
            stored = np.clip(np.asarray(upright), 0, 65535).astype(np.uint16)
            notes.append("grey with 16 bits a pixel is kept; the hole is filled with 8")
        elif has_alpha(image):
            stored = np.array(upright.convert("LA" if mode in ("LA", "La", "L", "1") else "RGBA"))
            notes.append("transparency is kept; the hole becomes opaque")
        elif mode in ("L", "1"):
            stored = rgb[..., 0]
            notes.append("grey is kept: the hole is filled in grey")
        else:
            stored = rgb
            if mode not in ("RGB", "P") or deep:
                notes.append(
                    f"{'16 bits a channel' if mode == 'RGB' else mode} is saved as RGB with 8 bits a channel"
                )
        profile = info.get("icc_profile") if mode in ("RGB", "RGBA", "L", "LA", "P") else None
    return Photograph(rgb, stored, turn, profile, notes)


def read_bytes(path: Path, what: str) -> bytes:
    """The file's bytes; ValueError in one line when there is no such file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the {what} {path} cannot be read: {error.strerror or error}") from None


def check_target(path: Path, sources: list[Path]) -> list[str]:
    """Warnings about writing to `path`; ValueError, before any work is done, when it cannot be written."""
    suffix = path.suffix.lower()
    if suffix not in LOSSLESS | LOSSY:
        raise ValueError(f"--out {path}: write a .png (or .tif, or .jpg)")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: the folder {path.parent} is not there")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path}: the folder {path.parent} cannot be written to")
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"--out {path} would overwrite what it is made from: give another name")
    if suffix in LOSSY:
        better = path.with_suffix(".png").name
        return [f"JPEG cannot keep the known pixels identical; write a PNG to keep them: --out {better}"]
    return []


def write_photograph(path: Path, pixels: np.ndarray, profile: bytes | None) -> None:
    """Publish the file at once: whoever looks sees the whole of it or what was there before."""
    image = Image.fromarray(pixels)
    kind = {**LOSSLESS, **LOSSY}[path.suffix.lower()]
    options: dict[str, object] = {"icc_profile": profile} if profile else {}
    if kind == "JPEG":
        deep = pixels.dtype == np.uint16
        image = Image.fromarray((pixels // 257).astype(np.uint8)) if deep else on_white(image)
        options |= {"quality": 95, "subsampling": 0}
    elif kind == "PNG":
        options["compress_level"] = 4
    else:
        options["compression"] = "tiff_lzw"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, kind, **options)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror or error}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def on_white(image: Image.Image) -> Image.Image:
    """Without transparency, for formats that have none."""
    if image.mode not in ("RGBA", "LA"):
        return image
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return flat.convert("RGB" if image.mode == "RGBA" else "L")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
