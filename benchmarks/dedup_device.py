"""Search of one process on a GPU: `python -m benchmarks.dedup_device --samples 10000000`.

Trains cells, assigns, and searches vectors with planted near-copies, all held in memory, by the
functions that `dedup` calls; each step's products are set against what the device can multiply,
and its reading against what it can copy, both measured first. Prints one JSON line. Runs on a CPU
too, where there is no GPU.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
import torch

from benchmarks.mixture import draw_mixture
from curate.dedup.cells import merge_cells, order_cells, search_cell
from curate.dedup.groups import unique_pairs
from curate.dedup.neighbors import Rows, assign_cells, pairs_within, train_centroids, unit_rows
from curate.models.precision import pick_device

Array = np.ndarray[Any, Any]

_MIN_COSINE, _RECALL = 0.95, 0.999
#: As the stage has them.
_TRAIN_PER_CELL, _ROUNDS, _PROBES, _TASK_ROWS = 64, 10, 32, 16384
_QUERIES = 16384
_BLOCK = 50_000


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.monotonic()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - begun, result


def measure_device() -> dict[str, float]:
    """Measure copies and square products, on random numbers: 10^12 bytes and operations a second.

    `copy` counts bytes read and written on the device, `upload` those moved to it from memory.
    """
    device = pick_device()
    # A CPU without units for bfloat16 takes minutes for what others do in a second.
    side, rows = (8192, 1 << 20) if device == "cuda" else (512, 1 << 16)
    found = {}
    for kind in (torch.bfloat16, torch.float32):
        one, other = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        _timed(lambda one=one, other=other: [one @ other for _ in range(3)])
        seconds, _ = _timed(lambda one=one, other=other: [one @ other for _ in range(10)])
        found[str(kind).removeprefix("torch.")] = 20 * side**3 / seconds / 1e12
    block = torch.randn(rows, 512, device=device)
    block.clone()
    seconds, _ = _timed(lambda: [block.clone() for _ in range(10)])
    found["copy"] = 20 * block.numel() * 4 / seconds / 1e12
    held = block.cpu()
    seconds, _ = _timed(lambda: held.to(device, copy=True))
    found["upload"] = held.numel() * 4 / seconds / 1e12
    return found


def _blocks(vectors: Array) -> Iterator[tuple[int, Array]]:
    for start in range(0, len(vectors), _BLOCK):
        yield start, vectors[start : start + _BLOCK]


def _train(vectors: Array, cells: int) -> Array:
    sample = unit_rows(vectors[:: max(1, len(vectors) // (cells * _TRAIN_PER_CELL))])
    centroids = merge_cells(sample, train_centroids(sample, cells, seed=0), _MIN_COSINE)
    return centroids[order_cells(centroids)]


def _assign(vectors: Array, centroids: Array) -> tuple[Array, Array]:
    most = min(_PROBES, len(centroids))
    cells = np.empty((most, len(vectors)), np.int32)
    detours = np.empty((most, len(vectors)), np.float16)
    for start, block in _blocks(vectors):
        part = slice(start, start + len(block))
        cells[:, part], detours[:, part] = assign_cells(unit_rows(block), centroids, most)
    return cells, detours


def _brute_force(vectors: Array, asked: Array) -> tuple[Array, Array]:
    """Pairs of some rows with all others: places in `asked`, rows."""
    queries = Rows.of(vectors[asked])
    number, other = [], []
    for start, block in _blocks(vectors):
        left, right, _ = pairs_within(queries, Rows.of(block), _MIN_COSINE)
        apart = asked[left] != start + right
        number.append(left[apart])
        other.append(start + right[apart])
    return np.concatenate(number), np.concatenate(other)


def _reach(cells: Array, detours: Array, left: Array, right: Array) -> float:
    """Detour by which pairs are found, but for half of what `target_recall` lets go."""

    def way(start: Array, end: Array) -> Array:
        there = cells[:, start] == cells[0, end]
        return np.where(there, detours[:, start], np.float16(np.inf)).min(0)

    needed = np.sort(np.minimum(way(left, right), way(right, left)))
    return float(needed[min(int(len(needed) * (1 + _RECALL) / 2), len(needed) - 1)])


def _search(vectors: Array, cells: Array, detours: Array, reach: float) -> dict[str, Any]:
    """Search all cells, by tasks of as many rows as the stage's; edges, spots, what it took."""
    near = detours <= np.float16(reach)
    slot, row = np.nonzero(near[: int(near.any(1).sum())])
    cell = cells[slot, row]
    order = np.argsort(cell, kind="stable")
    bounds = np.searchsorted(cell[order], np.arange(cells.max() + 2))
    homes = np.bincount(cells[0], minlength=len(bounds) - 1)
    task = (np.cumsum(homes) - homes / 2) // _TASK_ROWS
    edges: list[list[Array]] = [[], [], []]
    spots = []
    seconds = {"gather": 0.0, "prepare": 0.0, "search": 0.0}
    products = 0
    for number in np.unique(task):
        first, last = np.flatnonzero(task == number)[[0, -1]]
        chosen = order[bounds[first] : bounds[last + 1]]
        rows, places = np.unique(row[chosen], return_inverse=True)
        took, stored = _timed(lambda rows=rows: vectors[rows])
        seconds["gather"] += took
        took, everything = _timed(lambda stored=stored: Rows.of(stored))
        seconds["prepare"] += took
        begun = time.monotonic()
        for one in range(first, last + 1):
            inside = slice(bounds[one] - bounds[first], bounds[one + 1] - bounds[first])
            around, members = places[inside], np.flatnonzero(slot[chosen[inside]] == 0)
            if len(members):
                found = search_cell(everything.take(around), members, _MIN_COSINE)
                products += len(around) * len(members)
                ends = rows[around[found.left]], rows[around[found.right]], found.cosines
                for kept, end in zip(edges, ends, strict=True):
                    kept.append(end)
                spots += [rows[around[spot]] for spot in found.spots]
        seconds["search"] += time.monotonic() - begun
    left, right, _ = unique_pairs(*map(np.concatenate, edges))
    return {
        "edges": (left, right), "spots": spots, "seconds": seconds, "products": products,
        "copies": len(row),
    }  # fmt: skip


