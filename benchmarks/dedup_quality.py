"""Which copies are found, and what else: `python -m benchmarks.dedup_quality TARS WORK`.

Ten kinds of copies (`benchmarks.copies`) of a sample of pictures that all differ; every method sees
the same files. A picture and its copies are a family. A reported pair is right if both are of one
family; as two pictures of the corpus may be near copies that nobody planted, WORK/sheets shows a
hundred wrong ones of every method to judge by eye. Prints one JSON line, writes WORK/table.md.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from benchmarks.copies import COPIES, make_copy
from curate import storage
from curate.dedup.neighbors import Rows, pairs_within, unit_rows
from curate.formats.pixels import decode
from curate.memorization.folds import hash_unit

__all__ = ["Pairs", "draw_pictures", "judge", "plant"]

Array = np.ndarray[Any, Any]
#: Pairs (E,) of numbers of the sorted files, left < right.
Pairs = tuple[Array, Array]

_PIPELINE = "dedup"
#: Pictures are stored at most this large, and not drawn if smaller than the least or huge.
_LONGEST, _LEAST_SIDE, _MAX_PIXELS = 512, 32, 30_000_000
_SHOWN, _SHOWN_PX = 100, 96
_DISTANCES = (0, 2, 4, 6, 8, 10)


def draw_pictures(tars: Path, longest: int, seed: int = 0) -> Iterator[tuple[str, Image.Image]]:
    """Decodable pictures, at most `longest` px wide and high, in an order drawn by key."""
    with ExitStack() as stack:
        members = {}
        for path in sorted(tars.glob("*.tar")):
            tar = stack.enter_context(tarfile.open(path))
            for member in tar:
                if not member.name.endswith((".json", ".txt")):
                    members[Path(member.name).stem] = tar, member
        keys = sorted(members)
        for row in np.argsort(hash_unit(keys, seed, "dedup sample"), kind="stable"):
            tar, member = members[keys[row]]
            file = tar.extractfile(member)
            assert file is not None
            image = decode(file.read(), _MAX_PIXELS, longest).image
            if image is not None:
                image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
                yield keys[row], image


def _distinct(pictures: Iterator[tuple[str, Image.Image]]) -> Iterator[tuple[str, Image.Image]]:
    """Leave out what is tiny or has the pixels of an earlier one."""
    seen = set()
    for key, image in pictures:
        digest = hashlib.sha256(image.tobytes() + repr(image.size).encode()).digest()
        if min(image.size) >= _LEAST_SIDE and digest not in seen:
            seen.add(digest)
            yield key, image


def plant(tars: Path, folder: Path, sample: int, seed: int) -> None:
    """Write pictures and their copies as `KEY-KIND.png` (jpg), with captions that say nothing."""
    folder.mkdir(parents=True)
    pictures = _distinct(draw_pictures(tars, _LONGEST, seed))
    for (key, image), _ in zip(pictures, range(sample), strict=False):
        image.save(folder / f"{key}-original.png")
        for kind in COPIES:
            suffix = "jpg" if kind == "jpeg" else "png"
            (folder / f"{key}-{kind}.{suffix}").write_bytes(make_copy(image, kind, key))
        for kind in ("original", *COPIES):
            (folder / f"{key}-{kind}.txt").write_text("a picture")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".txt")


class _Truth:
    """What the files' names say: family and kind of each, both (N,)."""

    def __init__(self, names: list[str]) -> None:
        keys, kinds = zip(*(Path(name).stem.rsplit("-", 1) for name in names), strict=True)
        self.family = np.unique(keys, return_inverse=True)[1]
        self.kind = np.array(kinds)


def judge(truth: _Truth, left: Array, right: Array) -> dict[str, Any]:
    """Recall of each kind, precision of pairs, and families wrongly joined."""
    same = truth.family[left] == truth.family[right]
    original = np.where(truth.kind[left] == "original", right, left)
    linked = same & ((truth.kind[left] == "original") | (truth.kind[right] == "original"))
    found = {kind: int((truth.kind[original[linked]] == kind).sum()) for kind in COPIES}
    families = len(np.unique(truth.family))
    joined = _joined(truth, left[~same], right[~same])
    return {
        "recall": {kind: round(count / families, 3) for kind, count in found.items()},
        "mean": round(sum(found.values()) / families / len(COPIES), 3),
        "pairs": len(left),
        "precision": round(float(same.mean()), 4) if len(same) else None,
        "families_joined": len(joined),
    }


def _joined(truth: _Truth, left: Array, right: Array) -> Array:
    """One pair, drawn, of every two families that wrong pairs join: numbers of `left`."""
    ends = np.sort(np.stack([truth.family[left], truth.family[right]]), axis=0)
    order = np.random.default_rng(0).permutation(len(left))
    _, first = np.unique(ends[:, order], axis=1, return_index=True)
    return np.random.default_rng(1).permutation(order[first])


