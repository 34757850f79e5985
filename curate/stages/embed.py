"""embed: the only decode. Vectors, pixel facts and thumbnails in one pass over the images.

Where the source supplies vectors instead of images they are taken over, and nothing is decoded.
Score plug-ins look at the same decode; each fills a table of its own.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import Field, field_validator

from curate import plugins, storage
from curate.formats.pixels import Decoded, decode, make_thumbnail, measure_contrast
from curate.models import imports_of, parse_encoder
from curate.plugins import PICTURE_PX
from curate.schema import select_schema
from curate.stages.base import OneOrMore, Room, Stage, Step, Table, shard_tasks
from curate.stages.embed_plugins import (
    AT_ONCE,
    Scorer,
    commit_scores,
    open_scorer,
    plugin_tables,
    table_of,
)
from curate.stages.ingest import Ingest
from curate.stages.remove import BYTES_REASON, ByteLists

if TYPE_CHECKING:
    from curate.models.encoders import Encoder, Precision

__all__ = ["Embed", "embed_images", "open_encoder"]

_LOCATION = ("source_file", "member", "offset", "size_bytes", "row_group", "row", "ingest_reason")
#: Longest side of thumbnails: what proxies train on and the report shows.
_THUMBNAIL_PX = 128
#: Longest side of what plug-ins look at: a strip of a thousand to one is no picture.
_LONGEST_PX = 2048
#: Image batches are small on a CPU, so that what passes between layers stays in its cache: at
#: 224 px 8 at once run faster than 16 or 32. Text batches, because captions of one length are few
#: in a small shard, and batches are filled up to a fixed size.
_BATCH = {"cpu": {"image": 8, "text": 16}, "cuda": {"image": 256, "text": 256}}
_PROBE_SAMPLES = 16
#: Metadata that says how large an image is: that of the original before that of a copy.
_SIDES = (("original_width", "original_height"), ("width", "height"), ("WIDTH", "HEIGHT"))


class Embed(Stage):
    """Decode every image once; hash it, measure it, thumbnail it, and embed the pair."""

    name: ClassVar[str] = "embed"
    version: ClassVar[int] = 4

    encoder: str = Field(
        "offline",
        description="`offline`, or `open_clip:MODEL/PRETRAINED` with a tag or a local checkpoint",
    )
    max_pixels: int = Field(
        100_000_000, description="larger images are not decoded: `too_many_pixels`", ge=1
    )

    plugins: OneOrMore = Field(
        (), description="score plug-ins: `nsfw`, `text`, `language`, or those of other packages"
    )

    @field_validator("encoder")
    @classmethod
    def _check_encoder(cls, value: str) -> str:
        parse_encoder(value)
        return value

    @field_validator("plugins")
    @classmethod
    def _check_plugins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        columns: dict[str, str] = {}
        for name in value:
            for column in plugins.find(name).columns:
                if column.name in columns:
                    raise ValueError(
                        f"plug-ins of different columns; {columns[column.name]} and {name} both "
                        f"write {column.name}"
                    )
                columns[column.name] = name
        return value

    def reads(self) -> tuple[str, ...]:
        return (*_LOCATION, "caption", "metadata")

    def wants(self) -> tuple[str, ...]:
        return ("removal_reason",)

    def tables(self) -> tuple[Table, ...]:
        pixels = ("width", "height", "image_contrast", "sha256", "decode_reason", "byte_list")
        vectors = ("image_emb", "text_emb", "clip_score")
        return (
            Table("embed.vectors", vectors, ("encoder", "max_pixels")),
            Table("embed.pixels", pixels, ("max_pixels",)),
            Table("embed.thumbnails", ("thumbnail",), ("max_pixels",)),
            *plugin_tables(self.plugins, ("max_pixels",)),
        )

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("probe", _probe, _probe_tasks, ("embed.vectors",)),
            Step("shards", _embed_shard, shard_tasks),
        )

    def hashed_fields(self) -> dict[str, Any]:
        values = super().hashed_fields()
        # A table depends on its own plug-in, not on which others are asked.
        for name in values.pop("plugins"):
            values[f"plugins.{name}"] = plugins.find(name).identity()
        family, model, weights = parse_encoder(self.encoder)
        if not Path(weights).is_file():
            return values
        # A local checkpoint is what it holds, wherever it lies.
        with Path(weights).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {**values, "encoder": f"{family}:{model}/sha256:{digest}"}

    def imports(self, room: Room) -> tuple[str, ...]:
        return imports_of(self.encoder) if self._needs_encoder(room) else ()

    def warm(self, room: Room) -> None:
        scorer = open_scorer(room, self.plugins)
        if scorer is not None:
            scorer.warm()
        if self._needs_encoder(room):
            open_encoder(room)

    def _needs_encoder(self, room: Room) -> bool:
        return "embed.vectors" in room.missing and not room.has_source_vectors()

    def release(self, room: Room) -> None:
        room.find(Ingest).copies(room.folders["ingest"]).clear()

    def facts(self, room: Room) -> dict[str, Any]:
        if not room.has_source_vectors():
            return {"precision": storage.read_json(room.path("precision.json"))}
        widths = room.layout()["vectors"]
        return {"vectors": {"from": "source", **widths, "shared_space": _shares_space(widths)}}


_loading = threading.Lock()


def _load(name: str, device: str) -> "Encoder":
    with _loading:  # a task that comes while `warm` is at it waits instead of loading again
        return _load_once(name, device)


@lru_cache(maxsize=1)
def _load_once(name: str, device: str) -> "Encoder":
    # Kept between the tasks of one worker: loading takes seconds.
    from curate.models.encoders import load_encoder

    return load_encoder(name, device)


def open_encoder(room: Room) -> "Encoder":
    """Return the run's encoder, for a later stage's step too; kept between the tasks of a worker.

    Raises
    ------
    ConfigError, MissingWeightsError
        See `load_encoder`.
    """
    from curate.models.precision import pick_device

    return _load(_stage(room).encoder, pick_device())


def _probe_tasks(room: Room) -> list[str]:
    return [] if room.has_source_vectors() else ["precision"]


def _probe(room: Room, task: str) -> dict[str, float]:
    """Commit `precision.json`: device and number format, obeyed by all workers and resumes."""
    from curate.models.encoders import pad_tokens, torch_threads
    from curate.models.precision import choose_precision, pick_device

    device = pick_device()
    with torch_threads(1):
        encoder = open_encoder(room)
        images, captions = _probe_samples(room, encoder)
        if not images:
            images = [np.zeros((3, encoder.image_px, encoder.image_px), np.float32)]
        tokens = pad_tokens(encoder, encoder.tokenize(captions or [""]))
        chosen = choose_precision(encoder, device, np.stack(images), tokens)
    precision = {"device": device, "torch_threads": 1, "batch": _BATCH[device], **chosen}
    storage.commit_json(room.path("precision.json"), precision)
    return {}


def _probe_samples(room: Room, encoder: "Encoder") -> tuple[list[Any], list[str]]:
    """Return the first decodable images of the first shards, and captions."""
    images: list[Any] = []
    captions: list[str] = []
    for shard in room.shards()[:4]:
        index = _read_index(room, shard).slice(0, 2 * _PROBE_SAMPLES)
        captions += [caption for caption in index["caption"].to_pylist() if caption]
        for data in _open_images(room, index):
            found = decode(data, 10_000_000, encoder.image_px) if data else None
            if found and found.image is not None:
                images.append(encoder.prepare(found.image))
            if len(images) == _PROBE_SAMPLES:
                return images, captions[:_PROBE_SAMPLES]
    return images, captions[:_PROBE_SAMPLES]


def _stage(room: Room) -> Embed:
    """Return the run's own, which a later stage may ask for too."""
    return room.find(Embed)


