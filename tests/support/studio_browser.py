"""Helpers for tests in a browser: errors of pages, screenshots, accessibility."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import ConsoleMessage, Dialog, Page, Request

SCREENSHOTS = Path(__file__).parents[2] / "build" / "studio-screenshots"
SCHEMES, WIDTHS, TESTED_WIDTHS = ("light", "dark"), (400, 1280, 2560), (400, 1280)


class Watch:
    """Collects what no page of the studio may do."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.problems: list[str] = []

    def follow(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)

    def forgive(self, pattern: str) -> None:
        """Remove problems that the test causes; there must be some."""
        left = [problem for problem in self.problems if not re.search(pattern, problem)]
        assert len(left) < len(self.problems), f"no {pattern!r} in {self.problems}"
        self.problems[:] = left

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self.host:
            self.problems.append(f"request to {request.url}")


@contextmanager
def shown_as(page: Page, scheme: str, width: int) -> Iterator[None]:
    """Inside the block the page has this colour scheme and width."""
    before = page.viewport_size
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 900 if width < 2000 else 1300})
    yield
    page.emulate_media(color_scheme="light")
    if before:
        page.set_viewport_size(before)


def screenshots(page: Page, name: str) -> None:
    """With STUDIO_SCREENSHOTS set, pictures of the page as it is: light and dark, narrow and wide."""
    if not os.environ.get("STUDIO_SCREENSHOTS"):
        return
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for scheme in SCHEMES:
        for width in WIDTHS:
            with shown_as(page, scheme, width):
                page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)


def accessibility_faults(page: Page, schemes: tuple[str, ...] = SCHEMES) -> list[str]:
    """Serious and critical findings of axe-core in each colour scheme and width, and pages wider than the window."""
    faults = []
    for scheme in schemes:
        for width in TESTED_WIDTHS:
            with shown_as(page, scheme, width):
                for found in Axe().run(page).response["violations"]:
                    if found["impact"] in ("serious", "critical"):
                        nodes = "; ".join(node["html"][:160] for node in found["nodes"][:3])
                        faults.append(f"{scheme}, {width} px: {found['id']}: {found['help']}: {nodes}")
                if (overflow := overflow_pixels(page)) > 0:
                    faults.append(f"{scheme}, {width} px: {overflow} px wider than the window")
    return list(dict.fromkeys(faults))


def overflow_pixels(page: Page) -> int:
    """How much wider the page is than the window."""
    pixels: int = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return pixels
