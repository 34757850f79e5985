"""Charts as SVG: drawn once, coloured by the page's style, told apart without colour too."""

import math
from collections.abc import Sequence
from html import escape

__all__ = [
    "draw_bars",
    "draw_density",
    "draw_histogram",
    "draw_intervals",
    "draw_lines",
    "draw_steps",
]

#: Drawn for a phone's width, so that the letters are never smaller than the page's.
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 24
#: Characters of a number that fit beside the axis.
_MARK_CHARS = 5
#: Of letters below the axis: the widest, and a line.
_LETTER, _LINE = 7, 12


def draw_bars(start: int, length: int, total: int, dropped: bool) -> str:
    """Return one bar of the funnel, from `start` on, out of `total`."""
    left, width = (100 * part / max(total, 1) for part in (start, length))
    kind = "dropped" if dropped else "kept"
    return (
        '<svg class="strip" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{kind}" x="{left:.2f}" y="0" width="{max(width, 0.4 if length else 0):.2f}" '
        'height="8"/></svg>'
    )


def draw_histogram(
    name: str,
    low: float,
    high: float,
    kept: Sequence[int],
    dropped: Sequence[int],
    words: tuple[str, str] = ("kept", "dropped"),
    is_log: bool = False,
) -> str:
    """Return shares of the kept as an area and of the dropped as a line above the same bins.

    Parameters
    ----------
    name : str
    low, high : float
    kept, dropped : sequence of int
    words : (str, str)
        What the two are called.
    is_log : bool
        Whether the bins are equal parts of the logarithm.
    """
    shares = [[count / max(sum(side), 1) for count in side] for side in (kept, dropped)]
    top = max((max(side) for side in shares), default=0) or 1
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(kept), 1)
    bars, line = [], []

    def at(share: float) -> float:
        return low * (high / low) ** share if is_log else low + (high - low) * share

    for number, (own, other) in enumerate(zip(*shares, strict=True)):
        x, y = _LEFT + number * step, _down(own / top)
        first, last = (at((number + one) / len(kept)) for one in (0, 1))
        counts = f"{kept[number]:,} {words[0]}, {dropped[number]:,} {words[1]}"
        told = f"{first:.3g} to {last:.3g}: {counts}"
        bars.append(
            f'<rect class="kept area" x="{x:.1f}" y="{y:.1f}" width="{step:.2f}" '
            f'height="{_down(0) - y:.1f}"/>'
            f'<rect class="touch" x="{x:.1f}" y="{_TOP}" width="{step:.2f}" '
            f'height="{_down(0) - _TOP}"><title>{told}</title></rect>'
        )
        line += [f"{x:.1f},{_down(other / top):.1f}", f"{x + step:.1f},{_down(other / top):.1f}"]
    if sum(dropped):
        bars.append(f'<polyline class="line dropped" points="{" ".join(line)}"/>')
    # No more digits than the width of a bar allows: next to 1, 2e-5 is 0.
    digits = 2 - math.floor(math.log10(high - low)) if high > low else 2
    ends = [at(share) if is_log else round(at(share), digits) for share in (0, 0.5, 1)]
    marks = _mark_across(list(zip(ends, (0.0, 0.5, 1.0), strict=True)))
    marks += _mark_up([(0, 0), (top, 1)], "{:.0%}")
    told = f"{sum(kept):,} {words[0]} and {sum(dropped):,} {words[1]} have one"
    told += "; logarithmic axis" if is_log else ""
    return _frame(name, told, "".join(bars) + marks)


