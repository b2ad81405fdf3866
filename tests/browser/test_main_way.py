"""The main way through the studio; the part of the tests in a browser that `make test` runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from browser.conftest import Studio
from playwright.sync_api import Page, expect

from pipelines import registry
from support.mlflow_stores import champion_version
from support.studio_browser import accessibility_faults, screenshots
from support.studio_models import AliasDialog, expect_message
from support.studio_storage import RUNNING_RUN
from support.studio_try import TryPage, check_result, press, read_mask, tab_to, write_photo

pytestmark = pytest.mark.slow


def test_try_by_mouse(page: Page, tmp_path: Path) -> None:
    photo, source = TryPage(page), write_photo(tmp_path / "a photo.png")
    photo.open_file(source)
    assert photo.size == (300, 200)
    photo.paint_box(120, 60, 180, 110)
    photo.choose("edges v1", "edges v2")
    hole = photo.saved_mask()
    expected = np.zeros((200, 300), bool)
    expected[60:110, 120:180] = True
    assert (hole ^ expected).mean() < 0.01
    assert photo.hole_percent() == pytest.approx(100 * hole.mean(), abs=0.1)
    assert accessibility_faults(page, ("light",)) == []
    photo.fill()

    page.get_by_role("button", name="Side by side").click()
    for name in ("Photograph", "edges v1", "edges v2"):
        expect(page.get_by_role("img", name=name)).to_be_visible()
    page.get_by_role("button", name="Slider").click()
    before = photo.divider.get_attribute("aria-valuenow")
    box = photo.divider.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 60, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert int(photo.divider.get_attribute("aria-valuenow") or 0) < int(before or 0)
    assert accessibility_faults(page, ("dark",)) == []

    result = photo.download()
    assert result.suggested_filename == "a photo-filled.png"
    check_result(result, source, hole)
    np.testing.assert_array_equal(read_mask(photo.download("mask")), hole)


def test_try_by_keyboard(page: Page) -> None:
    """From the printed link to the downloaded result."""
    photo = TryPage(page)
    expect(page.get_by_role("button", name="Cat", exact=True)).to_be_visible()
    tab_to(page, "^Cat$")
    press(page, ["Enter"])
    expect(photo.stage).to_be_focused()
    press(
        page, ["r", *["ArrowUp"] * 3, "Space", *["Shift+ArrowRight"] * 2, *["Shift+ArrowDown"] * 2, "Space"]
    )
    expect(photo.hole).not_to_contain_text("none")
    tab_to(page, "^edges v2")
    if not photo.version("edges v2").is_checked():
        press(page, ["Space"])
    tab_to(page, "^Fill$")
    press(page, ["Enter"])
    photo.expect_result()
    expect(photo.divider).to_be_focused()
    press(page, ["ArrowLeft", "ArrowLeft"])
    expect(photo.divider).to_have_attribute("aria-valuenow", "46")
    tab_to(page, "^Download result$")
    with page.expect_download() as download:
        press(page, ["Enter"])
    assert re.fullmatch(r"chelsea-filled\.\w+", download.value.suggested_filename)
    press(page, ["Escape"])
    expect(photo.fill_button).to_be_visible()
    screenshots(page, "try-hole")


def test_a_better_version_becomes_champion(page: Page, studio: Studio) -> None:
    uri = studio.registry.uri
    registry.promote("encoder", "1", reason="at the command line", tracking_uri=uri)
    page.get_by_role("link", name="Models").click()
    page.get_by_role("link", name="encoder", exact=True).click()
    history = page.get_by_role("listitem").filter(has_text="at the command line")
    expect(history.first).to_be_visible(timeout=10_000)
    page.get_by_role("rowheader", name="2").get_by_role("link").click()
    expect(page.get_by_role("heading", name="Scores by hole area")).to_be_visible()
    dialog = AliasDialog(page)
    dialog.open("Make champion…")
    confirm = dialog.go_on("sharper")
    expect(dialog.dialog).to_contain_text("better")
    screenshots(page, "promotion")
    confirm.click()
    expect_message(page, "encoder version 2 is now champion")
    assert champion_version(uri) == "2"
    move = registry.history("encoder", uri)[-1]
    assert (move.to, move.forced) == ("2", False)
    assert move.reason.startswith("sharper; ")


def test_a_run_is_followed(page: Page, studio: Studio) -> None:
    page.get_by_role("link", name="Runs").click()
    page.get_by_role("link", name=RUNNING_RUN, exact=True).click()
    expect(page.get_by_role("region", name="Graph of the steps")).to_contain_text("context_encoder")
    studio.storage.report_progress(240)
    expect(page.get_by_role("main")).to_contain_text("240 of 400", timeout=10_000)
    assert accessibility_faults(page, ("light",)) == []
