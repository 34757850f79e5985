from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from curate.stages.report_captions import Captions
from curate.stages.report_titles import find_series, split_parts

COUNT = 400


def table(captions: list[str], clusters: list[str]) -> pa.Table:
    uids = [f"{number:032x}" for number in range(COUNT)]
    width = [64] * COUNT
    return pa.table({"uid": uids, "caption": captions, "cluster_id": clusters, "width": width})


def look(rows: pa.Table, vectors: np.ndarray) -> list[str]:
    """Read the samples in shards of which the last comes first."""
    ranks = np.random.default_rng(0).permutation(COUNT) / COUNT
    captions = Captions(1.0, 1.0)
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


#: What a series' captions end with, and what others say with them.
TAGS = ["vehicle, transport", "toy, party", "food, fruit", "office, tool", "people, hat"]


def of_series(number: int, title: str = "piggybank") -> str:
    """Sixteen samples have one title before tags that other captions have too."""
    tags = TAGS[number % len(TAGS)]
    return f"Drawn by A - {title}. {tags}" if number >= COUNT - 16 else f"thing {number}. {tags}"


def told_of_series(captions: list[str], vectors: np.ndarray) -> list[str]:
    rows = table(captions, [f"{number:032x}" for number in range(COUNT)])
    return [line for line in look(rows, vectors) if "titles are" in line or "title is" in line]


def test_a_title_of_unlike_pictures_is_told(vectors: np.ndarray) -> None:
    captions = [of_series(number) for number in range(COUNT)]
    captions[:25] = [f"Drawn by A - other {number}. toy" for number in range(25)]  # a known name
    assert told_of_series(captions, vectors) == [
        "1 title is shared by pictures that do not look alike, before words that differ "
        "(4.0% of samples), as “piggybank” in “Drawn by A - piggybank. people, hat”; where "
        "it is wrong, name the samples in remove.lists"
    ]


def test_a_title_of_like_pictures_is_none(vectors: np.ndarray) -> None:
    alike = vectors.copy()
    alike[COUNT - 16 :] = alike[:1] + 0.3 * alike[COUNT - 16 :]
    assert told_of_series([of_series(number) for number in range(COUNT)], alike) == []


def test_titles_beside_names_of_their_own_are_none(vectors: np.ndarray) -> None:
    """As of the flags of France, each of which is named."""
    captions = [of_series(number) for number in range(COUNT)]
    captions[COUNT - 16 :] = [f"France - region {number}. toy, party" for number in range(16)]
    assert told_of_series(captions, vectors) == []


def test_the_same_words_behind_a_title_are_no_series() -> None:
    counts = Counter({"a set. toy": 4, **{f"thing {number}. toy": 1 for number in range(96)}})
    assert find_series(counts, counts) == {}


def test_parts_end_at_punctuation() -> None:
    assert split_parts("Drawn by A.B. - piggy-bank. toy, 3.5 cm (red)") == [
        "Drawn by A.B", "piggy-bank", "toy", "3.5 cm", "red",
    ]  # fmt: skip
    assert split_parts("...") == ["..."]
