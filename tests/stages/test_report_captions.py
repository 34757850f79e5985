import numpy as np
import pyarrow as pa
import pytest

from curate.stages.report_captions import Captions

COUNT = 400


def table(captions: list[str], clusters: list[str]) -> pa.Table:
    uids = [f"{number:032x}" for number in range(COUNT)]
    width = [64] * COUNT
    return pa.table({"uid": uids, "caption": captions, "cluster_id": clusters, "width": width})


def look(rows: pa.Table, vectors: np.ndarray) -> list[str]:
    """Read the samples in shards of which the last comes first."""
    ranks = np.random.default_rng(0).permutation(COUNT) / COUNT
    captions = Captions(1.0)
    for step in (captions.count, captions.choose):
        for start in range(COUNT - 100, -1, -100):
            step(rows.slice(start, 100), ranks[start : start + 100])
    uids = rows["uid"].to_pylist()
    found = dict(zip(uids, vectors, strict=True))
    chosen = captions.uids()
    return captions.warnings({uid: found[uid] for uid in {*chosen, *uids[200:]}}, uids[200:])


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Pictures of which the first twenty are of one kind."""
    found = np.random.default_rng(1).normal(size=(COUNT, 16)).astype(np.float16)
    found[:20] = found[:1] + 0.3 * found[:20]
    return found


def title(number: int) -> str:
    """The first and the last twenty have one caption each."""
    if number < 20:
        return "a ring"
    return "  Part of\ta COLLECTION" if number >= COUNT - 20 else f"caption {number}"


def test_captions_of_unlike_pictures_are_told(vectors: np.ndarray) -> None:
    captions = [title(number) for number in range(COUNT)]
    lines = look(table(captions, [str(number) for number in range(COUNT)]), vectors)
    assert lines[:2] == [
        "5.0% of captions are one and the same: “  Part of\ta COLLECTION”",
        "5.0% of captions are one and the same: “a ring”",
    ]
    assert lines[2:] == [
        "1 caption is shared by pictures that do not look alike (5.0% of samples), as “  Part "
        "of\ta COLLECTION”; --set select.max_caption_repeats=4 keeps at most 4 of each"
    ]


def test_copies_count_once(vectors: np.ndarray) -> None:
    captions = [title(number) for number in range(COUNT)]
    clusters = [str(min(number, COUNT - 20)) for number in range(COUNT)]
    assert len(look(table(captions, clusters), vectors)) == 2


def test_captions_of_their_own_say_nothing(vectors: np.ndarray) -> None:
    captions = [f"caption {number}" for number in range(COUNT)]
    assert look(table(captions, [str(number) for number in range(COUNT)]), vectors) == []