def draw_lines(
    title: str,
    across: str,
    xs: Sequence[float],
    lines: Sequence[tuple[str, str, Sequence[float | None]]],
    current: float | None,
    is_movable: bool = True,
) -> str:
    """Return shares against rates on a logarithmic axis, with a mark that the page moves.

    Parameters
    ----------
    title, across : str
    xs : sequence of float, > 0, rising
    lines : sequence of (label, kind, values)
        `kind` names the line's style; None in values leaves a gap.
    current : float or None
        Where the run stands.
    is_movable : bool
        Whether there is a slider, which moves a mark.
    """
    low, high = math.log(xs[0]), math.log(xs[-1])
    spots = [_right((math.log(x) - low) / ((high - low) or 1)) for x in xs]
    known = [value for _, _, values in lines for value in values if value is not None]
    most = max(known, default=0) * 1.05 or 1.0
    top = 1.0 if len(lines) > 1 and most > 0.5 else most
    parts, legend = [], []
    for label, kind, values in lines:
        pairs = [(x, v) for x, v in zip(spots, values, strict=True) if v is not None]
        if not pairs:
            continue
        points = " ".join(f"{x:.1f},{_down(value / top):.1f}" for x, value in pairs)
        parts.append(f'<polyline class="line line-{kind}" points="{points}"/>')
        legend.append(f'<span class="key line-{kind}">{escape(label)}</span>')
    if current is not None and current in xs:
        x = spots[list(xs).index(current)]
        # A middled label would be cut off at either end.
        anchor = "end" if x > spots[-1] - 24 else "start" if x < spots[0] + 24 else "middle"
        parts.append(
            f'<line class="now" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_down(0)}"/>'
            f'<text class="now" x="{x:.1f}" y="{_TOP - 3}" text-anchor="{anchor}">this run</text>'
        )
    if is_movable:
        stops = " ".join(f"{x:.1f}" for x in spots)
        parts.append(
            f'<line class="mark" data-stops="{stops}" x1="{spots[-1]:.1f}" x2="{spots[-1]:.1f}" '
            f'y1="{_TOP}" y2="{_down(0)}"/>'
        )
    middle = math.exp((low + high) / 2)
    marks = _mark_across([(xs[0], 0.0), (middle, 0.5), (xs[-1], 1.0)])
    marks += _mark_up([(0, 0), (top / 2, 0.5), (top, 1)], _percents(top))
    return _frame(title, f"against {across}", "".join(parts) + marks, "".join(legend))


def _percents(top: float) -> str:
    """Format that tells half of `top` from nothing, in the room beside an axis."""
    if 0 < top < 1e-4:
        return "{:.2g}"
    digits = 0 if top > 0.05 or top <= 0 else max(2, math.ceil(-math.log10(top)) - 1)
    return f"{{:.{digits}%}}"


def draw_steps(title: str, points: Sequence[tuple[float, int]]) -> str:
    """Return kept samples at several cosines as points on a line, the run's own first."""
    least = min(x for x, _ in points)
    bottom, top = min(y for _, y in points), max(y for _, y in points)
    span = (top - bottom) or 1
    places = [(_right((x - least) / ((1 - least) or 1)), _down((y - bottom) / span * 0.9 + 0.05)) for x, y in points]  # fmt: skip  # noqa: E501
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle class="{"now" if number == 0 else "kept"}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>min_cosine {points[number][0]}: {points[number][1]:,} kept</title></circle>"
        for number, (x, y) in enumerate(places)
    )
    marks = _mark_across([(least, 0.0), ((least + 1) / 2, 0.5), (1.0, 1.0)])
    marks += _mark_up([(bottom, 0.05), (top, 0.95)], "{:,.0f}")
    drawn = f'<polyline class="line line-a" points="{line}"/>{dots}{marks}'
    return _frame(title, f"{points[0][1]:,} at this run's {points[0][0]}", drawn)


def draw_intervals(
    title: str,
    told: str,
    points: Sequence[tuple[str, float, float, float]],
    is_series: bool = True,
) -> str:
    """Return estimates side by side, with their intervals and a line at zero.

    Parameters
    ----------
    title, told : str
    points : sequence of (label, low, middle, high)
    is_series : bool
        Whether their order means something, so that a line joins them.
    """
    bottom = min([0.0, *(low for _, low, _, _ in points)])
    top = max([0.0, *(high for _, _, _, high in points)])
    span = (top - bottom) or 1
    places = [_right((number + 0.5) / len(points)) for number in range(len(points))]

    def down(value: float) -> float:
        return _down((value - bottom) / span)

    parts = [
        f'<line class="now" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(0):.1f}" '
        f'y2="{down(0):.1f}"/>'
    ]
    if is_series:
        spots = (f"{x:.1f},{down(one[2]):.1f}" for x, one in zip(places, points, strict=True))
        parts.append(f'<polyline class="line line-a" points="{" ".join(spots)}"/>')
    room = (_WIDTH - _LEFT) // max(len(points), 1) // _LETTER
    labels = [_break_label(label, room) for label, *_ in points]
    longest = max((len(row) for rows in labels for row in rows), default=1)
    # Labels that would run into each other are left out.
    every = -(-len(points) * longest * _LETTER // (_WIDTH - _LEFT)) or 1
    for number, (x, (label, low, middle, high)) in enumerate(zip(places, points, strict=True)):
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{down(low):.1f}" '
            f'y2="{down(high):.1f}"/><circle class="kept" cx="{x:.1f}" cy="{down(middle):.1f}" '
            f'r="4"><title>{escape(label)}: {middle:.3g} ({low:.3g} to {high:.3g})</title></circle>'
        )
        if number % every == 0:
            parts += [
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16 + row * _LINE}" '
                f'text-anchor="middle">{escape(text)}</text>'
                for row, text in enumerate(labels[number])
            ]
    zero = -bottom / span
    ends = [(bottom, 0.0), (bottom + span, 1.0)]
    marks = _mark_up([*ends, (0, zero)] if 0.1 < zero < 0.9 else ends, "{:.2g}")
    lines = max((len(rows) for rows in labels), default=1)
    return _frame(title, told, "".join(parts) + marks, more=(lines - 1) * _LINE)


