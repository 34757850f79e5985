"""Real image-text pairs from public packages, fetched with the packages' ordinary clients."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OPENCLIPART_PACKAGES = ("openclipart-png", "openclipart-svg")


@dataclass(frozen=True)
class Pair:
    """An image and its caption.

    Attributes
    ----------
    url
        Where the image is in its package, e.g. "openclipart:/animals/x.png".
    caption
        The right caption.
    title
        The part of the caption that names what is shown.
    name_group
        Pairs of one group show the same thing as far as names tell.
    category
        A coarse subject.
    image
        The image file's path, or its bytes.
    """

    url: str
    caption: str
    title: str
    name_group: str
    category: str
    image: Path | bytes

    @property
    def source(self) -> str:
        """The image's path relative to its package."""
        return self.url.partition(":/")[2]

    @property
    def extension(self) -> str:
        """The image's extension without the dot."""
        return self.url.rpartition(".")[2].lower()

    def read(self) -> bytes:
        """Return the image file's bytes."""
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()


def normalise(text: str) -> str:
    """Fold case, Unicode compatibility forms and white space, for comparing captions.

    Parameters
    ----------
    text
        Any text.

    Returns
    -------
    str
        Its normalised form.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fetch_package(pattern: str, command: list[str], cache: Path) -> Path:
    """Download a package by its ordinary client unless the cache has it.

    Parameters
    ----------
    pattern
        What the package file's name looks like.
    command
        What leaves it in the working folder.
    cache
        Folder for the package.

    Returns
    -------
    Path
        The package file.

    Raises
    ------
    FileNotFoundError
        If the command leaves no such file.
    """
    found = sorted(cache.glob(pattern))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        # The clients report progress on standard output, which here belongs to the results.
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
        found = sorted(cache.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{' '.join(command)} left no {pattern} in {cache}")
    return found[-1]


def unpacked(name: str, packages: Sequence[str], cache: Path) -> Path:
    """Download and unpack Debian packages unless the cache has them.

    Parameters
    ----------
    name
        The corpus, which names the folder.
    packages
        The packages that make it up.
    cache
        Folder for the packages and their contents.

    Returns
    -------
    Path
        The folder that holds what the packages install.
    """
    root = cache / name
    if not root.exists():
        debs = [
            fetch_package(f"{package}_*.deb", ["apt-get", "download", package], cache)
            for package in packages
        ]
        # Unpacked aside and renamed, so that an interrupted run leaves no partial corpus.
        partial = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
        try:
            for deb in debs:
                subprocess.run(["dpkg-deb", "-x", str(deb), str(partial)], check=True)
            partial.rename(root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return root


def fetch_openclipart(cache: Path) -> Path:
    """Download and unpack the openclipart packages unless the cache has them.

    Parameters
    ----------
    cache
        Folder for the packages and their contents.

    Returns
    -------
    Path
        The folder that holds `png` and `svg`.
    """
    root = unpacked("openclipart", OPENCLIPART_PACKAGES, cache)
    return root / "usr" / "share" / "openclipart"


def _texts(element: ET.Element) -> list[str]:
    return [text for text in (" ".join(part.split()) for part in element.itertext()) if text]


def read_svg_metadata(path: Path) -> tuple[str, str, list[str]]:
    """Read the title, description and tags of an openclipart SVG.

    Parameters
    ----------
    path
        The SVG file.

    Returns
    -------
    tuple of str, str, list of str
        Title, description and tags; empty where the file has none or is broken before them.
    """
    fields: dict[str, list[str]] = {}
    try:
        # Expat fetches no external entities and limits how far internal ones expand.
        for _, element in ET.iterparse(path, events=("end",)):
            if element.tag.rpartition("}")[2] == "Work":
                for child in element:
                    fields.setdefault(child.tag.rpartition("}")[2], []).extend(_texts(child))
                break
    except ET.ParseError:
        fields = {}
    title, description = (" ".join(fields.get(name, [])) for name in ("title", "description"))
    return title, description, fields.get("subject", [])


def openclipart_group(title: str, stem: str) -> str:
    """Name what an openclipart image shows.

    Parameters
    ----------
    title
        Its title, perhaps with an author ("Clipart by A - cat_02") and a number.
    stem
        Its file name without extension, which is used where there is no title.

    Returns
    -------
    str
        The title without its author and number.
    """
    name = normalise(title or stem.replace("_", " "))
    name = re.sub(r"^clipart by [^-]+ - ", "", name)
    # Numbers of their own and those that end a word, but never the whole name.
    name = re.sub(r"(?<=[^\W\d_])(?:[\W_]*\d+[a-z]?)+[\W_]*$", "", name)
    return " ".join(name.replace("_", " ").split())


def openclipart_pairs(root: Path) -> list[Pair]:
    """Read the openclipart pairs.

    Parameters
    ----------
    root
        The folder that holds `png` and `svg`.

    Returns
    -------
    list of Pair
        All PNGs that have an SVG, by path.
    """
    pairs = []
    for image in sorted((root / "png").rglob("*.png")):
        path = image.relative_to(root / "png")
        svg = (root / "svg" / path).with_suffix(".svg")
        if not svg.exists():
            continue
        title, description, tags = read_svg_metadata(svg)
        # Many descriptions repeat the title, which would read as a stutter.
        told = description if normalise(description) != normalise(title) else ""
        pairs.append(
            Pair(
                url=f"openclipart:/{path.as_posix()}",
                caption=". ".join(part for part in (title, told, ", ".join(tags)) if part),
                title=title,
                name_group=openclipart_group(title, path.stem),
                category=path.parts[0],
                image=image,
            )
        )
    return pairs
