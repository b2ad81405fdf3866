"""The pages about runs: states, progress, errors, reports, commands, and changes made elsewhere."""

from __future__ import annotations

import re
import time

import pytest
from browser.conftest import Studio
from playwright.sync_api import Page, expect

from pipelines import registry
from support.studio_browser import accessibility_faults, screenshots
from support.studio_storage import ERROR, FAILED_RUN, FINISHED_RUN, REPORT_SENTENCE, RUNNING_RUN, SWEEP_RUN

pytestmark = pytest.mark.browser
REFRESH_SECONDS = 10.0


def test_the_list_shows_states_progress_and_errors(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/runs")
    rows = page.get_by_role("main").get_by_role("listitem")
    for name, words in (
        (FINISHED_RUN, "finished"),
        (RUNNING_RUN, "left"),
        (FAILED_RUN, "failed"),
        (SWEEP_RUN, "2 finished"),
    ):
        expect(rows.filter(has=page.get_by_role("link", name=name, exact=True))).to_contain_text(words)
    expect(rows.filter(has_text=FAILED_RUN)).to_contain_text(ERROR)
    assert accessibility_faults(page) == []
    screenshots(page, "runs")
    page.get_by_role("button", name="Failed", exact=True).click()
    expect(page.get_by_role("link", name=FAILED_RUN, exact=True)).to_be_visible()
    expect(page.get_by_role("link", name=FINISHED_RUN, exact=True)).to_be_hidden()
    page.get_by_label("Filter by name or error").fill("no such run")
    expect(page.get_by_text("No run matches.")).to_be_visible()


def test_a_running_run_has_a_graph_progress_and_an_eta(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/runs")
    page.get_by_role("link", name=RUNNING_RUN, exact=True).click()
    graph = page.get_by_role("region", name="Graph of the steps")
    for step in ("shard", "context_encoder", "evaluate", "edge_connect", "running"):
        expect(graph).to_contain_text(step)
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="train-context_encoder"))
    expect(row).to_contain_text(re.compile(r"\d+ of 400.* left"))
    expect(row).to_contain_text("resuming from step 80 with 2 workers")
    assert accessibility_faults(page) == []
    screenshots(page, "run-running")


def test_progress_made_elsewhere_shows_within_ten_seconds(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/runs/{RUNNING_RUN}")
    expect(page.get_by_role("main")).to_contain_text("of 400")
    start = time.monotonic()
    studio.storage.report_progress(321)
    expect(page.get_by_role("main")).to_contain_text("321 of 400", timeout=1000 * REFRESH_SECONDS)
    assert time.monotonic() - start < REFRESH_SECONDS


def test_a_promotion_made_elsewhere_shows_within_ten_seconds(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/models/encoder")
    aliases = page.get_by_role("region", name="Aliases")
    expect(aliases).to_contain_text("version 2")
    start = time.monotonic()
    registry.promote("encoder", "1", reason="at the command line", tracking_uri=studio.registry.uri)
    expect(page.get_by_role("main")).to_contain_text("at the command line", timeout=1000 * REFRESH_SECONDS)
    expect(aliases).to_contain_text("version 1")
    assert time.monotonic() - start < REFRESH_SECONDS


def test_a_failed_run_names_the_error_and_how_to_continue(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/runs/{FAILED_RUN}")
    main = page.get_by_role("main")
    expect(main).to_contain_text(ERROR)
    expect(main).to_contain_text("in attempt 2")
    expect(main.get_by_role("heading", name="Continue it")).to_be_visible()
    assert accessibility_faults(page) == []
    screenshots(page, "run-failed")


def test_a_finished_run_has_its_report_and_the_command_that_repeats_it(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/runs/{FINISHED_RUN}")
    main = page.get_by_role("main")
    expect(main).to_contain_text(REPORT_SENTENCE)
    expect(main.get_by_role("link", name="edges version 2").first).to_have_attribute(
        "href", "/models/edges/2"
    )
    assert accessibility_faults(page) == []
    screenshots(page, "run-finished")
    command = main.get_by_role("code").filter(has_text="inpaint run").inner_text()
    main.get_by_role("button", name="Copy").first.click()
    expect(page.get_by_role("status").filter(has_text="Copied").first).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == command
    assert copied.startswith(f"inpaint run {FINISHED_RUN}")
    with page.expect_popup() as popup:
        main.get_by_role("link", name=re.compile("^Report of")).click()
    expect(popup.value.get_by_text(REPORT_SENTENCE)).to_be_visible()
    screenshots(popup.value, "report")


def test_a_sweep_lists_its_trials(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/runs/{SWEEP_RUN}")
    main = page.get_by_role("main")
    table = main.get_by_role("table").last
    expect(table.get_by_role("row")).to_have_count(6)
    for words in ("stopped by the scheduler", "the loss is nan at step 120", "best"):
        expect(table).to_contain_text(words)
    button = table.get_by_role("button", name="psnr_rgb_hole")
    button.click()
    button.click()
    expect(table.get_by_role("row").nth(1)).to_contain_text("21")
    assert accessibility_faults(page) == []
    screenshots(page, "run-sweep")