def _read_index(room: Room, shard: str, *columns: str) -> pa.Table:
    """Return index rows of a shard; of those on a removal list without their caption."""
    listed = ("removal_reason",) if room.has("removal_reason") else ()
    index = room.read(shard, [*_LOCATION, "caption", *columns, *listed])
    if not listed:
        return index
    place, field = index.column_names.index("caption"), index.schema.field("caption")
    hidden = pc.if_else(index["removal_reason"].is_valid(), None, index["caption"])
    return index.set_column(place, field, hidden.cast(field.type))


def _is_listed(index: pa.Table) -> np.ndarray[Any, Any]:
    """(N,) bool: whether a removal list names the sample."""
    if "removal_reason" not in index.column_names:
        return np.zeros(len(index), bool)
    found: np.ndarray[Any, Any] = index["removal_reason"].is_valid().to_numpy()
    return found


def _open_images(room: Room, index: pa.Table) -> Iterator[bytes | None]:
    """Yield the bytes of index rows in order; those on a removal list are not read."""
    listed = _is_listed(index)
    images = room.open_images(index.filter(pa.array(~listed)))
    for is_listed in listed:
        yield None if is_listed else next(images)


@dataclass
class _Sample:
    """What one decode yields."""

    decoded: Decoded
    sha256: str | None = None
    contrast: float | None = None
    thumbnail: bytes | None = None
    prepared: Any = None
    picture: Any = None
    scores: dict[str, Any] = field(default_factory=dict)
    byte_list: str | None = None


