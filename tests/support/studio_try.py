"""Drives the Try page as a person does: positions are pixels of the photograph."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps
from playwright.sync_api import Download, Locator, Page, expect

from data_prep.sources import bundled_photo

TAG_ORIENTATION, TAG_MAKE = 0x0112, 0x010F
ROTATED = 6  # EXIF: the file's rows are the picture's columns
FOCUS = (
    "document.activeElement?.getAttribute('aria-label') || document.activeElement?.textContent.trim() || ''"
)


class TryPage:
    """The page with its controls, by role and label."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.stage = page.get_by_role("application", name="Photograph and hole")

    # -- photograph

    def open_sample(self, title: str = "Cat") -> None:
        self.page.get_by_role("button", name=title, exact=True).click()
        expect(self.stage).to_be_visible()

    def open_file(self, path: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_role("button", name="Choose a photograph").click()
        chooser.value.set_files(path)
        expect(self.stage).to_be_visible()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the photograph, as the page states them."""
        found = re.search(r"(\d+) × (\d+)", self.page.get_by_text(re.compile(r"\d+ × \d+ · ")).inner_text())
        assert found
        return int(found[1]), int(found[2])

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The position in the window of a pixel, while all of the photograph is shown."""
        box, (width, height) = self.stage.bounding_box(), self.size
        assert box
        scale = min(box["width"] / width, box["height"] / height, 4)
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        return middle[0] + (x - width / 2) * scale, middle[1] + (y - height / 2) * scale

    # -- tools

    def tool(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def drag(self, *points: tuple[float, float]) -> None:
        """Press at the first point, move over the others, and release at the last."""
        mouse = self.page.mouse
        mouse.move(*self.at(*points[0]))
        mouse.down()
        for point in points[1:]:
            mouse.move(*self.at(*point), steps=5)
        mouse.up()

    def paint_box(self, left: int, top: int, right: int, bottom: int) -> None:
        self.tool("Box").click()
        self.drag((left, top), (right, bottom))
        expect(self.hole).not_to_contain_text("none")

    def show_edges(self) -> None:
        self.page.get_by_role("checkbox", name="Show and draw").check()
        expect(self.tool("Edge pen")).to_be_visible()

    @property
    def hole(self) -> Locator:
        return self.page.get_by_role("heading", name=re.compile("^Hole"))

    def hole_percent(self) -> float:
        found = re.search(r"([\d.]+)\s%", self.hole.inner_text())
        return float(found[1]) if found else 0.0

    def saved_mask(self) -> np.ndarray:
        """The mask that the page saves: bool [H,W], True = hole."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name="Save the mask").click()
        return read_mask(download.value)

    # -- versions and fill

    def version(self, name: str) -> Locator:
        """The check box of a version such as `edges v2`."""
        return self.page.get_by_role("checkbox", name=re.compile(rf"^{name}\b"))

    def choose(self, *names: str) -> None:
        """Choose these versions only."""
        for name in names:
            expect(self.version(name)).to_be_visible()
        for box in self.page.get_by_role("checkbox", name=re.compile(r"^\w+ v\d+")).all():
            label = box.get_attribute("aria-label") or ""
            if not any(re.match(rf"{name}\b", label) for name in names):
                box.uncheck()
        for name in names:
            self.version(name).check()

    @property
    def fill_button(self) -> Locator:
        return self.page.get_by_role("button", name="Fill", exact=True)

    def fill(self) -> None:
        """Fill and wait for the result."""
        self.fill_button.click()
        self.expect_result()

    def expect_result(self) -> None:
        """Wait for the result, or fail with the page's error."""
        alert = self.page.get_by_role("alert").filter(visible=True)
        expect(self.result_link.or_(alert).first).to_be_visible(timeout=120_000)
        assert not alert.count(), alert.inner_text()

    @property
    def result_link(self) -> Locator:
        return self.page.get_by_role("link", name="Download result")

    @property
    def divider(self) -> Locator:
        return self.page.get_by_role("slider", name=re.compile("^Divider"))

    def download(self, link: str = "Download result") -> Download:
        """What a link whose name ends so downloads."""
        with self.page.expect_download() as download:
            self.page.get_by_role("link", name=re.compile(f"{link}$", re.IGNORECASE)).click()
        return download.value

    def painted(self, layer: str) -> int:
        """The number of pixels on the screen that a layer of the photograph covers: mask, edges or lines."""
        count: int = self.page.locator(f"canvas[data-layer={layer}]").evaluate(
            """canvas => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => {
                const copy = new OffscreenCanvas(canvas.width, canvas.height)
                    .getContext("2d", {willReadFrequently: true});
                copy.drawImage(canvas, 0, 0);
                const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
                let count = 0;
                for (let at = 3; at < data.length; at += 4) count += data[at] > 40;
                done(count);
            })))"""
        )
        return count


def read_mask(download: Download) -> np.ndarray:
    with Image.open(download.path()) as image:
        return np.asarray(image.convert("L")) > 127


def upright(source: str | Path | bytes) -> np.ndarray:
    """The pixels of a file as they are shown."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def write_photo(path: Path, width: int = 300, height: int = 200) -> Path:
    """A PNG that is stored on its side, with EXIF and a colour profile; its upright size is width x height."""
    pixels = bundled_photo("coffee")[100 : 100 + height, 150 : 150 + width]
    exif = Image.Exif()
    exif[TAG_ORIENTATION], exif[TAG_MAKE] = ROTATED, "A camera"
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stored.save(path, exif=exif, icc_profile=profile)
    return path


def check_result(download: Download, source: Path, hole: np.ndarray) -> None:
    """The result has the photograph's mode, EXIF and profile, and its pixels outside the hole; inside it differs. It is
    stored upright."""
    with Image.open(source) as before, Image.open(download.path()) as after:
        assert (after.format, after.mode) == (before.format, before.mode)
        assert dict(after.getexif()) == dict(before.getexif()) | {TAG_ORIENTATION: 1}
        assert after.info.get("icc_profile") == before.info.get("icc_profile")
    old, new = upright(source), upright(download.path())
    np.testing.assert_array_equal(new[~hole], old[~hole])
    assert (new[hole] != old[hole]).any(axis=-1).mean() > 0.5


def tab_to(page: Page, text: str, most: int = 80) -> None:
    """Press Tab until the control with this label or text has the focus."""
    seen: list[str] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUS))
        if re.search(text, seen[-1]):
            return
    raise AssertionError(f"no {text!r} by Tab: {seen}")


def press(page: Page, keys: Sequence[str]) -> None:
    for key in keys:
        page.keyboard.press(key)
