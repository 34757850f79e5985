"""The comparison, the audit's page and the ablation's in a real browser, with text of any kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pytest
from PIL import Image

from curate.ablate import ablating
from curate.audit import auditing, sources
from curate.report.ablate_page import render_ablation
from curate.report.audit_page import render_audit
from curate.report.plain import read_style
from curate.report.text import clean_text
from curate.stages.report import RunFacts, write_report
from curate.stages.report_compare import Side, write_comparison
from tests.ablate.finished import write_run
from tests.ablate.test_ablating import Local
from tests.audit.test_auditing import write_embeddings
from tests.audit.test_auditing import write_run as write_scores
from tests.exports import Silent
from tests.report.conftest import OpenPage
from tests.report.test_page import HOSTILE
from tests.stages.test_report import FACTS, decisions, lay_out
from tests.stages.test_report_compare import change, manifest
from tests.support import carry_out, clean_pairs, pair, write_tar

Report = dict[str, Any]
Fill = Callable[[str], Path]

#: What may stand in a file's name, of all the odd.
NAME = "<img src=x onerror=alert(1)> \"'#?% \u202ezebra 👩‍👩‍👧‍👦"
PHONE = {"width": 400, "height": 800}
POLICIES = {
    "compare": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'",
    "audit": "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'",
}
POLICIES["ablate"] = POLICIES["audit"]
#: Tries to run what a caption might bring, and tells what ran.
ATTACK = """() => {
  const script = document.createElement("script");
  script.textContent = "window.ran = 1";
  const image = document.createElement("img");
  image.setAttribute("onerror", "window.ran = 2");
  image.src = "nowhere.webp";
  document.body.append(script, image);
  const link = document.createElement("a");
  link.href = "javascript:window.ran=3";
  document.body.append(link);
  link.click();
  return new Promise((done) => setTimeout(() => done(window.ran ?? null), 50));
}"""


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in folders of odd names, whose captions, keys and parameters are as odd."""
    folder = tmp_path_factory.mktemp("compare")
    table = decisions(400)
    odd = list(HOSTILE.values())
    for name in ("caption", "key", "source_file"):
        place = table.column_names.index(name)
        texts = [odd[number % len(odd)] for number in range(len(table))]
        table = table.set_column(place, name, pa.array(texts))
    image = next(image for image, _ in clean_pairs(9) if image[:2] == b"\xff\xd8")
    sides = []
    for number, one in enumerate((table, change(table, 0.5))):
        out = folder / f"{number} {NAME}"
        room = lay_out(out / "stages", one, image, 1 + number)
        select = {"select": manifest(max_mismatch_rate=0.05, note=odd[number], other=odd[-number])}
        sides.append(Side(str(out), room, RunFacts(FACTS, select)))
        write_report(room, sides[-1].run, str(out / "report"))
    write_comparison(*sides, f"{sides[0].out}/compare")
    return Path(sides[0].out, "compare/index.html")


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """An audit of three checkpoints, in folders of odd names, with all that it can tell apart."""
    folder = tmp_path_factory.mktemp("audit")
    uids = [f"{number:032x}" for number in range(90)]
    paths = []
    for number, pull in ((1, 0.0), (2, 0.4), (10, 1.0)):
        paths.append(write_embeddings(folder / f"{NAME} {number}", pull, number))
        (paths[-1] / "candidates/uids.txt").write_text("\n".join(uids))
    scores = write_scores(folder / "run", uids)
    reference = write_embeddings(folder / f"reference {NAME}", 0, 5)
    asked = sources.Request(
        tuple(str(path) for path in paths), reference=str(reference), run=str(scores)
    )
    return auditing.audit(asked, Silent())


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """An ablation of four settings and their controls."""
    folder = tmp_path_factory.mktemp("ablate")
    rates = ("null", "0.2", "0.04", "0.04, select.min_caption_chars: 4")
    grid = "".join(f"- {{select.max_mismatch_rate: {rate}}}\n" for rate in rates)
    (folder / "grid.yaml").write_text(grid)
    out = write_run(folder / "out")
    asked = ablating.Request(
        str(out), str(folder / "grid.yaml"), model="heads", seeds=2, held_out=0.2, epochs=4.0
    )
    return ablating.ablate(asked, Local(), Silent())


def spoil(value: Any, text: str) -> Any:
    """Put a text in the place of every other; `kind` alone is always the program's own word."""
    if isinstance(value, dict):
        return {key: one if key == "kind" else spoil(one, text) for key, one in value.items()}
    if isinstance(value, list):
        return [spoil(one, text) for one in value]
    return text if isinstance(value, str) else value


def write_figures(folder: Path, page: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "report.css").write_bytes(read_style())
    (folder / "index.html").write_bytes(page)
    return folder / "index.html"


@pytest.fixture
def pages(comparison: Path, audited: Report, ablated: Report, tmp_path: Path) -> dict[str, Path]:
    """Where each of the pages lies, the last two as real runs leave them."""
    return {
        "compare": comparison,
        "audit": write_figures(tmp_path / "audit", render_audit(audited)),
        "ablate": write_figures(tmp_path / "ablate", render_ablation(ablated)),
    }


def assert_fits(page: Any, width: int = 400) -> None:
    sizes = "[document.documentElement.scrollWidth, document.querySelector('header').scrollWidth]"
    assert max(page.evaluate(sizes)) <= width


def assert_inert(page: Any) -> None:
    """Nothing of a text became an element, an attribute that runs, or another page's address."""
    assert page.locator("body script, [onerror], [onload], iframe, object, embed, b").count() == 0
    addresses = "nodes => nodes.map((n) => n.getAttribute('href') || n.getAttribute('src'))"
    for address in page.locator("main [href], main [src]").evaluate_all(addresses):
        assert urlsplit(address).scheme == ""
        assert not address.startswith("x")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("render", [render_audit, render_ablation])
