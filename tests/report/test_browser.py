"""The page in a real browser: it opens from disk, moves, finds, and fits a phone.

Wants playwright and Debian's chromium (`apt-get install chromium`, `pip install playwright`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from curate.stages.base import Room
from curate.stages.report import RunFacts, write_report
from curate.stages.report_compare import Side, write_comparison
from curate.storage import vector_column
from tests.report.conftest import OpenPage
from tests.stages.test_report import FACTS, decisions, lay_out
from tests.stages.test_report_compare import change
from tests.support import sample_pairs

HOSTILE = "<img src=x onerror=alert(1)> \u202ezebra"
ODD = (
    "\u200fשלום\u202e\u2067",
    "x" * 10_000,
    "a\x00b\x1b[2J",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "' \" ` ${z}</script>",
)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in a folder whose name a shell and a URL must quote."""
    out = tmp_path_factory.mktemp("browser") / "it's 100 % out"
    image = next(image for image, _ in sample_pairs().values() if image[:2] == b"\xff\xd8")
    table = decisions(2000)
    captions = table["caption"].to_pylist()
    kept = table["keep"].to_pylist()
    captions = [HOSTILE if keep else text for keep, text in zip(kept, captions, strict=True)]
    captions = [text if n % 9 else ODD[n // 9 % len(ODD)] for n, text in enumerate(captions)]
    for name in ("caption", "key"):
        table = table.set_column(table.column_names.index(name), name, [captions])
    # As real ones are: most are far below a thousandth.
    place = table.column_names.index("mismatch_probability")
    small = pc.power(table.column(place), pa.scalar(5, pa.float32()))
    table = table.set_column(place, table.schema.field(place), small)
    vectors = np.random.default_rng(0).normal(size=(len(table), 8)).astype(np.float32)
    rows = zip(table["uid"].to_pylist(), vectors, strict=True)
    room = lay_out(out / "stages", table, image, 2)
    add_vectors(room, dict(rows))
    parameters = {"max_mismatch_rate": 0.05}
    manifest = {"parameters": parameters, "steps": {}, "versions": {"curate": "1"}}
    write_report(room, RunFacts(FACTS, {"select": manifest}), str(out / "report"))
    other = change(table, 0.3)
    there = Side("other", lay_out(out / "other", other, image, 3), RunFacts(FACTS, {}))
    here = Side(str(out), room, RunFacts(FACTS, {"select": manifest}))
    write_comparison(here, there, str(out / "compare"))
    return out / "report/index.html"


def add_vectors(room: Room, vectors: dict[str, Any]) -> None:
    """Put image vectors beside what `lay_out` laid out, for the map."""
    room.origins["image_emb"] = "embed.vectors"
    room.folders["embed.vectors"] = room.folders["select"].replace("select", "embed.vectors")
    for shard in room.shards():
        uids = room.read(shard, [])["uid"]
        held = np.stack([vectors[uid] for uid in uids.to_pylist()])
        column = vector_column(held, np.ones(len(held), bool))
        room.commit_shard("embed.vectors", shard, pa.table({"uid": uids, "image_emb": column}))


def test_opens_from_disk_and_shows_pictures(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
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


def test_the_slider_moves_counts_and_samples(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
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
    page.keyboard.press("ArrowRight")
    assert page.locator("#rate").input_value() == "1"
    assert look() != after
    page.keyboard.press("ArrowLeft")
    assert look() == after


def test_small_probabilities_are_told_and_fall_on_their_side(
    open_page: OpenPage, page_path: Path
) -> None:
    page = open_page(page_path)
    samples, curve = page.evaluate("[window.curateReport.samples, window.curateReport.curve]")
    name = "mismatch_probability"
    least = min((samples[item] for item in curve["ladder"]), key=lambda one: one["scores"][name])
    assert least["scores"][name] < 1e-4
    page.locator("#search").fill(least["uid"])
    card = page.locator("#wall .card")
    assert f"mismatch {least['told'][name]}" in card.inner_text()
    card.locator("summary").click()
    assert least["told"][name] in card.locator("dd").all_inner_texts()
    page.locator("#rate").focus()
    page.keyboard.press("Home")
    sides = page.locator("#ladder .group")
    assert (
        sides.nth(0).locator("h4").inner_text() == f"below the line ({curve['points'][0]['told']})"
    )
    for side, is_below in ((0, True), (1, False)):
        for card in sides.nth(side).locator(".card").all():
            uid = card.locator("code.show").text_content().split()[-1]
            (value,) = [one["scores"][name] for one in samples if one["uid"] == uid]
            assert (value <= curve["points"][0]["limit"] * (1 + 1e-5)) == is_below


def test_galleries_and_search(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(open_page: OpenPage, page_path: Path, scheme: str) -> None:
    page = open_page(page_path, color_scheme=scheme)
    ink, paper = page.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        ".map((c) => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)); })()"
    )
    assert (ink > paper) == (scheme == "dark")
    assert abs(ink - paper) > 500


@pytest.mark.parametrize("width", [400, 320, 1200])
def test_nothing_scrolls_sideways(open_page: OpenPage, page_path: Path, width: int) -> None:
    page = open_page(page_path, viewport={"width": width, "height": 800})
    page.locator("#wall summary").first.click()
    sizes = "[document.documentElement.scrollWidth, document.querySelector('header').scrollWidth]"
    assert max(page.evaluate(sizes)) <= width


def test_every_control_is_reached_by_keyboard(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    stop = (
        "(() => { const n = document.activeElement; const s = getComputedStyle(n);"
        "n.dataset.reached = '';"
        "return [n.tagName, s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
    )
    for _ in range(1000):
        tag, style, width = page.evaluate(stop)
        if tag == "BODY":
            break
        assert (style, width >= 2) == ("solid", True), tag
        page.keyboard.press("Tab")
    assert tag == "BODY"
    controls = "a[href], button, input, summary, #setting, #plane, .region[tabindex='0']"
    missed = (
        "nodes => nodes.filter(n => n.checkVisibility() && !('reached' in n.dataset))"
        ".map(n => n.outerHTML)"
    )
    assert page.locator(controls).evaluate_all(missed) == []


def test_odd_text_is_text(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
    for needle, shown in (("שלום", "[U+202E]"), ("xxxxx", "(10,000 characters)"), ("a␀b", "␛[2J")):
        page.locator("#search").fill(needle)
        caption = page.locator("#wall .caption").first
        assert shown in caption.inner_text()
        assert caption.get_attribute("dir") == "auto"
    for needle in ("👩‍👩‍👧‍👦", "</script>"):
        page.locator("#search").fill(needle)
        assert needle in page.locator("#wall .caption").first.inner_text()


def test_pointing_at_the_map_shows_that_sample(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
    plane = page.locator("#plane")
    plane.scroll_into_view_if_needed()
    box = plane.bounding_box()
    assert box is not None
    samples, points = page.evaluate("[window.curateReport.samples, window.curateReport.map]")
    for item, x, y in points[:5]:
        left, top = (8 + x * 344) / 360 * box["width"], (8 + y * 254) / 270 * box["height"]
        page.mouse.move(box["x"] + left, box["y"] + top)
        shown = page.locator("#here")
        image = shown.locator("img").first
        assert samples[item]["uid"] in (shown.locator("code.show").text_content() or "")
        assert image.get_attribute("src") == samples[item]["picture"]
        image.evaluate("image => image.decode()")
    before = page.locator("#here code.show").text_content()
    plane.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#here code.show").text_content() != before


def test_dots_take_the_colour_of_what_is_asked(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
    buttons = page.locator("#colours button")
    assert buttons.all_inner_texts() == ["verdict", "rarity", "cluster"]
    seen = set()
    for number in range(3):
        buttons.nth(number).click()
        assert buttons.nth(number).get_attribute("aria-pressed") == "true"
        fills = "nodes => nodes.map(n => getComputedStyle(n).fill)"
        seen.add(tuple(page.locator("#plane .dot").evaluate_all(fills)))
    assert len(seen) == 3


def test_regions_show_their_samples(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path)
    regions = page.locator("#regions .region")
    told, shown = page.evaluate(
        "[window.curateReport.density.regions, window.curateReport.density.shown]"
    )
    full = [number for number, items in enumerate(shown) if items][:2]
    regions.nth(full[0]).click()
    assert page.locator("#region .card").count() == len(shown[full[0]])
    heading = page.locator("#region h3").inner_text()
    assert heading.startswith(f"{told[full[0]][0]} samples, {told[full[0]][1]} dropped")
    regions.nth(full[1]).focus()
    page.keyboard.press("Enter")
    assert page.locator("#region .card").count() == sum(len(shown[number]) for number in full)
    regions.nth(full[0]).click()
    assert page.locator("#region .card").count() == len(shown[full[1]])
    regions.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert regions.nth(6).evaluate("node => node === document.activeElement")


def test_two_runs_side_by_side(open_page: OpenPage, page_path: Path) -> None:
    page = open_page(page_path.parents[1] / "compare/index.html")
    assert page.title() == "curate: two runs compared"
    assert page.locator("#wall h3").inner_text() == "Newly dropped"
    first = page.locator("#wall .card").first
    assert "the other run: kept" in first.inner_text()
    first.locator("img").first.evaluate("image => image.decode()")
    first.locator("summary").click()
    out = str(page_path.parents[1]).replace("'", "'\\''")
    assert first.locator("code.show").inner_text().startswith(f"curate show '{out}' ")
    assert page.locator("#curves svg").count() > 5
    page.locator("#changes a").first.click()
    assert page.title() == "curate report"


@pytest.mark.parametrize("place", ["report", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_pictures_of_the_pages_are_left_to_look_at(
    open_page: OpenPage, page_path: Path, screenshots: Path, place: str, scheme: str, width: int
) -> None:
    size = {"width": width, "height": 900}
    path = page_path.parents[1] / place / "index.html"
    page = open_page(path, color_scheme=scheme, viewport=size)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    target = screenshots / f"{place}-{scheme}-{width}.png"
    page.screenshot(path=target, full_page=True)
    assert target.stat().st_size > 20_000


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_pictures_of_what_a_reader_does_are_left_too(
    open_page: OpenPage, page_path: Path, screenshots: Path, scheme: str, width: int
) -> None:
    page = open_page(page_path, color_scheme=scheme, viewport={"width": width, "height": 900})

    def leave(name: str, section: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        target = screenshots / f"report-{name}-{scheme}-{width}.png"
        page.locator(section).screenshot(path=target)
        assert target.stat().st_size > 5_000

    for gallery in ("threshold", "clusters", "memorized", "unreadable", "duplicate_perceptual"):
        page.locator(f"#chips button[data-name={gallery}]").click()
        leave(gallery, "#galleries")
    page.locator("#search").fill("zebra")
    page.locator("#wall summary").nth(1).click()
    opened = page.locator("#wall .card").nth(1)
    other = page.locator("#wall .card").nth(2)
    # What is known of a sample has room for two columns, and does not stretch its neighbours.
    assert opened.bounding_box()["width"] > 1.9 * other.bounding_box()["width"]
    assert opened.bounding_box()["height"] > 1.2 * other.bounding_box()["height"]
    leave("search", "#galleries")
    page.locator("#rate").fill("9")
    leave("slider", "#threshold")
    page.locator("#regions .region").last.click()
    page.locator("#regions .region").nth(-2).click()
    leave("regions", "#curves")
    for button in page.locator("#colours button").all():
        button.click()
        page.locator("#plane").hover()
        leave(f"map-{button.inner_text()}", "#map")
