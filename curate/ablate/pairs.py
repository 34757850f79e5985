"""What students train on and are judged by: a pool of the run's samples, and pairs held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.errors import InputError
from curate.memorization.folds import hash_unit
from curate.memorization.mismatch import normalise_caption
from curate.memorization.rarity import RARE
from curate.stages.base import Room

__all__ = [
    "LEAST_HELD_OUT",
    "Pairs",
    "choose_pairs",
    "held_places",
    "is_trainable",
    "limit_share",
    "rows_by_shard",
]

Array = np.ndarray[Any, Any]

#: With fewer, a difference of several points in R@10 is within noise.
LEAST_HELD_OUT = 100
_EVERY, _NO = -1, -2
_NEEDED = ("thumbnail", "image_emb", "text_emb")
_NUMBERS = ("rarity", "clip_score", "alignment_in")


@dataclass(frozen=True)
class Pairs:
    """Samples that can be trained on or held out, in an order drawn by uid.

    Parameters
    ----------
    rows : (N,) int64
        Of the run.
    uids, captions : list of str, length N
    codes : (N, 2) int64
        Of cluster and caption.
    held_by : (N,) int64
        Seed that holds out a sample's cluster; -1 (every seed) and -2 (none) where pairs are
        named.
    judges : (N,) bool
        One of each cluster and one of each caption that a seed holds out: a caption that hundreds
        of pictures share is one question, whose answer would count hundreds of times.
    rare : (N,) bool or None
        The rarest fifth; None where the run does not know.
    cosine : (N,) float64
        By which a cosine filter keeps; NaN where unknown.
    cosine_column : str or None
    """

    rows: Array
    uids: list[str]
    captions: list[str]
    codes: Array
    held_by: Array
    judges: Array
    rare: Array | None
    cosine: Array
    cosine_column: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def held(self, seed: int) -> Array:
        """Places of the pairs that judge a seed's students: (H,) int64, ascending."""
        return held_places(self.held_by, self.judges, seed)

    def trainable(self, seed: int) -> Array:
        """Whether a seed's students may train on a sample: (N,) bool."""
        return is_trainable(self.held_by, seed)

    @property
    def apart(self) -> bool:
        """Whether each seed is judged by pairs of its own."""
        return not (self.held_by == _EVERY).any()


def is_trainable(held_by: Array, seed: int) -> Array:
    """Tell what a seed's students may train on: (N,) bool from (N,) int64, see `Pairs`."""
    return (held_by != seed) & (held_by != _EVERY)


def held_places(held_by: Array, judges: Array, seed: int) -> Array:
    """Return the places that judge a seed's students: (H,) int64, ascending; see `Pairs`."""
    return np.flatnonzero(judges & ~is_trainable(held_by, seed))


def limit_share(share: float, seeds: int) -> float:
    """Return the share of the clusters that a seed holds out: they last for so many seeds."""
    return min(share, 1 / seeds)


def choose_pairs(
    room: Room,
    share: float,
    limit: int,
    seed: int,
    seeds: int,
    named: frozenset[str] | None = None,
) -> Pairs:
    """Draw pool and held-out pairs by cluster.

    Each seed of the students holds out other clusters: seeds times as many pairs judge as where
    all are judged by the same, for as many students.

    Parameters
    ----------
    room : Room
        Of the run's `select`.
    share : float
        Of the clusters that a seed holds out, (0, 1), see `limit_share`. Without `named`.
    limit : int
        Samples of the pool at most, in whole clusters.
    seed : int
    seeds : int
        Of the students.
    named : frozenset of str, optional
        Uids that every seed holds out instead. Of their clusters nothing is trained on, and the
        first of each cluster and caption in the order judges.

    Raises
    ------
    InputError
        If the run lacks what students see, or too few pairs are held out.
    """
    lacking = [name for name in _NEEDED if not room.has(name)]
    if lacking:
        raise InputError(
            f"ablate: needs the run's {', '.join(lacking)}; its pipeline makes none. Run one with "
            "`embed` on images and captions, such as `default`."
        )
    table = pa.concat_tables([_read(room, shard) for shard in room.shards()])
    asked = frozenset[str]()
    if named is not None:
        uids, clusters = (table[name].to_pylist() for name in ("uid", "cluster_id"))
        asked = frozenset(c for u, c in zip(uids, clusters, strict=True) if u in named)
    rows = _draw_pool(table, limit, seed, asked)
    pool = table.take(pa.array(rows))
    uids, clusters, captions = (pool[n].to_pylist() for n in ("uid", "cluster_id", "caption"))
    if named is None:
        unit = hash_unit(clusters, seed, "ablate held out")
        held_by = (unit / limit_share(share, seeds)).astype(np.int64)
        may_judge = np.ones(len(rows), bool)
    else:
        held_by = np.where([cluster in asked for cluster in clusters], _EVERY, _NO)
        may_judge = np.array([uid in named for uid in uids], bool)
    codes = _number([clusters, [normalise_caption(text) for text in captions]])
    judges = _first_of_each(codes[:, :1], may_judge)
    judges = _first_of_each(np.stack([held_by, codes[:, 1]], axis=1), judges)
    pairs = Pairs(rows, uids, captions, codes, held_by, judges, **_describe(pool))
    fewest = min(len(pairs.held(number)) for number in range(seeds))
    if fewest < LEAST_HELD_OUT:
        option = f"--held-out {share:g}" if named is None else "--held-out-list"
        advice = "Raise it" if named is not None or share * seeds < 1 else "Take fewer --seeds"
        advice += " or --limit" if table["usable"].to_numpy(False).sum() > limit else ""
        raise InputError(
            f"{option}: must leave every seed at least {LEAST_HELD_OUT} pairs of different "
            f"clusters and captions to judge by; got {fewest} of {len(rows)} usable samples. "
            f"{advice}, or run on more."
        )
    return pairs


