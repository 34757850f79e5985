"""Samples to measure on: from any input that curate reads, or what a finished run kept."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate import formats, storage
from curate.engine.finished import read_finished
from curate.errors import ConfigError, CurateError, InputError
from curate.formats.pixels import decode
from curate.formats.sources import find_root
from curate.memorization.folds import hash_unit
from curate.stages.ingest import assign_uids

if TYPE_CHECKING:
    from curate.models.encoders import Encoder

__all__ = [
    "IMAGE_BATCH",
    "MAX_PIXELS",
    "Panel",
    "embed_panel",
    "finished_run",
    "join_run",
    "list_samples",
    "naming",
]

Array = np.ndarray[Any, Any]

#: As `embed.max_pixels` of the shipped pipelines.
MAX_PIXELS = 100_000_000
#: Images and captions per inference batch, to which the last is filled up.
IMAGE_BATCH, _TEXT_BATCH = 32, 64
_WHERE = ("source_file", "member", "offset", "size_bytes", "row_group", "row")
_COLUMNS = ("uid", "key", *_WHERE, "caption")
#: What a run's decisions tell of a candidate.
_DECISIONS = ("cluster_id", "cluster_size", "rarity", "mismatch_probability", "keep")


@dataclass(frozen=True)
class Panel:
    """Samples and where their images lie; no pixel is held.

    Parameters
    ----------
    root : str
        Folder to which names of sources are relative.
    index : pyarrow.Table
        `uid`, `key`, `caption`, and where the image is.
    """

    root: str
    index: pa.Table

    def __len__(self) -> int:
        return int(self.index.num_rows)

    @property
    def uids(self) -> list[str]:
        """Identities of the samples."""
        return list(self.index["uid"].to_pylist())

    @property
    def captions(self) -> list[str]:
        """Captions of the samples."""
        return list(self.index["caption"].to_pylist())

    def take(self, rows: Array) -> "Panel":
        """Return some samples, in the order asked for."""
        return Panel(self.root, self.index.take(pa.array(rows, pa.int64())))

    def draw(self, most: int, seed: int) -> "Panel":
        """Return so many samples, drawn by seed and uid, in the order of their sources."""
        if len(self) <= most:
            return self
        order = np.argsort(hash_unit(self.uids, seed, "panel"), kind="stable")
        return self.take(np.sort(order[:most]))

    def read(self) -> Iterator[bytes | None]:
        """Yield the bytes of the images, in order."""
        return formats.read_images(self.root, self.index)

    def pictures(self, working_px: int) -> Iterator[Image.Image | None]:
        """Yield decoded images, in order; None where one cannot be decoded."""
        for data in self.read():
            yield decode(data, MAX_PIXELS, working_px).image if data else None


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Begin errors about what an option gave with its name, unless they name another."""
    try:
        yield
    except CurateError as error:
        if str(error).startswith("--"):
            raise
        raise type(error)(f"{option} {error}") from error


def finished_run(inputs: Sequence[str]) -> str | None:
    """Return the OUT of a finished run if the inputs are one, or its `shards`."""
    for path in inputs:
        for folder in (path, path.rstrip("/").removesuffix("shards")):
            if folder and storage.exists(storage.join(folder, "run.json")):
                return folder.rstrip("/")
    return None


def list_samples(inputs: Sequence[str], where: str, dataset: str = "") -> Panel:
    """Index samples that have an image and a caption.

    Parameters
    ----------
    inputs : sequence of str
        As `curate run` takes them; of a finished OUT, what it kept.
    where : str
        Names the inputs in errors.
    dataset : str
        `ingest.dataset` of the run that the samples belong to.

    Raises
    ------
    InputError
        If an input cannot be read, holds vectors instead of images, or nothing usable.
    """
    out = finished_run(inputs)
    paths = (storage.join(out, "shards"),) if out else tuple(inputs)
    with naming(where):
        root = find_root(paths)
        layout, sources = formats.list_sources(paths, root)
    if formats.FORMATS[layout].open_vectors is not None:
        raise InputError(
            f"{where}: must hold images, for the checkpoint to embed; got vectors ({layout}). Name "
            "images, or folders of embeddings instead of checkpoints."
        )
    parts = []
    for source in sources:
        table = assign_uids(formats.FORMATS[source.kind].scan(source, None, None).table, dataset)
        usable = pa.compute.is_null(table["ingest_reason"])
        parts.append(table.filter(usable).select(_COLUMNS))
    index = pa.concat_tables(parts).combine_chunks()
    # The first of a uid, as in a run.
    first = np.unique(index["uid"].to_numpy(zero_copy_only=False), return_index=True)[1]
    index = index.take(pa.array(np.sort(first), pa.int64()))
    if not len(index):
        raise InputError(f"{where}: must hold images with captions; got none. Check {paths[0]}.")
    return Panel(root, index)


def join_run(out: str, uids: list[str]) -> dict[str, Array]:
    """Return what a finished run decided about candidates.

    Returns
    -------
    dict
        `cluster_id` (str, the uid itself where unknown), `cluster_size`, `rarity` and
        `mismatch_probability` (NaN where unknown), `kept` (1, 0 or NaN), (N,) each.

    Raises
    ------
    ConfigError
        If the run knows none of them.
    """
    read_finished(out)
    folder = storage.join(out, "decisions")
    places = {uid: row for row, uid in enumerate(uids)}
    numbers = {
        name: np.full(len(uids), np.nan)
        for name in ("cluster_size", "rarity", "mismatch_probability", "kept")
    }
    clusters = np.array(uids, dtype=object)
    known = 0
    for name in storage.list_names(folder):
        table = storage.read_table(storage.join(folder, name), ["uid", *_DECISIONS])
        rows = [
            (row, places[uid]) for row, uid in enumerate(table["uid"].to_pylist()) if uid in places
        ]
        known += len(rows)
        part = table.take(pa.array([row for row, _ in rows], pa.int64())).to_pydict()
        for number, (_, place) in enumerate(rows):
            clusters[place] = part["cluster_id"][number] or uids[place]
            part_keep = part["keep"][number]
            found = {**{n: part[n][number] for n in _DECISIONS if n in numbers}, "kept": part_keep}
            for column, value in found.items():
                if value is not None:
                    numbers[column][place] = value
    if not known:
        raise ConfigError(
            f"--run {out}: must have decided about the candidates; it knows none of {len(uids)}. "
            "Name the run whose input or output they are."
        )
    return {"cluster_id": clusters.astype(str), **numbers}


def embed_panel(encoder: "Encoder", panel: Panel) -> tuple[dict[str, Array], Array]:
    """Embed images and captions.

    Returns
    -------
    embeddings : dict of str to (N, D) float32, unit norm
        "image" and "text"; zeros where an image cannot be decoded.
    valid : (N,) bool
    """
    from curate.models.encoders import Precision, embed_captions, embed_pictures, torch_threads

    pictures = panel.pictures(encoder.image_px)
    prepared = (None if picture is None else encoder.prepare(picture) for picture in pictures)
    with torch_threads(1):  # sums depend on thread counts
        images, valid = embed_pictures(encoder, prepared, len(panel), IMAGE_BATCH, Precision())
        texts, _ = embed_captions(encoder, panel.captions, _TEXT_BATCH, Precision())
    return {"image": images, "text": texts}, valid
