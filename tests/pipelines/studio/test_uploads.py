"""Uploaded files that are too large, damaged, of another kind, or have dangerous names."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import tifffile
from fastapi.testclient import TestClient
from PIL import Image

from pipelines.studio import photos
from pipelines.studio.uploads import clean_name
from support.inpainting import photograph
from support.studio_client import encoded, running_app, studio_settings, writer

MAX_BYTES, MAX_PIXELS = 300_000, 100_000


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    settings = studio_settings(tmp_path, max_upload_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    with running_app(settings) as app:
        app.state.studio.fills.prepare = lambda: None  # no process
        yield writer(app)


def upload(client: TestClient, data: Any, name: str = "a.png", query: str = "") -> tuple[int, dict[str, Any]]:
    answer = client.post(f"/api/photos{query}", content=data, headers={"X-File-Name": quote(name)})
    return answer.status_code, answer.json()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size, with a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def tiff_header(width: int, height: int, samples: int = 1, bits: int = 8) -> bytes:
    """A TIFF that claims this size."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries += [(277, 3, samples), (278, 4, height), (279, 4, 100)]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("chunked", [False, True])
def test_too_many_bytes_are_refused(client: TestClient, chunked: bool) -> None:
    data = b"\x89PNG\r\n\x1a\n" + bytes(MAX_BYTES)
    status, answer = upload(
        client, (data[i : i + 9999] for i in range(0, len(data), 9999)) if chunked else data
    )
    assert status == 413
    assert "the studio takes up to 0.286" in answer["error"]
    assert "inpaint fill" in answer["error"]


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (png_header(100_000, 100_000), "10,000.0 megapixels; the studio takes up to 0.1:"),
        (png_header(2**31 - 1, 2**31 - 1), "megapixels"),
        (png_header(400, 300), "400 x 300 px, 0.1 megapixels; the studio takes up to 0.1:"),
        (tiff_header(60_000, 50_000), "60000 x 50000 px, 3,000.0 megapixels"),
        (tiff_header(300, 300, samples=50, bits=64), "MiB when decoded"),
        (b"P6 70000 70000 255\n" + bytes(100), "4,900.0 megapixels"),
        (
            b"BM" + struct.pack("<IHHIIiiHH", 1000, 0, 0, 54, 40, 50_000, 50_000, 1, 24) + bytes(500),
            "2,500.0 megapixels",
        ),
    ],
    ids=["png", "largest_png", "small_png", "tiff", "deep_tiff", "ppm", "bmp"],
)
def test_too_many_pixels_are_refused_before_decoding(
    client: TestClient, data: bytes, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "read_photo_file", lambda *_: pytest.fail("decoded"))
    status, answer = upload(client, data, "bomb")
    assert status == 413
    assert numbers in answer["error"]
    assert answer["error"].startswith("bomb ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "in none of the formats"),
        (b"GIF89a" + bytes(100), "in none of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "in none of the formats"),
        (b"BM" + bytes(30), "cannot be read"),
        (b"II*\0" + bytes(30), "cannot be read"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "cannot be read"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "cannot be read"),
        (encoded(photograph())[:-2000], "cannot be read as a photograph"),
        (encoded(photograph(), "JPEG")[:-500], "cannot be read as a photograph"),
        (encoded(photograph(4, 4)), "too small"),
    ],
    ids=["empty", "svg", "gif", "eps", "bmp", "tiff", "jpeg", "webp", "cut_png", "cut_jpeg", "small"],
)
def test_files_that_are_no_photograph_are_refused(client: TestClient, data: bytes, reason: str) -> None:
    status, answer = upload(client, data, "broken.bin")
    assert status == 400
    assert reason in answer["error"]
    assert answer["error"].startswith("broken.bin ")
    assert "\n" not in answer["error"]


def test_names_are_only_shown(client: TestClient, tmp_path: Path) -> None:
    data = encoded(photograph())
    for name in ("../../etc/cron.d/x.png", "/etc/x.png", "C:\\Users\\x.png", "a/../x.png", "x.png/"):
        status, photo = upload(client, data, name)
        assert (status, photo["name"]) == (200, "x.png")
    (session,) = client.app.state.studio.sessions._sessions.values()  # type: ignore[attr-defined]
    files = [path for path in session.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"photo.png", "view.png"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", "photograph"),
        ("..", "photograph"),
        ("a\x00b\r\nc.png", "abc.png"),
        ("a\u202egnp.exe", "agnp.exe"),
        ("<b>.png", "<b>.png"),
        ("ü \u3042.png", "ü \u3042.png"),
        ("x" * 200 + ".png", "x" * 75 + "….png"),
    ],
)
def test_shown_names(name: str, shown: str) -> None:
    assert clean_name(name) == shown


def test_all_formats_are_taken(client: TestClient) -> None:
    pixels = photograph()
    kinds = {"PNG": "PNG", "JPEG": "JPEG", "TIFF": "TIFF", "WEBP": "WEBP", "BMP": "BMP", "PPM": "PPM"}
    for kind, expected in kinds.items():
        status, photo = upload(client, encoded(pixels, kind))
        assert status == 200, photo
        assert (photo["format"], photo["width"], photo["height"]) == (expected, 60, 44)
        view = client.get(photo["view"])
        assert view.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(view.content)).size == (60, 44)
    status, photo = upload(client, encoded(pixels[..., 0], "PPM"))
    assert photo["mode"] == "grey, 8 bits"