def _draw_pool(table: pa.Table, limit: int, seed: int, asked: frozenset[str]) -> Array:
    """Draw whole clusters, those asked for first: (N,) int64, in an order drawn by uid."""
    clusters = table["cluster_id"].to_pylist()
    usable = table["usable"].to_numpy(zero_copy_only=False)
    draw = hash_unit(clusters, seed, "ablate pool")
    draw[[cluster in asked for cluster in clusters]] = 0.0
    if usable.sum() > limit:
        usable = usable & (draw <= np.sort(draw[usable])[limit - 1])
    rows = np.flatnonzero(usable)
    order = hash_unit(table["uid"].take(pa.array(rows)).to_pylist(), seed, "ablate order")
    return rows[np.argsort(order, kind="stable")]


def _number(names: Sequence[list[str]]) -> Array:
    """Number what is named alike in each of C lists of N: (N, C) int64."""
    codes = [np.unique(np.array(part, str), return_inverse=True)[1] for part in names]
    return np.stack(codes, axis=1).astype(np.int64)


def _first_of_each(keys: Array, among: Array) -> Array:
    """Choose the first row of each (N, K) int64 key among some of N: (N,) bool."""
    places = np.flatnonzero(among)
    chosen = np.zeros(len(keys), bool)
    chosen[places[np.unique(keys[places], axis=0, return_index=True)[1]]] = True
    return chosen


def _describe(pool: pa.Table) -> dict[str, Any]:
    """Say which are rare, and by what a cosine filter keeps: fields of `Pairs`."""
    numbers = {name: pool[name].to_numpy().astype(float) for name in _NUMBERS}
    known = [name for name in _NUMBERS[1:] if np.isfinite(numbers[name]).any()]
    rarity = numbers["rarity"]
    return {
        "rare": rarity >= RARE if np.isfinite(rarity).any() else None,
        "cosine": numbers[known[0]] if known else np.full(len(pool), np.nan),
        "cosine_column": known[0] if known else None,
    }


def _read(room: Room, shard: str) -> pa.Table:
    """Read a shard: of what is large only whether it is there."""
    present = [name for name in ("cluster_id", *_NUMBERS) if room.has(name)]
    table = room.read(shard, ["caption", *_NEEDED, *present])
    usable = np.array([bool(text and text.strip()) for text in table["caption"].to_pylist()], bool)
    for name in _NEEDED:
        usable &= pc.is_valid(table[name]).to_numpy()
    uid = table["uid"]
    cluster = pc.coalesce(table["cluster_id"], uid) if "cluster_id" in present else uid
    none = pa.nulls(len(table), pa.float64())
    numbers = {n: table[n].cast(pa.float64()) if n in present else none for n in _NUMBERS}
    return pa.table(
        {
            "uid": uid,
            "cluster_id": cluster,
            "caption": table["caption"],
            "usable": pa.array(usable),
            **numbers,
        }
    )


def rows_by_shard(room: Room, rows: Array) -> Sequence[tuple[str, Array, Array]]:
    """Return (shard, rows in it, places in `rows`) for each shard that has any.

    Parameters
    ----------
    room : Room
    rows : (N,) int64
        Of the run.
    """
    found, start = [], 0
    for shard in room.layout()["shards"]:
        stop = start + shard["samples"]
        places = np.flatnonzero((rows >= start) & (rows < stop))
        if len(places):
            found.append((shard["name"], rows[places] - start, places))
        start = stop
    return found
