"""Weights for trainers that know none per sample: groups of shards, each with its factor.

Trainers draw shards, or streams, with replacement; a shard's factor is then how often each of its
samples is seen. All shards are of even size, whatever their group, so that factors hold however a
trainer draws.
"""

import json
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Group", "Layout", "cut", "describe_mds", "describe_tars"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Group:
    """Shards whose samples weigh about the same.

    Parameters
    ----------
    shards : int
    samples : int
    factor : float
        Mean weight of its samples; 1 is the mean over all.
    """

    shards: int
    samples: int
    factor: float


@dataclass(frozen=True)
class Layout:
    """Which sample goes where.

    Parameters
    ----------
    shard : (N,) int32
        The shard of each sample. Shards of one group follow each other.
    place : (N,) int32
        Its place in there.
    groups : tuple of Group
        By rising factor.
    error : float
        Mean of |factor - weight| over all samples, in units of the mean weight.
    """

    shard: Array
    place: Array
    groups: tuple[Group, ...]
    error: float


def cut(weights: Array, order: Array, shards: int, groups: int) -> Layout:
    """Cut samples into shards whose sizes differ by one at most, and these into groups.

    With one group the order alone decides. With more, samples are sorted by weight, the shards
    fall into the groups that leave the least squared error of the weights, and within a group the
    order decides.

    Parameters
    ----------
    weights : (N,) float
    order : (N,) int
        Samples in the order wanted.
    shards : int
        At most N.
    groups : int
        At most; where shards weigh the same there are fewer.
    """
    count = len(weights)
    bounds = np.arange(shards + 1) * count // max(shards, 1)
    sizes = np.diff(bounds)
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    by_weight = np.lexsort((rank, weights)) if groups > 1 else order
    sums = np.add.reduceat(weights[by_weight].astype(np.float64), bounds[:-1]) if shards else sizes
    ends = _cut_values(sums / sizes, sizes, groups) if shards else []
    shard, place = np.empty(count, np.int32), np.empty(count, np.int32)
    shard_of_position = np.repeat(np.arange(shards), sizes)
    place_of_position = np.arange(count) - np.repeat(bounds[:-1], sizes)
    found, error = [], 0.0
    mean = float(weights.mean()) if count and weights.any() else 1.0
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        low, high = bounds[first], bounds[last]
        members = by_weight[low:high]
        members = members[np.argsort(rank[members])]
        shard[members] = shard_of_position[low:high]
        place[members] = place_of_position[low:high]
        factor = float(weights[members].mean(dtype=np.float64)) / mean
        error += float(np.abs(weights[members] / mean - factor).sum())
        found.append(Group(last - first, int(high - low), factor))
    return Layout(shard, place, tuple(found), error / max(count, 1))


def _cut_values(values: Array, sizes: Array, groups: int) -> list[int]:
    """Return where runs of rising values end that leave the least squared error in all.

    A further run is made only where it makes the error smaller.
    """
    count = len(values)
    weight, total, square = (
        np.concatenate([[0.0], np.cumsum(part)])
        for part in (sizes, sizes * values, sizes * values**2)
    )

    def spread(first: Array, last: int) -> Array:
        mass = weight[last] - weight[first]
        found: Array = square[last] - square[first] - (total[last] - total[first]) ** 2 / mass
        return np.maximum(found, 0)

    best = np.concatenate([[0.0], [spread(np.array(0), end) for end in range(1, count + 1)]])
    cuts: list[Array] = []
    # Below this it is rounding that a further run would take away.
    noise = 1e-9 * max(float(square[-1]), 1e-30)
    for already in range(1, min(groups, count)):
        better, origin = np.full(count + 1, np.inf), np.zeros(count + 1, np.int64)
        for end in range(already + 1, count + 1):
            starts = np.arange(already, end)
            costs = best[starts] + spread(starts, end)
            origin[end] = starts[np.argmin(costs)]
            better[end] = costs.min()
        if better[count] > best[count] - noise:
            break
        best = better
        cuts.append(origin)
    ends = [count]
    for origin in reversed(cuts):
        ends.append(int(origin[ends[-1]]))
    return ends[::-1]


