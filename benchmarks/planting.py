"""Decides which samples of a corpus are spoilt, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import cycle
from random import Random

from benchmarks.images import NEAR_TRANSFORMS
from benchmarks.sources import Pair, normalise

CLEAN = "clean"
SWAP = "swap"
EXACT_TWIN = "exact_twin"
NEAR_TWIN = "near_twin"
UNDECODABLE = "undecodable"
TRUNCATED = "truncated"
EMPTY_CAPTION = "empty_caption"
KINDS = (CLEAN, SWAP, EXACT_TWIN, NEAR_TWIN, UNDECODABLE, TRUNCATED, EMPTY_CAPTION)

_MAX_PASSES = 200


@dataclass(frozen=True)
class Shares:
    """How many samples of each kind to plant, as shares of the number of originals."""

    swaps: float = 0.0
    exact_twins: float = 0.0
    near_twins: float = 0.0
    undecodable: float = 0.0
    truncated: float = 0.0
    empty_captions: float = 0.0

    def __post_init__(self) -> None:
        """Reject shares that cannot be disjoint."""
        shares = [getattr(self, field.name) for field in fields(self)]
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError("shares must not be negative, nor sum to more than 1")


@dataclass(frozen=True)
class Sample:
    """A sample to write.

    Attributes
    ----------
    pair
        The original pair.
    kind
        One of `KINDS`.
    caption
        The caption to write, which is not always the pair's.
    of
        For twins the original sample's index in the plan, for swaps that of the sample whose
        caption is written, else None.
    transform
        A near twin's transformation, else None.
    """

    pair: Pair
    kind: str
    caption: str
    of: int | None = None
    transform: str | None = None


def swap_donors(pairs: Sequence[Pair], chosen: Sequence[int], rng: Random) -> dict[int, int]:
    """Permute captions so that each one certainly changes.

    Parameters
    ----------
    pairs
        The corpus.
    chosen
        Indices of the pairs whose captions are permuted.
    rng
        Source of the permutation.

    Returns
    -------
    dict of int to int
        For each chosen index, the index of the pair whose caption it is given. The normalised
        caption and the name group of the two always differ.
    """
    texts = {index: normalise(pairs[index].caption) for index in chosen}

    def clashes(receiver: int, donor: int) -> bool:
        same_group = pairs[receiver].name_group == pairs[donor].name_group
        return same_group or texts[receiver] == texts[donor]

    donors = list(chosen)
    rng.shuffle(donors)
    for _ in range(_MAX_PASSES):
        fixed = [at for at, index in enumerate(chosen) if clashes(index, donors[at])]
        if not fixed:
            return dict(zip(chosen, donors, strict=True))
        for at in fixed:
            other = rng.randrange(len(chosen))
            here, there = donors[other], donors[at]
            if not clashes(chosen[at], here) and not clashes(chosen[other], there):
                donors[at], donors[other] = here, there
    raise ValueError("the chosen captions are too alike to be swapped")


def _take(pool: list[int], count: int, accept: Callable[[int], bool], what: str) -> list[int]:
    taken: list[int] = []
    for index in pool:
        if len(taken) == count:
            break
        if accept(index):
            taken.append(index)
    if len(taken) < count:
        raise ValueError(f"the corpus has too few pairs to plant {count} {what}")
    used = set(taken)
    pool[:] = [index for index in pool if index not in used]
    return taken


def plan(pairs: Sequence[Pair], shares: Shares, seed: int) -> list[Sample]:
    """Plant defects in a corpus.

    Kinds are disjoint: an original is spoilt in one way at most, those of twins in none.

    Parameters
    ----------
    pairs
        The originals.
    shares
        How much to plant.
    seed
        Decides which originals are taken.

    Returns
    -------
    list of Sample
        The originals in their order, then the twins.
    """
    rng = Random(f"plan:{seed}")
    pool = list(range(len(pairs)))
    rng.shuffle(pool)

    def captioned(index: int) -> bool:
        return bool(normalise(pairs[index].caption))

    def take(share: float, what: str, accept: Callable[[int], bool] = lambda _: True) -> list[int]:
        return _take(pool, round(share * len(pairs)), accept, what)

    donors = swap_donors(pairs, take(shares.swaps, "swaps", captioned), rng)
    exact = take(shares.exact_twins, "exact twins")
    near = take(shares.near_twins, "near twins")
    broken = dict.fromkeys(take(shares.undecodable, "undecodable files"), UNDECODABLE)
    broken |= dict.fromkeys(take(shares.truncated, "truncated files"), TRUNCATED)
    empty = set(take(shares.empty_captions, "empty captions", captioned))

    samples = []
    for index, pair in enumerate(pairs):
        if index in donors:
            donor = donors[index]
            samples.append(Sample(pair, SWAP, pairs[donor].caption, of=donor))
        elif index in empty:
            samples.append(Sample(pair, EMPTY_CAPTION, ""))
        else:
            samples.append(Sample(pair, broken.get(index, CLEAN), pair.caption))
    samples += [Sample(pairs[of], EXACT_TWIN, pairs[of].caption, of=of) for of in exact]
    return samples + [
        Sample(pairs[of], NEAR_TWIN, pairs[of].caption, of, transform)
        for of, transform in zip(near, cycle(NEAR_TRANSFORMS), strict=False)
    ]
