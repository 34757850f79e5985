"""Real image-text pairs from GIMP's manuals: pictures and the alt texts that authors gave them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from benchmarks.images import is_decodable
from benchmarks.sources import Pair, normalise, unpacked

# What the stylesheets that turn the manual into pages add of themselves: arrows between pages,
# signs beside notes and tips, the site's sign on the title page. No author chose these pictures,
# and their alt texts name a link or a kind of paragraph. What authors wrote is kept, "Example"
# included.
DECORATIONS = frozenset(
    f"images/{name}.png"
    for name in (
        *("prev", "next", "up", "home", "gimp-org"),
        *("note", "tip", "important", "caution", "warning"),
    )
)

# The parts of a figure share its alt text; all figures but one have no more parts than this.
MAX_LINKS = 5


@dataclass(frozen=True)
class Figure:
    """An image of a manual with one of its alt texts.

    Attributes
    ----------
    language
        The folder of the manual's language, e.g. "pt_BR".
    path
        The image's path in that folder, which is the same in all languages.
    image
        The image file.
    digest
        A hash of its bytes.
    text
        The alt text without superfluous white space.
    """

    language: str
    path: str
    image: Path
    digest: str
    text: str


class _Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        text = " ".join((values.get("alt") or "").split())
        if tag == "img" and text:
            self.found.append((values.get("src") or "", text))


def read_alt_texts(page: Path) -> list[tuple[str, str]]:
    """Read the images of a page that have an alt text.

    Parameters
    ----------
    page
        The HTML file.

    Returns
    -------
    list of tuple of str, str
        Source and alt text of each, by place.
    """
    parser = _Images()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    return parser.found


def read_figures(folder: Path) -> Iterator[Figure]:
    """Read the images of a manual that have an alt text, as often as they occur.

    Parameters
    ----------
    folder
        The manual in one language, which holds pages and `images`.

    Yields
    ------
    Figure
        Each image that lies in the folder, can be decoded and is no decoration, by page and place.
    """
    folder = folder.resolve()
    digests: dict[str, str | None] = {}
    for page in sorted(folder.rglob("*.html")):
        for source, text in read_alt_texts(page):
            image = (page.parent / source).resolve()
            if not image.is_relative_to(folder) or not image.is_file():
                continue
            path = image.relative_to(folder).as_posix()
            if path in DECORATIONS:
                continue
            if path not in digests:
                data = image.read_bytes()
                # One German PNG has a wrong checksum; only what is planted may be broken.
                digests[path] = hashlib.sha256(data).hexdigest() if is_decodable(data) else None
            digest = digests[path]
            if digest is not None:
                yield Figure(folder.name, path, image, digest, text)


def _components(links: Iterable[set[str]]) -> dict[str, str]:
    groups: dict[str, set[str]] = {}
    for names in links:
        merged = names.union(*(groups.get(name, ()) for name in names))
        groups.update(dict.fromkeys(merged, merged))
    return {name: min(group) for name, group in groups.items()}


def gimp_help_groups(figures: Iterable[Figure]) -> dict[str, str]:
    """Tell which images of a manual show the same thing.

    Images are of one group if they have the same path, in whatever language and however
    localised, the same bytes or the same alt text, or if a chain of such links joins them. Alt
    texts join the parts of a figure: an image before and after a command. A text of more than
    `MAX_LINKS` images ("Example") joins none of them, and an image with more than that many texts
    in one language is joined to no other by its texts: a hundred filters start from one
    photograph, which would make one group of them all.

    Parameters
    ----------
    figures
        Images with their alt texts.

    Returns
    -------
    dict of str to str
        For each image's path, the first path of its group.
    """
    paths_by_digest: defaultdict[str, set[str]] = defaultdict(set)
    paths_by_text: defaultdict[str, set[str]] = defaultdict(set)
    texts: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for figure in figures:
        text = normalise(figure.text)
        paths_by_digest[figure.digest].add(figure.path)
        paths_by_text[text].add(figure.path)
        texts[figure.language, figure.path].add(text)
    hubs = {path for (_, path), found in texts.items() if len(found) > MAX_LINKS}
    links = (paths - hubs for paths in paths_by_text.values() if len(paths) <= MAX_LINKS)
    return _components([*paths_by_digest.values(), *links])


def gimp_help_pairs(cache: Path, languages: Sequence[str] = ("en",)) -> list[Pair]:
    """Read the pairs of GIMP's manuals, downloading their packages unless the cache has them.

    Parameters
    ----------
    cache
        Folder for the packages and their contents.
    languages
        Languages as the names of packages spell them, e.g. "de" or "pt-br".

    Returns
    -------
    list of Pair
        All that differ in the image's bytes or in the normalised alt text, by language and place.
        A picture that no one localised so has one pair for each translation of its alt text.
    """
    figures: dict[tuple[str, str], Figure] = {}
    for language in languages:
        name = f"gimp-help-{language}"
        root = unpacked(name, [name], cache)
        folders = sorted(root.glob("usr/share/gimp/*/help/*/"))
        if not folders:
            raise FileNotFoundError(f"{name} left no manual in {root}")
        for folder in folders:
            for figure in read_figures(folder):
                figures.setdefault((figure.digest, normalise(figure.text)), figure)
    groups = gimp_help_groups(figures.values())
    return [
        Pair(
            url=f"gimp-help:/{figure.language}/{figure.path}",
            caption=figure.text,
            title=figure.text,
            name_group=groups[figure.path],
            category="/".join(PurePosixPath(figure.path).parent.parts[1:2]),
            image=figure.image,
        )
        for figure in figures.values()
    ]