def test_deep_tiffs_and_frames(client: TestClient) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for level in (1000, 60_000):
            writer.write(np.full((20, 30, 3), level, np.uint16), photometric="rgb")
    status, photo = upload(client, file.getvalue(), "deep.tif")
    assert status == 200
    assert (photo["frames"], photo["frame"], photo["mode"]) == (2, 1, "RGB, 16 bits")
    levels = []
    for frame in (1, 2):
        photo = upload(client, file.getvalue(), "deep.tif", f"?frame={frame}")[1]
        levels.append(Image.open(io.BytesIO(client.get(photo["view"]).content)).getpixel((3, 3))[0])  # type: ignore[index]
    assert levels[0] < 10 < 200 < levels[1]
    for frame in (0, 3):
        status, answer = upload(client, file.getvalue(), "deep.tif", f"?frame={frame}")
        assert status == 400, answer
    assert "the first is 1" in answer["error"]
    assert upload(client, b"", query="?frame=x")[0] == 400


def test_a_turned_photograph_is_shown_upright_with_its_profile(client: TestClient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photograph(), "JPEG", exif=exif, icc_profile=b"a profile" * 20)
    photo = upload(client, data)[1]
    assert (photo["width"], photo["height"]) == (44, 60)
    assert any("upright" in note for note in photo["notes"])
    assert Image.open(io.BytesIO(client.get(photo["view"]).content)).info["icc_profile"] == b"a profile" * 20


def test_the_oldest_photographs_are_dropped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph())
    first, second = (upload(client, data)[1]["id"] for _ in range(2))
    for _ in range(photos.MAX_PHOTOS - 2):
        upload(client, data)
    assert client.get(f"/api/photos/{first}").status_code == 200  # and is the one used last
    upload(client, data)
    assert client.get(f"/api/photos/{second}").status_code == 404
    monkeypatch.setattr(photos, "MAX_FOLDER_BYTES", 1)
    last = upload(client, data)[1]["id"]
    (session,) = client.app.state.studio.sessions._sessions.values()  # type: ignore[attr-defined]
    assert list(session.photos) == [last]
    assert [path.name for path in session.folder.iterdir()] == [last]


def test_masks_are_checked(client: TestClient) -> None:
    photo = upload(client, encoded(photograph()))[1]["id"]
    hole = np.zeros((44, 60), np.uint8)
    hole[10:20, 10:40] = 255
    url = f"/api/photos/{photo}/mask"
    answer = client.put(url, content=encoded(hole))
    assert answer.json() == {"hole_percent": 11.36}
    transparent = np.dstack([np.full_like(hole, 255)] * 3 + [hole])
    assert client.put(url, content=encoded(transparent)).json() == {"hole_percent": 11.36}
    saved = np.asarray(Image.open(io.BytesIO(client.get(f"{url}.png").content)).convert("L"))
    np.testing.assert_array_equal(saved, hole)
    for data, status, reason in (
        (encoded(hole[:-1]), 400, "60 x 43 px, the photograph 60 x 44"),
        (png_header(90_000, 90_000), 413, "megapixels"),
        (b"nothing", 400, "none of the formats"),
        (encoded(hole)[:-30], 400, "the mask cannot be read"),
    ):
        answer = client.put(url, content=data)
        assert (answer.status_code, reason in answer.json()["error"]) == (status, True), answer.text
    assert client.get(f"/api/photos/{photo}").json()["hole_percent"] == 11.36


def test_mask_files_are_read_as_fill_reads_them(client: TestClient) -> None:
    photo = upload(client, encoded(photograph()))[1]["id"]
    hole = np.zeros((88, 120), np.uint8)
    hole[20:40, 20:80] = 7

    def send(pixels: np.ndarray) -> tuple[int, dict[str, Any]]:
        headers = {"X-File-Name": "my%20mask.png"}
        answer = client.post(f"/api/photos/{photo}/mask-file", content=encoded(pixels), headers=headers)
        return answer.status_code, answer.json()

    status, answer = send(hole)
    assert (status, answer["hole_percent"]) == (200, 11.36)
    assert answer["notes"] == ["the mask my mask.png is 120x88 px: resized to the photograph's 60x44"]
    assert client.get(answer["mask"]).status_code == 200
    status, answer = send((255 - (hole > 0) * 255).astype(np.uint8))
    assert status == 200
    assert "looks inverted" in answer["warnings"][0]
    assert "--" not in answer["warnings"][0]
    hole[60:70, 20:80] = 9
    for pixels, reason in ((hole, "save the mask with white"), (hole[:30], "aspect ratios")):
        status, answer = send(pixels)
        assert status == 400
        assert reason in answer["error"], answer
        assert "--" not in answer["error"]
        assert "/" not in answer["error"]


def test_drawn_lines_are_kept_and_removed(client: TestClient) -> None:
    photo = upload(client, encoded(photograph()))[1]["id"]
    lines = np.zeros((44, 60), np.uint8)
    lines[20, 10:40] = 255
    (session,) = client.app.state.studio.sessions._sessions.values()  # type: ignore[attr-defined]
    path = session.photos[photo].lines
    for data, exists in (
        (encoded(lines), True),
        (b"", False),
        (encoded(lines), True),
        (encoded(0 * lines), False),
    ):
        assert client.put(f"/api/photos/{photo}/lines", content=data).status_code == 200
        assert path.exists() == exists
