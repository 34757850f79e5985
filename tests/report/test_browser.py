"""The page in a real browser: it opens from disk, moves, finds, and fits a phone.

Wants playwright and Debian's chromium (`apt-get install chromium`, `pip install playwright`).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curate.stages.report import RunFacts, write_report
from tests.stages.test_report import FACTS, decisions, lay_out
from tests.support import sample_pairs

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

HOSTILE = "<img src=x onerror=alert(1)> \u202ezebra"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in a folder whose name a shell and a URL must quote."""
    out = tmp_path_factory.mktemp("browser") / "it's 100 % out"
    image = next(image for image, _ in sample_pairs().values() if image[:2] == b"\xff\xd8")
    table = decisions(2000)
    captions = table["caption"].to_pylist()
    kept = table["keep"].to_pylist()
    captions = [HOSTILE if keep else text for keep, text in zip(kept, captions, strict=True)]
    table = table.set_column(table.column_names.index("caption"), "caption", [captions])
    room = lay_out(out / "stages", table, image, 2)
    parameters = {"max_mismatch_rate": 0.05}
    manifest = {"parameters": parameters, "steps": {}, "versions": {"curate": "1"}}
    write_report(room, RunFacts(FACTS, {"select": manifest}), str(out / "report"))
    return out / "report/index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def open_page(browser: Any, path: Path, **settings: Any) -> Any:
    """Open a page on which any complaint of the browser fails the test."""
    page = browser.new_page(**settings)
    page.on("console", lambda message: pytest.fail(f"console: {message.text}"))
    page.on("pageerror", lambda error: pytest.fail(f"error: {error}"))
    page.on("dialog", lambda dialog: pytest.fail(f"dialog: {dialog.message}"))
    page.goto(path.as_uri())
    return page


def test_opens_from_disk_and_shows_pictures(browser: Any, page_path: Path) -> None:
    page = open_page(browser, page_path)
    assert page.title() == "curate report"
    page.locator("#galleries").scroll_into_view_if_needed()
    # The page's policy keeps a browser's driver from waiting by a function, too.
    page.locator("#wall img").first.evaluate("image => image.decode()")
    assert page.locator("#wall img").first.evaluate("image => image.naturalWidth") > 0
    assert page.locator("#wall .card").count() > 10
    assert page.locator("#wall .caption", has_text="<img src=x").count() > 0
    assert page.locator("#wall .caption img").count() == 0
    page.locator("#wall summary").first.click()
    out = str(page_path.parents[1]).replace("'", "'\\''")
    command = page.locator("#wall code.show").first.inner_text()
    assert command.startswith(f"curate show '{out}' ")
    page.close()


def test_the_slider_moves_counts_and_samples(browser: Any, page_path: Path) -> None:
    page = open_page(browser, page_path)
    setting = page.locator("#setting")
    assert setting.inner_text() == "--set select.max_mismatch_rate=0.05"

    def look() -> tuple[str, str, str, str]:
        mark = page.locator("#rates .mark").first.get_attribute("x1")
        figures, ladder = page.locator("#figures"), page.locator("#ladder")
        return setting.inner_text(), figures.inner_text(), ladder.inner_text(), str(mark)

    before = look()
    page.locator("#rate").focus()
    page.keyboard.press("Home")
    after = look()
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert page.locator("#ladder .card").count() > 8
    page.close()


def test_galleries_and_search(browser: Any, page_path: Path) -> None:
    page = open_page(browser, page_path)
    for number in range(page.locator("#chips button").count()):
        chip = page.locator("#chips button").nth(number)
        chip.focus()
        page.keyboard.press("Enter")
        assert chip.get_attribute("aria-pressed") == "true"
        assert page.locator("#wall .card").count() > 0
    page.locator("#search").fill("ZEBRA")
    found = page.locator("#wall .card .caption").all_inner_texts()
    assert found
    assert all("zebra" in text for text in found)
    page.locator("#search").fill("nowhere to be found")
    assert page.locator("#wall .card").count() == 0
    page.locator("a[data-gallery=decode_error]").click()
    assert page.locator("#wall h3").inner_text() == "Unreadable"
    assert page.locator("#search").input_value() == ""
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser: Any, page_path: Path, scheme: str) -> None:
    page = open_page(browser, page_path, color_scheme=scheme)
    ink, paper = page.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        ".map((c) => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)); })()"
    )
    assert (ink > paper) == (scheme == "dark")
    assert abs(ink - paper) > 500
    page.close()


@pytest.mark.parametrize("width", [400, 320, 1200])
def test_nothing_scrolls_sideways(browser: Any, page_path: Path, width: int) -> None:
    page = open_page(browser, page_path, viewport={"width": width, "height": 800})
    page.locator("#wall summary").first.click()
    sizes = "[document.documentElement.scrollWidth, document.querySelector('header').scrollWidth]"
    assert max(page.evaluate(sizes)) <= width
    page.close()


def test_every_control_is_reached_by_keyboard(browser: Any, page_path: Path) -> None:
    page = open_page(browser, page_path)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    handled = "a, button, input, summary"
    controls = page.locator(handled)
    for number in range(controls.count()):
        assert controls.nth(number).evaluate("node => node.tabIndex") >= 0
    page.close()
