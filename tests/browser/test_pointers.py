"""The Try page with a pen and with fingers, as the browser reports them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from browser.conftest import Studio
from playwright.sync_api import Browser, CDPSession, Page, expect

from support.studio_browser import Watch, overflow_pixels, screenshots
from support.studio_try import TryPage

pytestmark = pytest.mark.browser
Point = tuple[float, float]

ERASE_WITH_THE_OTHER_END = """(stage, points) => points.forEach(([clientX, clientY], at) => {
    const type = at === 0 ? "pointerdown" : at === points.length - 1 ? "pointerup" : "pointermove";
    const button = type === "pointermove" ? -1 : 5, buttons = type === "pointerup" ? 0 : 32;
    stage.dispatchEvent(new PointerEvent(type, {
        pointerType: "pen", pointerId: 1, isPrimary: true, bubbles: true, button, buttons, clientX, clientY,
    }));
})"""
"""Chromium's protocol has no eraser end. The id is that of the mouse, which an element may capture."""


class Pointers:
    """A pen and fingers on the photograph; positions are pixels of the photograph."""

    def __init__(self, page: Page, photo: TryPage) -> None:
        self.client: CDPSession = page.context.new_cdp_session(page)
        self.at = photo.at

    def pen(self, event: str, point: Point) -> None:
        """`event`: Pressed, Moved or Released."""
        x, y = self.at(*point)
        more = {"pointerType": "pen", "force": 0.5, "button": "left", "clickCount": 1}
        more["buttons"] = 0 if event == "Released" else 1
        self.client.send("Input.dispatchMouseEvent", {"type": f"mouse{event}", "x": x, "y": y, **more})

    def touch(self, event: str, points: Sequence[Point]) -> None:
        """`event`: Start, Move or End; `points`: of all fingers that are down."""
        self.touch_window(event, [self.at(*point) for point in points])

    def touch_window(self, event: str, places: Sequence[Point]) -> None:
        """As `touch`, at positions in the window."""
        touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
        self.client.send("Input.dispatchTouchEvent", {"type": f"touch{event}", "touchPoints": touches})


@pytest.fixture
def photo(page: Page) -> TryPage:
    photo = TryPage(page)
    photo.open_sample("Cat")
    photo.tool("Brush").click()
    return photo


@pytest.fixture
def pointers(page: Page, photo: TryPage) -> Pointers:
    return Pointers(page, photo)


def test_a_pen_paints_and_its_other_end_erases(photo: TryPage, pointers: Pointers) -> None:
    pointers.pen("Moved", (100, 100))
    pointers.pen("Pressed", (100, 100))
    pointers.pen("Moved", (200, 100))
    pointers.pen("Released", (200, 100))
    painted = photo.saved_mask()
    assert painted[100, [105, 150, 195]].all()
    assert not painted[150].any()
    places = [photo.at(150, y) for y in (60, 100, 140)]
    photo.stage.evaluate(ERASE_WITH_THE_OTHER_END, places)
    erased = photo.saved_mask()
    assert erased[100, [105, 195]].all()
    assert not erased[100, 150]


def test_the_hand_that_holds_the_pen_does_nothing(photo: TryPage, pointers: Pointers) -> None:
    zoom = photo.page.get_by_role("button", name="Show at 100 %")
    fitted = zoom.inner_text()
    pointers.touch("Start", [(300, 250)])  # first the hand, then the pen, then more of the hand
    pointers.pen("Moved", (100, 100))
    pointers.pen("Pressed", (100, 100))
    pointers.pen("Moved", (150, 100))
    pointers.touch("Start", [(300, 250), (320, 260)])
    pointers.touch("Move", [(280, 250), (340, 270)])
    pointers.pen("Moved", (200, 100))
    pointers.pen("Released", (200, 100))
    pointers.touch("End", [])
    mask = photo.saved_mask()
    assert mask[100, [105, 150, 195]].all()
    assert not mask[200:].any()
    assert zoom.inner_text() == fitted


def test_a_finger_paints_and_two_zoom(photo: TryPage, pointers: Pointers) -> None:
    pointers.touch("Start", [(100, 100)])
    pointers.touch("Move", [(200, 100)])
    pointers.touch("End", [])
    painted = photo.saved_mask()
    assert painted[100, [105, 150, 195]].all()
    zoom = photo.page.get_by_role("button", name="Show at 100 %")
    fitted = zoom.inner_text()
    pointers.touch("Start", [(200, 200)])  # begins a stroke, which the second finger takes back
    pointers.touch("Start", [(200, 200), (240, 200)])
    for distance in (60, 80, 100):
        pointers.touch("Move", [(220 - distance / 2, 200), (220 + distance / 2, 200)])
    pointers.touch("End", [])
    expect(zoom).not_to_have_text(fitted)
    np.testing.assert_array_equal(photo.saved_mask(), painted)
    photo.tool("Undo").click()
    expect(photo.hole).to_contain_text("none")


@pytest.fixture
def phone(browser: Browser, studio: Studio, watch: Watch) -> Iterator[Page]:
    """A page of a telephone, opened by the printed link."""
    context = browser.new_context(
        viewport={"width": 400, "height": 800}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    context.on("page", watch.follow)
    page = context.new_page()
    page.goto(studio.link)
    yield page
    context.close()


def test_the_main_way_on_a_telephone(phone: Page) -> None:
    photo = TryPage(phone)
    phone.get_by_role("button", name="Cat", exact=True).tap()
    expect(photo.stage).to_be_visible()
    photo.tool("Brush").tap()
    pointers = Pointers(phone, photo)
    pointers.touch("Start", [(150, 120)])
    pointers.touch("Move", [(200, 150)])
    pointers.touch("End", [])
    expect(photo.hole).not_to_contain_text("none")
    assert overflow_pixels(phone) <= 0
    screenshots(phone, "try-telephone")
    photo.fill_button.tap()
    photo.expect_result()
    before = photo.divider.get_attribute("aria-valuenow")
    box = photo.divider.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    pointers.touch_window("Start", [(x, y)])
    for distance in (40, 80):
        pointers.touch_window("Move", [(x - distance, y)])
    pointers.touch_window("End", [])
    expect(photo.divider).not_to_have_attribute("aria-valuenow", before or "")
    with phone.expect_download() as download:
        phone.get_by_role("link", name=re.compile("Download result")).tap()
    assert download.value.suggested_filename.endswith(".png")
