"""The pages about models: what they show, comparisons, and moves of aliases by the registry's rules."""

from __future__ import annotations

import re

import pytest
from browser.conftest import Studio
from playwright.sync_api import Page, expect

from pipelines import registry
from support.mlflow_stores import champion_version
from support.studio_browser import Watch, accessibility_faults, screenshots
from support.studio_models import COMPARISON_SECONDS, AliasDialog, expect_message
from support.studio_registry import SCRIPT

pytestmark = pytest.mark.browser


def test_the_list_of_models_and_its_filter(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/models")
    cards = page.get_by_role("main").get_by_role("listitem")
    expect(cards.filter(has_text="encoder")).to_contain_text("1 did not become champion")
    expect(cards.filter(has_text="encoder")).to_contain_text("version 2")
    expect(page.get_by_role("main").get_by_role("img").first).to_be_visible()
    assert accessibility_faults(page) == []
    screenshots(page, "models")
    page.get_by_label("Find a model").fill("edge")
    expect(page.get_by_role("link", name="edges", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="encoder", exact=True)).to_be_hidden()
    page.get_by_label("Find a model").fill("nothing like it")
    expect(page.get_by_text("No model has this in its name.")).to_be_visible()


def test_a_model_with_its_versions_chart_and_history(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/models/encoder")
    main = page.get_by_role("main")
    expect(main.get_by_role("heading", name="3 versions")).to_be_visible()
    for words in ("version 1 became champion", "version 2 became champion instead of version 1"):
        expect(main.get_by_role("listitem").filter(has_text=words).first).to_be_visible()
    expect(main.get_by_role("listitem").filter(has_text="version 3 did not become champion")).to_be_visible()
    page.get_by_label("Metric", exact=True).select_option(index=1)
    expect(page).to_have_url(re.compile("metric="))
    page.get_by_role("button", name=re.compile("^version")).click()
    expect(main.get_by_role("row").nth(1)).to_contain_text("1")
    assert accessibility_faults(page) == []
    screenshots(page, "model")
    page.get_by_label("Filter the versions").fill("rejected")
    expect(page.get_by_role("checkbox", name="Choose version 3")).to_be_visible()
    expect(page.get_by_role("checkbox", name="Choose version 2")).to_be_hidden()


def test_a_version_says_how_it_scored_and_what_made_it(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/models/edges/2")
    main = page.get_by_role("main")
    for heading in ("Scores by hole area", "Samples", "What made it", "Model card"):
        expect(main.get_by_role("heading", name=heading, level=2)).to_be_visible()
    page.get_by_text("The same as a table").first.click()
    expect(main.get_by_role("table").first).to_contain_text(re.compile("telea", re.IGNORECASE))
    page.get_by_text("Recipe", exact=True).click()
    expect(main.get_by_text("seed: 4")).to_be_visible()
    expect(main).to_contain_text("seeds")  # the sweep
    expect(main).to_contain_text("0123456789ab")  # the commit
    for image in main.get_by_role("img").all():
        if (image.evaluate("image => image.tagName")) == "IMG":
            image.scroll_into_view_if_needed()
            expect(image).to_have_js_property("complete", True)
            assert image.evaluate("image => image.naturalWidth") > 0
    assert accessibility_faults(page) == []
    screenshots(page, "version")
    page.get_by_role("link", name="Try it").click()
    expect(page.get_by_role("button", name="Choose a photograph")).to_be_visible()


def test_scripts_in_descriptions_and_tags_are_text(page: Page, studio: Studio) -> None:
    for path in ("/models", "/models/edges", "/models/edges/2", "/models/compare?a=edges/1&b=edges/2"):
        page.goto(studio.url + path)
        expect(page.get_by_role("main")).to_be_visible()
        assert page.evaluate("window.injected") is None
    page.goto(f"{studio.url}/models/edges")
    expect(page.get_by_role("main")).to_contain_text("<script>window.injected = true</script>")
    page.goto(f"{studio.url}/models/edges/2")
    page.get_by_text(re.compile(r"^\d+ tags$")).click()
    expect(page.get_by_text(SCRIPT)).to_be_visible()


def test_two_versions_are_compared_with_pictures(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/models/encoder")
    page.get_by_role("checkbox", name="Choose version 1").check()
    page.get_by_role("checkbox", name="Choose version 2").check()
    page.get_by_role("button", name="Compare the two chosen").click()
    expect(page.get_by_role("heading", name="Compare two versions")).to_be_visible()
    expect(page.get_by_role("table", name="Stored scores of A and B")).to_be_visible()
    assert accessibility_faults(page) == []
    page.get_by_label("Photographs", exact=True).select_option("bundled")
    page.get_by_label("At most").fill("12")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.get_by_role("heading", name="Side by side")).to_be_visible(timeout=1000 * COMPARISON_SECONDS)
    table = page.get_by_role("region", name=re.compile("^Differences with")).first
    expect(table).to_contain_text("PSNR")
    expect(table).to_contain_text(re.compile("better|worse|not distinguishable|no difference"))
    picture = page.get_by_role("img", name=re.compile("photograph 1 of|photograph 0 of|, photograph")).first
    picture.scroll_into_view_if_needed()
    expect(picture).to_have_js_property("complete", True)
    assert picture.evaluate("image => image.naturalWidth") > 0
    assert accessibility_faults(page) == []
    screenshots(page, "compared")


def test_an_alias_of_ones_own_is_set_with_a_reason(page: Page, studio: Studio) -> None:
    page.goto(f"{studio.url}/models/encoder/1")
    dialog = AliasDialog(page)
    dialog.open("Set alias…")
    assert accessibility_faults(page) == []
    screenshots(page, "alias-dialog")
    dialog.dialog.get_by_label("Alias", exact=True).select_option(label="another …")
    dialog.dialog.get_by_label("Name of the alias").fill("staging")
    dialog.go_on("to look at it").click()
    expect_message(page, "encoder version 1 is now staging")
    assert studio.registry.client.get_model_version_by_alias("encoder", "staging").version in (1, "1")
    move = registry.history("encoder", studio.registry.uri)[-1]
    assert (move.alias, move.to) == ("staging", "1")
    assert move.reason.startswith("to look at it")
    expect(page.get_by_role("main")).to_contain_text("to look at it")


def test_an_alias_that_is_not_allowed_is_refused_in_the_dialog(
    page: Page, studio: Studio, watch: Watch
) -> None:
    page.goto(f"{studio.url}/models/encoder/1")
    dialog = AliasDialog(page)
    dialog.open("Set alias…")
    dialog.dialog.get_by_label("Alias", exact=True).select_option(label="another …")
    dialog.dialog.get_by_label("Name of the alias").fill("latest")
    dialog.dialog.get_by_role("button", name="Continue").click()
    expect(dialog.dialog.get_by_role("alert")).to_contain_text("'latest' cannot be an alias")
    watch.forgive("status of 4")
    dialog.dialog.get_by_role("button", name="Cancel").click()
    expect(dialog.dialog).to_be_hidden()


def test_a_worse_version_is_refused_unless_forced_and_rolled_back(page: Page, studio: Studio) -> None:
    uri = studio.registry.uri
    page.goto(f"{studio.url}/models/encoder/3")
    expect(page.get_by_role("main")).to_contain_text("did not become champion")
    dialog = AliasDialog(page)
    dialog.open("Make champion…")
    confirm = dialog.go_on("the customer likes it")
    expect(dialog.dialog).to_contain_text("worse")
    expect(dialog.dialog).to_contain_text("95 % interval")
    assert accessibility_faults(page) == []
    screenshots(page, "promotion-objection")
    confirm.click()
    expect(dialog.dialog.get_by_role("alert")).to_contain_text("although the registry objects")
    assert champion_version(uri) == "2"
    dialog.force.check()
    confirm.click()
    expect_message(page, "encoder version 3 is now champion")
    assert champion_version(uri) == "3"
    move = registry.history("encoder", uri)[-1]
    assert move.forced
    assert move.reason.startswith("the customer likes it")

    page.goto(f"{studio.url}/models/encoder")
    page.get_by_role("button", name="Roll back…").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("version 2")
    screenshots(page, "rollback")
    assert accessibility_faults(page) == []
    page.get_by_role("dialog").get_by_label("Reason").fill("it was worse after all")
    page.get_by_role("dialog").get_by_role("button", name="Back to version 2").click()
    expect(page.get_by_role("main")).to_contain_text("it was worse after all")
    assert champion_version(uri) == "2"
    assert registry.history("encoder", uri)[-1].action == "rollback"


def test_a_move_that_somebody_else_made_meanwhile_is_not_overwritten(
    page: Page, studio: Studio, watch: Watch
) -> None:
    uri = studio.registry.uri
    page.goto(f"{studio.url}/models/edges/1")
    dialog = AliasDialog(page)
    dialog.open("Set alias…")
    dialog.dialog.get_by_label("Alias", exact=True).select_option(label="candidate")
    confirm = dialog.go_on("mine")
    registry.rollback("edges", reason="somebody else", tracking_uri=uri)
    registry.promote("edges", "1", "candidate", reason="somebody else", tracking_uri=uri)
    registry.promote("edges", "2", "candidate", reason="somebody else", tracking_uri=uri)
    confirm.click()
    expect(dialog.dialog.get_by_role("alert")).to_be_visible()
    watch.forgive("status of 4")
    assert registry.history("edges", uri)[-1].reason == "somebody else"


def test_without_the_token_nothing_can_be_changed(visitor: Page, studio: Studio) -> None:
    visitor.goto(f"{studio.url}/models/encoder/1")
    for name in ("Make champion…", "Set alias…"):
        button = visitor.get_by_role("button", name=name)
        expect(button).to_be_disabled()
        expect(button).to_have_attribute("title", re.compile("token"))
    visitor.goto(f"{studio.url}/models/compare?a=encoder/1&b=encoder/2")
    expect(visitor.get_by_role("main")).to_contain_text("needs the studio's token")
    screenshots(visitor, "compare-read-only")
