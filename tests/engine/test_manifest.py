import enum
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curate import __version__, storage
from curate.engine.manifest import (
    FINGERPRINT_CHARS,
    canonical,
    fingerprint,
    is_complete,
    provenance,
)


class _Word(enum.Enum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        {1, 2},
        frozenset(),
        object(),
        b"bytes",
        {1: "a"},
        {("a",): 1},
        {None: 1},
        np.zeros(2),
        np.int64(3),
        Path("x"),
        _Word.ONE,
        1j,
        lambda: None,
    ],
    # Not by repr: it may tell an address, which no two processes share.
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_stable_text_is_refused(value: Any) -> None:
    for whole in (value, [value], {"a": [1, {"b": value}]}):
        with pytest.raises(TypeError, match="cannot be fingerprinted"):
            canonical(whole)


def test_canonical_text() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": "é\n"}}
    assert canonical(value) == '{"a":{"\\u00fc":"\\u00e9\\n"},"b":[1,2.5,null,true]}'


def test_order_of_keys_does_not_count_and_order_of_lists_does() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint((1, 2)) == fingerprint([1, 2])


def test_different_values_have_different_fingerprints() -> None:
    values = [
        None,
        True,
        False,
        0,
        1,
        1.5,
        "",
        "1",
        "None",
        [],
        {},
        [[]],
        ["a", "b"],
        ["ab"],
        {"a": None},
    ]
    assert len({fingerprint(value) for value in values}) == len(values)  # fmt: skip
    for value in values:
        assert len(fingerprint(value)) == FINGERPRINT_CHARS
        assert set(fingerprint(value)) <= set("0123456789abcdef")


def test_stable_across_processes() -> None:
    value = {"z": [0.1, 1e-30, 2**70], "a": "text", "b": {"x": None, "w": True}}
    code = f"from curate.engine.manifest import fingerprint; print(fingerprint({value!r}))"
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == fingerprint(value)


def test_fingerprints_of_released_versions_stay() -> None:
    # A change here makes every user's finished stages new: do it only on purpose.
    assert fingerprint({"stage": "embed", "min_cosine": 0.95}) == "b5ef4609f069"


def test_the_manifest_is_the_mark_of_completion(tmp_path: Path) -> None:
    folder = str(tmp_path / "stage")
    assert not is_complete(folder)
    storage.commit_json(f"{folder}/origin.json", {})
    assert not is_complete(folder)
    storage.commit_json(f"{folder}/manifest.json", {})
    assert is_complete(folder)


def test_provenance_names_versions() -> None:
    versions = provenance()
    assert versions["curate"] == __version__
    assert {"python", "torch", "numpy", "pyarrow"} <= versions.keys()
    assert canonical(versions)
