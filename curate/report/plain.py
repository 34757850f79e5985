"""Pages of figures alone: no script, nothing loaded but their style."""

from collections.abc import Sequence
from html import escape

from curate.report.page import read_assets

__all__ = ["read_style", "wrap_page"]

_POLICY = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'"


def read_style() -> bytes:
    """Return the style sheet that the page links to as `report.css`."""
    return read_assets()["report.css"]


def wrap_page(title: str, sections: Sequence[tuple[str, str]], body: str) -> bytes:
    """Return a page's HTML.

    Parameters
    ----------
    title : str
    sections : sequence of (id, title)
        Of the body, in order.
    body : str
        HTML.
    """
    links = "".join(f'<a href="#{name}">{escape(told)}</a>' for name, told in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="referrer" content="no-referrer">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<link rel="stylesheet" href="report.css"></head><body>'
        f'<a class="skip" href="#{sections[0][0]}">Skip to the figures</a>'
        f'<header><strong>{escape(title)}</strong><nav aria-label="Sections">{links}</nav></header>'
        f"<main>{body}</main></body></html>\n"
    ).encode()
