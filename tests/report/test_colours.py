"""The page's colours: told apart with two kinds of cones, and text that can be read."""

import itertools
import re
from importlib import resources

import numpy as np
import pytest

#: Linear RGB as protanopes and deuteranopes see it: Machado, Oliveira and Fernandes, "A
#: Physiologically-based Model for Simulation of Color Vision Deficiency" (2009), severity 1.
SEEN = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
#: Linear sRGB to XYZ under D65.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
#: Colours that stand in one chart. Lines have dashes of their own besides, and verdicts shapes.
TOGETHER = {
    "verdicts": ("kept", "dropped"),
    "lines": ("kept", "dropped", "c", "d"),
    "rarity": ("rare-0", "rare-1", "rare-2", "rare-3", "rare-4"),
}
#: Distance in CIELAB (1976) below which two marks on one chart are easily taken for each other.
APART = 10


def linear(colour: str) -> np.ndarray:
    """(3,) floats in [0, 1] of a colour written #rgb or #rrggbb."""
    digits = colour if len(colour) == 6 else "".join(2 * one for one in colour)
    values = np.array([int(digits[place : place + 2], 16) for place in (0, 2, 4)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """(3,) floats: CIELAB of linear sRGB."""
    relative = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(axis=1)
    root = np.where(
        relative > (6 / 29) ** 3, np.cbrt(relative), relative * (29 / 6) ** 2 / 3 + 4 / 29
    )
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2, from 1 to 21."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def palette(scheme: str) -> dict[str, str]:
    style = (resources.files("curate.report") / "report.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    found = dict(re.findall(r"--([\w-]+): #(\w+)", light))
    return found if scheme == "light" else found | dict(re.findall(r"--([\w-]+): #(\w+)", dark))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("group", TOGETHER)
def test_colours_of_one_chart_are_told_apart(group: str, seen: str, scheme: str) -> None:
    colours = palette(scheme)
    for one, other in itertools.combinations((*TOGETHER[group], "card"), 2):
        ends = [lab(SEEN[seen] @ linear(colours[name])) for name in (one, other)]
        assert np.linalg.norm(ends[0] - ends[1]) >= APART, (one, other)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_clusters_stand_out_from_the_paper(scheme: str) -> None:
    # Eight colours repeat and need not be told apart: which samples are copies of each other is
    # shown beside the map, where pointing at a dot shows its picture. All must be seen, though.
    style = (resources.files("curate.report") / "report.css").read_text("utf-8")
    clusters = re.findall(r"svg \.cluster-\d \{ fill: #(\w+)", style)
    assert len(clusters) == 8
    paper = palette(scheme)["card"]
    for colour, view in itertools.product(clusters, SEEN.values()):
        assert np.linalg.norm(lab(view @ linear(colour)) - lab(view @ linear(paper))) >= 2 * APART


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str) -> None:
    colours = palette(scheme)
    for text, paper in itertools.product(
        ("ink", "soft", "kept", "dropped"), ("page", "card", "wash")
    ):
        assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
    assert contrast(colours["page"], colours["kept"]) >= 4.5  # a pressed button
