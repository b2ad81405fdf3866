"""The Try page: every way to open, paint, load and compare, with the messages that keep a person from errors."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser.conftest import Studio
from PIL import Image
from playwright.sync_api import Page, expect

from data_prep.sources import bundled_photo
from support.cluster_harness import wait_for
from support.studio_browser import Watch, accessibility_faults, screenshots
from support.studio_try import TryPage, check_result, press, read_mask, upright, write_photo

pytestmark = pytest.mark.browser
TRANSFER = """async ([name, bytes]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
    return transfer;
}"""


@pytest.fixture
def photo(page: Page) -> TryPage:
    return TryPage(page)


@pytest.fixture
def opened(photo: TryPage) -> TryPage:
    photo.open_sample("Cat")
    photo.choose("edges v2")
    return photo


def test_a_fill_is_cancelled_and_the_next_one_works(opened: TryPage) -> None:
    """The first test: the worker process is still starting, so the fill takes seconds."""
    opened.choose("edges v1", "edges v2", "encoder v1", "encoder v2")
    opened.paint_box(100, 100, 180, 180)
    opened.fill_button.click()
    cancel = opened.page.get_by_role("button", name="Cancel")
    expect(opened.page.get_by_role("progressbar")).to_be_visible()
    screenshots(opened.page, "try-progress")
    cancel.click()
    expect(opened.fill_button).to_be_visible()
    expect(opened.page.get_by_role("status").filter(has_text="cancelled")).to_have_count(1)
    assert not opened.result_link.is_visible()
    opened.choose("edges v2")
    opened.fill()


def test_the_start_without_a_photograph(photo: TryPage) -> None:
    expect(photo.page.get_by_role("button", name="Cat", exact=True)).to_be_visible()
    expect(photo.stage).to_be_hidden()
    assert accessibility_faults(photo.page) == []
    screenshots(photo.page, "try-start")


def test_without_the_token_the_page_can_be_read_only(visitor: Page, studio: Studio) -> None:
    visitor.goto(studio.url)
    expect(visitor.get_by_role("button", name="Choose a photograph")).to_be_disabled()
    expect(visitor.get_by_role("button", name="Cat", exact=True)).to_be_disabled()
    expect(visitor.get_by_role("main")).to_contain_text("token")
    assert accessibility_faults(visitor) == []
    screenshots(visitor, "try-read-only")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_photograph_is_dropped_or_pasted(photo: TryPage, tmp_path: Path, way: str) -> None:
    page, data = photo.page, [*write_photo(tmp_path / "a.png").read_bytes()]
    expect(page.get_by_role("button", name="Choose a photograph")).to_be_visible()
    transfer = page.evaluate_handle(TRANSFER, ["holiday.png", data])
    if way == "drop":
        target = page.get_by_role("region", name="Choose a photograph")
        for event in ("dragenter", "dragover", "drop"):
            target.dispatch_event(event, {"dataTransfer": transfer})
    else:
        page.evaluate(
            "t => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: t, bubbles: true}))",
            transfer,
        )
    expect(photo.stage).to_be_visible()
    assert photo.size == (300, 200)
    expect(page.get_by_text("holiday.png")).to_be_visible()


def test_a_name_with_a_script_is_text(photo: TryPage, tmp_path: Path) -> None:
    photo.open_file(write_photo(tmp_path / "<img src=x onerror=alert(1)>.png"))
    expect(photo.page.get_by_text("<img src=x onerror=alert(1)>.png")).to_be_visible()


def test_a_file_that_is_no_photograph_is_refused_in_one_sentence(
    photo: TryPage, tmp_path: Path, watch: Watch
) -> None:
    (tmp_path / "notes.png").write_text("no photograph")
    with photo.page.expect_file_chooser() as chooser:
        photo.page.get_by_role("button", name="Choose a photograph").click()
    chooser.value.set_files(tmp_path / "notes.png")
    expect(
        photo.page.get_by_role("status").filter(has_text=re.compile("notes.png|photograph|image"))
    ).to_be_visible()
    expect(photo.stage).to_be_hidden()
    watch.forgive("status of 4")


def test_brush_eraser_undo_and_redo(opened: TryPage) -> None:
    opened.tool("Brush").click()
    opened.drag((100, 100), (200, 100))
    expect(opened.hole).not_to_contain_text("none")
    painted = opened.saved_mask()
    assert painted[100, 150]
    assert not painted[200, 150]
    opened.tool("Eraser").click()
    opened.drag((150, 60), (150, 140))
    erased = opened.saved_mask()
    assert painted[100, 105]
    assert erased[100, 105]
    assert not erased[100, 150]
    opened.tool("Undo").click()
    np.testing.assert_array_equal(opened.saved_mask(), painted)
    opened.tool("Redo").click()
    np.testing.assert_array_equal(opened.saved_mask(), erased)
    press(opened.page, ["Control+z", "Control+z"])
    expect(opened.hole).to_contain_text("none")
    expect(opened.tool("Undo")).to_be_disabled()


def test_the_size_of_the_brush_by_wheel_and_keys(opened: TryPage) -> None:
    opened.tool("Brush").click()
    size = opened.page.get_by_role("spinbutton", name="Size of the tool in pixels")
    sizes = [int(size.input_value())]
    opened.page.mouse.move(*opened.at(200, 150))
    opened.page.mouse.wheel(0, -200)
    expect(size).not_to_have_value(str(sizes[0]))
    sizes.append(int(size.input_value()))
    opened.stage.focus()
    press(opened.page, ["[", "["])
    sizes.append(int(size.input_value()))
    press(opened.page, ["]"] * 4)
    sizes.append(int(size.input_value()))
    assert sizes[0] < sizes[1]
    assert sizes[2] < sizes[1] < sizes[3]
    size.fill("30")
    opened.drag((200, 150), (200, 150))
    diameter = np.sqrt(opened.saved_mask().sum() * 4 / np.pi)
    assert diameter == pytest.approx(30, abs=2)


def test_zoom_and_pan_keep_what_is_painted(opened: TryPage) -> None:
    opened.paint_box(100, 100, 160, 160)
    before = opened.saved_mask()
    zoom = opened.page.get_by_role("button", name="Show at 100 %")
    fitted = zoom.inner_text()
    opened.tool("Zoom in").click()
    expect(zoom).not_to_have_text(fitted)
    opened.page.mouse.move(*opened.at(225, 150))
    opened.page.keyboard.down("Control")
    opened.page.mouse.wheel(0, -300)
    opened.page.keyboard.up("Control")
    opened.tool("Move the photograph").click()
    opened.drag((225, 150), (180, 120))
    screenshots(opened.page, "try-zoomed")
    np.testing.assert_array_equal(opened.saved_mask(), before)
    opened.tool("Fit").click()
    expect(zoom).to_have_text(fitted)


def test_invert_clear_and_a_mask_from_a_file(opened: TryPage, tmp_path: Path) -> None:
    width, height = opened.size
    mask = np.zeros((height, width), np.uint8)
    mask[40:90, 60:160] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    with opened.page.expect_file_chooser() as chooser:
        opened.page.get_by_role("button", name="Load a mask").click()
    chooser.value.set_files(tmp_path / "mask.png")
    expect(opened.hole).not_to_contain_text("none")
    np.testing.assert_array_equal(opened.saved_mask(), mask > 0)
    opened.tool("Invert the hole").click()
    np.testing.assert_array_equal(opened.saved_mask(), mask == 0)
    opened.tool("Clear the hole").click()
    expect(opened.hole).to_contain_text("none")


def test_known_edges_are_shown_and_edges_are_drawn_in_the_hole(opened: TryPage) -> None:
    opened.paint_box(150, 80, 290, 200)
    assert opened.painted("edges") == 0
    opened.show_edges()
    wait_for(lambda: opened.painted("edges") > 0, "edges on the photograph")
    opened.tool("Edge pen").click()
    opened.drag((170, 100), (270, 180))
    opened.drag((170, 180), (270, 100))
    drawn = opened.painted("lines")
    assert drawn > 0
    opened.drag((20, 20), (120, 20))  # outside the hole: not an edge
    assert opened.painted("lines") == drawn
    screenshots(opened.page, "try-edges")
    assert accessibility_faults(opened.page) == []
    opened.tool("Edge eraser").click()
    opened.drag((170, 100), (270, 180))
    assert 0 < opened.painted("lines") < drawn
    opened.page.get_by_role("button", name="Take the photograph's edges").click()
    expect(opened.page.get_by_role("status").filter(has_text="edges are in the hole")).to_have_count(1)
    assert opened.painted("lines") > 0
    opened.fill()


def test_drawn_edges_change_the_result(opened: TryPage) -> None:
    opened.paint_box(150, 80, 290, 200)
    opened.fill()
    without = upright(opened.download().path())
    opened.page.get_by_role("button", name="Back to the mask").click()
    opened.show_edges()
    opened.tool("Edge pen").click()
    for y in range(90, 200, 20):
        opened.drag((160, y), (280, y))
    opened.fill()
    assert (upright(opened.download().path()) != without).any()


def test_a_model_without_edges_has_no_edge_tools(opened: TryPage) -> None:
    opened.show_edges()
    opened.choose("encoder v2")
    expect(opened.tool("Edge pen")).to_be_hidden()
    expect(opened.page.get_by_role("checkbox", name="Show and draw")).to_be_hidden()


def test_a_fifth_version_is_refused(opened: TryPage) -> None:
    opened.choose("edges v1", "edges v2", "encoder v1", "encoder v2")
    box = opened.version("encoder v3")
    box.click()
    expect(box).not_to_be_checked()
    expect(opened.page.get_by_role("status").filter(has_text="At most 4 versions").first).to_be_visible()


def test_holes_unlike_those_of_the_training_are_warned_of(opened: TryPage) -> None:
    opened.choose("edges v2", "encoder v2")
    panel = opened.page.get_by_role("complementary", name="Versions and filling")
    expect(panel).to_contain_text(re.compile(r"holes of 2(\.0)? to 30\s%"))
    opened.paint_box(20, 20, 430, 280)
    warning = panel.get_by_role("listitem").filter(has_text="trained")
    expect(warning.first).to_be_visible()
    screenshots(opened.page, "try-warning")
    assert accessibility_faults(opened.page) == []


def test_the_result_is_the_next_photograph(photo: TryPage, tmp_path: Path) -> None:
    source = write_photo(tmp_path / "a.png")
    photo.open_file(source)
    photo.choose("edges v2")
    photo.paint_box(30, 30, 80, 80)
    first_hole = photo.saved_mask()
    photo.fill()
    screenshots(photo.page, "try-result")
    first = photo.download()
    check_result(first, source, first_hole)
    photo.page.get_by_role("button", name="Continue with this result").click()
    expect(photo.hole).to_contain_text("none")
    photo.paint_box(180, 100, 230, 150)
    second_hole = photo.saved_mask()
    assert not (first_hole & second_hole).any()
    photo.fill()
    second = upright(photo.download().path())
    np.testing.assert_array_equal(second[~second_hole], upright(first.path())[~second_hole])


def test_four_versions_side_by_side(opened: TryPage) -> None:
    opened.choose("edges v1", "edges v2", "encoder v1", "encoder v2")
    opened.paint_box(180, 100, 260, 180)
    opened.fill()
    for name in ("Photograph", "edges v1", "edges v2", "encoder v1", "encoder v2"):
        expect(opened.page.get_by_role("img", name=name)).to_be_visible()
    assert accessibility_faults(opened.page) == []
    screenshots(opened.page, "try-side-by-side")
    opened.page.get_by_role("button", name="Slider").click()
    opened.page.get_by_role("group", name="Version shown").get_by_role("button", name="encoder v2").click()
    expect(opened.divider).to_have_attribute("aria-label", re.compile("encoder v2"))
    screenshots(opened.page, "try-slider")


def test_the_format_of_the_result_is_chosen(opened: TryPage) -> None:
    opened.paint_box(180, 100, 260, 180)
    opened.page.get_by_text("Options", exact=True).click()
    opened.page.get_by_label("File format").select_option("tiff")
    opened.fill()
    result = opened.download()
    assert result.suggested_filename.endswith((".tif", ".tiff"))
    with Image.open(result.path()) as image:
        assert image.format == "TIFF"
    assert read_mask(opened.download("mask")).any()


def test_the_seam_is_blended(opened: TryPage) -> None:
    opened.paint_box(180, 100, 260, 180)
    hole = opened.saved_mask()
    opened.fill()
    seam = upright(opened.download().path())
    opened.page.get_by_role("button", name="Back to the mask").click()
    opened.page.get_by_text("Options", exact=True).click()
    opened.page.get_by_role("checkbox", name="Blend the seam").check()
    opened.fill()
    blended = upright(opened.download().path())
    assert (blended != seam)[hole].any()
    np.testing.assert_array_equal(blended[~hole], seam[~hole])


def test_a_frame_of_a_file_with_several_is_chosen(photo: TryPage, tmp_path: Path) -> None:
    frames = [bundled_photo("coffee")[:200, :300], bundled_photo("chelsea")[:180, :280]]
    first, second = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    first.save(tmp_path / "scans.tiff", save_all=True, append_images=[second])
    photo.open_file(tmp_path / "scans.tiff")
    photo.choose("edges v2")
    shown = photo.page.get_by_label("Frame")
    expect(shown.locator("option:checked")).to_have_text("1 of 2")
    shown.select_option("2")
    expect(photo.page.get_by_text("280 × 180")).to_be_visible()
    expect(shown.locator("option:checked")).to_have_text("2 of 2")
    photo.paint_box(100, 80, 160, 120)
    hole = photo.saved_mask()
    photo.fill()
    with Image.open(photo.download().path()) as result:
        assert (result.format, getattr(result, "n_frames", 1)) == ("TIFF", 1)
        np.testing.assert_array_equal(np.asarray(result)[~hole], frames[1][~hole])


def test_the_keys_are_listed(opened: TryPage) -> None:
    press(opened.page, ["?"])
    expect(opened.page.get_by_role("dialog", name="Keys")).to_be_visible()
    assert accessibility_faults(opened.page) == []
    screenshots(opened.page, "try-keys")
    press(opened.page, ["Escape"])
    expect(opened.page.get_by_role("dialog", name="Keys")).to_be_hidden()
