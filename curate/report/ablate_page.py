"""The page of an ablation: curves with intervals, the table, and what is recommended."""

from html import escape
from typing import Any

from curate.report.ablate_words import tell_pool, tell_recommendation
from curate.report.charts import draw_intervals
from curate.report.page import wrap_name
from curate.report.plain import wrap_page
from curate.report.text import clean_text

__all__ = ["render_ablation"]

_SECTIONS = (("overview", "Overview"), ("curves", "Curves"), ("settings", "Settings"))
_PARTS = {
    "all": "Held-out R@10",
    "rare": "Rarest fifth",
    "rest": "The rest",
    "zero_shot": "Zero-shot accuracy",
}
_KINDS = {"random": "Random sets of the same size", "cosine": "Cosine filter of the same size"}


def render_ablation(report: dict[str, Any]) -> bytes:
    """Return the page's HTML.

    Parameters
    ----------
    report : dict
        What `ablate.ablating.ablate` returns.
    """
    body = _render_head(report) + _render_curves(report) + _render_table(report)
    return wrap_page("curate ablate", _SECTIONS, body)


def _render_head(report: dict[str, Any]) -> str:
    options, *sentences = tell_recommendation(report)
    plan = report["plan"]
    warnings = "".join(f"<li><bdi>{_text(line)}</bdi></li>" for line in report["warnings"])
    return (
        '<section id="overview"><h1>How hard to filter</h1>'
        '<p class="command">Recommended: '
        f"<code>{_text(options.removeprefix('Recommended: '))}</code></p>"
        + "".join(f"<p>{_text(line)}</p>" for line in sentences)
        + f"<p>{tell_pool(report)}; each student ({_text(report['model'])}) took "
        f"{plan['steps']:,} steps of {plan['batch']} pairs. Settings that were clearly "
        "behind the best got no further seeds.</p>"
        + (f'<ul class="warnings" aria-label="Warnings">{warnings}</ul>' if warnings else "")
        + "</section>"
    )


def _render_curves(report: dict[str, Any]) -> str:
    charts = [
        _curve(report, "setting", part, title, "gain over the loosest by share dropped, 95 % each")
        for part, title in _PARTS.items()
        if all(part in row["figures"] for row in report["lines"])
    ]
    charts += [
        _curve(report, kind, "all", title, "the same gain, by share dropped")
        for kind, title in _KINDS.items()
        if any(row["kind"] == kind for row in report["lines"])
    ]
    return (
        f'<section id="curves"><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'
    )


def _curve(report: dict[str, Any], kind: str, part: str, title: str, told: str) -> str:
    rows = [row for row in report["lines"] if row["kind"] == kind]
    points = []
    for row in rows:
        one = row["figures"][part]
        points.append((f"{row['share_dropped']:.0%}", one["low"], one["gain"], one["high"]))
    return draw_intervals(title, told, points)


def _render_table(report: dict[str, Any]) -> str:
    parts = [p for p in _PARTS if all(p in row["figures"] for row in report["lines"])]
    heads = "".join(f"<th scope=col class=number>{escape(_PARTS[part])}</th>" for part in parts)
    rows = "".join(
        f'<tr><th scope="row">{wrap_name(row["name"])}</th>'
        f'<td class="number">{row["kept"]:,}</td><td class="number">{row["share_dropped"]:.1%}</td>'
        f'<td class="number">{row["seeds"]}{" (stopped)" if row["stopped"] else ""}</td>'
        + "".join(_cell(row["figures"][part]) for part in parts)
        + "</tr>"
        for row in report["lines"]
    )
    return (
        '<section id="settings"><h2>Settings</h2><h3 id="means">Means over seeds; gains over the '
        "loosest setting, with standard errors over pairs and seeds</h3>"
        '<div class="matrix" tabindex="0"><table aria-labelledby="means"><thead><tr>'
        "<th scope=col>setting or control</th><th scope=col class=number>kept</th>"
        "<th scope=col class=number>dropped</th><th scope=col class=number>seeds</th>"
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _cell(one: dict[str, Any]) -> str:
    is_loosest = not one["gain"] and not one["stderr"]
    gain = "–" if is_loosest else f"{one['gain']:+.4f} ± {one['stderr']:.4f}"
    return f'<td class="number">{one["mean"]:.4f}<br>{gain}</td>'


def _text(value: str) -> str:
    return escape(clean_text(value))