def _towers(room: Room) -> tuple["Encoder", dict[str, Any]]:
    """Return the run's encoder and what was chosen for it."""
    choice = storage.read_json(room.path("precision.json", table="embed.vectors"))
    return _load(_stage(room).encoder, choice["device"]), choice


def embed_images(
    room: Room, images: Iterator[bytes | None], count: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[bytes | None]]:
    """Embed pictures that are not samples of the run as the run embeds its samples.

    Parameters
    ----------
    room : Room
        Of a later stage.
    images : iterator of bytes or None
    count : int
        N, their number.

    Returns
    -------
    vectors : (N, D) float16
    valid : (N,) bool
        Whether the picture could be decoded.
    thumbnails : list of bytes or None, length N
    """
    from curate.models.encoders import torch_threads

    encoder, choice = _towers(room)
    with torch_threads(choice["torch_threads"]):
        decoded = _decode_all(room, images, encoder, thumbnails=True)
        samples, vectors, valid = _encode_images(encoder, decoded, count, choice)
    return vectors, valid, [sample.thumbnail for sample in samples]


def _embed_shard(room: Room, shard: str) -> dict[str, float]:
    if room.has_source_vectors():
        return _take_over(room, shard)
    from curate.models.encoders import embed_captions, torch_threads

    index, lists = _read_index(room, shard), ByteLists(room)
    uids, captions = index.select(["uid"]), index["caption"].to_pylist()
    scorer = open_scorer(room, _stage(room).plugins)
    given: dict[str, Any] = {"scorer": scorer, "captions": captions, "lists": lists}
    if "embed.vectors" not in room.missing:
        needed = _needs_pixels(room, scorer) or lists.lists
        opened = _open_images(room, index) if needed else repeat(None, len(index))
        samples = list(_decode_all(room, opened, None, **given))
        return _commit_facts(room, shard, uids, samples, scorer)
    encoder, choice = _towers(room)
    with torch_threads(choice["torch_threads"]):
        decoded = _decode_all(room, _open_images(room, index), encoder, **given)
        samples, images, has_image = _encode_images(encoder, decoded, len(index), choice)
        size, precision = choice["batch"]["text"], _precision(choice["text"])
        unlisted = _unlisted(captions, samples)
        texts, has_text = embed_captions(encoder, unlisted, size, precision)
    texts = texts.astype(np.float16)
    vectors = _vector_table(uids, encoder.shared_space, images, has_image, texts, has_text)
    room.commit_shard("embed.vectors", shard, vectors)
    return _commit_facts(room, shard, uids, samples, scorer)


def _unlisted(captions: Sequence[str | None], samples: list[_Sample]) -> list[str | None]:
    """Captions, without those of samples whose bytes are on a removal list."""
    given = zip(captions, samples, strict=True)
    return [None if sample.byte_list else caption for caption, sample in given]


def _needs_pixels(room: Room, scorer: Scorer | None) -> bool:
    """Tell whether anything but plug-ins that only read captions is missing."""
    own = {table_of(plugin.name) for plugin in scorer.plugins} if scorer else set()
    return bool(room.missing - own) or (scorer is not None and scorer.takes_pictures())


