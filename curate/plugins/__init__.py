"""Score plug-ins of `embed`: one file each, described in README.md beside this one."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curate.schema import COLUMNS, Column

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "BUILT_IN",
    "GROUP",
    "PICTURE_PX",
    "Column",
    "Plugin",
    "Score",
    "find",
    "find_column",
    "find_writer",
]

#: Entry points under which packages offer plug-ins of their own.
GROUP = "curate.plugins"
#: Plug-in -> module of this package that holds it as `PLUGIN`.
BUILT_IN = {
    "nsfw": "curate.plugins.nsfw",
    "text": "curate.plugins.text",
    "language": "curate.plugins.language",
}
#: Pictures are decoded for plug-ins as for a tower of this size: their shorter side is at least
#: twice that, or the original's.
PICTURE_PX = 224

#: `score(images, captions)`: B RGB images and B captions to B values for each column.
Score = Callable[[Sequence["Image.Image | None"], Sequence[str | None]], dict[str, Sequence[Any]]]

#: Tables of `embed` that are not a plug-in's.
_TAKEN = ("vectors", "pixels", "thumbnails")
_TYPES = (pa.float32(), pa.float64(), pa.int32(), pa.int64(), pa.bool_(), pa.string())


@dataclass(frozen=True)
class Plugin:
    """What scores samples, and the columns that it fills.

    Parameters
    ----------
    name : str
        As `embed.plugins` gives it: lower-case letters, digits and underscores.
    version : int
        Raised by whoever changes what is computed from the same picture and caption.
    columns : tuple of Column
        Of stage `embed`. Those of other packages are numbers, truth values or text, and go to
        `decisions`.
    inputs : tuple of str
        `image`, `caption` or both. Samples without the first are not scored: their values are
        null. The second may be None.
    load : callable
        Returns the scoring function (`Score`). Called once per process, which alone may import
        what is heavy.
    packages : tuple of str, optional
        Distributions that hold code and weights; their versions are part of the fingerprint.
    extra : str, optional
        What `pip install` wants, if they are missing.

    Notes
    -----
    `score` gets each sample's picture (RGB, shorter side at least 448 px or the original's, longer
    side at most 2048 px, its own copy) and caption, up to a few dozen at once, and returns for
    every column as many values, None or NaN where there is none. A sample's values must not depend
    on which others come along. It may be called from several threads at once, and should compute
    in the one that called it.
    """

    name: str
    version: int
    columns: tuple[Column, ...]
    inputs: tuple[str, ...]
    load: Callable[[], Score]
    packages: tuple[str, ...] = ()
    extra: str = ""

    def identity(self) -> dict[str, Any]:
        """Return what tells this plug-in from another of its name: part of the fingerprint."""
        versions = {package: metadata.version(package) for package in self.packages}
        return {"version": self.version, **versions}

    def advise_install(self) -> str:
        """Return the command that gets the plug-in's packages."""
        return f"pip install '{self.extra or ' '.join(self.packages)}'"


def find(name: str) -> Plugin:
    """Return the plug-in of a name, ready to be loaded.

    Raises
    ------
    ValueError
        If there is none, it is not sound, or its packages are missing; the message goes after "must
        be".
    """
    if name in BUILT_IN:
        plugin: Plugin = import_module(BUILT_IN[name]).PLUGIN
    else:
        plugin = _find_installed(name)
    for package in plugin.packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise ValueError(
                f"installed; {name} needs the package {package}: {plugin.advise_install()}"
            ) from error
    return plugin


def find_column(name: str) -> Column | None:
    """Return a column that an installed plug-in of another package offers; None if none does."""
    return next((c for plugin in _offered() for c in plugin.columns if c.name == name), None)


def find_writer(column: str) -> str | None:
    """Return the name of the plug-in that writes a column; None if none does."""
    for name, module in BUILT_IN.items():
        if column in [own.name for own in import_module(module).PLUGIN.columns]:
            return name
    return next((p.name for p in _offered() if column in [own.name for own in p.columns]), None)


def _offered() -> Iterator[Plugin]:
    """Yield the sound plug-ins of other packages."""
    for entry in metadata.entry_points(group=GROUP):
        # What is wrong with one is told to whoever asks for it.
        with contextlib.suppress(ValueError):
            yield find(entry.name)


def _find_installed(name: str) -> Plugin:
    found = list(metadata.entry_points(group=GROUP, name=name))
    if not found:
        known = [*BUILT_IN, *sorted(entry.name for entry in metadata.entry_points(group=GROUP))]
        raise ValueError(f"among {', '.join(known)}; there is no {name!r}")
    try:
        plugin = found[0].load()
    except Exception as error:  # whatever a package of somebody else does when it is imported
        raise ValueError(
            f"importable; {found[0].value} raised {type(error).__name__}: {error}"
        ) from error
    faults = list(_faults(name, plugin))
    if faults:
        raise ValueError(f"sound; in {found[0].value} {faults[0]}")
    return plugin


def _faults(name: str, plugin: Any) -> Iterator[str]:
    """Yield what is wrong with a plug-in from outside."""
    if not isinstance(plugin, Plugin):
        yield f"is a {type(plugin).__name__} and no Plugin"
        return
    if plugin.name != name or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _TAKEN:
        yield f"the name {plugin.name!r} must be that of the entry point, and not taken"
    if not plugin.inputs or not {"image", "caption"}.issuperset(plugin.inputs):
        yield f"inputs must be image, caption or both; got {plugin.inputs!r}"
    if not plugin.columns:
        yield "there must be columns; got none"
    for column in plugin.columns:
        if column.name in COLUMNS or not re.fullmatch(r"[a-z][a-z0-9_]*", column.name):
            yield f"the column {column.name!r} must be a new word of a-z, 0-9 and _"
        if column.type not in _TYPES:
            yield f"{column.name} must be one of {', '.join(map(str, _TYPES))}; got {column.type}"
        if (column.stage, column.where) != ("embed", "decisions"):
            yield f"{column.name} must be of the stage `embed` and go to `decisions`"
