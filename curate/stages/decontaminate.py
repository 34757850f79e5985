"""decontaminate: find the samples that show a picture one will evaluate on.

It removes nothing: `select` drops what has a `contaminated_by`.
"""

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from curate import formats, storage
from curate.dedup.registration import ReadImage
from curate.errors import InputError
from curate.formats.arrays import normalise
from curate.formats.pixels import read_thumbnail
from curate.formats.sources import Source, find_root, identify
from curate.schema import select_schema
from curate.stages.base import OneOrMore, Room, Step, Table, execution_only, one_task, shard_tasks
from curate.stages.embed import embed_images
from curate.stages.ingest import (
    Ingest,
    Layout,
    VectorChoice,
    commit_sources,
    read_source,
    source_tasks,
)
from curate.stages.likeness import Likeness

__all__ = ["Decontaminate"]

Array = np.ndarray[Any, Any]

_COLUMNS = ("contaminated_by", "contamination_cosine")


class Decontaminate(Likeness):
    """Compare every sample with pictures that must not be trained on."""

    name: ClassVar[str] = "decontaminate"
    version: ClassVar[int] = 3

    inputs: OneOrMore = execution_only(
        (),
        "files, folders, patterns and fsspec URLs of the evaluation images, or of their vectors by "
        "the run's own model; none: nothing to do",
    )
    format: Layout = Field(
        "auto", description="layout of these; auto: told from the names of the files"
    )
    vectors: VectorChoice = Field(
        None, description="which of DataComp's arrays are taken; default: as for `ingest.vectors`"
    )

    def reads(self) -> tuple[str, ...]:
        return ("image_emb", *(("thumbnail",) if self.asks_pixels else ()))

    def tables(self) -> tuple[Table, ...]:
        return (Table(self.name, _COLUMNS),)

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("list", _list, one_task),
            Step("evaluation", _embed_source, source_tasks),
            Step("check", _check, one_task),
            Step("match", _match, shard_tasks),
        )

    def list_sources(self) -> list[Source]:
        """Return the sources of the evaluation images, in order of name.

        Raises
        ------
        InputError
            If an input is missing, empty or of another layout.
        """
        if not self.inputs:
            return []
        return formats.list_sources(self.inputs, find_root(self.inputs), self.format)[1]

    def sources(self) -> list[dict[str, Any]]:
        return [identify(source) for source in self.list_sources()]

    def facts(self, room: Room) -> dict[str, Any]:
        found: dict[str, Any] = storage.read_json(room.path("evaluation.json"))
        return found


def _stage(room: Room) -> Decontaminate:
    assert isinstance(room.stage, Decontaminate)
    return room.stage


def _list(room: Room, task: str) -> dict[str, float]:
    """Put down the sources, so that not every task has to list the whole input again."""
    sources = _stage(room).list_sources()
    if sources and room.has_source_vectors() and not _holds_vectors(sources[0]):
        raise InputError(
            f"{_stage(room).inputs[0]}: must hold vectors (decontaminate.inputs), as the run's own "
            f"come from its input and not from an encoder; got {sources[0].kind}. Embed the images "
            "with the model that made those."
        )
    return {"sources": commit_sources(room, sources)}


def _holds_vectors(source: Source) -> bool:
    return formats.FORMATS[source.kind].open_vectors is not None


def _embed_source(room: Room, task: str) -> dict[str, float]:
    """Commit name, vector and thumbnail of every evaluation image of one source."""
    root = find_root(_stage(room).inputs)
    source = read_source(room, task, root)
    index = formats.FORMATS[source.kind].scan(source, None, None).table
    thumbnails: list[bytes | None] = [None] * len(index)
    if _holds_vectors(source):
        vectors, valid = _read_vectors(room, source, index)
    else:
        images = formats.read_images(root, index)
        vectors, valid, thumbnails = embed_images(room, images, len(index))
    table = pa.table(
        {
            "name": pa.array(_names(source, index), pa.string()),
            "image_emb": storage.vector_column(vectors, valid),
            "thumbnail": pa.array(thumbnails, pa.binary()),
        }
    )
    usable = table.filter(pa.array(valid))
    storage.commit_table(room.path("evaluation", f"{task}.parquet"), usable)
    return {"samples": len(index), "usable": len(usable)}