def _break_label(label: str, chars: int) -> list[str]:
    """Cut a label of more characters at the space nearest to its middle."""
    spaces = [place for place, character in enumerate(label) if character == " "]
    if len(label) <= chars or not spaces:
        return [label]
    place = min(spaces, key=lambda one: abs(one - len(label) / 2))
    return [label[:place], label[place + 1 :]]


def draw_density(
    column: str,
    low: float,
    high: float,
    counts: Sequence[Sequence[int]],
    regions: Sequence[Sequence[int]],
) -> str:
    """Return a grid of squares, the stronger in colour the more samples, in regions to choose.

    Parameters
    ----------
    column : str
        What goes up.
    low, high : float
        Its range.
    counts : (R, C) int
        By rarity (across, [0, 1]) and by `column`.
    regions : (S * S, 2) int
        Samples and dropped samples of S by S regions, rarity first.
    """
    most = max(max(row) for row in counts)
    width = (_WIDTH - _LEFT - _RIGHT) / len(counts)
    height = (_HEIGHT - _TOP - _BOTTOM) / len(counts[0])
    squares = []
    for across, row in enumerate(counts):
        for up, count in enumerate(row):
            if count:
                # Logarithmic: a few samples in a corner are what one looks for.
                opacity = 0.15 + 0.85 * math.log1p(count) / math.log1p(most)
                x, y = _LEFT + across * width, _down(0) - (up + 1) * height
                squares.append(
                    f'<rect class="kept" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}" fill-opacity="{opacity:.2f}"/>'
                )
    marks = _mark_across([(0, 0.0), (0.5, 0.5), (1, 1.0)])
    marks += _mark_up([(low, 0), ((low + high) / 2, 0.5), (high, 1)], "{:.2g}")
    return _frame(
        f"{column} against rarity",
        "the stronger the colour, the more samples; choose regions to see theirs",
        f'{"".join(squares)}{marks}<g id="regions">{_draw_regions(regions)}</g>',
    )


def _draw_regions(regions: Sequence[Sequence[int]]) -> str:
    side = math.isqrt(len(regions))
    width = (_WIDTH - _LEFT - _RIGHT) / side
    height = (_HEIGHT - _TOP - _BOTTOM) / side
    drawn = []
    for number, (samples, dropped) in enumerate(regions):
        across, up = divmod(number, side)
        told = f"{samples:,} samples, {dropped:,} dropped"
        drawn.append(
            f'<rect class="touch region" role="button" aria-pressed="false" aria-label="{told}" '
            f'tabindex="{0 if number == 0 else -1}" x="{_LEFT + across * width:.1f}" '
            f'y="{_down(0) - (up + 1) * height:.1f}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>{told}</title></rect>"
        )
    return "".join(drawn)


def _right(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _down(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _mark_across(marks: Sequence[tuple[float, float]]) -> str:
    anchors = {0.0: "start", 1.0: "end"}
    axis = (
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_down(0)}" y2="{_down(0)}"/>'
    )
    return axis + "".join(
        f'<text x="{_right(place):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
        f'text-anchor="{anchors.get(place, "middle")}">{value:.3g}</text>'
        for value, place in marks
    )


def _mark_up(marks: Sequence[tuple[float, float]], pattern: str) -> str:
    drawn = []
    for value, place in marks:
        nothing = "0%" if "%" in pattern else "0"
        text = pattern.format(value) if value else nothing
        if len(text) > _MARK_CHARS:
            # Or the edge would cut off a minus sign.
            text = text.replace("0.", ".", 1).replace("e-0", "e-")
        drawn.append(
            f'<text x="{_LEFT - 6}" y="{_down(place) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    return "".join(drawn)


def _frame(title: str, told: str, drawn: str, legend: str = "", more: int = 0) -> str:
    """Put a title above a drawing that is `more` higher than others."""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<small>{escape(told)}</small>'
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT + more}" role="img" '
        f'aria-label="{escape(title)}: {escape(told)}">{drawn}</svg>'
        + (f'<p class="legend">{legend}</p>' if legend else "")
        + "</figure>"
    )
