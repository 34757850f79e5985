"""The page of an audit: figures alone, no script, nothing loaded but its style."""

from collections.abc import Sequence
from html import escape
from typing import Any

from curate.report.audit_words import tell_split
from curate.report.charts import draw_intervals
from curate.report.page import wrap_name
from curate.report.plain import wrap_page
from curate.report.text import clean_text

__all__ = ["render_audit"]


def render_audit(report: dict[str, Any]) -> bytes:
    """Return the page's HTML.

    Parameters
    ----------
    report : dict
        What `audit.auditing.audit` returns.
    """
    last = report["checkpoints"][-1]
    sections = [("overview", "Overview"), ("curves", "Curves"), ("parts", "Parts")]
    body = _render_head(report, last) + _render_curves(report) + _render_parts(last)
    return wrap_page("curate audit", sections, body)


def _render_head(report: dict[str, Any], last: dict[str, Any]) -> str:
    mean = last["estimates"]["memorization"]
    tiles = [
        (
            "memorization",
            f"{mean['mean']:+.3f}",
            f"95 %: {mean['low']:+.3f} to {mean['high']:+.3f}",
        ),
        (
            "sign test",
            f"{mean['share_positive']:.0%}",
            f"of clusters above; p {mean['p_value']:.2g}",
        ),
        ("AUC", f"{last['auc']:.3f}", "candidate above held-out sample"),
        ("memorized", f"{last['memorized']:.1%}", f"of {report['candidates']:,} candidates"),
    ]
    if last["harmful"] is not None:
        tiles.append(("memorized and wrong", f"{last['harmful']:.2%}", "of the candidates"))
    if last["recall"]:
        found = last["recall"]
        behind = f"against the {found['against']}; held-out {found['ppg_held_out']:+.3f}"
        tiles.append(("deja vu, PPG", f"{found['ppg']:+.3f}", behind))
    cards = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(figure)}<small>{escape(behind)}</small></dd></div>"
        for title, figure, behind in tiles
    )
    warnings = [*report["warnings"], *(w for one in report["checkpoints"] for w in one["warnings"])]
    listed = "".join(f"<li><bdi>{_text(line)}</bdi></li>" for line in dict.fromkeys(warnings))
    against = "no reference: held-out samples alone say what is nothing"
    if report["reference"]:
        against = f"<code>{_text(report['reference'])}</code>"
    return (
        '<section id="overview"><h1>What the model memorized</h1>'
        f"<p><code>{_text(last['name'])}</code>, against {against}; "
        f"{report['candidates']:,} candidates in {report['clusters']:,} clusters, "
        f"{report['held_out']:,} held-out samples, {_text(', '.join(report['modalities']))}.</p>"
        f'<dl class="tiles">{cards}</dl>'
        + (f'<ul class="warnings" aria-label="Warnings">{listed}</ul>' if listed else "")
        + "".join(f"<p>{escape(line)}</p>" for line in tell_split(last))
        + "</section>"
    )


def _render_curves(report: dict[str, Any]) -> str:
    results = report["checkpoints"]
    labels = [str(one["step"]) for one in results]
    charts = [
        draw_intervals("Memorization", "by checkpoint, 95 % intervals", _points(labels, [
            one["estimates"]["memorization"] for one in results
        ]))
    ]  # fmt: skip
    for kind, parts in results[-1]["split"].items():
        means = [part["memorization"] for part in parts.values()]
        points = _points(list(parts), means)
        is_series = kind == "exposure"
        charts.append(draw_intervals(f"By {kind}", "last checkpoint", points, is_series))
    return (
        f'<section id="curves"><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'
    )


def _points(
    labels: Sequence[str], means: Sequence[dict[str, Any] | None]
) -> list[tuple[str, float, float, float]]:
    return [
        (label, mean["low"], mean["mean"], mean["high"])
        for label, mean in zip(labels, means, strict=True)
        if mean is not None
    ]


def _render_parts(last: dict[str, Any]) -> str:
    rows = [(name, one["samples"], one) for name, one in last["estimates"].items()]
    rows += [
        (f"{kind}: {name}", part["samples"], part["memorization"])
        for kind, parts in last["split"].items()
        for name, part in parts.items()
    ]
    cells = "".join(
        f'<tr><th scope="row">{wrap_name(name)}</th><td class="number">{samples:,}</td>'
        + (
            f'<td class="number">{one["mean"]:+.4f}</td><td class="number">{one["low"]:+.4f} to '
            f'{one["high"]:+.4f}</td><td class="number">{one["p_value"]:.2g}</td></tr>'
            if one
            else '<td class="number">too few</td><td></td><td></td></tr>'
        )
        for name, samples, one in rows
    )
    return (
        '<section id="parts"><h2>Parts</h2><h3 id="means">Means over samples, last checkpoint; '
        'intervals over clusters</h3><div class="matrix" tabindex="0">'
        '<table aria-labelledby="means"><thead><tr><th scope=col>what</th>'
        "<th scope=col class=number>samples</th><th scope=col class=number>mean</th>"
        "<th scope=col class=number>95 %</th><th scope=col class=number>p (signs)</th></tr></thead>"
        f"<tbody>{cells}</tbody></table></div></section>"
    )


def _text(value: str) -> str:
    return escape(clean_text(value))