def _read_vectors(room: Room, source: Source, index: pa.Table) -> tuple[Array, Array]:
    """Return the source's vectors, if they can be of the run's space: (M, D) float16, (M,) bool."""
    ingest = room.source()
    assert isinstance(ingest, Ingest)
    choice = _stage(room).vectors or ingest.vectors
    found = formats.measure_vectors(source, choice, len(index))
    column = room.read(room.shards()[0], ["image_emb"])["image_emb"]
    width = column.type.byte_width // 2
    if found["image"] != width:
        raise InputError(
            f"{source.name}: vectors must be {width} numbers wide, as the run's (decontaminate"
            f".inputs); got {found['image']}. Embed the evaluation images with the run's model."
        )
    opener = formats.FORMATS[source.kind].open_vectors
    assert opener is not None
    return normalise(opener(source, choice).image.take(index["row"].to_numpy()))


def _names(source: Source, index: pa.Table) -> list[str]:
    """Path of a file, or source:key of what lies within one."""
    between = "" if source.name.endswith("/") else ":"
    return [f"{source.name}{between}{key}" for key in index["key"].to_pylist()]


def _check(room: Room, task: str) -> dict[str, float]:
    """Refuse a set of which no image can be read, or every sample would pass for clean."""
    usable = sum(storage.read_table(path, ["name"]).num_rows for path in _paths(room))
    inputs = _stage(room).inputs
    if inputs and not usable:
        raise InputError(
            f"{inputs[0]}: must hold images or vectors to compare with (decontaminate.inputs); "
            "none can be decoded, or has a norm. Name others."
        )
    storage.commit_json(room.path("evaluation.json"), {"images": usable})
    return {}


def _paths(room: Room) -> list[str]:
    return [room.path("evaluation", f"{task}.parquet") for task in source_tasks(room)]


def _match(room: Room, shard: str) -> dict[str, float]:
    """Commit, for every sample of a shard, the evaluation image that it is most like."""
    from curate.dedup.neighbors import Rows, pairs_within

    stage, paths = _stage(room), _paths(room)
    table = room.read(shard, stage.reads() if paths else [])
    names: list[str | None] = [None] * len(table)
    cosines = np.full(len(table), np.nan, np.float32)
    if paths:
        vectors, valid = storage.read_vectors(table["image_emb"])
        own = np.flatnonzero(valid & storage.has_direction(vectors))
        queries = Rows.of(vectors[own])
    for path in paths:
        known = storage.read_table(path)
        if len(known) == 0 or len(own) == 0:
            continue
        # Vectors that came without images have no thumbnails.
        has_pixels = known["thumbnail"].null_count == 0
        judge = stage if has_pixels else stage.without_pixels()
        base = Rows.of(storage.read_vectors(known["image_emb"])[0])
        left, right, cosine = pairs_within(queries, base, judge.min_cosine)
        left = own[left]
        numbers = len(table) + right
        confirmed = judge.confirm(left, numbers, _thumbnail_reader(table, known))
        # The most alike; of equally alike ones the first.
        order = np.lexsort((right, -cosine))
        for place in order[confirmed[order]]:
            row = left[place]
            if not cosines[row] >= cosine[place]:
                cosines[row] = cosine[place]
                names[row] = known["name"][int(right[place])].as_py()
    columns = [pa.array(names, pa.string()), pa.array(cosines, pa.float32(), from_pandas=True)]
    found = table.select(["uid"])
    for field, column in zip(select_schema(_COLUMNS), columns, strict=True):
        found = found.append_column(field, column)
    room.commit_shard(stage.name, shard, found)
    return {"samples": len(table), "contaminated": sum(name is not None for name in names)}


def _thumbnail_reader(samples: pa.Table, known: pa.Table) -> ReadImage:
    """Read thumbnails of samples, and of evaluation images numbered after them."""

    @lru_cache(maxsize=4096)
    def read(number: int) -> Image.Image:
        table, row = (samples, number) if number < len(samples) else (known, number - len(samples))
        return read_thumbnail(table["thumbnail"][int(row)].as_py())

    return read
