"""A small finished run to export: real stages around a stand-in for the judging ones."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate import storage
from curate.config import Pipeline
from curate.engine.manifest import provenance
from curate.engine.runner import bind, publish
from curate.schema import select_schema
from curate.stages.base import Stage, Table
from curate.stages.ingest import Ingest
from curate.stages.write import Write

COUNT = 120
#: Every fourth is dropped.
KEPT = 90
#: What a reader must find of a sample: hash of the image, caption, captions, weight.
Found = tuple[str, str, list[str], float]


class Here:
    """Runs tasks in this process."""

    def map(
        self, function: Callable[..., Any], tasks: Sequence[str], *arguments: Any
    ) -> Iterator[tuple[str, Any]]:
        for task in tasks:
            yield task, function(*arguments, task)


class InProcess(Here):
    """Takes the place of worker processes where these are not what is tested."""

    count = threads = 1

    def __init__(self, *arguments: object) -> None:
        pass

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def warm(self, *arguments: object) -> None:
        pass

    def everywhere(self, *arguments: object) -> None:
        pass

    def describe_dashboard(self) -> str:
        return "none"


class Silent:
    """Progress that nobody watches, but for what was done."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[int, int]] = {}

    def note(self, text: str) -> None:
        pass

    def begin(self, stage: str, step: str, tasks: int, done: int, workers: int = 0) -> None:
        self.steps[step] = (tasks, done)

    def advance(self, counts: Mapping[str, float]) -> None:
        pass

    def end(self) -> None:
        pass


class Judged(Stage):
    """Stands for the stages between ingest and write, by the samples' numbers."""

    name = "judged"

    def tables(self) -> tuple[Table, ...]:
        columns = ("sha256", "width", "keep", "reason", "failed_rules", "weight", "captions")
        return (Table("judged", columns),)


def image_of(number: int, kinds: tuple[str, ...]) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (8 + number % 5, 9, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 36)).save(buffer, kinds[number % len(kinds)])
    return buffer.getvalue()


def caption_of(number: int) -> str:
    return f"caption {number}, «quoted», \"so\" 'too', 1.5\t漢字\nsecond line"


def weight_of(number: int) -> float:
    """Three bands around .4, .9 and 2."""
    return (0.4, 0.9, 2.0)[number % 3] * (1 + number / 1000)


def write_source(path: Path, kinds: tuple[str, ...]) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(COUNT):
            members = (("img", image_of(number, kinds)), ("txt", caption_of(number).encode()))
            for suffix, content in members:
                header = tarfile.TarInfo(f"{number:04d}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def make_run(
    folder: Path,
    kinds: tuple[str, ...] = ("PNG", "JPEG"),
    keep: bool = True,
    shard_samples: int = 30,
) -> Path:
    """Write a finished OUT, by default of three shards, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_source(folder / "0.tar", kinds)
    out = folder / "out"
    ingest = Ingest(inputs=(str(folder / "0.tar"),), shard_samples=50)
    stages = (ingest, Judged(), Write(shard_samples=shard_samples))
    bound = bind(Pipeline("test", "write: {}\n", stages), str(out))
    for one in bound:
        if one.stage.name == "judged":
            judge(one.room, kinds, keep)
            continue
        for step in one.stage.steps():
            for task in step.tasks(one.room):
                step.run(one.room, task)
    publish(bound[-1], str(out), {})
    kept = KEPT if keep else 0
    dropped = {"mismatched": COUNT - kept}
    run = {
        "status": "finished",
        "name": "test",
        "pipeline": "write: {}\n",
        "counts": {"ingested": COUNT, "kept": kept, "dropped": dropped},
        "facts": {"select": {"mismatch": {"expected_rate": 0.0123}}},
        "stages": {
            name: {"fingerprint": fingerprint}
            for one in (bound[0], bound[-1])
            for name, fingerprint in one.fingerprints.items()
        },
        "versions": provenance(),
    }
    storage.commit_json(str(out / "run.json"), run)
    return out


def judge(room: Any, kinds: tuple[str, ...], keep: bool) -> None:
    for shard in room.shards():
        rows = []
        for row in room.read(shard, ["key", "caption"]).to_pylist():
            number = int(row["key"])
            kept = keep and number % 4 != 0
            merged = [f"other caption {number}"] * (number % 2)
            rows.append(
                {
                    "uid": row["uid"],
                    "sha256": hashlib.sha256(image_of(number, kinds)).hexdigest(),
                    "width": 40 if number % 5 else None,
                    "keep": kept,
                    "reason": None if kept else "mismatched",
                    "failed_rules": [] if kept else ["mismatched"],
                    "weight": weight_of(number) if kept else 0.0,
                    "captions": [row["caption"], *merged] if kept else None,
                }
            )
        names = ["uid", *room.stage.writes()]
        room.commit_shard("judged", shard, pa.Table.from_pylist(rows, select_schema(names)))


def expected(out: Path) -> dict[str, Found]:
    """Read OUT's shards: what every export must hold."""
    rows: dict[str, Found] = {}
    for path in sorted((out / "shards").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            digest = hashlib.sha256(row["image"]).hexdigest()
            assert digest == row["sha256"]
            rows[row["uid"]] = (digest, row["caption"], row["captions"], row["weight"])
    return rows


@dataclass(frozen=True)
class Page:
    """A page with commands."""

    text: str

    def block(self, kind: str, start: str = "") -> str:
        """Return the block of a kind that begins with some text."""
        blocks = [part.partition("```")[0] for part in self.text.split(f"```{kind}\n")[1:]]
        return next(block for block in blocks if block.startswith(start))


def need(package: str) -> None:
    """Skip, visibly, where a package that reads our output is not installed."""
    if find_spec(package) is None:
        pytest.skip(f"could not import {package!r}: pip install 'curate[readers]'")


def run_python(code: str, *arguments: object, folder: Path) -> str:
    """Run code in a process of its own: other people's warnings are not ours."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ
        | {"HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "TMPDIR": str(folder)}
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
