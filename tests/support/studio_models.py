"""Drives the dialogs that move aliases."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

COMPARISON_SECONDS = 120.0


class AliasDialog:
    """The dialog of `Make champion…` or `Set alias…`, on a version's page."""

    def __init__(self, page: Page) -> None:
        self.page, self.dialog = page, page.get_by_role("dialog")

    def open(self, button: str) -> None:
        self.page.get_by_role("button", name=button).click()
        expect(self.dialog).to_be_visible()

    def go_on(self, reason: str = "") -> Locator:
        """Give the reason and continue; returns the confirming button, when what it confirms is shown."""
        if reason:
            self.dialog.get_by_label("Reason").fill(reason)
        self.dialog.get_by_role("button", name="Continue").click()
        confirm = self.dialog.get_by_role("button", name=re.compile("^Make version"))
        expect(confirm).to_be_visible(timeout=1000 * COMPARISON_SECONDS)
        return confirm

    @property
    def force(self) -> Locator:
        return self.dialog.get_by_role("checkbox", name=re.compile("although the registry objects"))


def expect_message(page: Page, text: str) -> None:
    expect(page.get_by_role("status").filter(has_text=re.compile(text)).first).to_be_visible()