def _numbers(layout_error: float, groups: list[Group]) -> list[str]:
    rows = [
        f"| {number} | {group.samples} | {group.shards} | {group.factor:.4f} |"
        for number, group in enumerate(groups)
    ]
    return [
        "| group | samples | shards | factor |", "|---|---|---|---|", *rows, "",
        f"A sample's factor differs from its own weight by {layout_error:.3f} on average (weights "
        "have mean 1). The exact weight is with each sample.", "",
    ]  # fmt: skip


def _share(groups: list[Group]) -> list[float]:
    """Of all samples drawn, the share that comes from each group."""
    mass = [group.samples * group.factor for group in groups]
    return [part / sum(mass) for part in mass]


def describe_tars(
    groups: list[Group], error: float, folder: str, skipped: int, captions: list[str]
) -> str:
    """Return `TRAINING.md` of tars: how open_clip and webdataset train on them with weights.

    Parameters
    ----------
    folder : str
        Where the tars lie.
    skipped : int
        Images of kinds that open_clip does not read.
    captions : list of str
        JSON fields that hold captions.
    """
    urls = [f"group{n}-{{00000..{g.shards - 1:05d}}}.tar" for n, g in enumerate(groups)]
    data = "::".join(f"$DATA/{url}" for url in urls)
    factors = "::".join(f"{group.factor:.4f}" for group in groups)
    kinds = [
        f"{skipped} of the samples are of other kinds than JPEG, PNG and WebP: open_clip leaves "
        "them out.", "",
    ]  # fmt: skip
    lines = [
        "# Training on these tars, weighted", "",
        *_numbers(error, groups),
        *(kinds if skipped else []),
        "## open_clip", "",
        "The number of samples comes from `sizes.json`.", "",
        "```sh", f"DATA={shlex.quote(folder)}",
        "python -m open_clip_train.main --model ViT-B-32 --dataset-type webdataset \\",
        f'  --train-data "{data}" \\',
        f"  --train-data-upsampling-factors '{factors}' --dataset-resampled \\",
        "  --batch-size 256 --workers 4 --epochs 32", "```", "",
        *(_describe_captions(captions) if len(captions) > 1 else []),
        "## webdataset", "",
        "```python", "import webdataset as wds", "",
        f"DATA = {json.dumps(folder, ensure_ascii=False)}", "groups = [",
        *(f'    "{url}",' for url in urls), "]",
        "shares = [" + ", ".join(f"{share:.6f}" for share in _share(groups)) + "]",
        "streams = [", '    wds.WebDataset(f"{DATA}/{urls}", resampled=True).shuffle(1000)',
        "    for urls in groups", "]",
        "samples = wds.RandomMix(streams, shares)", "```", "",
        "It never ends: an epoch is as many samples as you say.", "",
        "`curate export --to mds` writes the same groups for MosaicML's streaming.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _describe_captions(fields: list[str]) -> list[str]:
    keys, shares = ";".join(fields), " ".join("1" for _ in fields)
    return [
        f"Some samples have up to {len(fields)} captions: their own, and those of dropped copies. "
        "The command above trains on the first. Versions of open_clip whose `--help` names "
        "`--json-text-key-probs` (3.3.0 does not) draw one each time a sample is seen, with", "",
        "```", f"  --json-text-key '{keys}' --json-text-key-probs {shares}", "```", "",
    ]  # fmt: skip


def describe_mds(groups: list[Group], error: float, folder: str) -> str:
    """Return `TRAINING.md` of MosaicML's streaming shards, one folder per group."""
    streams = [
        f'    Stream(local=f"{{DATA}}/group{number}", repeat={group.factor:.4f}),'
        for number, group in enumerate(groups)
    ]
    lines = [
        "# Training on these streams, weighted", "",
        *_numbers(error, groups),
        "```python", "from streaming import Stream, StreamingDataset", "",
        f"DATA = {json.dumps(folder, ensure_ascii=False)}", "streams = [", *streams, "]",
        "samples = StreamingDataset(streams=streams, shuffle=True, batch_size=256)", "```", "",
        "`StreamingDataset(local=DATA, batch_size=256)` reads all groups as one, unweighted. Where "
        "the data lie on an object store, give `remote` as well.", "",
    ]  # fmt: skip
    return "\n".join(lines)
