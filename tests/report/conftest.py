"""A real browser, and where pictures of pages are left."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

#: Opens a page in the real browser, with the network off; settings are those of its context.
OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by playwright; tests are skipped where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    """Open pages that must be free of complaints until the test's end."""
    pages, complaints = [], []

    def complain(text: str) -> None:
        complaints.append(text)

    def open_one(path: Path, **settings: Any) -> Any:
        page = browser.new_page(**settings)
        pages.append(page)
        page.context.set_offline(True)
        page.on("request", lambda one: one.url.startswith("file:") or complain(one.url))
        page.on("console", lambda message: complain(message.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("dialog", lambda dialog: (complain(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_one
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the pages are left: pytest's folder, or CURATE_SCREENSHOTS."""
    chosen = os.environ.get("CURATE_SCREENSHOTS")
    return Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
