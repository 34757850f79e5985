"""Tests of emoji with several pictures and several names, on excerpts of the packages."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emoji import (
    EMOJI_VENDORS,
    EMOJI_VERSION,
    NAMES_VERSION,
    emoji_group,
    emoji_names,
    emoji_pairs,
    read_emoji,
)

BOTH = {"has_img_google": True, "has_img_twitter": True}
ENTRIES = [
    {"name": "HASH KEY", "category": "Symbols", "image": "0023-fe0f-20e3.png", **BOTH},
    {
        "name": "WOMAN FARMER",
        "category": "People & Body",
        "image": "1f469-200d-1f33e.png",
        **BOTH,
        "skin_variations": {"1F3FB": {"image": "1f469-1f3fb-200d-1f33e.png", **BOTH}},
    },
    {
        "name": "PEOPLE HOLDING HANDS",
        "category": "People & Body",
        "image": "1f9d1-200d-1f91d-200d-1f9d1.png",
        **BOTH,
        "skin_variations": {
            "1F3FB-1F3FF": {"image": "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff.png", **BOTH}
        },
    },
    {"name": "LIBRA", "category": "Symbols", "image": "264e.png", **BOTH, "has_img_twitter": False},
    {"name": "COCKROACH", "category": "Animals & Nature", "image": "1fab3.png", **BOTH},
]
NAMES = {
    "en": [
        {"label": "keycap: #", "hexcode": "0023-FE0F-20E3"},
        {
            "label": "woman farmer",
            "hexcode": "1F469-200D-1F33E",
            "skins": [
                {"label": "woman farmer: light skin tone", "hexcode": "1F469-1F3FB-200D-1F33E"}
            ],
        },
        {"label": "people holding hands", "hexcode": "1F9D1-200D-1F91D-200D-1F9D1"},
        {"label": "Libra", "hexcode": "264E"},
        {"label": "cockroach", "hexcode": "1FAB3"},
    ],
    "de": [
        {"label": "Kakerlake", "hexcode": "1FAB3"},
        {"label": "Taste: #", "hexcode": "0023-FE0F-20E3"},
        {
            "label": "Bäuerin",
            "hexcode": "1F469-200D-1F33E",
            "skins": [{"label": "Bäuerin: helle Hautfarbe", "hexcode": "1F469-1F3FB-200D-1F33E"}],
        },
        {"label": "sich an den Händen haltende Personen", "hexcode": "1F9D1-200D-1F91D-200D-1F9D1"},
        {"label": "Waage (Sternzeichen)", "hexcode": "264E"},
    ],
    # A language whose names are not complete.
    "fr": [{"label": "cafard", "hexcode": "1FAB3"}],
}


def write_package(path: Path, files: dict[str, bytes]) -> None:
    """Write a package as npm packs it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def pictures_of(vendor: str) -> dict[str, bytes]:
    """Return what stands for a vendor's images, by path."""
    entries: list[dict[str, Any]] = [*ENTRIES]
    entries += [v for entry in ENTRIES for v in entry.get("skin_variations", {}).values()]
    return {
        f"img/{vendor}/64/{entry['image']}": f"{vendor} {entry['image']}".encode()
        for entry in entries
        if entry[f"has_img_{vendor}"]
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out a cache that holds all packages."""
    folder = tmp_path_factory.mktemp("cache")
    table = {"emoji.json": json.dumps(ENTRIES).encode()}
    for vendor in EMOJI_VENDORS:
        others = {f"img/{vendor}/16/1fab3.png": b"too small"}
        path = folder / f"emoji-datasource-{vendor}-{EMOJI_VERSION}.tgz"
        write_package(path, table | others | pictures_of(vendor))
    files = {f"{lang}/data.json": json.dumps(names).encode() for lang, names in NAMES.items()}
    files |= {"package.json": b"{}", "de/shortcodes/cldr.json": b"{}", "de/compact.json": b"[]"}
    files["versions/emoji.json"] = b"{}"
    write_package(folder / f"emojibase-data-{NAMES_VERSION}.tgz", files)
    return folder


def test_pairs_name_skin_tones(cache: Path) -> None:
    pairs = {pair.source: pair for pair in emoji_pairs(cache)}
    assert len(pairs) == 7 + 6
    toned = pairs["img/google/64/1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff.png"]
    assert toned.caption == "people holding hands, light skin tone, dark skin tone"
    assert (toned.title, toned.name_group) == ("people holding hands",) * 2
    assert "img/twitter/64/264e.png" not in pairs


def test_names_are_those_of_the_language(cache: Path) -> None:
    assert emoji_names(cache, "de") == {
        "1FAB3": "Kakerlake",
        "0023-20E3": "Taste: #",
        "1F469-200D-1F33E": "Bäuerin",
        "1F469-1F3FB-200D-1F33E": "Bäuerin: helle Hautfarbe",
        "1F9D1-200D-1F91D-200D-1F9D1": "sich an den Händen haltende Personen",
        "264E": "Waage (Sternzeichen)",
    }


@pytest.mark.parametrize("language", ["xx", "versions", "meta", ""])
def test_an_unknown_language_is_refused(cache: Path, language: str) -> None:
    with pytest.raises(ValueError, match="must be one of de, en, fr; got"):
        emoji_names(cache, language)


def test_emoji_have_the_pictures_and_names_asked_for_and_no_skin_tone(cache: Path) -> None:
    emoji = read_emoji(cache, EMOJI_VENDORS, ("en", "de"))
    assert {one.code: one.names for one in emoji} == {
        "0023-20E3": ("keycap: #", "Taste: #"),
        "1F469-200D-1F33E": ("woman farmer", "Bäuerin"),
        "1F9D1-200D-1F91D-200D-1F9D1": (
            "people holding hands",
            "sich an den Händen haltende Personen",
        ),
        "1FAB3": ("cockroach", "Kakerlake"),
    }
    assert [one.code for one in emoji] == sorted(one.code for one in emoji)
    assert emoji[0].images == (b"google 0023-fe0f-20e3.png", b"twitter 0023-fe0f-20e3.png")


def test_only_what_all_vendors_draw_and_all_languages_name_is_read(cache: Path) -> None:
    drawn_by_one = read_emoji(cache, ("google",), ("de", "en"))
    assert ("Waage (Sternzeichen)", "Libra") in [one.names for one in drawn_by_one]
    assert all(len(one.images) == 1 for one in drawn_by_one)
    (named,) = read_emoji(cache, EMOJI_VENDORS[::-1], ("fr",))
    assert named.images == (b"twitter 1fab3.png", b"google 1fab3.png")
    assert named.names == ("cafard",)


@pytest.mark.parametrize(
    "codes",
    [
        # Farmer: person, man, woman, with a skin tone.
        ("1F9D1-200D-1F33E", "1F468-200D-1F33E", "1f469-200d-1f33e", "1F469-1F3FB-200D-1F33E"),
        # Person, man running; facing right; with a skin tone.
        ("1F3C3", "1F3C3-200D-2642-FE0F", "1F3C3-1F3FF-200D-2640-FE0F-200D-27A1-FE0F"),
        # People, men, women, woman and man holding hands.
        ("1F9D1-200D-1F91D-200D-1F9D1", "1F46C", "1F46D", "1F46B-1F3FB"),
        # Couple with heart, one of two men, one of women with two skin tones.
        (
            "1F491",
            "1F468-200D-2764-FE0F-200D-1F468",
            "1F469-1F3FB-200D-2764-FE0F-200D-1F469-1F3FF",
        ),
        # Families of three.
        ("1F46A", "1F468-200D-1F469-200D-1F466", "1F9D1-200D-1F9D1-200D-1F9D2"),
        ("1F385", "1F936", "1F9D1-200D-1F384"),  # Santa, Mrs. Claus, Mx Claus
        ("2764", "2764-FE0F"),
    ],
)
def test_variants_are_one_group(codes: tuple[str, ...]) -> None:
    assert len({emoji_group(code) for code in codes}) == 1


def test_different_emoji_are_different_groups() -> None:
    codes = [
        *("1F9D1", "1F9D2", "1F9D1-200D-1F33E", "1F9D1-200D-1F373"),  # person, child, two trades
        *("1F9D1-200D-1F9B0", "1F9D1-200D-1F9B1"),  # red and curly hair
        *("2640", "2642", "27A1", "1F3FB", "1F3FF"),  # the signs themselves
        *("1F491", "1F48F", "1F46A", "2764-FE0F", "2764-FE0F-200D-1F525"),
        *("1F1E9-1F1EA", "1F1EB-1F1F7", "0023-FE0F-20E3", "002A-FE0F-20E3"),  # flags, keys
    ]
    assert len({emoji_group(code) for code in codes}) == len(codes)
