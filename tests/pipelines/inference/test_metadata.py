"""EXIF, colour profile, resolution and text of a photograph are kept as far as the output format can store them."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from pipelines.inference.exif import Field, build_block, integer_field, read_block
from pipelines.inference.fill import FillResult, fill
from support.inpainting import HEIGHT, WIDTH, hole_mask, loaded_model, photograph

EXIF, GPS = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/><b>a title</b></x:xmpmeta>'
OUTS = (".jpg", ".png", ".tif")
INS = (".jpg", ".png", ".webp", ".tif")


def text(value: str) -> Field:
    data = value.encode() + b"\0"
    return Field(2, len(data), data)


def fraction(numerator: int, denominator: int = 1) -> Field:
    return Field(5, 1, struct.pack(">2I", numerator, denominator))


def camera_block(orientation: int = 1, thumbnail: bytes = b"") -> bytes:
    """EXIF as a camera writes it: non-ASCII text, a maker note, GPS and a thumbnail."""
    maker_note = b"MAKER\0" + bytes(range(100))
    exif: dict[int, Field | dict] = {
        0x829A: fraction(1, 250),
        0x927C: Field(7, len(maker_note), maker_note),
        0x9286: Field(7, 12, b"ASCII\0\0\0word"),
        0xA002: integer_field(">", 4, 900),
        0xA003: integer_field(">", 4, 600),
        0xA434: text("Löns 50mm"),
    }
    gps: dict[int, Field | dict] = {
        1: text("N"),
        2: Field(5, 3, struct.pack(">6I", 48, 1, 30, 1, 0, 1)),
        6: fraction(1001, 2),
    }
    block = build_block(
        ">",
        {
            0x010E: text("Straße © mü"),
            0x0112: integer_field(">", 3, orientation),
            0x011A: fraction(300),
            0x011B: fraction(150),
            0x0128: integer_field(">", 3, 2),
            0x8298: text("(c) me"),
            EXIF: exif,
            GPS: gps,
        },
    )
    if thumbnail:  # the second IFD, after the first
        end = len(block) + len(block) % 2
        (count,) = struct.unpack_from(">H", block, 8)
        thumbnail_fields = {513: integer_field(">", 4, end + 30), 514: integer_field(">", 4, len(thumbnail))}
        directory = build_block(">", thumbnail_fields)[8:]
        assert len(directory) == 30
        pointer_offset = 10 + 12 * count
        block = (
            block[:pointer_offset]
            + struct.pack(">I", end)
            + block[pointer_offset + 4 :].ljust(end - pointer_offset - 4, b"\0")
            + directory
        )
        block += thumbnail
    return b"Exif\0\0" + block


def save(
    path: Path, image: Image.Image, orientation: int = 1, thumbnail: bytes = b"", **options: Any
) -> None:
    """Save with all metadata that the format can store."""
    block = camera_block(orientation, thumbnail)
    if path.suffix == ".png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP)
        options["pnginfo"] = info
    elif path.suffix == ".tif":
        exif = Image.Exif()
        exif.load(block)
        exif[700] = XMP
        options["compression"] = "raw"
        block = exif  # type: ignore[assignment]
    else:
        options["xmp"] = XMP
        options |= {"lossless": True} if path.suffix == ".webp" else {"quality": 95, "subsampling": 0}
    dpi = {} if path.suffix == ".webp" else {"dpi": (300, 150)}
    image.save(path, exif=block, icc_profile=SRGB, **dpi, **options)


def run(source: Path, out: Path, mask: np.ndarray | None = None, **options: Any) -> FillResult:
    mask_path = source.with_name("mask.png")
    Image.fromarray(hole_mask() if mask is None else mask).save(mask_path)
    return fill(loaded_model(), source, mask_path, out, **options)


def xmp_of(image: Image.Image) -> bytes:
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    return xmp.encode() if isinstance(xmp, str) else xmp


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("kind", INS)
def test_all_metadata_is_kept(tmp_path: Path, kind: str, out: str) -> None:
    source, target = tmp_path / f"in{kind}", tmp_path / f"out{out}"
    save(source, Image.fromarray(photograph()))
    report = run(source, target)
    with Image.open(source) as before, Image.open(target) as after:
        exif_before, exif_after = before.getexif(), after.getexif()
        for ifd in (EXIF, GPS):
            assert dict(exif_before.get_ifd(ifd)) == dict(exif_after.get_ifd(ifd))
            assert len(exif_after.get_ifd(ifd)) > 2
        assert exif_before[0x010E] == exif_after[0x010E]
        assert exif_after[0x8298] == "(c) me"
        assert after.info["icc_profile"] == SRGB
        assert after.info["dpi"] == pytest.approx((300, 150), abs=0.02)
        assert b"a title" in xmp_of(after)
        assert b"Orientation" not in xmp_of(after)
    assert "kept: EXIF, colour profile, 300 dpi, XMP" in report.notes
    if kind in (".jpg", ".png", ".webp") and out != ".tif":
        assert "Straße © mü".encode() in target.read_bytes(), "non-ASCII text is changed"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "out"), [(".jpg", ".jpg"), (".tif", ".tif"), (".png", ".jpg"), (".webp", ".png")]
)
def test_orientation_is_applied_once(tmp_path: Path, kind: str, out: str, orientation: int) -> None:
    """The result is upright with orientation 1; x and y of sizes and resolutions are swapped with the pixels."""
    inverse_transpose = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose values
    upright = Image.fromarray(photograph())
    stored = (
        upright.transpose(Image.Transpose(inverse_transpose[orientation])) if orientation > 1 else upright
    )
    source, target = tmp_path / f"in{kind}", tmp_path / f"out{out}"
    save(source, stored, orientation)
    report = run(source, target)
    with Image.open(target) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.size == (WIDTH, HEIGHT)
        sideways = orientation >= 5
        sides = [image.getexif().get_ifd(EXIF)[tag] for tag in (0xA002, 0xA003)]
        assert sides == ([600, 900] if sideways else [900, 600])
        assert image.info["dpi"] == pytest.approx((150, 300) if sideways else (300, 150), abs=0.02)
        hole = hole_mask()
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(upright))[~hole]
        assert difference.mean() < (6 if ".jpg" in (kind, out) else 0.001)
    assert ("the photograph is turned upright" in " ".join(report.notes)) == (orientation > 1)


def test_the_thumbnail_of_the_old_photograph_is_removed(tmp_path: Path) -> None:
    small = io.BytesIO()
    Image.fromarray(photograph()).resize((24, 16)).save(small, "JPEG")
    source, target = tmp_path / "in.jpg", tmp_path / "out.jpg"
    save(source, Image.fromarray(photograph()), thumbnail=small.getvalue())
    assert Image.open(source).getexif().get_ifd(ExifTags.IFD.IFD1)[514] == len(small.getvalue())
    report = run(source, target)
    assert small.getvalue()[20:-20] in source.read_bytes()
    assert small.getvalue()[20:60] not in target.read_bytes()
    with Image.open(target) as image:
        assert not image.getexif().get_ifd(ExifTags.IFD.IFD1)
        assert image.getexif().get_ifd(EXIF)[0x927C].startswith(b"MAKER"), "other fields have moved"
    assert any("thumbnail" in note and "left out" in note for note in report.notes)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda block: b"Exif\0\0" + b"XX" + block[8:], "damaged"),
        (lambda block: block[:10] + b"\xff\xff\xff\xff" + block[14:], "damaged"),
        (lambda block: block[:9], "damaged"),
        (lambda block: block[:120], None),
        (lambda block: block[:16] + b"\xff" * (len(block) - 16), None),
    ],
)
@pytest.mark.parametrize("out", OUTS)
def test_damaged_exif_does_not_stop_a_fill(tmp_path: Path, out: str, damage: Any, word: str | None) -> None:
    source, target = tmp_path / "in.jpg", tmp_path / f"out{out}"
    Image.fromarray(photograph()).save(source, exif=damage(camera_block(6)), quality=95, dpi=(300, 300))
    report = run(source, target, mask=None)
    with Image.open(target) as image:
        image.load()
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    if word:
        assert any("EXIF data is damaged and left out" in note for note in report.notes)


def test_a_profile_is_kept_only_with_its_color_space(tmp_path: Path) -> None:
    source = tmp_path / "in.tif"
    Image.fromarray(photograph()).convert("CMYK").save(source, icc_profile=b"ink")
    for out, profile in ((".tif", b"ink"), (".jpg", b"ink"), (".png", None)):
        report = run(source, tmp_path / f"out{out}")
        with Image.open(tmp_path / f"out{out}") as image:
            assert image.mode == ("RGB" if out == ".png" else "CMYK")
            assert image.info.get("icc_profile") == profile
        left_out = "the CMYK colour profile is left out: it does not describe RGB" in report.notes
        assert left_out == (out == ".png")


def test_16_bit_files_keep_metadata(tmp_path: Path) -> None:
    """Also for 16 bits with alpha, which Pillow does not write: EXIF, profile and resolution."""
    deep = np.dstack([photograph().astype(np.uint16) * 257 + 1, np.full((HEIGHT, WIDTH), 60000, np.uint16)])
    source = tmp_path / "in.tif"
    extra = [(34675, 7, len(SRGB), SRGB, True), (33432, 2, 0, "(c) me", True)]
    tifffile.imwrite(
        source, deep, photometric="rgb", extrasamples=["unassalpha"], resolution=(118, 118), resolutionunit="CENTIMETER",
        extratags=extra, description="a caption",
    )  # fmt: skip
    for out in (".png", ".tif"):
        run(source, tmp_path / f"out{out}")
        with Image.open(tmp_path / f"out{out}") as image:
            assert image.info["icc_profile"] == SRGB
            assert image.getexif()[33432] == "(c) me"
            assert image.getexif()[270] == "a caption"
            assert image.info["dpi"] == pytest.approx((299.72, 299.72), abs=0.01)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.pages[0].tags[296].value == 3, "not in the source's unit"
        np.testing.assert_array_equal(file.asarray()[~hole_mask()], deep[~hole_mask()])


def test_text_and_gamma_of_a_png(tmp_path: Path) -> None:
    source, info = tmp_path / "in.png", PngInfo()
    info.add_text("parameters", "steps: 20")
    info.add_itxt("Title", "ein schöner Titel")
    info.add(b"gAMA", struct.pack(">I", 100000))
    Image.fromarray(photograph()).save(source, pnginfo=info)
    run(source, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        image.load()
        assert image.text == {"parameters": "steps: 20", "Title": "ein schöner Titel"}
        assert image.info["gamma"] == 1.0
    for out in (".jpg", ".tif"):
        notes = " | ".join(run(source, tmp_path / f"out{out}").notes)
        assert "text is left out" in notes
        assert "parameters, Title" in notes
        assert "gamma or primaries are left out" in notes


def test_a_comment_is_kept_in_every_format(tmp_path: Path) -> None:
    source = tmp_path / "in.jpg"
    Image.fromarray(photograph()).save(source, comment="schön")
    for out in OUTS:
        run(source, tmp_path / f"out{out}")
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.info["comment"] == "schön".encode()
    with Image.open(tmp_path / "out.png") as image:
        image.load()
        assert image.text == {"Comment": "schön"}
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.pages[0].description == "schön"


def test_exif_too_long_for_a_jpeg_is_named(tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    block = build_block("<", {270: text("x" * 70000)})
    Image.fromarray(photograph()).save(source, exif=b"Exif\0\0" + block)
    notes = " | ".join(run(source, tmp_path / "out.jpg").notes)
    assert re.search(r"EXIF of 700\d\d bytes is left out: JPEG holds 65504", notes)
    assert "kept" not in notes
    assert "kept: EXIF" in run(source, tmp_path / "out.png").notes


def test_exif_blocks_survive_a_round_trip() -> None:
    block = camera_block(1)
    assert read_block(block).upright_block(False) == block[6:]
    exif = read_block(block)
    rebuilt = read_block(build_block(exif.byte_order, exif.fields_to_keep()))
    assert {tag: field.data for tag, field in rebuilt.sub_ifds[EXIF].items()} == {
        tag: field.data for tag, field in exif.sub_ifds[EXIF].items()
    }