def _recall(found: dict[str, Any], count: int, number: Array, left: Array, right: Array) -> float:
    """Mean over queries of the share of their pairs that are edges or within a spot."""
    low, high = np.minimum(left, right), np.maximum(left, right)
    one, two = found["edges"]
    known = np.isin(low * count + high, one * count + two)
    for spot in found["spots"]:
        known |= np.isin(low, spot) & np.isin(high, spot)
    _, place, each = np.unique(number, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(place, known) / each))


@click.command()
@click.option("--samples", default=100_000, show_default=True)
@click.option("--width", default=512, show_default=True)
def main(samples: int, width: int) -> None:
    """Measure on SAMPLES vectors."""
    device = measure_device()
    vectors = np.empty((samples, width), np.float16)
    seconds: dict[str, float] = {}

    def draw() -> None:
        start = 0
        for block in draw_mixture(samples, width):
            vectors[start : start + len(block)] = block
            start += len(block)

    cells = round(samples**0.5)
    seconds["draw"], _ = _timed(draw)
    seconds["centroids"], centroids = _timed(lambda: _train(vectors, cells))
    seconds["cells"], assigned = _timed(lambda: _assign(vectors, centroids))
    asked = np.random.default_rng(0).choice(samples, min(samples, _QUERIES), replace=False)
    asked.sort()
    seconds["recall"], (number, other) = _timed(lambda: _brute_force(vectors, asked))
    # Not those of the picture that is everywhere, which would outvote all.
    few = np.bincount(number, minlength=len(asked))[number] <= 64
    reach = _reach(*assigned, asked[number[few]], other[few])
    seconds["search"], found = _timed(lambda: _search(vectors, *assigned, reach))
    seconds |= {f"search.{name}": value for name, value in found["seconds"].items()}
    trained = min(samples, cells * _TRAIN_PER_CELL)
    products = {
        "centroids": trained * cells * _ROUNDS,
        "cells": samples * len(centroids),
        "recall": len(asked) * samples,
        "search": found["products"],
    }
    rates = {name: 2 * width * count / seconds[name] / 1e12 for name, count in products.items()}
    report = {
        "samples": samples,
        "width": width,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "tera_per_second": {name: round(value, 3) for name, value in device.items()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "tera_operations": {name: round(rate, 3) for name, rate in rates.items()},
        "of_bfloat16_rate": {n: round(rate / device["bfloat16"], 4) for n, rate in rates.items()},
        "cells": len(centroids),
        "copies_per_sample": round(found["copies"] / samples, 3),
        "edges": len(found["edges"][0]),
        "spots": len(found["spots"]),
        "recall": round(_recall(found, samples, number, asked[number], other), 5),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
