"""One self-contained HTML page: no script, no network, captions escaped, pictures inside."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Gallery", "Picture", "render_page"]

#: Characters of a caption that are shown; the whole is in `decisions`.
_SHOWN_CHARS = 160

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; }
body { padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.gallery { display: grid; gap: .8rem; }
.gallery { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .4rem; }
figure .row { display: flex; gap: .4rem; justify-content: center; min-height: 128px; }
figure img { max-width: 100%; object-fit: contain; background: #fff; min-width: 0; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; margin-top: .4rem; }
figcaption small { display: block; opacity: .75; } p { max-width: 44rem; }
.none { display: grid; place-items: center; width: 128px; background: var(--soft); }
"""


@dataclass(frozen=True)
class Picture:
    """One sample of a gallery.

    Parameters
    ----------
    uid : str
    thumbnail : bytes or None
        WebP; None where the image could not be decoded.
    caption : str or None
    notes : tuple of str
        Facts shown under the caption.
    beside : bytes or None
        Thumbnail of the sample that this one duplicates.
    """

    uid: str
    thumbnail: bytes | None
    caption: str | None
    notes: tuple[str, ...] = ()
    beside: bytes | None = None


@dataclass(frozen=True)
class Gallery:
    """Pictures under a heading, out of `total` of their kind."""

    title: str
    meaning: str
    total: int
    pictures: tuple[Picture, ...]


def render_page(counts: Sequence[tuple[str, int]], galleries: Sequence[Gallery]) -> str:
    """Return the page's HTML.

    Parameters
    ----------
    counts : sequence of (str, int)
        Rows of the table at the top.
    galleries : sequence of Gallery
    """
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{number:,}</td></tr>'
        for name, number in counts
    )
    body = "".join(map(_render_gallery, galleries))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>curate report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing on this page may load or run anything, whatever a caption says.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body><h1>What was kept, what was dropped, and why</h1>"
        f"<table>{rows}</table>{body}</body></html>\n"
    )


def _render_gallery(gallery: Gallery) -> str:
    figures = "".join(map(_render_picture, gallery.pictures))
    shown = len(gallery.pictures)
    count = f"{gallery.total:,}" if shown == gallery.total else f"{shown} of {gallery.total:,}"
    return (
        f"<h2>{escape(gallery.title)} ({count})</h2><p>{escape(gallery.meaning)}</p>"
        f'<div class="gallery">{figures}</div>'
    )


def _render_picture(picture: Picture) -> str:
    caption = picture.caption if picture.caption else "no caption"
    if len(caption) > _SHOWN_CHARS:
        caption = caption[:_SHOWN_CHARS] + " …"
    images = _render_image(picture.thumbnail, caption)
    if picture.beside is not None:
        images += _render_image(picture.beside, "the sample that is kept instead")
    notes = "".join(f"<small>{escape(note)}</small>" for note in (*picture.notes, picture.uid))
    return (
        f'<figure><div class="row">{images}</div>'
        f"<figcaption>{escape(caption)}{notes}</figcaption></figure>"
    )


def _render_image(thumbnail: bytes | None, description: str) -> str:
    if thumbnail is None:
        return '<span class="none">no picture</span>'
    data = base64.b64encode(thumbnail).decode()
    return f'<img alt="{escape(description)}" src="data:image/webp;base64,{data}">'
