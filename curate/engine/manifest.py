"""What makes an output what it is: fingerprints, provenance, and the mark of completion."""

import hashlib
import json
import math
import platform
from importlib import metadata
from typing import Any

from curate import __version__, storage

__all__ = ["FINGERPRINT_CHARS", "canonical", "fingerprint", "is_complete", "provenance"]

#: 48 bits: folders of one OUT are told apart, which takes far fewer.
FINGERPRINT_CHARS = 12

_PACKAGES = (
    "torch",
    "open_clip_torch",
    "faiss-gpu",
    "faiss-cpu",
    "dask",
    "distributed",
    "numpy",
    "pyarrow",
    "Pillow",
    "scikit-learn",
    "onnxruntime",
)


def canonical(value: Any) -> str:
    """Return the one JSON text of a value, for hashing.

    Raises
    ------
    TypeError
        If the value holds anything but None, bool, int, finite float, str, lists and mappings
        with str keys: what has no stable text must not enter a fingerprint.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"cannot be fingerprinted: {value}")
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(one) for key, one in value.items()}
    raise TypeError(f"cannot be fingerprinted: {type(value).__name__} {value!r}")


def fingerprint(value: Any) -> str:
    """Return the first `FINGERPRINT_CHARS` hex digits of a value's SHA-256."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:FINGERPRINT_CHARS]


def is_complete(folder: str) -> bool:
    """Tell whether a table's folder holds its completion mark."""
    return storage.exists(storage.join(folder, "manifest.json"))


def provenance() -> dict[str, str]:
    """Return versions of everything whose change may change a number."""
    versions = {"curate": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
