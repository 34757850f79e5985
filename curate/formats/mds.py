"""MosaicML's streaming shards (MDS version 2), written without their package.

A shard is: number of samples, where each begins (all uint32), the layout as JSON, the samples. A
sample is: lengths of the columns without a fixed one, then the columns in order of their names.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

__all__ = ["COLUMNS", "SHARD_BYTES", "describe", "encode_sample", "index", "split", "write"]

#: Column -> encoding, by name as the layout wants them.
COLUMNS = {
    "caption": "str",
    "captions": "json",
    "image": "bytes",
    "uid": "str",
    "weight": "float32",
}
#: Bytes of a shard, from which on another begins: what their own writer takes. Positions within a
#: shard are uint32, so that none may reach 4 GiB.
SHARD_BYTES = 64 << 20

_WIDTHS = {"float32": 4}
_LAYOUT: dict[str, Any] = {
    "column_encodings": list(COLUMNS.values()),
    "column_names": list(COLUMNS),
    "column_sizes": [_WIDTHS.get(encoding) for encoding in COLUMNS.values()],
    "compression": None,
    "format": "mds",
    "hashes": [],
    "size_limit": SHARD_BYTES,
    "version": 2,
}


def encode_sample(row: dict[str, Any]) -> bytes:
    """Encode a row of `shards`; its image passes through as it is."""
    parts = {
        "caption": (row["caption"] or "").encode(),
        "captions": json.dumps(row["captions"] or []).encode(),
        "image": row["image"],
        "uid": row["uid"].encode(),
        "weight": np.float32(row["weight"]).tobytes(),
    }
    lengths = [len(parts[name]) for name, kind in COLUMNS.items() if kind not in _WIDTHS]
    return np.array(lengths, "<u4").tobytes() + b"".join(parts[name] for name in COLUMNS)


def split(samples: Iterable[bytes], limit: int = SHARD_BYTES) -> Iterator[list[bytes]]:
    """Yield runs of encoded samples, each of `limit` bytes at most or of one sample."""
    run: list[bytes] = []
    size_bytes = 0
    for sample in samples:
        if run and size_bytes + len(sample) > limit:
            yield run
            run, size_bytes = [], 0
        run.append(sample)
        size_bytes += len(sample)
    if run:
        yield run


def write(path: str, samples: list[bytes]) -> int:
    """Write one shard of encoded samples; return its bytes.

    Parameters
    ----------
    path : str
        Local, as `storage.commit` gives.
    """
    layout = json.dumps(_LAYOUT, sort_keys=True).encode()
    head = 4 * (len(samples) + 2) + len(layout)
    begins = head + np.cumsum([0, *map(len, samples)])
    with open(path, "wb") as file:
        file.write(np.uint32(len(samples)).tobytes())
        file.write(begins.astype("<u4").tobytes())
        file.write(layout)
        file.writelines(samples)
    return int(begins[-1])


def describe(name: str, samples: int, size_bytes: int) -> dict[str, Any]:
    """Return what an index says of a shard; `name` is relative to the index."""
    raw = {"basename": name, "bytes": size_bytes, "hashes": {}}
    return {**_LAYOUT, "raw_data": raw, "samples": samples, "zip_data": None}


def index(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of `index.json`."""
    return {"shards": shards, "version": 2}