def _take_over(room: Room, shard: str) -> dict[str, float]:
    """Commit what the source itself says: vectors, and the sides of images that are not here."""
    index = _read_index(room, shard, "metadata")
    listed = _is_listed(index)
    uids, captions = index.select(["uid"]), index["caption"].to_pylist()
    counts: dict[str, float] = {}
    if "embed.vectors" in room.missing:
        found = room.read_source_vectors(index)
        shared = _shares_space(room.layout()["vectors"])
        has_image, has_text = found.has_image & ~listed, found.has_text & ~listed
        vectors = _vector_table(uids, shared, found.images, has_image, found.texts, has_text)
        room.commit_shard("embed.vectors", shard, vectors)
        counts["without_vector"] = int((~has_image).sum())
    sides = [_read_sides(text) for text in index["metadata"].to_pylist()]
    samples = [_Sample(Decoded(None, *both, None)) for both in sides]
    scorer = open_scorer(room, _stage(room).plugins)
    if scorer is not None:
        _score(scorer, samples, captions)
    return counts | _commit_facts(room, shard, uids, samples, scorer)


def _shares_space(widths: dict[str, int | None]) -> bool:
    """Towers of one width count as trained to meet: who embeds both for others has a CLIP."""
    return widths["image"] == widths["text"]


def _read_sides(metadata: str | None) -> tuple[int | None, int | None]:
    """Width and height that a sample's metadata gives; None where it gives no whole pair."""
    fields = json.loads(metadata) if metadata else {}
    for names in _SIDES:
        # A column with gaps may come as floats.
        width, height = (_to_side(fields.get(name)) for name in names)
        if width and height:
            return width, height
    return None, None


