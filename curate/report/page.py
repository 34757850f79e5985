"""A static page that opens from disk: HTML for the figures, a data file for the samples.

Captions and keys are whatever the web held. They reach the page as JSON, with everything escaped
that could end a script, and from there as text nodes; the page's policy runs its own file alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from curate.report.charts import draw_bars, draw_density, draw_histogram, draw_lines, draw_steps
from curate.report.text import clean_text, tell_score, tell_share

__all__ = [
    "Chart",
    "Gallery",
    "Group",
    "Overview",
    "read_assets",
    "render_data",
    "render_document",
    "render_galleries",
    "render_page",
    "render_table",
    "wrap_name",
]

#: Characters of a caption that are shown; the whole is in `decisions`.
_SHOWN_CHARS = 240
_NAME_CHARS = 160

#: Nothing on this page may load or run anything else, whatever a caption says.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Group:
    """Part of a gallery.

    Parameters
    ----------
    label : str
        "" where the gallery has but one.
    total : int
        Samples of the kind; those shown may be fewer.
    uids : tuple of str
    """

    label: str
    total: int
    uids: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """Samples of one kind under a heading."""

    name: str
    title: str
    meaning: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Chart:
    """Histogram of a score: kept and dropped in equal parts of [low, high] or of its logarithm."""

    name: str
    low: float
    high: float
    kept: list[int]
    dropped: list[int]
    is_log: bool = False


@dataclass(frozen=True)
class Overview:
    """The figures of a run.

    Parameters
    ----------
    counts : tuple of (str, int, str)
        Dropped samples by reason, with its meaning.
    ingested, kept : int
    tiles : tuple of (str, str, str)
        Figure, what it is, what stands behind it.
    warnings : tuple of str
    times : tuple of (str, float, float)
        Stage, wall seconds, samples.
    parameters : tuple of (str, str)
    versions : tuple of (str, str)
    fingerprints : tuple of (str, str)
        Table and the hash of everything that made it.
    what_if : tuple of (float, int)
        Cosine and samples that would have been kept, the run's own first.
    what_if_bound : bool
        Whether these are upper bounds.
    """

    counts: tuple[tuple[str, int, str], ...]
    ingested: int
    kept: int
    tiles: tuple[tuple[str, str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    times: tuple[tuple[str, float, float], ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    fingerprints: tuple[tuple[str, str], ...] = ()
    what_if: tuple[tuple[float, int], ...] = ()
    what_if_bound: bool = False


def read_assets() -> dict[str, bytes]:
    """Return the page's own script and style by file name."""
    folder = resources.files("curate.report")
    return {name: (folder / name).read_bytes() for name in ("report.js", "report.css")}


