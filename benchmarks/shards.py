"""Writes planned samples as WebDataset shards in img2dataset's layout, with their truth."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.images import (
    Encoded,
    Encoding,
    encode_original,
    near_twin,
    truncated,
    undecodable,
)
from benchmarks.planting import KINDS, NEAR_TWIN, TRUNCATED, UNDECODABLE, Sample

SHARD_DIGITS = 5
ROW_GROUP_SIZE = 100

SHARD_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)

TRUTH_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "key",
            "kind",
            "of_key",
            "transform",
            "original_caption",
            "name_group",
            "category",
            "source",
        )
    ]
)


def sample_key(position: int, samples_per_shard: int) -> str:
    """Name a sample as img2dataset does.

    Parameters
    ----------
    position
        The sample's place among all samples.
    samples_per_shard
        The number of samples in a full shard.

    Returns
    -------
    str
        The shard's number in five digits, then the index in the shard, both zero-padded.
    """
    digits = math.ceil(math.log10(samples_per_shard))
    shard, index = divmod(position, samples_per_shard)
    return f"{shard * 10**digits + index:0{SHARD_DIGITS + digits}d}"


def render(sample: Sample, encoding: Encoding, seed: int) -> tuple[Encoded, dict[str, Any], str]:
    """Make the image file of a sample.

    Parameters
    ----------
    sample
        The sample.
    encoding
        How originals are stored.
    seed
        Decides random bytes and lengths.

    Returns
    -------
    tuple of Encoded, dict, str
        The image file, the sizes for its metadata, and a near twin's transformation or "".
    """
    pair = sample.pair
    rng = Random(f"{sample.kind}:{seed}:{pair.url}")
    if sample.kind == UNDECODABLE:
        encoded = undecodable("jpg" if encoding.longest_side else pair.extension, rng)
        return encoded, _sizes(encoded, None, None), ""
    encoded, width, height = encode_original(pair.read(), pair.extension, encoding)
    transform = ""
    if sample.kind == TRUNCATED:
        encoded = truncated(encoded, rng)
    elif sample.kind == NEAR_TWIN:
        encoded, transform = near_twin(encoded, sample.transform or "", encoding.quality)
    return encoded, _sizes(encoded, width, height), transform


def _sizes(encoded: Encoded, width: int | None, height: int | None) -> dict[str, Any]:
    return {
        "width": encoded.width,
        "height": encoded.height,
        "original_width": width,
        "original_height": height,
    }


def _add_members(archive: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    # webdataset's writer sorts a sample's members by extension, and sets owner and mode so.
    for extension, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        info.mode = 0o444
        info.uname = info.gname = "bigdata"
        info.mtime = 0
        archive.addfile(info, io.BytesIO(data))


def _write_stats(path: Path, count: int) -> None:
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        # Real times would make two builds of the same corpus differ.
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": count},
    }
    path.write_text(json.dumps(stats, indent=4), encoding="utf-8")


def _write_shard(
    stem: Path, samples: Sequence[Sample], keys: Sequence[str], encoding: Encoding, seed: int
) -> list[str]:
    rows = []
    transforms = []
    with tarfile.open(f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, sample in zip(keys, samples, strict=True):
            encoded, sizes, transform = render(sample, encoding, seed)
            row = {
                "caption": sample.caption,
                "url": sample.pair.url,
                "key": key,
                "status": "success",
                "error_message": None,
                **sizes,
                "exif": "{}",
                "sha256": hashlib.sha256(encoded.data).hexdigest(),
            }
            members = {
                encoded.extension: encoded.data,
                "json": json.dumps(row, indent=4).encode(),
                "txt": sample.caption.encode(),
            }
            _add_members(archive, key, members)
            rows.append(row)
            transforms.append(transform)
    table = pa.Table.from_pylist(rows, SHARD_SCHEMA)
    pq.write_table(table, f"{stem}.parquet", row_group_size=ROW_GROUP_SIZE)
    _write_stats(Path(f"{stem}_stats.json"), len(rows))
    return transforms


def _shuffled(count: int, seed: int, samples_per_shard: int) -> tuple[list[int], list[str]]:
    order = list(range(count))
    Random(f"order:{seed}").shuffle(order)
    keys = [""] * count
    for position, index in enumerate(order):
        keys[index] = sample_key(position, samples_per_shard)
    return order, keys


def write_corpus(
    samples: Sequence[Sample], output: Path, encoding: Encoding, seed: int, samples_per_shard: int
) -> dict[str, Any]:
    """Write a corpus and its truth.

    Parameters
    ----------
    samples
        The planned samples.
    output
        Folder for `shards` and `truth.parquet`; it must not hold shards yet.
    encoding
        How originals are stored.
    seed
        Decides the order of samples, and with `render` their bytes.
    samples_per_shard
        The number of samples in a full shard.

    Returns
    -------
    dict
        The number of samples of each kind, of all samples, and the bytes written.
    """
    shards = output / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    if any(shards.iterdir()):
        raise FileExistsError(f"{shards} is not empty")
    # Twins and swaps are shuffled along, so that they spread over all shards.
    order, keys = _shuffled(len(samples), seed, samples_per_shard)
    transforms: list[str] = []
    for shard, start in enumerate(range(0, len(order), samples_per_shard)):
        part = order[start : start + samples_per_shard]
        stem = shards / f"{shard:0{SHARD_DIGITS}d}"
        part_keys = [keys[index] for index in part]
        part_samples = [samples[index] for index in part]
        transforms += _write_shard(stem, part_samples, part_keys, encoding, seed)

    truth = [
        _truth_row(samples[index], keys, index, transform)
        for index, transform in zip(order, transforms, strict=True)
    ]
    truth_path = output / "truth.parquet"
    pq.write_table(pa.Table.from_pylist(truth, TRUTH_SCHEMA), truth_path, compression="zstd")
    counts = Counter(sample.kind for sample in samples)
    return {
        "kinds": {kind: counts[kind] for kind in KINDS},
        "samples": len(samples),
        "bytes": sum(path.stat().st_size for path in (truth_path, *shards.iterdir())),
    }


def _truth_row(
    sample: Sample, keys: Sequence[str], index: int, transform: str
) -> dict[str, str | None]:
    return {
        "key": keys[index],
        "kind": sample.kind,
        "of_key": None if sample.of is None else keys[sample.of],
        "transform": transform or None,
        "original_caption": sample.pair.caption,
        "name_group": sample.pair.name_group,
        "category": sample.pair.category,
        "source": sample.pair.source,
    }
