"""A studio in a real browser: what other pages and other people cannot do, and what is shown without the token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser.conftest import Studio
from playwright.sync_api import BrowserContext, Page, expect

from support.studio_browser import Watch, accessibility_faults, screenshots

pytestmark = pytest.mark.browser
ATTACK = """<!doctype html><title>other</title>
<form id="form" method="post" action="{url}/api/models/encoder/aliases"><input name="version" value="1"></form>
<iframe title="frame" src="{url}/"></iframe>"""


@contextmanager
def serve(page: str) -> Iterator[str]:
    """A page of another origin."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_page_of_another_origin_can_neither_write_nor_read(
    context: BrowserContext, page: Page, studio: Studio, watch: Watch
) -> None:
    """The browser holds the studio's session, as that of a person who works with it."""
    with serve(ATTACK.format(url=studio.url)) as other:
        stranger = context.new_page()
        stranger.goto(other)
        answers = stranger.evaluate(
            """async (url) => {
                const outcomes = [];
                const requests = [
                    [`${url}/api/versions`, {credentials: "include"}],
                    [`${url}/api/fills`, {method: "POST", credentials: "include", body: "{}"}],
                    [`${url}/api/fills`, {method: "POST", credentials: "include", body: "{}",
                                          headers: {"Content-Type": "application/json", "X-CSRF-Token": "x"}}],
                ];
                for (const [address, options] of requests) {
                    try { outcomes.push((await fetch(address, options)).status); } catch { outcomes.push("refused"); }
                }
                return outcomes;
            }""",
            studio.url,
        )
        assert answers == ["refused"] * 3
        with stranger.expect_navigation() as navigation:
            stranger.locator("#form").evaluate("form => form.submit()")
        response = navigation.value
        assert response is not None
        assert response.status == 403
        assert "error" in response.text()
        framed = [frame for frame in stranger.frames if frame.parent_frame]
        assert all("Models" not in frame.content() for frame in framed)
        stranger.close()
    watch.problems.clear()  # all of them the stranger's
    page.goto(f"{studio.url}/models")
    expect(page.get_by_role("link", name="encoder").first).to_be_visible()


def test_the_link_carries_the_token_once(page: Page, studio: Studio) -> None:
    assert "token" not in page.url
    expect(page.get_by_role("link", name="Read only")).to_have_count(0)


def test_a_wrong_token_is_refused_and_the_right_one_opens(
    visitor: Page, studio: Studio, watch: Watch
) -> None:
    visitor.goto(studio.url)
    visitor.get_by_role("link", name="Read only").click()
    field = visitor.get_by_role("textbox", name="Token")
    expect(field).to_be_visible()
    assert accessibility_faults(visitor) == []
    screenshots(visitor, "token")
    field.fill("guess")
    field.press("Enter")
    expect(visitor.get_by_role("alert")).to_be_visible()
    watch.forgive("40[0-9]")
    visitor.get_by_role("textbox", name="Token").fill(studio.server.token)
    visitor.get_by_role("textbox", name="Token").press("Enter")
    expect(visitor.get_by_role("link", name="Read only")).to_have_count(0)


def test_an_unknown_page_says_so(visitor: Page, studio: Studio, watch: Watch) -> None:
    visitor.goto(f"{studio.url}/models/nothing")
    expect(visitor.get_by_role("main")).to_contain_text("Not found")
    watch.forgive("404")
    assert accessibility_faults(visitor) == []
    screenshots(visitor, "not-found")