def render_data(
    rows: dict[str, dict[str, Any]],
    pictures: dict[str, str],
    scores: Sequence[str],
    galleries: Sequence[Gallery],
    curve: dict[str, Any] | None,
    places: dict[str, Any] | None = None,
    density: dict[str, Any] | None = None,
    further: dict[str, dict[str, Any]] | None = None,
    other: str | None = None,
) -> bytes:
    """Return the data file: a script that does nothing but assign one value.

    Parameters
    ----------
    rows : dict
        Columns of the shown samples by uid.
    pictures : dict
        Path of a sample's thumbnail, relative to the page.
    scores : sequence of str
        Columns shown as numbers.
    galleries : sequence of Gallery
    curve : dict, optional
        `points`, `current` and `ladder` (uids).
    places : dict, optional
        `points` of the map: uid, across and down in [0, 1].
    density : dict, optional
        `regions` and `shown` of the density, see `render_page`.
    further : dict, optional
        Columns of some samples that no run has, by uid: `there` (verdict of another run) and
        `elsewhere` (the sample is of that run).
    other : str, optional
        OUT of that other run.
    """
    place = {uid: number for number, uid in enumerate(rows)}
    clusters = [
        row.get("cluster_id") for row in rows.values() if (row.get("cluster_size") or 1) > 1
    ]
    cluster = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    value = {
        "samples": [
            {
                **_sample(
                    row, pictures.get(uid), place.get(row["representative_uid"] or ""), scores
                ),
                **(
                    {"cluster": cluster[row["cluster_id"]]}
                    if row.get("cluster_id") in cluster
                    else {}
                ),
                **(further or {}).get(uid, {}),
            }
            for uid, row in rows.items()
        ],
        "galleries": [
            {
                "name": gallery.name,
                "title": gallery.title,
                "meaning": gallery.meaning,
                "groups": [
                    {"label": g.label, "total": g.total, "items": [place[u] for u in g.uids]}
                    for g in gallery.groups
                ],
            }
            for gallery in galleries
        ],
        "map": places and [[place[uid], x, y] for uid, x, y in places["points"]],
        "density": density
        and {
            "regions": density["regions"],
            "shown": [[place[uid] for uid in uids] for uids in density["shown"]],
        },
        **({"other": other} if other is not None else {}),
        "curve": curve
        and {
            **curve,
            "points": [
                {**one, "told": tell_score(one["limit"]), "setting": str(one["rate"])}
                for one in curve["points"]
            ],
            "ladder": [place[uid] for uid in curve["ladder"]],
        },
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Inside JSON these occur in strings only. A script file may hold all of them but the last two;
    # whoever pastes it into a page may not.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'"use strict";\nwindow.curateReport = {text};\n'.encode()


def _sample(
    row: dict[str, Any], picture: str | None, representative: int | None, scores: Sequence[str]
) -> dict[str, Any]:
    caption = row["caption"]
    found = {
        "uid": row["uid"],
        "key": clean_text(row["key"], _NAME_CHARS),
        "file": clean_text(row["source_file"], _NAME_CHARS),
        "caption": None if caption is None else clean_text(caption, _SHOWN_CHARS),
        "keep": row["keep"],
        "reason": row["reason"],
        "failed": row["failed_rules"],
        "picture": picture,
        "size": [row["width"], row["height"]] if row["width"] else None,
        "scores": {n: float(f"{row[n]:.6g}") for n in scores if row.get(n) is not None},
        "told": {n: tell_score(row[n]) for n in scores if row.get(n) is not None},
        "weight": round(row["weight"], 3) if row["keep"] else None,
        "like": representative,
        "merged": [clean_text(text, _SHOWN_CHARS) for text in (row["captions"] or [])[1:6]],
        "kind": row.get("memorization_kind"),
        "earlier": row.get("earlier_uid"),
        "shows": row.get("contaminated_by") and clean_text(row["contaminated_by"], _NAME_CHARS),
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def render_page(
    overview: Overview,
    charts: Sequence[Chart],
    curve: dict[str, Any] | None,
    density: dict[str, Any] | None,
    places: dict[str, Any] | None = None,
) -> bytes:
    """Return the page's HTML.

    Parameters
    ----------
    overview : Overview
    charts : sequence of Chart
    curve : dict, optional
        `points` and `current`, see `report_curves.trade_off`.
    density : dict, optional
        `column`, `low`, `high` and `counts` over rarity (rows) and that column; `regions`:
        samples and dropped samples of each part that can be chosen; `shown` (uids of each).
    places : dict, optional
        `points` and `trust` of the map, see `report_map.draw_map`.
    """
    body = [
        _render_head(overview),
        render_galleries(),
        _render_threshold(curve, overview),
        _render_curves(charts, overview, density),
        _render_map(places),
        _render_run(overview),
    ]
    sections = [one for one in _SECTIONS if one[0] != "map" or places is not None]
    return render_document("curate report", sections, "".join(body))


def render_document(title: str, sections: Sequence[tuple[str, str]], body: str) -> bytes:
    """Return a page with the report's style, script, data file and policy.

    Parameters
    ----------
    title : str
    sections : sequence of (id, title)
        What the head links to; the first is where a reader starts.
    body : str
        HTML of the sections.
    """
    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in sections)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="referrer" content="no-referrer">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<link rel="stylesheet" href="report.css">'
        '<script src="data.js" defer></script><script src="report.js" defer></script></head><body>'
        f'<a class="skip" href="#{sections[0][0]}">Skip to the figures</a>'
        f'<header><strong>curate</strong><nav aria-label="Sections">{links}</nav></header>'
        f"<main>{body}</main></body></html>\n"
    )
    return page.encode()


_SECTIONS = (
    ("overview", "Overview"),
    ("galleries", "Galleries"),
    ("threshold", "Threshold"),
    ("curves", "Curves"),
    ("map", "Map"),
    ("run", "Run"),
)


