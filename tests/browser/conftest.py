"""Fixtures for tests that drive the studio in a browser. They need Debian's chromium; without it they are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from support.studio_browser import Watch
from support.studio_registry import StudioRegistry
from support.studio_server import StudioServer
from support.studio_storage import StudioStorage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium", path="/usr/bin")
NO_CHROMIUM = "chromium is not installed: apt-get install chromium"
HERE = Path(__file__).parent
TIMEOUT_SECONDS = 30.0  # for what a page shall show


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM:
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=NO_CHROMIUM))


class Studio:
    """A studio with a registry and a storage of its own; `link` opens it for writing."""

    def __init__(self, server: StudioServer, registry: StudioRegistry, storage: StudioStorage) -> None:
        self.server, self.registry, self.storage = server, registry, storage
        self.url, self.link = server.url, server.link


@pytest.fixture(scope="session")
def shared_registry(made_once: Callable[..., Any], empty: Path, quiet_torch: None) -> StudioRegistry:
    """Built by one process; no test may change it."""
    registry: StudioRegistry = made_once("studio", lambda folder: StudioRegistry.create(folder, empty))
    return registry


@pytest.fixture(scope="module")
def studio(shared_registry: StudioRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """The tests of a file share a studio, and may change its registry and its storage."""
    folder = tmp_path_factory.mktemp("studio")
    registry, storage = shared_registry.copy(folder), StudioStorage.create(folder)
    with storage.running(), StudioServer(registry.uri, storage.folder, folder) as server:
        yield Studio(server, registry, storage)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=TIMEOUT_SECONDS * 1000)
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, studio: Studio, tmp_path: Path) -> Iterator[BrowserContext]:
    """A browser with nothing in it, which may use the clipboard."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, accept_downloads=True, reduced_motion="reduce"
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=studio.url)
    context.set_default_timeout(TIMEOUT_SECONDS * 1000)
    yield context
    context.close()


@pytest.fixture
def watch(context: BrowserContext, studio: Studio) -> Iterator[Watch]:
    """Watches all pages of the test: no error, no violation of the Content-Security-Policy, no dialog, and no request
    that leaves the studio. A test removes from `problems` those that it causes."""
    watch = Watch(urlsplit(studio.url).netloc)
    context.on("page", watch.follow)
    yield watch
    assert watch.problems == []


@pytest.fixture
def visitor(context: BrowserContext, watch: Watch) -> Page:
    """A page without the studio's token."""
    return context.new_page()


@pytest.fixture
def page(visitor: Page, studio: Studio) -> Page:
    """A page that the printed link opened, so it may write."""
    visitor.goto(studio.link)
    return visitor
