"""Score plug-ins at work: pictures and captions to columns, a few samples at a time."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curate import plugins
from curate.errors import PluginError
from curate.plugins import Plugin, Score
from curate.stages.base import Room, Table

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["AT_ONCE", "Scorer", "commit_scores", "open_scorer", "plugin_tables", "table_of"]

#: Samples that a plug-in gets at once: their pictures are held together.
AT_ONCE = 8


def table_of(name: str) -> str:
    """Return the side table that a plug-in fills."""
    return f"embed.{name}"


def plugin_tables(names: Sequence[str], fields: tuple[str, ...]) -> tuple[Table, ...]:
    """Return one table for each plug-in; it depends on the plug-in and on some fields of embed."""
    return tuple(
        Table(
            table_of(name),
            tuple(column.name for column in plugins.find(name).columns),
            (*fields, f"plugins.{name}"),
        )
        for name in names
    )


@dataclass(frozen=True)
class Scorer:
    """The plug-ins whose tables are still to be filled."""

    plugins: tuple[Plugin, ...]

    def takes_pictures(self) -> bool:
        """Tell whether any of them looks at pictures."""
        return any("image" in plugin.inputs for plugin in self.plugins)

    def score(
        self, images: Sequence["Image.Image | None"], captions: Sequence[str | None]
    ) -> list[dict[str, Any]]:
        """Return each sample's values by column."""
        rows: list[dict[str, Any]] = [{} for _ in images]
        spoken = [caption if caption and caption.strip() else None for caption in captions]
        for plugin in self.plugins:
            for name, values in _score(plugin, images, spoken).items():
                for row, value in zip(rows, values, strict=True):
                    row[name] = value
        return rows

    def warm(self) -> None:
        """Load all."""
        for plugin in self.plugins:
            _load(plugin.name)


def open_scorer(room: Room, names: Sequence[str]) -> Scorer | None:
    """Return what scores for the tables that are missing; None if none is."""
    missing = [name for name in names if table_of(name) in room.missing]
    return Scorer(tuple(plugins.find(name) for name in missing)) if missing else None


def commit_scores(
    room: Room, shard: str, uids: pa.Table, scorer: Scorer, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Commit one shard of every plug-in's table; return how many samples each scored."""
    counts: dict[str, float] = {}
    for plugin in scorer.plugins:
        content = uids
        for column in plugin.columns:
            values = pa.array([row[column.name] for row in rows], column.type)
            content = content.append_column(column.name, values)
        room.commit_shard(table_of(plugin.name), shard, content)
        first = content[plugin.columns[0].name]
        counts[f"scored.{plugin.name}"] = len(first) - first.null_count
    return counts


_loading = threading.Lock()


def _load(name: str) -> Score:
    with _loading:  # as with encoders: whoever comes while it loads waits
        return _load_once(name)


@cache
def _load_once(name: str) -> Score:
    plugin = _find(name)
    try:
        return plugin.load()
    except Exception as error:  # of a package that is somebody else's
        raise PluginError(
            f"embed.plugins: {name} must load; {_say(error)}. {plugin.advise_install()}, or leave "
            "it out."
        ) from error


def _find(name: str) -> Plugin:
    try:
        return plugins.find(name)
    except ValueError as error:  # a worker elsewhere that lacks what the driver has
        raise PluginError(f"embed.plugins: must be {error}") from error


def _score(
    plugin: Plugin, images: Sequence["Image.Image | None"], captions: Sequence[str | None]
) -> dict[str, list[Any]]:
    """Values of a plug-in's columns, None for the samples that it is not asked about."""
    first: Sequence[Any] = images if plugin.inputs[0] == "image" else captions
    asked = [row for row, given in enumerate(first) if given is not None]
    filled: dict[str, list[Any]] = {c.name: [None] * len(images) for c in plugin.columns}
    if not asked:
        return filled
    # A copy each: a plug-in that scales its picture must not scale another's.
    pictures = [images[row] if "image" in plugin.inputs else None for row in asked]
    copies = [picture.copy() if picture is not None else None for picture in pictures]
    spoken = [captions[row] if "caption" in plugin.inputs else None for row in asked]
    score = _load(plugin.name)
    try:
        found = score(copies, spoken)
    except Exception as error:  # of a package that is somebody else's
        raise PluginError(
            f"embed.plugins: {plugin.name} must score any picture and caption; {_say(error)}. Mend "
            "it, or leave it out."
        ) from error
    for column in plugin.columns:
        for row, value in zip(asked, _values(plugin, column, found, len(asked)), strict=True):
            filled[column.name][row] = value
    return filled


def _values(plugin: Plugin, column: plugins.Column, found: Any, count: int) -> list[Any]:
    """Check and bring to its type what a plug-in says of one column."""
    wanted = f"{plugin.name} must return {count} values of {column.type} for {column.name}"
    try:
        values = pa.array(list(found[column.name]), column.type, from_pandas=True).to_pylist()
    except (KeyError, TypeError, ValueError) as error:  # pyarrow's are ValueErrors
        raise PluginError(f"embed.plugins: {wanted}; {_say(error)}. Mend it.") from error
    if len(values) != count:
        raise PluginError(f"embed.plugins: {wanted}; got {len(values)}. Mend it.")
    return values


def _say(error: Exception) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"
