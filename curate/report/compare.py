"""The page on which two runs stand side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from curate.report.charts import draw_histogram, draw_lines
from curate.report.page import render_document, render_galleries, render_table, wrap_name
from curate.report.text import clean_text

__all__ = ["Comparison", "Pair", "render_comparison"]


@dataclass(frozen=True)
class Pair:
    """Histograms of one score in both runs, over equal parts of [low, high] or of its logarithm."""

    name: str
    low: float
    high: float
    this: list[int]
    other: list[int]
    is_log: bool = False


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs.

    Parameters
    ----------
    this, other : str
        OUT of the run that the page belongs to, and of the one it is compared with.
    verdicts : tuple of str
        "kept", and every reason that occurs in either, then "not in the run" if that occurs.
    moved : (V, V) int
        Samples by verdict in the other run (rows) and in this (columns).
    settings : tuple of (str, str, str)
        What differs: parameter, in this run, in the other.
    pairs : tuple of Pair
    rates : tuple of float
        Values of `select.max_mismatch_rate`; empty if a run has no scores.
    kept, expected : tuple of (list, list)
        By rate, in this run and in the other: share kept, and expected mismatch share.
    """

    this: str
    other: str
    verdicts: tuple[str, ...]
    moved: list[list[int]]
    settings: tuple[tuple[str, str, str], ...] = ()
    pairs: tuple[Pair, ...] = ()
    rates: tuple[float, ...] = ()
    kept: tuple[Sequence[float], Sequence[float]] = ((), ())
    expected: tuple[Sequence[float | None], Sequence[float | None]] = ((), ())


def render_comparison(found: Comparison, this_report: str, other_report: str) -> bytes:
    """Return the page's HTML.

    Parameters
    ----------
    found : Comparison
    this_report, other_report : str
        Addresses of the runs' own pages, relative to this one.
    """
    sections = [
        ("changes", "Changes"),
        ("galleries", "Galleries"),
        ("curves", "Curves"),
        ("settings", "Settings"),
    ]
    body = [
        _render_changes(found, this_report, other_report),
        render_galleries(),
        _render_curves(found),
        _render_settings(found),
    ]
    return render_document("curate: two runs compared", sections, "".join(body))


def _render_changes(found: Comparison, this_report: str, other_report: str) -> str:
    kept = found.verdicts.index("kept")
    both = [
        (row, column)
        for row, was in enumerate(found.verdicts)
        for column, now in enumerate(found.verdicts)
        if _ABSENT not in (was, now)
    ]
    moved = found.moved
    dropped = sum(moved[kept][column] for row, column in both if row == kept != column)
    gained = sum(moved[row][kept] for row, column in both if column == kept != row)
    same = sum(moved[row][column] for row, column in both if row == column)
    shared = sum(moved[row][column] for row, column in both)
    tiles = [
        ("newly dropped", dropped, "kept by the other run"),
        ("newly kept", gained, "dropped by the other run"),
        ("other reason", shared - same - dropped - gained, "dropped by both"),
        ("same verdict", same, f"of {shared:,} samples of both runs"),
    ]
    cards = "".join(
        f"<div><dt>{title}</dt><dd>{number:,}<small>{behind}</small></dd></div>"
        for title, number, behind in tiles
    )
    return (
        '<section id="changes"><h1>Two runs compared</h1>'
        f'<p><a href="{escape(this_report)}">This run</a>: <code>{_path(found.this)}</code><br>'
        f'<a href="{escape(other_report)}">The other run</a>: <code>{_path(found.other)}</code></p>'
        f'<dl class="tiles">{cards}</dl>{_render_totals(found)}{_render_matrix(found)}</section>'
    )


def _path(out: str) -> str:
    return escape(clean_text(out))


#: Last of the verdicts: what a sample has that one of the runs never saw.
_ABSENT = "not in the run"


def _render_totals(found: Comparison) -> str:
    rows = []
    for number, verdict in enumerate(found.verdicts):
        this = sum(row[number] for row in found.moved)
        other = sum(found.moved[number])
        more = f"{this - other:+,}".replace("-", "−") if this != other else "0"
        rows.append((verdict, f"{this:,}", f"{other:,}", more))
    heads = ("verdict", "this run", "the other", "difference")
    return render_table("Samples by verdict", heads, rows, 1)


def _render_matrix(found: Comparison) -> str:
    """From verdict to verdict; what all samples kept has no row or column."""
    moved, places = found.moved, range(len(found.verdicts))
    rows = [r for r in places if any(moved[r][c] for c in places if c != r)]
    columns = [c for c in places if any(moved[r][c] for r in places if r != c)]
    if not rows:
        return ""
    heads = "".join(f'<th class="number">{wrap_name(found.verdicts[c])}</th>' for c in columns)
    lines = []
    for row in rows:
        cells = "".join(
            f'<td class="number {"same" if row == column or not moved[row][column] else "moved"}">'
            f"{moved[row][column]:,}</td>"
            for column in columns
        )
        lines.append(f'<tr><th scope="row">{wrap_name(found.verdicts[row])}</th>{cells}</tr>')
    return (
        "<h3>What changed: from the other run&#39;s verdict (rows) to this run&#39;s (columns)</h3>"
        f'<div class="matrix" tabindex="0"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _render_curves(found: Comparison) -> str:
    words = ("of this run", "of the other")
    parts = [
        draw_histogram(p.name, p.low, p.high, p.this, p.other, words, p.is_log) for p in found.pairs
    ]
    if found.rates:
        for title, (this, other) in (
            ("Share kept", found.kept),
            ("Expected share of mismatched captions among the kept", found.expected),
        ):
            lines = [("this run", "a", this), ("the other run", "b", other)]
            parts.append(
                draw_lines(title, "select.max_mismatch_rate", found.rates, lines, None, False)
            )
    if not parts:
        parts.append("<p>The runs have no numeric score in common.</p>")
    return (
        '<section id="curves"><h2>Curves</h2><p class="legend"><span class="key kept">this run'
        '</span> <span class="key dropped">the other run</span> all samples, kept or not, each as '
        f'a share of its own run</p><div class="charts">{"".join(parts)}</div></section>'
    )


def _render_settings(found: Comparison) -> str:
    rows: Sequence[tuple[str, str, str]] = found.settings
    table = render_table("What differs", ("name", "this run", "the other run"), rows, 9)
    same = "<p>Parameters, versions and input are the same.</p>"
    return f'<section id="settings"><h2>Settings</h2>{table if rows else same}</section>'
