"""The report's page shows what it is given and runs nothing of it."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from curate.report.charts import draw_histogram, draw_intervals, draw_lines
from curate.report.page import (
    Chart,
    Gallery,
    Group,
    Overview,
    read_assets,
    render_data,
    render_page,
)
from curate.report.text import clean_text, tell_score, tell_share
from curate.report.words import describe_facts
from curate.stages.report_curves import BINS, bar_range, count_bins

HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "quotes": "\" onload=\"x()\" ' onerror='y()' `${z()}`",
    "turned": "safe\u202egpj.exe\u202c \u200fשלום\u200f",
    "long": "x" * 10_000,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "nul": "a\x00b\x1b[2J\x7f\x85",
    "lines": "one\u2028two\u2029three\n<!-- & -->",
}


class _Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append("/" + tag)

    def handle_data(self, data: str) -> None:
        assert not self.inside or self.inside[-1] not in ("script", "style"), "nothing runs inline"
        self.text += data


def read(page: bytes) -> _Reader:
    reader = _Reader()
    reader.feed(page.decode())
    return reader


def row(uid: str, **columns: Any) -> dict[str, Any]:
    return {
        "uid": uid,
        "key": uid,
        "source_file": "0.tar",
        "caption": "a cat",
        "keep": True,
        "reason": None,
        "failed_rules": [],
        "width": 8,
        "height": 8,
        "weight": 1.0,
        "representative_uid": None,
        "captions": ["a cat"],
        **columns,
    }


def load(data: bytes) -> dict[str, Any]:
    text = data.decode().partition("window.curateReport = ")[2]
    found: dict[str, Any] = json.loads(text.rstrip().removesuffix(";"))
    return found


CURVE = {
    "points": [
        {"rate": rate, "limit": rate, "kept": 5, "expected": rate, "rare_lost": None,
         "common_lost": 0.1, "caught": {}, "wider": False}
        for rate in (0.01, 0.02)
    ],
    "current": 0.02,
    "ladder": [],
    "note": "<b>",
    "ingested": 10,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_captions_are_data_and_never_markup(kind: str) -> None:
    text = HOSTILE[kind]
    rows = {"a": row("a", caption=text, key=text, source_file=text, captions=["x", text])}
    data = render_data(rows, {}, (), [Gallery("kept", "", "", (Group("", 1, ("a",)),))], None)
    for character in "<>&\u2028\u2029\u202e\x00\x1b\x7f\x85":
        assert character not in data.decode()
    found = load(data)["samples"][0]
    for shown in (found["caption"], found["key"], found["file"], found["merged"][0]):
        assert shown.startswith(clean_text(text[:160]))
        assert len(shown) < 300


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert clean_text(HOSTILE["nul"]) == "a␀b␛[2J␡[U+0085]"
    turned = "safe[U+202E]gpj.exe[U+202C] \u200fשלום\u200f"
    assert clean_text(HOSTILE["turned"]) == turned
    assert clean_text(HOSTILE["emoji"]) == HOSTILE["emoji"]
    assert clean_text("\ud800") == "\ufffd"
    assert clean_text("x" * 10_000, 5) == "xxxxx … (10,000 characters)"


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_page_escapes_what_it_says(kind: str) -> None:
    text = HOSTILE[kind]
    tiles = ((text, text, text),)
    overview = Overview((("mismatched", 1, text),), 2, 1, tiles, (text,), (), ((text, text),))
    found = read(render_page(overview, [], None, None))
    assert clean_text(text).replace("\n", "") in found.text.replace("\n", "")
    names = {name for _, attributes in found.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "style"}
    assert [a.get("src") for tag, a in found.tags if tag == "script"] == ["data.js", "report.js"]


def test_the_page_may_load_nothing_but_its_own_files() -> None:
    found = read(render_page(Overview((), 0, 0), [], CURVE, None))
    policies = [a["content"] for _, a in found.tags if a.get("http-equiv")]
    assert policies == [
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    ]
    links = [a[name] for _, a in found.tags for name in ("src", "href") if a.get(name)]
    assert {link for link in links if not link.startswith("#")} == {*read_assets(), "data.js"}
    for asset in read_assets().values():
        # The one address is the name of the SVG elements that the script makes.
        assert b"http" not in asset.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"innerHTML" not in asset
        assert b"eval(" not in asset


def test_numbers_of_the_funnel() -> None:
    counts = (("decode_error", 1000, "broken"), ("duplicate_bytes", 1, "equal"))
    found = read(render_page(Overview(counts, 5000, 3999), [], None, None))
    for number in ("5,000", "−1,000", "−1", "3,999", "80.0%", "20.0%"):
        assert number in found.text


def test_charts_are_well_formed_and_hold_every_count() -> None:
    charts = [Chart("rarity", 0.0, 1.0, [3, 0, 1], [0, 0, 0]), Chart("flat", 1, 1, [1], [2])]
    density = {"column": "memorization_score", "low": -1, "high": 1, "counts": [[0, 2], [9, 0]]}
    density["regions"] = [[0, 0], [2, 1], [9, 0], [0, 0]]
    overview = Overview((), 10, 4, what_if=((0.78, 4), (0.9, 6)), what_if_bound=True)
    page = render_page(overview, charts, CURVE, density).decode()
    pieces = page.split("<svg ")[1:]
    assert len(pieces) == 2 + 2 + 2 + 1 + 1
    for piece in pieces:
        drawing = ET.fromstring("<svg " + piece.partition("</svg>")[0] + "</svg>")
        assert "nan" not in ET.tostring(drawing, "unicode")
    for told in ("0 to 0.333: 3 kept, 0 dropped", "min_cosine 0.9: 6 kept", "9 samples, 0 dropped"):
        assert told in page
    assert "upper bounds" in page


def test_an_empty_run_has_a_page() -> None:
    found = read(render_page(Overview((), 0, 0), [], None, None))
    assert "0 of 0 samples" in found.text
    assert load(render_data({}, {}, (), [], None)) == {
        "samples": [], "galleries": [], "map": None, "density": None, "curve": None,
    }  # fmt: skip


def test_samples_name_those_they_are_like() -> None:
    rows = {
        "a": row("a", keep=False, reason="duplicate_bytes", representative_uid="b", captions=None),
        "b": row("b", mismatch_probability=0.25, captions=["a cat", "one cat"]),
    }
    found = load(
        render_data(rows, {"b": "thumbnails/0000.webp"}, ("mismatch_probability",), [], None)
    )
    copy, kept = found["samples"]
    assert copy["like"] == 1
    assert "picture" not in copy
    assert kept["scores"] == {"mismatch_probability": 0.25}
    assert kept["merged"] == ["one cat"]


@pytest.mark.parametrize(
    ("value", "told", "longer"),
    [
        (0.0, "0", "0"),
        (0.42718, "0.427", "0.4272"),
        (1.0, "1.000", "1.0000"),
        (-0.0614, "-0.061", "-0.0614"),
        (0.001, "0.001", "0.0010"),
        (0.00031649, "0.00032", "0.0003"),
        (-0.00031649, "-0.00032", "-0.0003"),
        (2.1493e-6, "2.1e-06", "2.1e-06"),
        (6.0e-7, "6.0e-07", "6.0e-07"),
    ],
)
def test_small_numbers_are_not_shown_as_nothing(value: float, told: str, longer: str) -> None:
    assert (tell_score(value), tell_score(value, 4)) == (told, longer)


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.0, "0.0%"), (3 / 8121, "<0.1%"), (0.0006, "0.1%"), (0.5, "50.0%"), (0.9999, ">99.9%"),
     (1.0, "100.0%")],
)  # fmt: skip
def test_shares_of_a_few_are_not_nothing(share: float, told: str) -> None:
    assert tell_share(share) == told
    assert f"{share:.1%}" == told or told[0] in "<>"


def test_samples_and_stops_tell_how_small_a_probability_is() -> None:
    rows = {"a": row("a", mismatch_probability=3.21654987e-7, rarity=0.5)}
    curve = {**CURVE, "points": [{**CURVE["points"][0], "limit": 1.5e-7}], "ladder": ["a"]}
    found = load(render_data(rows, {}, ("mismatch_probability", "rarity"), [], curve))
    assert found["samples"][0]["told"] == {"mismatch_probability": "3.2e-07", "rarity": "0.500"}
    assert found["samples"][0]["scores"]["mismatch_probability"] == 3.21655e-7
    assert found["curve"]["points"][0]["told"] == "1.5e-07"


def test_numbers_beside_an_axis_keep_their_sign() -> None:
    drawn = draw_intervals(
        "Gain", "by share", [("0%", 0.0, 0.0, 0.0), ("5%", -0.0098, 0.01, 0.025)]
    )
    assert ">-.0098</text>" in drawn
    assert ">0.025</text>" in drawn
    expected = [("expected", "b", [0.0, 1.3e-5])]
    drawn = draw_lines("Expected", "rate", [0.01, 0.02], expected, None)
    for told in (">0</text>", ">6.8e-6</text>", ">1.4e-5</text>"):
        assert told in drawn


def test_parts_are_not_joined_and_long_labels_stand_in_two_lines() -> None:
    labels = ("rare and right", "common and wrong", "common and right")
    points = [(label, 0.1, 0.2, 0.3) for label in labels]
    drawn = draw_intervals("By rarity and verdict", "last", points, is_series=False)
    assert "polyline" not in drawn
    assert [drawn.count(f">{text}</text>") for text in ("common", "and wrong", "and right")] == [
        2,
        1,
        1,
    ]
    assert 'viewBox="0 0 360 202"' in drawn
    drawn = draw_intervals("Gain", "by share", [("5%", -1.0, 0.5, 2.0), ("6%", -0.5, 0.5, 1.0)])
    assert "polyline" in drawn
    assert 'viewBox="0 0 360 190"' in drawn
    assert ">0</text>" in drawn


def test_what_the_report_warns_of_is_told_at_the_end_of_a_run() -> None:
    facts = {"report": {"warnings": ["5.0% of captions are one and the same: “a\x1b[2J”"]}}
    assert describe_facts(facts, {}) == ["Warning: 5.0% of captions are one and the same: “a␛[2J”"]


def test_small_probabilities_stand_on_a_logarithmic_axis() -> None:
    name = "mismatch_probability"
    low, high = bar_range(name, 0.0, 1.0)
    values = np.array([0.0, 1e-5, 1e-3, 0.1, 1.0, np.nan])
    counts = count_bins(name, values, low, high)
    assert counts.tolist() == [int(place in (0, 5, 16, 26, 31)) for place in range(BINS)]
    none = [0] * BINS
    drawn = draw_histogram(name, low, high, counts.tolist(), none, is_log=True)
    assert "logarithmic axis" in drawn
    for told in (">1e-06<", ">0.001<", ">1<", "1e-06 to 1.54e-06: 1 kept, 0 dropped"):
        assert told in drawn