def _sheet(files: list[Path], left: Array, right: Array, path: Path) -> None:
    """Draw pairs side by side, numbered, eight a row."""
    path.parent.mkdir(exist_ok=True)
    px, columns = _SHOWN_PX, 8
    rows = max(1, -(-len(left) // columns))
    sheet = Image.new("RGB", (columns * (2 * px + 10), rows * (px + 6)), "magenta")
    for number, pair in enumerate(zip(left, right, strict=True)):
        x, y = number % columns * (2 * px + 10), number // columns * (px + 6)
        for at, file in enumerate(pair):
            with Image.open(files[file]) as image:
                small = image.convert("RGB")
            small.thumbnail((px, px))
            sheet.paste(small, (x + at * (px + 1), y))
        ImageDraw.Draw(sheet).text((x + 1, y + 1), str(number), fill="magenta")
    sheet.save(path)


class _Runs:
    """Runs of the command on the planted pictures."""

    def __init__(self, work: Path) -> None:
        self.work, self.out = work, work / "run"
        self.files = _files(work / "images")

    def edges(self, *settings: str) -> tuple[Pairs, float]:
        """Pairs that the shipped pipeline joins, equal bytes included, and the stage's seconds."""
        command = [
            "run",
            _PIPELINE,
            "--input",
            str(self.work / "images"),
            "--output",
            str(self.out),
        ]
        command += [word for setting in settings for word in ("--set", setting)]
        subprocess.run(
            [sys.executable, "-m", "curate", *command], check=True, stdout=subprocess.DEVNULL
        )
        stage, folder = self._table("dedup")
        edges = pq.read_table(folder / "edges")
        nodes = np.load(folder / "nodes.npy")
        equal = np.flatnonzero(nodes != np.arange(len(nodes)))
        rows = [
            np.r_[edges["left_row"].to_numpy(), equal],
            np.r_[edges["right_row"].to_numpy(), nodes[equal]],
        ]
        numbers = self._numbers()
        seconds = sum(step.get("busy_seconds", 0) for step in stage["steps"].values())
        return _once(numbers[rows[0]], numbers[rows[1]]), seconds

    def _numbers(self) -> Array:
        """Number of the file of each row."""
        keys = self._column("ingest", "key").to_pylist()
        numbers = {file.name: number for number, file in enumerate(self.files)}
        return np.array([numbers[key] for key in keys])

    def _table(self, name: str) -> tuple[dict[str, Any], Path]:
        """What the last run says of a table, and its folder."""
        stage = json.loads((self.out / "run.json").read_text())["stages"][name]
        return stage, self.out / "stages" / f"{name}-{stage['fingerprint']}"

    def _column(self, table: str, name: str) -> Any:
        return pq.read_table(self._table(table)[1] / "shards")[name]

    def vectors(self) -> Array:
        """(N, D) float32, in the files' order."""
        found = unit_rows(storage.read_vectors(self._column("embed.vectors", "image_emb"))[0])
        ordered = np.empty_like(found)
        ordered[self._numbers()] = found
        return ordered


def _once(left: Array, right: Array) -> Pairs:
    ends = np.unique(np.sort(np.stack([left, right]), axis=0), axis=1)
    low, high = ends[:, ends[0] < ends[1]]
    return low, high


def _ours(runs: _Runs) -> Iterator[tuple[str, Pairs, float]]:
    yield "shipped", *runs.edges()
    yield "shipped, one probe", *runs.edges("dedup.max_probes=1")
    vectors = runs.vectors()
    np.save(runs.work / "vectors.npy", vectors)
    for cosine in (0.95, 0.9):
        begun = time.monotonic()
        left, right, _ = pairs_within(Rows.of(vectors), Rows.of(vectors), cosine)
        yield f"cosine {cosine:.2f}", _once(left, right), time.monotonic() - begun


def _peers(work: Path, python: str) -> Iterator[tuple[str, Pairs, float]]:
    for method in ("imagehash-phash", "imagehash-dhash", "imagededup-phash", "imagededup-dhash"):
        left, right, value, seconds = _peer(work, python, method)
        for most in _DISTANCES:
            near = value <= most
            yield f"{method} {most}", _once(left[near], right[near]), seconds
    for method in ("fastdup", "semhash"):
        left, right, value, seconds = _peer(work, python, method)
        for least in (0.96, 0.9):
            near = value >= least
            yield f"{method} {least:.2f}", _once(left[near], right[near]), seconds


def _peer(work: Path, python: str, method: str) -> tuple[Array, Array, Array, float]:
    path = work / "peers" / f"{method}.npz"
    if not path.exists():
        script = Path(__file__).with_name("dedup_peers.py")
        subprocess.run([python, script, method, work], check=True, stdout=subprocess.DEVNULL)
    with np.load(path) as found:
        return found["left"], found["right"], found["value"], float(found["seconds"])


def _table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"| method | {' | '.join(COPIES)} | mean | precision | families joined | s |",
        "|" + "---|" * (len(COPIES) + 5),
    ]
    for name, row in found.items():
        cells = [f"{row['recall'][kind]:.2f}" for kind in COPIES]
        cells += [f"{row['mean']:.3f}", f"{row['precision']}", f"{row['families_joined']}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("tars", type=click.Path(path_type=Path, exists=True))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--sample", default=400, show_default=True, help="Pictures to copy.")
@click.option("--seed", default=0, show_default=True)
@click.option("--peers", help="Python of an environment that has the other tools.")
def main(tars: Path, work: Path, sample: int, seed: int, peers: str | None) -> None:
    """Plant copies of pictures of TARS in WORK, which may be of an earlier call, and look."""
    if not (work / "images").exists():
        plant(tars, work / "images", sample, seed)
    runs = _Runs(work)
    truth = _Truth([file.name for file in runs.files])
    found: dict[str, dict[str, Any]] = {}
    methods = [_ours(runs), *([_peers(work, peers)] if peers else [])]
    for name, (left, right), seconds in (each for method in methods for each in method):
        found[name] = {**judge(truth, left, right), "seconds": round(seconds, 1)}
        wrong = truth.family[left] != truth.family[right]
        left, right = left[wrong], right[wrong]
        shown = _joined(truth, left, right)[:_SHOWN]
        _sheet(runs.files, left[shown], right[shown], work / "sheets" / f"{name}.png")
    (work / "table.md").write_text(_table(found))
    click.echo(json.dumps({"pictures": len(runs.files), "methods": found}))


if __name__ == "__main__":
    main()