def _render_head(overview: Overview) -> str:
    behind = f"{overview.kept:,} of {overview.ingested:,} samples"
    tiles = [("kept", _percent(overview.kept, overview), behind)]
    tiles += [(title, figure, behind) for figure, title, behind in overview.tiles]
    cards = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(figure)}<small>{escape(behind)}</small></dd></div>"
        for title, figure, behind in tiles
    )
    warnings = "".join(
        f"<li><bdi>{escape(clean_text(line))}</bdi></li>" for line in overview.warnings
    )
    return (
        '<section id="overview"><h1>What was kept, what was dropped, and why</h1>'
        f'<dl class="tiles">{cards}</dl>'
        + (f'<ul class="warnings" aria-label="Warnings">{warnings}</ul>' if warnings else "")
        + _render_funnel(overview)
        + "</section>"
    )


def _render_funnel(overview: Overview) -> str:
    """From everything that came in to what is kept, a row for each reason."""
    left, rows = overview.ingested, []
    rows.append(("ingested", f"{left:,}", "", draw_bars(0, left, overview.ingested, False), ""))
    for code, number, meaning in overview.counts:
        left -= number
        bar = draw_bars(left, number, overview.ingested, True)
        rows.append((code, f"−{number:,}", _percent(number, overview), bar, meaning))
    bar = draw_bars(0, overview.kept, overview.ingested, False)
    rows.append(("kept", f"{overview.kept:,}", _percent(overview.kept, overview), bar, ""))
    cells = "".join(
        f'<tr><th scope="row">{_link_gallery(name, meaning)}</th><td class="number">{number}</td>'
        f'<td class="number share">{share}</td><td class="bar">{bar}</td></tr>'
        for name, number, share, bar, meaning in rows
    )
    return (
        '<table class="funnel"><caption>Samples, and the first rule that each dropped one failed'
        "</caption><thead><tr><th scope=col>reason</th><th scope=col class=number>samples</th>"
        '<th scope=col class="number share">share</th><th scope=col class=bar></th></tr></thead>'
        f"<tbody>{cells}</tbody></table>"
    )


def _link_gallery(name: str, meaning: str) -> str:
    """Reasons link to their galleries; those of unreadable samples share one."""
    text = escape(name)
    if name != "ingested":
        text = f'<a href="#gallery-{text}" data-gallery="{text}">{text}</a>'
    return text + (f"<small>{escape(meaning)}</small>" if meaning else "")


def _percent(number: int, overview: Overview) -> str:
    return tell_share(number / max(overview.ingested, 1))


def render_galleries() -> str:
    """Return the section that the script fills with the galleries of the data file."""
    return (
        '<section id="galleries"><h2>Galleries</h2>'
        '<label class="search">Search captions, keys and uids of the samples shown here'
        '<input id="search" type="search" autocomplete="off" spellcheck="false"></label>'
        '<div id="chips" class="chips" role="group" aria-label="Choose a gallery"></div>'
        '<div id="wall" aria-live="polite"><noscript>Pictures are put up by report.js, which did '
        "not run.</noscript></div></section>"
    )


def _render_threshold(curve: dict[str, Any] | None, overview: Overview) -> str:
    if curve is None:
        return (
            '<section id="threshold"><h2>Threshold</h2><p>No sample of this run has a '
            "mismatch_probability, so that there is no threshold to move: the pipeline has no "
            "<code>score</code>, or too few samples.</p></section>"
        )
    points = curve["points"]
    rates = [point["rate"] for point in points]
    lines = [
        ("kept, of all ingested", "a", [p["kept"] / max(overview.ingested, 1) for p in points]),
        ("rare samples lost", "b", [p["rare_lost"] for p in points]),
        ("common samples lost", "c", [p["common_lost"] for p in points]),
        ("random captions caught", "d", [p["caught"].get("random") for p in points]),
    ]
    expected = [("expected mismatched among the kept", "b", [p["expected"] for p in points])]
    charts = draw_lines(
        "What a rate keeps, loses and catches", "select.max_mismatch_rate", rates, lines,
        curve["current"],
    ) + draw_lines(
        "Expected share of mismatched captions among the kept", "select.max_mismatch_rate", rates,
        expected, curve["current"],
    )  # fmt: skip
    at = rates.index(curve["current"]) if curve["current"] in rates else len(rates) - 1
    return (
        '<section id="threshold"><h2>Threshold</h2>'
        f"<p>{escape(curve['note'])}</p>"
        f'<div class="charts" id="rates">{charts}</div>'
        '<label class="slider">select.max_mismatch_rate'
        f'<input id="rate" type="range" min="0" max="{len(rates) - 1}" step="1" value="{at}">'
        "</label>"
        '<p class="command"><code id="setting" tabindex="0"></code></p>'
        '<dl class="tiles" id="figures" aria-live="polite"></dl>'
        '<div id="ladder"></div></section>'
    )


