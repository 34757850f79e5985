from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate.dedup.groups import Walk
from curate.stages import select_table
from curate.stages.select_table import Decisions, fold_caption, merge_captions

Array = np.ndarray[Any, Any]


def duplicates(count: int, seed: int) -> tuple[pa.ChunkedArray, Array, Array, Array]:
    """Draw captions, who is kept, whom the others duplicate, and an order of preference."""
    rng = np.random.default_rng(seed)
    words = ["a cat", "A  CAT", "a dog", "two dogs", "a\tdog", "tree", None]
    texts = [words[i] for i in rng.integers(0, len(words), count)]
    kept = rng.random(count) < 0.2
    representative = np.where(kept, -1, rng.choice(np.flatnonzero(kept), count))
    representative[rng.random(count) < 0.1] = -1
    captions = pa.chunked_array([pa.array(texts[:40], pa.string()), pa.array(texts[40:])])
    return captions, kept, representative, rng.permutation(count)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_captions_are_merged_as_said(
    most: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_table, "_BLOCK", block)
    captions, kept, representative, order = duplicates(200, most)
    expected: dict[int, list[str]] = {
        row: [text] for row, text in enumerate(captions.to_pylist()) if kept[row] and text
    }
    for row in order.tolist():
        text, merged = captions[row].as_py(), expected.get(int(representative[row]), [])
        known = {fold_caption(one) for one in merged}
        if text and 0 < len(merged) < most and fold_caption(text) not in known:
            merged.append(text)
    assert most == 1 or max(map(len, expected.values())) > 1
    rows, sources = merge_captions(captions, kept, representative, order, most)
    found: dict[int, list[str]] = {}
    for row, source in zip(rows.tolist(), sources.tolist(), strict=True):
        found.setdefault(row, []).append(captions[source].as_py())
    assert found == expected
    # The table has them too, wherever it is cut.
    walk = Walk(kept, representative, np.ones(200, np.float32), np.zeros(200, bool))
    uids = np.array([f"{i:032x}" for i in range(200)], "S32")
    failed = {"contaminated": ~kept}
    lists = pa.chunked_array([pa.nulls(200, pa.string())])
    merged = (rows, sources)
    decisions = Decisions(uids, captions, failed, lists, walk, kept.astype(float), merged)
    table = pa.concat_tables([decisions.table(0, 30), decisions.table(30, 200)])
    assert table["captions"].to_pylist() == [expected.get(row) for row in range(200)]
    assert table["failed_rules"].to_pylist() == [[] if k else ["contaminated"] for k in kept]
    extra = sum(map(len, expected.values())) - len(expected)
    assert decisions.counts()["merged_captions"] == extra
