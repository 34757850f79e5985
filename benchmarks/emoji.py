"""Emoji from public packages: two vendors' renderings, and names in thirty languages."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sources import Pair, fetch_package, normalise

EMOJI_VENDORS = ("google", "twitter")
EMOJI_VERSION = "16.0.0"
#: Of `emojibase-data`, which has the names that Unicode's CLDR gives to the same emoji.
NAMES_VERSION = "16.0.3"
#: Whose names for emoji that package has too.
_NAME_MAKERS = ("emojibase", "github", "iamcal", "joypixels")

SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}

#: Joins signs to one emoji, and asks for a picture where text would do: no meaning of their own.
_JOINER, _PICTURE = "200D", "FE0F"
#: Behind another sign: female, male, facing right.
_QUALIFIERS = frozenset({"2640", "2642", "27A1", *SKIN_TONES})
#: One sign for all genders of what signs of their own name by gender.
_ANY_GENDER = {
    **dict.fromkeys(("1F468", "1F469"), ("1F9D1",)),  # man, woman: person
    **dict.fromkeys(("1F466", "1F467"), ("1F9D2",)),  # boy, girl: child
    **dict.fromkeys(("1F474", "1F475"), ("1F9D3",)),  # old man, old woman: older person
    **dict.fromkeys(("1F934", "1F478"), ("1FAC5",)),  # prince, princess: person with crown
    **dict.fromkeys(("1F930", "1FAC3"), ("1FAC4",)),  # pregnant woman, pregnant man: person
    **dict.fromkeys(("1F385", "1F936"), ("1F9D1", "1F384")),  # Santa, Mrs. Claus: Mx Claus
    "1F57A": ("1F483",),  # man dancing: woman dancing
    # Man and woman, men, women holding hands: people holding hands.
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), ("1F9D1", "1F91D", "1F9D1")),
    "1F48F": ("1F9D1", "2764", "1F48B", "1F9D1"),  # kiss
    "1F491": ("1F9D1", "2764", "1F9D1"),  # couple with heart
    "1F46A": ("1F9D1", "1F9D1", "1F9D2"),  # family
}


@dataclass(frozen=True)
class Emoji:
    """An emoji with several pictures and several names.

    Attributes
    ----------
    code
        Its code points, e.g. "1F469-200D-1F33E".
    images
        An image file's bytes from each vendor.
    names
        Its name in each language.
    """

    code: str
    images: tuple[bytes, ...]
    names: tuple[str, ...]


def _emoji_variants(entry: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    name = entry["name"].lower()
    yield entry, name
    for code, variant in sorted(entry.get("skin_variations", {}).items()):
        tones = dict.fromkeys(SKIN_TONES[part] for part in code.split("-"))
        yield variant, ", ".join([name, *tones])


def _emoji_vendor_pairs(package: Path, vendor: str) -> list[Pair]:
    folder = f"img/{vendor}/64"
    images: dict[str, bytes] = {}
    entries: list[dict[str, Any]] = []
    with tarfile.open(package) as archive:
        for member in archive:
            path = member.name.removeprefix("package/")
            if path != "emoji.json" and not path.startswith(folder + "/"):
                continue
            content = archive.extractfile(member)
            if content is None:
                continue
            if path == "emoji.json":
                entries = json.load(content)
            else:
                images[path] = content.read()
    return [
        Pair(
            url=f"emoji:/{folder}/{variant['image']}",
            caption=caption,
            title=entry["name"].lower(),
            name_group=normalise(entry["name"]),
            category=entry["category"],
            image=images[f"{folder}/{variant['image']}"],
        )
        for entry in entries
        for variant, caption in _emoji_variants(entry)
        if variant[f"has_img_{vendor}"]
    ]


def emoji_pairs(cache: Path) -> list[Pair]:
    """Read the emoji pairs, downloading their packages unless the cache has them.

    Parameters
    ----------
    cache
        Folder for the packages.

    Returns
    -------
    list of Pair
        All emoji of both vendors, skin tones included.
    """
    pairs = []
    for vendor in EMOJI_VENDORS:
        name = f"emoji-datasource-{vendor}"
        command = ["npm", "pack", "--silent", f"{name}@{EMOJI_VERSION}"]
        package = fetch_package(f"{name}-{EMOJI_VERSION}.tgz", command, cache)
        pairs.extend(_emoji_vendor_pairs(package, vendor))
    return pairs


def emoji_names(cache: Path, language: str) -> dict[str, str]:
    """Read the names of all emoji, downloading their package unless the cache has it.

    Parameters
    ----------
    cache
        Folder for the package.
    language
        As the package spells it, e.g. "de".

    Returns
    -------
    dict of str to str
        Name by code points, without those that ask for a picture.

    Raises
    ------
    ValueError
        If the package lacks the language.
    """
    package = _names_package(cache)
    with tarfile.open(package) as archive:
        paths = {path.split("/")[1]: path for path in archive.getnames() if _has_names(path)}
        if language not in paths:
            known = ", ".join(sorted(paths))
            raise ValueError(f"language: must be one of {known}; got {language!r}")
        content = archive.extractfile(paths[language])
        assert content is not None
        entries = json.load(content)
    return {
        plain_code(variant["hexcode"]): variant["label"]
        for entry in entries
        for variant in (entry, *entry.get("skins", []))
    }


def emoji_captions(cache: Path) -> dict[str, list[str]]:
    """Read what else emoji are called in English: other makers' names, and keywords.

    Parameters
    ----------
    cache
        As `emoji_names`.

    Returns
    -------
    dict of str to list of str
        By code points: distinct captions, its own name, all keywords as one, other names.
    """
    folder = "package/en"
    with tarfile.open(_names_package(cache)) as archive:

        def read(path: str) -> Any:
            content = archive.extractfile(f"{folder}/{path}.json")
            assert content is not None
            return json.load(content)

        entries = read("data")
        makers = [read(f"shortcodes/{maker}") for maker in _NAME_MAKERS]
    found: dict[str, list[str]] = {}
    for entry in entries:
        others = [maker.get(entry["hexcode"], []) for maker in makers]
        lists = [[other] if isinstance(other, str) else other for other in others]
        names = [name.replace("_", " ").replace("-", " ") for part in lists for name in part]
        keywords = [" ".join(entry["tags"])] if "tags" in entry else []
        captions = {normalise(name): name for name in (entry["label"], *keywords, *names)}
        found[plain_code(entry["hexcode"])] = list(captions.values())
    return found


def _names_package(cache: Path) -> Path:
    command = ["npm", "pack", "--silent", f"emojibase-data@{NAMES_VERSION}"]
    return fetch_package(f"emojibase-data-{NAMES_VERSION}.tgz", command, cache)


def _has_names(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 3 and parts[2] == "data.json"


def plain_code(code: str) -> str:
    """Code points in capitals, without those that ask for a picture: how names are looked up."""
    return "-".join(part for part in code.upper().split("-") if part != _PICTURE)


def read_emoji(cache: Path, vendors: Sequence[str], languages: Sequence[str]) -> list[Emoji]:
    """Read the emoji that all vendors draw and all languages name, without skin tones.

    Parameters
    ----------
    cache
        Folder for the packages, which are downloaded unless it has them.
    vendors
        Of `EMOJI_VENDORS`.
    languages
        See `emoji_names`.

    Returns
    -------
    list of Emoji
        By code points.
    """
    images: dict[str, dict[str, bytes]] = {vendor: {} for vendor in vendors}
    for pair in emoji_pairs(cache):
        _, vendor, _, name = pair.source.split("/")
        code = plain_code(name.partition(".")[0])
        if vendor in images and not SKIN_TONES.keys() & set(code.split("-")):
            images[vendor][code] = pair.read()
    names = [emoji_names(cache, language) for language in languages]
    codes = set.intersection(*map(set, images.values()), *map(set, names))
    return [
        Emoji(
            code,
            tuple(images[vendor][code] for vendor in vendors),
            tuple(part[code] for part in names),
        )
        for code in sorted(codes)
    ]


def emoji_group(code: str) -> str:
    """Name what an emoji shows, whatever its skin tones and genders and wherever it looks.

    Parameters
    ----------
    code
        Its code points.

    Returns
    -------
    str
        Code points that all such variants share.
    """
    first, *others = (part for part in plain_code(code).split("-") if part != _JOINER)
    kept = [first, *(part for part in others if part not in _QUALIFIERS)]
    return "-".join(sign for part in kept for sign in _ANY_GENDER.get(part, (part,)))
