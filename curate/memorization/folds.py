"""Which cluster is left out of which proxy: complementary halves, drawn by hash.

A draw depends on the seed and on the cluster's id alone, never on the position of a row, the
shard it lies in or the worker that asks.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

__all__ = [
    "MAX_BLOCK_BITS",
    "average",
    "block_masks",
    "draw_blocks",
    "draw_halves",
    "draw_masks",
    "draw_repeats",
    "hash_unit",
    "split_sides",
]

Array = np.ndarray[Any, Any]

#: Clusters fall into at most 2**4 blocks and a proxy sees half of the blocks, so that there are
#: always pairs of samples that exactly the same proxies left out: phantoms are made of those.
MAX_BLOCK_BITS = 4


def hash_unit(keys: Sequence[str], seed: int, purpose: str) -> Array:
    """Return a uniform number for each key.

    Parameters
    ----------
    keys : sequence of str, length N
    seed : int
    purpose : str
        Draws for different purposes are independent.

    Returns
    -------
    (N,) float64, [0, 1)
    """
    salt = blake2b(f"{purpose}:{seed}".encode(), digest_size=16).digest()
    digests = b"".join(blake2b(k.encode(), digest_size=8, key=salt).digest() for k in keys)
    # 53 bits are what a float64 in [0, 1) holds exactly.
    uniform: Array = (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53
    return uniform


def draw_repeats(keys: Sequence[str], weights: Array, seed: int, purpose: str) -> Array:
    """Round each weight up or down at random, so that its expectation is the weight.

    Parameters
    ----------
    keys : sequence of str, length N
    weights : (N,) float, at least 0
    seed, purpose
        As `hash_unit` takes them.

    Returns
    -------
    (N,) int64
    """
    whole = np.floor(weights)
    repeats: Array = whole + (hash_unit(keys, seed, purpose) < weights - whole)
    return repeats.astype(np.int64)


def _check_proxies(proxies: int) -> None:
    if proxies < 2 or proxies % 2:
        raise ValueError(f"proxies: must be even and at least 2; got {proxies}")


def draw_blocks(cluster_ids: Sequence[str], proxies: int, seed: int) -> Array:
    """Assign every cluster to a block; samples of one block are in and out together.

    Parameters
    ----------
    cluster_ids : sequence of str, length N
    proxies : int
        P, even and at least 2.
    seed : int

    Returns
    -------
    (N,) int32, [0, 2**min(P / 2, MAX_BLOCK_BITS))

    Raises
    ------
    ValueError
        If P is odd or below 2.
    """
    _check_proxies(proxies)
    blocks = 2 ** min(proxies // 2, MAX_BLOCK_BITS)
    return (hash_unit(cluster_ids, seed, "block") * blocks).astype(np.int32)


def block_masks(proxies: int, seed: int) -> Array:
    """Tell which blocks each proxy trains on.

    Proxies 2m and 2m + 1 are complements. The first pairs split the blocks by one bit of their
    number each, so that their splits are independent; further pairs split them at random into
    halves.

    Parameters
    ----------
    proxies : int
        P, even and at least 2.
    seed : int

    Returns
    -------
    (blocks, P) bool
        Every row holds exactly P / 2 times True; so does every column half of the blocks.

    Raises
    ------
    ValueError
        If P is odd or below 2.
    """
    _check_proxies(proxies)
    bits = min(proxies // 2, MAX_BLOCK_BITS)
    number = np.arange(2**bits)
    masks = np.zeros((len(number), proxies), bool)
    for pair in range(proxies // 2):
        if pair < bits:
            first = (number >> pair) % 2 == 0
        else:
            order = hash_unit([str(n) for n in number], seed, f"pair {pair}").argsort()
            first = np.isin(number, order[: len(number) // 2])
        masks[:, 2 * pair] = first
        masks[:, 2 * pair + 1] = ~first
    return masks


def draw_masks(cluster_ids: Sequence[str], proxies: int, seed: int) -> Array:
    """Tell which samples each proxy trains on.

    Parameters
    ----------
    cluster_ids : sequence of str, length N
        Samples of one cluster are in and out together: a twin left in would mean that nothing
        was left out.
    proxies : int
        P, even and at least 2.
    seed : int

    Returns
    -------
    (N, P) bool
        Every row holds exactly P / 2 times True.

    Raises
    ------
    ValueError
        If P is odd or below 2.

    References
    ----------
    Feldman and Zhang, What Neural Networks Memorize and Why (arXiv:2008.03703), section 2:
    random subsets, each sample in a fixed share of them.
    """
    masks: Array = block_masks(proxies, seed)[draw_blocks(cluster_ids, proxies, seed)]
    return masks


def draw_halves(cluster_ids: Sequence[str], proxies: int, seed: int) -> Array:
    """Tell which samples each proxy trains on, by halves that are independent of each other.

    Unlike `draw_masks`, which holds few kinds of samples so that phantoms can be made of them: with
    many proxies, any two clusters are together in other halves than any other two.

    Parameters
    ----------
    cluster_ids, proxies, seed
        As `draw_masks` takes them.

    Returns
    -------
    (N, P) bool
        Columns 2m and 2m + 1 are complements: every row holds exactly P / 2 times True.

    Raises
    ------
    ValueError
        If P is odd or below 2.

    References
    ----------
    As for `draw_masks`.
    """
    _check_proxies(proxies)
    first = [hash_unit(cluster_ids, seed, f"half {m}") < 0.5 for m in range(proxies // 2)]
    sides: Array = np.stack([side for one in first for side in (one, ~one)], axis=1)
    return sides


def split_sides(values: Array, inside: Array) -> tuple[Array, Array]:
    """Separate what in-proxies and out-proxies say.

    Parameters
    ----------
    values : (N, P) or (N, P, K) floating
    inside : (N, P) bool
        See `draw_masks` and `draw_halves`.

    Returns
    -------
    within, without : (N, P / 2) or (N, P / 2, K) floating
        Column by column from a pair of complementary proxies.
    """
    # Each pair of complements holds one proxy of either kind.
    half = (len(values), values.shape[1] // 2, *values.shape[2:])
    return values[inside].reshape(half), values[~inside].reshape(half)


def average(values: Array) -> tuple[Array, Array]:
    """Mean over proxies and its standard error: (N, M) to (N,) and (N,), NaN for M below 2."""
    count = values.shape[1]
    error = np.full(len(values), np.nan)
    if count > 1:
        error = values.std(1, ddof=1) / np.sqrt(count)
    return values.mean(1), error