def _to_side(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 1 <= value < 2**31 else None


def _decode_all(
    room: Room,
    images: Iterator[bytes | None],
    encoder: "Encoder | None",
    thumbnails: bool | None = None,
    scorer: Scorer | None = None,
    captions: Sequence[str | None] = (),
    lists: ByteLists | None = None,
) -> Iterator[_Sample]:
    """Decode images in order, and score them, ahead of the encoder where there are cores for it."""
    max_pixels = _stage(room).max_pixels
    # The same size whatever is asked for, so that a table made later is what it would have been.
    working_px = max(PICTURE_PX, encoder.image_px if encoder else 0)
    small = "embed.thumbnails" in room.missing if thumbnails is None else thumbnails
    looks = scorer is not None and scorer.takes_pictures()

    def look(data: bytes | None) -> _Sample:
        if not data:
            reason = None if data is None else "image_empty"
            return _Sample(Decoded(None, None, None, reason))
        listed = lists.find(data) if lists else None
        if listed is not None:
            return _Sample(Decoded(None, None, None, BYTES_REASON), byte_list=listed)
        decoded = decode(data, max_pixels, working_px)
        digest = hashlib.sha256(data).hexdigest()
        if decoded.image is None:
            return _Sample(decoded, digest)
        thumbnail = make_thumbnail(decoded.image, _THUMBNAIL_PX) if small else None
        prepared = encoder.prepare(decoded.image) if encoder else None
        picture = _picture(data, decoded, working_px, max_pixels) if looks else None
        contrast = measure_contrast(decoded.image)
        return _Sample(_without_image(decoded), digest, contrast, thumbnail, prepared, picture)

    def work(block: list[tuple[bytes | None, str | None]]) -> list[_Sample]:
        samples = [look(data) for data, _ in block]
        if scorer is not None:
            _score(scorer, samples, _unlisted([caption for _, caption in block], samples))
        return samples

    given = zip(images, captions, strict=True) if scorer else ((data, None) for data in images)
    # Blocks are for plug-ins alone: without any, decoding runs ahead picture by picture.
    size = AT_ONCE if scorer else 1
    blocks = iter(lambda: list(islice(given, size)), [])
    if room.threads < 2:
        for block in blocks:
            yield from work(block)
        return
    # One core stays for the encoder; Pillow and hashing release the interpreter's lock.
    with ThreadPoolExecutor(room.threads - 1) as pool:
        begun = islice(blocks, (2 if scorer else 4) * room.threads)
        ahead = [pool.submit(work, block) for block in begun]
        while ahead:
            done = ahead.pop(0).result()
            ahead += [pool.submit(work, block) for block in islice(blocks, 1)]
            yield from done


def _picture(data: bytes, decoded: Decoded, working_px: int, max_pixels: int) -> Image.Image:
    """Return what plug-ins see of an image, which does not depend on the encoder."""
    image, width, height = decoded.image, decoded.width, decoded.height
    assert image is not None
    assert width is not None
    assert height is not None
    if working_px > PICTURE_PX and min(width, height) >= 4 * PICTURE_PX:
        # A tower of more pixels had a large image scaled down by less.
        image = decode(data, max_pixels, PICTURE_PX).image
        assert image is not None
    if max(image.size) > _LONGEST_PX:
        image = image.copy()
        image.thumbnail((_LONGEST_PX, _LONGEST_PX))
    return image


def _score(scorer: Scorer, samples: list[_Sample], captions: Sequence[str | None]) -> None:
    """Give samples their scores, and let their pictures go."""
    for start in range(0, len(samples), AT_ONCE):
        block = samples[start : start + AT_ONCE]
        pictures = [sample.picture for sample in block]
        rows = scorer.score(pictures, captions[start : start + AT_ONCE])
        for sample, row in zip(block, rows, strict=True):
            sample.scores, sample.picture = row, None


def _without_image(decoded: Decoded) -> Decoded:
    return Decoded(None, decoded.width, decoded.height, decoded.reason)


def _precision(tower: dict[str, Any]) -> "Precision":
    from curate.models.encoders import Precision

    return Precision(tower["dtype"], tower["channels_last"])


def _encode_images(
    encoder: "Encoder", decoded: Iterator[_Sample], count: int, choice: dict[str, Any]
) -> tuple[list[_Sample], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return samples, (N, D) float16 and (N,) bool."""
    from curate.models.encoders import embed_pictures

    samples: list[_Sample] = []

    def take() -> Iterator[Any]:
        for sample in decoded:
            samples.append(sample)
            yield sample.prepared
            sample.prepared = None

    size, precision = choice["batch"]["image"], _precision(choice["image"])
    vectors, valid = embed_pictures(encoder, take(), count, size, precision)
    return samples, vectors.astype(np.float16), valid


def _vector_table(
    uids: pa.Table,
    shared_space: bool,
    images: np.ndarray[Any, Any],
    has_image: np.ndarray[Any, Any],
    texts: np.ndarray[Any, Any],
    has_text: np.ndarray[Any, Any],
) -> pa.Table:
    scores = pa.nulls(len(uids), pa.float32())
    if shared_space:
        cosines = (images.astype(np.float32) * texts.astype(np.float32)).sum(axis=1)
        scores = pa.array(cosines, pa.float32(), mask=~(has_image & has_text))
    return (
        uids.append_column("image_emb", storage.vector_column(images, has_image))
        .append_column("text_emb", storage.vector_column(texts, has_text))
        .append_column("clip_score", scores)
    )


def _commit_facts(
    room: Room, shard: str, uids: pa.Table, samples: list[_Sample], scorer: Scorer | None
) -> dict[str, float]:
    """Commit everything but vectors; return the counts."""
    columns = {
        "width": [s.decoded.width for s in samples],
        "height": [s.decoded.height for s in samples],
        "image_contrast": [s.contrast for s in samples],
        "sha256": [s.sha256 for s in samples],
        "decode_reason": [s.decoded.reason for s in samples],
        "byte_list": [s.byte_list for s in samples],
        "thumbnail": [s.thumbnail for s in samples],
    }
    for table in ("embed.pixels", "embed.thumbnails"):
        if table in room.missing:
            names = next(t.columns for t in room.stage.tables() if t.name == table)
            content = uids
            for field in select_schema(names):
                content = content.append_column(field, pa.array(columns[field.name], field.type))
            room.commit_shard(table, shard, content)
    counts = _counts(samples)
    if scorer is not None:
        rows = [sample.scores for sample in samples]
        counts |= commit_scores(room, shard, uids, scorer, rows)
    return counts


def _counts(samples: list[_Sample]) -> dict[str, float]:
    counts: dict[str, float] = {"samples": len(samples)}
    for sample in samples:
        if sample.decoded.reason:
            key = f"reason.{sample.decoded.reason}"
            counts[key] = counts.get(key, 0) + 1
    return counts
