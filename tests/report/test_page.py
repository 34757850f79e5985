"""The report's page shows what it is given and runs nothing of it."""

import base64
from html.parser import HTMLParser

from curate.report.page import Gallery, Picture, render_page


class _Reader(HTMLParser):
    """Collects tags, image sources and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name == "src" and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    return reader


def test_captions_are_text_and_never_markup() -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="x()">" onload="y()'
    pictures = (Picture("ab", b"RIFF", hostile),)
    found = _read(render_page([], [Gallery("kept", "", 1, pictures)]))
    assert "script" not in found.tags
    assert hostile in found.text
    assert found.sources == ["data:image/webp;base64," + base64.b64encode(b"RIFF").decode()]


def test_duplicates_stand_beside_the_sample_that_is_kept() -> None:
    picture = Picture("ab", b"one", "a cat", ("cosine 0.990",), b"two")
    found = _read(render_page([], [Gallery("duplicate_semantic", "", 1, (picture,))]))
    assert [base64.b64decode(s.split(",")[1]) for s in found.sources] == [b"one", b"two"]
    assert "cosine 0.990" in found.text


def test_missing_pictures_and_captions_are_said() -> None:
    found = _read(render_page([], [Gallery("decode_error", "", 1, (Picture("ab", None, None),))]))
    assert found.sources == []
    assert "no picture" in found.text
    assert "no caption" in found.text


def test_counts_say_how_many_are_shown_of_how_many() -> None:
    galleries = [Gallery("mismatched", "why", 1234, (Picture("ab", None, "x"),))]
    found = _read(render_page([("ingested", 5000)], galleries))
    assert "5,000" in found.text
    assert "mismatched (1 of 1,234)" in found.text


def test_long_captions_are_cut() -> None:
    found = _read(render_page([], [Gallery("kept", "", 1, (Picture("ab", None, "x" * 9999),))]))
    assert "x" * 160 + " …" in found.text
    assert "x" * 161 not in found.text