def test_figures_with_odd_names(
    open_page: OpenPage,
    audited: Report,
    ablated: Report,
    tmp_path: Path,
    render: Callable[[Report], bytes],
    kind: str,
) -> None:
    real = audited if render is render_audit else ablated
    spoilt = spoil({**real, "warnings": [""]}, HOSTILE[kind])
    page = open_page(write_figures(tmp_path / "page", render(spoilt)), viewport=PHONE)
    shown = page.locator("main").text_content()
    assert shown.count(clean_text(HOSTILE[kind])) >= 3
    for character in "\x00\x1b\u202e\x85":
        assert character not in shown
    assert_inert(page)
    assert page.locator("main img").count() == 0
    assert_fits(page)
    assert page.locator(".matrix").evaluate("node => node.scrollWidth") < 1200


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_comparison_of_odd_text(open_page: OpenPage, comparison: Path, kind: str) -> None:
    page = open_page(comparison, viewport=PHONE)
    # A line's end is no part of what can be searched.
    page.locator("#search").fill(clean_text(HOSTILE[kind])[:9])
    caption = page.locator("#wall .caption").first
    assert caption.text_content().startswith(clean_text(HOSTILE[kind])[:240])
    assert caption.get_attribute("dir") == "auto"
    page.locator("#wall summary").first.click()
    details = page.locator("#wall details dd").all_text_contents()
    assert clean_text(HOSTILE[kind], 160) in details
    assert_inert(page)
    assert_fits(page)


def test_runs_of_odd_names_are_named_and_linked(open_page: OpenPage, comparison: Path) -> None:
    page = open_page(comparison, viewport=PHONE)
    heads, links = page.locator("#changes code"), page.locator("#changes p a")
    for number in range(2):
        assert heads.nth(number).text_content().endswith(f"{number} {clean_text(NAME)}")
        links.nth(number).click()
        assert page.title() == "curate report"
        assert f"{number} {NAME}/report" in unquote(urlsplit(page.url).path)
        assert_inert(page)
        page.go_back()
    settings = page.locator("#settings").text_content()
    assert clean_text(HOSTILE["quotes"]) in settings
    assert_fits(page)


@pytest.mark.parametrize("place", POLICIES)
def test_the_policy_runs_nothing_that_is_put_in(
    browser: Any, pages: dict[str, Path], place: str
) -> None:
    page = browser.new_page()  # whose console may complain
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(pages[place].as_uri())
    policy = page.locator("meta[http-equiv=Content-Security-Policy]")
    assert policy.get_attribute("content") == POLICIES[place]
    assert page.evaluate(ATTACK) is None
    assert sum("Content Security Policy" in text for text in refused) >= 3
    page.close()


def posing() -> dict[str, bytes]:
    """Files that are named as images and would run if a browser took them for what they are."""
    script = b"<script>alert(1)</script>"
    return {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)">' + script + b"</svg>",
        "html": b"<!doctype html><html><body>" + script,
        "html_after_gif": b"GIF89a/*" + script,
        "xml": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        b'<svg xmlns="http://www.w3.org/2000/svg"><text>&x;</text></svg>',
    }


def test_what_only_poses_as_an_image_is_no_picture(open_page: OpenPage, tmp_path: Path) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("ingest: {}\nembed: {encoder: offline}\nselect: {}\nreport: {}\n")
    members = [part for key, data in posing().items() for part in pair(key, data, b"a caption")]
    for number, (image, caption) in enumerate(clean_pairs(3)):
        members += pair(f"real{number}", image, caption)
    write_tar(tmp_path / "in/0.tar", members)
    room = carry_out(tmp_path / "in", tmp_path / "out", str(recipe))[-1].room
    sides = [
        Side(str(tmp_path / "out"), room, RunFacts({}, {})),
        Side("other", lay_out(tmp_path / "other", decisions(2), None, 1), RunFacts({}, {})),
    ]
    write_comparison(*sides, str(tmp_path / "compare"))
    (report,) = (tmp_path / "out").rglob("index.html")
    for path in (report, tmp_path / "compare/index.html"):
        files = [file for file in path.parent.rglob("*") if file.parent != path.parent]
        assert len(files) == 3
        for file in files:
            with Image.open(file) as picture:
                assert (file.suffix, picture.format) == (".webp", "WEBP")
        page = open_page(path, viewport=PHONE)
        page.locator("#search").fill("a caption")
        posed = page.locator("#wall .card", has_text="decode_error")
        assert posed.count() == len(posing())
        assert posed.locator("img").count() == 0
        assert posed.locator(".none").count() == len(posing())
        page.locator("#search").fill("real")
        images = page.locator("#wall img")
        assert images.count() == 3
        for number in range(images.count()):
            images.nth(number).scroll_into_view_if_needed()
            images.nth(number).evaluate("image => image.decode()")
        assert_fits(page)


@pytest.mark.parametrize("place", ["audit", "ablate"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_pictures_of_figures_are_left_to_look_at(
    open_page: OpenPage,
    pages: dict[str, Path],
    screenshots: Path,
    place: str,
    scheme: str,
    width: int,
) -> None:
    size = {"width": width, "height": 900}
    page = open_page(pages[place], color_scheme=scheme, viewport=size)
    assert_fits(page, width)
    target = screenshots / f"{place}-{scheme}-{width}.png"
    page.screenshot(path=target, full_page=True)
    assert target.stat().st_size > 20_000
