"""clip-retrieval's embeddings: `img_emb/`, `text_emb/` and `metadata/`, in parts of one number."""

import re
from collections.abc import Iterable

from curate import storage
from curate.errors import InputError
from curate.formats.arrays import Pair, open_array
from curate.formats.index import Scan
from curate.formats.parquet import scan_rows
from curate.formats.sources import File, Source, check_name, list_folder, parent

__all__ = ["belongs", "group", "holds", "open_vectors", "scan"]

#: A part's number is padded as the writer saw fit, in all its files alike; numbers may be missing.
_IMAGES = re.compile(r"(?:.*/)?img_emb_(\d+)\.npy")
_OTHERS = re.compile(r"(?:.*/)?(?:text_emb_\d+\.npy|metadata_(\d+)\.parquet)")
_KEY_NAMES = ("key", "image_path")


def holds(names: Iterable[str]) -> bool:
    """Tell whether there are vectors of this layout among files."""
    return any(_IMAGES.fullmatch(name) for name in names)


def belongs(name: str) -> bool:
    """Tell whether a file of this name is part of such a folder."""
    return bool(_IMAGES.fullmatch(name) or _OTHERS.fullmatch(name))


def group(files: list[File]) -> list[Source]:
    """Return one source per part, named by its image vectors.

    Texts and metadata are looked for beside the folder of the images, named as inputs or not.

    Raises
    ------
    InputError
        If vectors and metadata do not come together.
    """
    sources = []
    parts: dict[str, set[str]] = {}
    beside: dict[str, dict[str, File]] = {}
    for file in files:
        found = _IMAGES.fullmatch(file.name)
        if found is None:
            continue
        base, part = parent(parent(file.url)), found[1]
        parts.setdefault(base, set()).add(part)
        if base not in beside:
            below = (list_folder(storage.join(base, name)) for name in ("metadata", "text_emb"))
            beside[base] = {name: one for listed in below for name, one in listed.items()}
        table = beside[base].get(f"metadata_{part}.parquet")
        if table is None:
            raise InputError(
                f"{file.name}: must have metadata/metadata_{part}.parquet beside its folder; there "
                "is none. Copy it there."
            )
        text = beside[base].get(f"text_emb_{part}.npy")
        content = (file, table) if text is None else (file, table, text)
        size_bytes = sum(one.size_bytes for one in content)
        name = check_name(file.name)
        sources.append(Source(name, file.url, "clip_retrieval", size_bytes, (), content))
    for file in files:
        other = _OTHERS.fullmatch(file.name)
        lacks = parts.get(parent(parent(file.url)))
        if other and other[1] and lacks and other[1] not in lacks:
            raise InputError(
                f"{file.name}: must have img_emb/img_emb_{other[1]}.npy beside its folder; there "
                "is none. Copy it there, or remove the table."
            )
    return sources


def _beside(source: Source, folder: str, suffix: str) -> tuple[str, str]:
    """Return URL and name, for error messages, of another file of a source's part."""
    found = _IMAGES.fullmatch(source.name)
    assert found is not None
    name = f"{folder}/{folder}_{found[1]}.{suffix}"
    return storage.join(parent(parent(source.url)), name), name


def scan(source: Source, uid_column: str | None = None, caption_column: str | None = None) -> Scan:
    """Index one part by its metadata.

    Parameters
    ----------
    source : Source
    uid_column, caption_column : str, optional
        Columns that identify a sample, and that hold its caption.

    Raises
    ------
    InputError
        If the metadata cannot be read.
    """
    table = _beside(source, "metadata", "parquet")
    return scan_rows(source, table, _KEY_NAMES, uid_column, caption_column)


def open_vectors(source: Source, choice: str | None = None) -> Pair:
    """Open the vectors of one part; there is nothing to choose.

    Raises
    ------
    InputError
        If an array is not one of vectors.
    """
    url, name = _beside(source, "text_emb", "npy")
    text = open_array(url, name) if storage.exists(url) else None
    return Pair(open_array(source.url, source.name), text)
