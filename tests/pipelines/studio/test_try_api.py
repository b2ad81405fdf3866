"""The Try page's API with real registered models: versions, edges, checks and fills."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageCms
from skimage.feature import canny

from pipelines.inference.preview import check_fill, known_edges, tile_inputs
from pipelines.studio.photos import for_page
from support.inpainting import loaded_model
from support.mlflow_stores import SIGMA, MlflowStore, photograph
from support.studio_client import encoded, running_app, studio_settings, wait_for_job, writer

BOX = (slice(30, 46), slice(40, 60))
BOTH = ["edges/1", "encoder/1"]


@pytest.fixture(scope="module")
def client(store: MlflowStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with running_app(studio_settings(tmp_path_factory.mktemp("studio"), store.uri)) as app:
        yield writer(app)


@pytest.fixture
def image() -> np.ndarray:
    return photograph(96, 128)[0]


def hole_of(image: np.ndarray, box: tuple[slice, slice] = BOX) -> np.ndarray:
    hole = np.zeros(image.shape[:2], bool)
    hole[box] = True
    return hole


def add(
    client: TestClient, data: bytes, hole: np.ndarray | None = None, name: str = "a b.png"
) -> dict[str, Any]:
    """An uploaded photograph with this hole."""
    answer = client.post("/api/photos", content=data, headers={"X-File-Name": name})
    assert answer.status_code == 200, answer.text
    photo: dict[str, Any] = answer.json()
    if hole is not None:
        mask = client.put(f"/api/photos/{photo['id']}/mask", content=encoded(hole.astype(np.uint8) * 255))
        assert mask.status_code == 200, mask.text
    return photo


def fill(client: TestClient, photo: str, versions: list[str], **options: Any) -> dict[str, Any]:
    answer = client.post("/api/fills", json={"photo": photo, "versions": versions, **options})
    assert answer.status_code == 200, answer.text
    return wait_for_job(client, answer.json())


def opened(client: TestClient, url: str) -> Image.Image:
    answer = client.get(url)
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def test_versions_are_listed_with_what_they_were_trained_on(client: TestClient) -> None:
    versions = {version["id"]: version for version in client.get("/api/versions").json()}
    assert set(versions) == set(BOTH)
    assert versions["edges/1"] | {"aliases": [], "created": ""} == {
        "id": "edges/1",
        "name": "edges",
        "version": "1",
        "aliases": [],
        "model": versions["edges/1"]["model"],
        "size": versions["edges/1"]["size"],
        "sigma": versions["edges/1"]["sigma"],
        "created": "",
    }
    details = client.get("/api/versions/edges/1").json()
    assert (details["takes_edges"], details["needs_edges"], details["sigma"]) == (True, True, SIGMA)
    assert (details["size"], details["hole_range"]) == (32, None)
    assert not client.get("/api/versions/encoder/1").json()["takes_edges"]
    for path in ("/api/versions/edges/9", "/api/versions/..%2f..%2fetc/1", "/api/versions/nothing/1"):
        assert client.get(path).status_code == 404


def test_a_fill_keeps_what_the_file_had(client: TestClient, image: np.ndarray) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    grey, hole = image[..., 0], hole_of(image)
    data = encoded(grey, "TIFF", exif=exif, icc_profile=profile)
    photo = add(client, data, hole, "grey.tif")
    job = fill(client, photo["id"], BOTH)
    assert (job["state"], job["done"], job["total"]) == ("finished", 2, 2)
    for version, result in zip(BOTH, job["result"]["versions"], strict=True):
        assert (result["version"], result["error"], result["name"]) == (version, None, "grey-filled.tif")
        answer = client.get(result["download"])
        assert answer.headers["content-disposition"] == 'attachment; filename="grey-filled.tif"'
        filled = Image.open(io.BytesIO(answer.content))
        assert (filled.format, filled.mode) == ("TIFF", "L")
        assert filled.info["icc_profile"] == profile
        assert filled.getexif()[0x010F] == "A camera"
        pixels = np.asarray(filled)
        np.testing.assert_array_equal(pixels[~hole], grey[~hole])
        assert (pixels[hole] != grey[hole]).any()
        view = np.asarray(opened(client, result["view"]).convert("L"))
        np.testing.assert_array_equal(view, pixels)
        assert not any("/" in text or "--" in text for text in (*result["notes"], *result["warnings"]))
    assert any("grey is kept" in note for note in result["notes"])


def test_a_result_is_the_next_input(client: TestClient, image: np.ndarray) -> None:
    photo = add(client, encoded(image), hole_of(image))
    job = fill(client, photo["id"], ["encoder/1"])
    result = job["result"]["versions"][0]
    next_photo = client.post(f"/api/photos/from-result/{job['id']}/0").json()
    assert next_photo["name"] == "a b-filled.png"
    np.testing.assert_array_equal(
        np.asarray(opened(client, next_photo["view"])), np.asarray(opened(client, result["download"]))
    )
    other = hole_of(image, (slice(60, 80), slice(80, 100)))
    mask = encoded(other.astype(np.uint8) * 255)
    client.put(f"/api/photos/{next_photo['id']}/mask", content=mask)
    assert fill(client, next_photo["id"], ["encoder/1"])["state"] == "finished"
    for index in (1, -1, 9):
        assert client.post(f"/api/photos/from-result/{job['id']}/{index}").status_code == 404
    assert client.get(f"/api/jobs/{job['id']}/results/x/view").status_code == 400


@pytest.mark.parametrize(("wanted", "suffix"), [("same", "jpg"), ("png", "png"), ("tiff", "tif")])
def test_formats_of_results(client: TestClient, image: np.ndarray, wanted: str, suffix: str) -> None:
    photo = add(client, encoded(image, "JPEG"), hole_of(image), "a.jpeg")
    job = fill(client, photo["id"], ["encoder/1"], format=wanted, blend=True)
    result = job["result"]["versions"][0]
    assert result["name"] == f"a-filled.{suffix}"
    lossy = [text for text in result["warnings"] if "JPEG cannot keep" in text]
    assert lossy == (
        ["JPEG cannot keep the known pixels identical; download a PNG to keep them"] * (suffix == "jpg")
    )


@pytest.fixture
def broken(client: TestClient, store: MlflowStore) -> Iterator[str]:
    """A version whose files are missing, while the test runs: other tests share the registry."""
    store.client.create_registered_model("broken")
    store.client.create_model_version("broken", "file:///nowhere/at/all", store.run_id)
    client.app.state.studio.registry.refresh()  # type: ignore[attr-defined]
    yield "broken/1"
    store.client.delete_registered_model("broken")


def test_one_versions_error_does_not_lose_the_others(
    client: TestClient, image: np.ndarray, broken: str
) -> None:
    photo = add(client, encoded(image), hole_of(image))
    job = fill(client, photo["id"], [broken, "encoder/1"])
    bad, good = job["result"]["versions"]
    assert job["state"] == "finished"
    assert bad["error"]
    assert "/nowhere/at" not in bad["error"]
    assert good["error"] is None
    assert client.get(good["download"]).status_code == 200
    assert client.get(f"/api/jobs/{job['id']}/results/0/download").status_code == 404
    assert fill(client, photo["id"], [broken])["state"] == "failed"


def test_edges_are_those_that_the_model_sees(client: TestClient) -> None:
    pixels = cv2.GaussianBlur(photograph(64, 64)[0], (0, 0), 1)
    hole = hole_of(pixels, (slice(20, 44), slice(20, 44)))
    photo = add(client, encoded(pixels), hole)
    url = f"/api/photos/{photo['id']}/edges?version=edges/1"
    shown = np.asarray(opened(client, url).convert("RGBA"))[..., 3] > 0
    # one tile of 64 px, which is the photograph: an independent implementation of Canny, without the hole
    grey = pixels.astype(np.float64) @ [0.2125, 0.7154, 0.0721] / 255
    expected = canny(grey, SIGMA, low_threshold=0.1, high_threshold=0.2, mask=~hole)
    assert expected.any()
    np.testing.assert_array_equal(shown, expected)
    inside = np.asarray(opened(client, f"{url}&inside=1").convert("RGBA"))[..., 3] > 0
    own = canny(grey, SIGMA, low_threshold=0.1, high_threshold=0.2)
    np.testing.assert_array_equal(inside, own & hole)
    answer = client.get(f"/api/photos/{photo['id']}/edges?version=encoder/1")
    assert answer.status_code == 400
    assert "uses no edges" in answer.json()["error"]


def test_edges_of_downscaled_tiles_and_of_the_whole_photograph() -> None:
    image = cv2.GaussianBlur(photograph(300, 400)[0], (0, 0), 2)
    model = loaded_model(sigma=1.0, needs_edges=True)
    hole = hole_of(image, (slice(80, 160), slice(100, 200)))
    (tile,) = tile_inputs(model, hole, 64)
    assert tile.tile.is_resized
    edges = known_edges(model, image, hole, 64)
    outside = np.ones_like(hole)
    outside[tile.tile.slices] = False
    assert edges.any()
    assert not edges[outside].any()
    assert not edges[hole].any()
    whole = known_edges(model, image, np.zeros_like(hole), 512)
    np.testing.assert_array_equal(whole, model.edges_outside_hole(image, np.zeros_like(hole)))


def test_drawn_lines_change_the_fill(client: TestClient, image: np.ndarray) -> None:
    hole = hole_of(image, (slice(24, 60), slice(40, 76)))
    photo = add(client, encoded(image), hole)
    lines = np.zeros(hole.shape, np.uint8)
    lines[40, 40:76] = 255
    without = fill(client, photo["id"], ["edges/1"])["result"]["versions"][0]
    client.put(f"/api/photos/{photo['id']}/lines", content=encoded(lines))
    job = fill(client, photo["id"], BOTH)
    drawn, encoder = job["result"]["versions"]
    first, second = (np.asarray(opened(client, result["download"])) for result in (without, drawn))
    assert (first[hole] != second[hole]).any()
    assert encoder["error"] is None
    assert any("takes none" in note for note in encoder["notes"])


def test_checks_name_area_tiles_and_what_the_models_cannot_do(client: TestClient, image: np.ndarray) -> None:
    photo = add(client, encoded(image), hole_of(image))
    answer = client.post(f"/api/photos/{photo['id']}/checks", json={"versions": BOTH}).json()
    assert answer["hole_percent"] == round(100 * 16 * 20 / (96 * 128), 2)
    assert answer["tiles"] == [{"left": 18, "top": 6, "width": 64, "height": 64, "hole_percent": 7.81}]
    empty = add(client, encoded(image))
    answer = client.post(f"/api/photos/{empty['id']}/checks", json={"versions": BOTH}).json()
    assert answer == {"hole_percent": 0.0, "tiles": [], "warnings": []}


def test_warnings_before_a_fill() -> None:
    model = loaded_model(hole_range=[0.1, 0.2])
    hole = np.zeros((200, 200), bool)
    hole[50:150, 50:150] = True
    larger, tile = check_fill(model, list(tile_inputs(model, hole)))
    assert "the hole is larger than toy was trained for: 25% of its tile, trained up to 20%" in larger
    assert "the tile is larger" in tile
    assert "--" not in for_page(tile, {})


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"photo": "nothing"}, 404, "no such photograph"),
        ({"versions": []}, 400, "one to 4"),
        ({"versions": ["a/1"] * 5}, 400, "one to 4"),
        ({"versions": "edges/1"}, 400, "one to 4"),
        ({"versions": ["edges/77"]}, 404, "no version edges/77"),
        ({"versions": ["../../etc/passwd"]}, 404, "no version"),
        ({"format": "exe"}, 400, "same, png, jpeg or tiff"),
        ({"max_tile_size": 10**9}, 400, "32 to 2048"),
    ],
)
def test_fills_that_cannot_be(
    client: TestClient, image: np.ndarray, change: dict[str, Any], status: int, reason: str
) -> None:
    photo = add(client, encoded(image), hole_of(image))
    answer = client.post("/api/fills", json={"photo": photo["id"], "versions": BOTH, **change})
    assert answer.status_code == status
    assert reason in answer.json()["error"]


def test_a_fill_needs_a_hole_and_something_around_it(client: TestClient, image: np.ndarray) -> None:
    for hole, reason in ((None, "there is no hole"), (np.ones(image.shape[:2], bool), "covers the whole")):
        photo = add(client, encoded(image), hole)
        answer = client.post("/api/fills", json={"photo": photo["id"], "versions": BOTH})
        assert answer.status_code == 400
        assert reason in answer.json()["error"]


def test_a_fill_is_cancelled(client: TestClient, image: np.ndarray) -> None:
    large = cv2.resize(image, (1152, 1152))
    hole = np.zeros(large.shape[:2], bool)
    for row in range(20, 1136, 96):
        for column in range(20, 1136, 96):  # 144 tiles: it does not end before it is cancelled
            hole[row : row + 10, column : column + 10] = True
    photo = add(client, encoded(large), hole)
    job = client.post("/api/fills", json={"photo": photo["id"], "versions": BOTH}).json()
    began = time.monotonic()
    client.post(f"/api/jobs/{job['id']}/cancel")
    assert wait_for_job(client, job)["state"] == "cancelled"
    assert time.monotonic() - began < 6
    photo = add(client, encoded(image), hole_of(image))
    assert fill(client, photo["id"], ["encoder/1"])["state"] == "finished"


def test_samples(client: TestClient) -> None:
    samples = client.get("/api/samples").json()
    assert len(samples) >= 4
    thumb = opened(client, samples[0]["thumb"])
    assert max(thumb.size) <= 192
    photo = client.post(f"/api/photos/sample/{samples[0]['id']}").json()
    assert opened(client, photo["view"]).size == (photo["width"], photo["height"])
    assert client.post("/api/photos/sample/..%2fx").status_code == 404


def test_a_studio_without_a_registry(tmp_path: Path) -> None:
    with running_app(studio_settings(tmp_path)) as app:
        assert writer(app).get("/api/versions").json() == []