def _render_curves(
    charts: Sequence[Chart], overview: Overview, density: dict[str, Any] | None
) -> str:
    parts = [
        draw_histogram(c.name, c.low, c.high, c.kept, c.dropped, is_log=c.is_log) for c in charts
    ]
    if len(overview.what_if) > 1:
        bound = ", upper bounds" if overview.what_if_bound else ""
        parts.append(draw_steps(f"Kept against dedup.min_cosine{bound}", overview.what_if))
    if density is not None:
        shown = {name: density[name] for name in ("column", "low", "high", "counts", "regions")}
        parts.append(draw_density(**shown))
    if not parts:
        parts.append("<p>This run has no numeric score.</p>")
    legend = (
        '<p class="legend"><span class="key kept">kept</span> <span class="key dropped">dropped'
        "</span> each as a share of its own, so that shapes compare</p>"
    )
    return (
        f'<section id="curves"><h2>Curves</h2>{legend if charts else ""}'
        f'<div class="charts">{"".join(parts)}</div>'
        '<div id="region" aria-live="polite"></div></section>'
    )


def _render_map(places: dict[str, Any] | None) -> str:
    if places is None:
        return ""
    number = len(places["points"])
    trust = ""
    if places["trust"] is not None:
        trust = f" (trustworthiness {places['trust']:.2f}; 1: always)"
    return (
        f'<section id="map"><h2>Map</h2><p>{number:,} samples at random, laid out by t-SNE so that '
        f"neighbours have like pictures{trust}. Sizes of groups and distances between them mean "
        "little. Point at a dot, or move with the arrow keys.</p>"
        '<div id="colours" class="chips" role="group" aria-label="Colour of the dots"></div>'
        '<p class="legend"><span class="key dot kept">kept</span> '
        '<span class="key dot dropped">dropped</span> <span id="scale"></span></p>'
        '<div class="plane"><svg id="plane" viewBox="0 0 360 270" tabindex="0" role="application" '
        'aria-label="Map of samples; left and right arrow keys move between them"></svg>'
        '<div id="here" aria-live="polite"></div></div></section>'
    )


def _render_run(overview: Overview) -> str:
    total = sum(seconds for _, seconds, _ in overview.times)
    times = [
        (name, f"{seconds:,.1f}", f"{samples / seconds:,.0f}" if seconds else "")
        for name, seconds, samples in overview.times
    ]
    blocks = []
    if times:
        rows = [*times, ("all of these", f"{total:,.1f}", "")]
        blocks.append(render_table("Time", ("stage", "seconds", "samples/s"), rows, 1))
    if overview.versions:
        blocks.append(render_table("Versions", ("package", "version"), overview.versions, 9))
    if overview.fingerprints:
        heads = ("table", "fingerprint")
        blocks.append(render_table("Fingerprints", heads, overview.fingerprints, 9))
    if overview.parameters:
        blocks.append(render_table("Parameters", ("name", "value"), overview.parameters, 9))
    return f'<section id="run"><h2>Run</h2><div class="tables">{"".join(blocks)}</div></section>'


def wrap_name(text: str) -> str:
    """Return a text as HTML; long names wrap after an underscore."""
    return escape(clean_text(text)).replace("_", "_<wbr>")


def render_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int
) -> str:
    """Return a table of texts; columns from `numbers_from` on hold numbers."""

    def cell(number: int, text: str, tag: str) -> str:
        kind = ' class="number"' if number >= numbers_from else ""
        return f"<{tag}{kind}>{wrap_name(text)}</{tag}>"

    head = "".join(cell(i, text, "th") for i, text in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(cell(i, text, 'td') for i, text in enumerate(row))}</tr>" for row in rows
    )
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
