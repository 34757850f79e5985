"""What the tests of the whole command share: the real command, small real inputs, invariants."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from curate import storage
from curate.cli import main
from curate.config import load_pipeline
from curate.engine.runner import BoundStage, bind
from curate.schema import REASONS, public_columns, select_schema

SAMPLE = Path(str(resources.files("curate"))) / "sample"
CURATE = Path(sys.executable).with_name("curate")
#: Far above what any run here takes: a hang must fail a test, not stop the suite.
TIMEOUT_SECONDS = 300

Members = list[tuple[str, bytes]]


def launch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end, in a process of its own as users do."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
        env=os.environ | environment,
    )


def command(*arguments: object) -> list[str]:
    return [str(CURATE), *map(str, arguments)]


def curate(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process: its workers then share one import with earlier ones.

    An error that is not told in a line is raised.
    """
    given = [str(one) for one in arguments]
    done = CliRunner().invoke(main, given, catch_exceptions=False)
    return subprocess.CompletedProcess(given, done.exit_code, done.stdout, done.stderr)


def succeed(
    *arguments: object, by: Callable[..., subprocess.CompletedProcess[str]] = curate
) -> subprocess.CompletedProcess[str]:
    """Run the command and demand that it ends well and quietly."""
    done = by(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error: " not in done.stderr
    return done


def call(*arguments: object, exit_code: int = 0) -> str:
    """Run the command in this process; return what it prints, or the line it ends with."""
    done = curate(*arguments)
    assert done.returncode == exit_code, done.stderr
    return only_error(done.stderr) if exit_code else done.stdout


def only_error(stderr: str) -> str:
    """Return the one line that an error is, after checking that it is one and the last."""
    assert "Traceback" not in stderr, stderr
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1, stderr
    assert lines[-1] == errors[0], stderr
    return errors[0]


@lru_cache(maxsize=1)
def sample_pairs() -> dict[str, tuple[bytes, bytes]]:
    """Image and caption of the bundled sample by key, in its order."""
    images: dict[str, bytes] = {}
    captions: dict[str, bytes] = {}
    for path in sorted((SAMPLE / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                if suffix == "txt":
                    captions[key] = file.read()
                elif suffix != "json":
                    images[key] = file.read()
    return {key: (images[key], captions[key]) for key in sorted(images)}


@lru_cache(maxsize=1)
def sample_truth() -> dict[str, dict[str, Any]]:
    rows = pq.read_table(SAMPLE / "truth.parquet").to_pylist()
    return {row["key"]: row for row in rows}


def clean_pairs(count: int) -> list[tuple[bytes, bytes]]:
    """Return pairs of the bundled sample with nothing wrong and no twin."""
    truth = sample_truth()
    twinned = {row["of_key"] for row in truth.values() if row["kind"].endswith("twin")}
    pairs = sample_pairs()
    keys = [key for key, row in truth.items() if row["kind"] == "clean" and key not in twinned]
    return [pairs[key] for key in sorted(keys)[:count]]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def pair(key: str, image: bytes, caption: bytes) -> Members:
    return [(f"{key}.jpg", image), (f"{key}.txt", caption)]


def write_samples(path: Path, samples: Iterable[tuple[str, bytes | None, str | None]]) -> Path:
    """Write a tar of keys with a picture and a caption, either of which may be missing."""
    members = []
    for key, image, caption in samples:
        for suffix, content in (("png", image), ("txt", caption and caption.encode())):
            if content is not None:
                members.append((f"{key}.{suffix}", content))
    return write_tar(path, members)


def write_subset(folder: Path, count: int, tars: int) -> Path:
    """Write samples of the bundled sample, good, bad and twins, as a few tars."""
    truth, pairs = sample_truth(), sample_pairs()
    twins = [(key, row["of_key"]) for key, row in truth.items() if row["kind"].endswith("twin")]
    first = [key for both in twins[: count // 4] for key in both]
    chosen = list(dict.fromkeys([*first, *pairs]))[:count]
    for number in range(tars):
        part = sorted(chosen[number::tars])
        write_tar(folder / f"{number:05d}.tar", [m for key in part for m in pair(key, *pairs[key])])
    return folder


def read_folder(folder: Path) -> pa.Table:
    """Return all Parquet files of a folder as one table."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def read_decisions(out: Path) -> pa.Table:
    return read_folder(out / "decisions")


def read_shards(out: Path) -> pa.Table:
    paths = sorted((out / "shards").glob("*.parquet"))
    return read_folder(out / "shards") if paths else _empty_shards()


def _empty_shards() -> pa.Table:
    return select_schema(public_columns("shards")).empty_table()


def read_summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return found


def read_report(out: Path) -> dict[str, Any]:
    """Return the samples, galleries and curve that the report's page shows."""
    return read_data(out / "report")


def read_data(folder: Path) -> dict[str, Any]:
    """Return what a page shows, from the data file beside it."""
    text = (folder / "data.js").read_text(encoding="utf-8")
    head, _, value = text.partition("window.curateReport = ")
    assert head == '"use strict";\n'
    found: dict[str, Any] = json.loads(value.rstrip().removesuffix(";"))
    return found


def list_tree(out: Path) -> set[str]:
    """Return the names of all files below a folder."""
    return {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}


def stage_folders(out: Path) -> set[str]:
    return {path.name for path in (out / "stages").iterdir()}


def assert_sound(out: Path) -> None:
    """Check everything that holds of any finished output, whatever went in."""
    decisions, shards, summary = read_decisions(out), read_shards(out), read_summary(out)
    assert summary["status"] == "finished"
    assert decisions.schema.equals(select_schema(public_columns("decisions")))
    assert shards.schema.equals(select_schema(public_columns("shards")))
    rows = {row["uid"]: row for row in decisions.to_pylist()}
    assert len(rows) == len(decisions), "uids must be unique"
    kept = {uid for uid, row in rows.items() if row["keep"]}
    assert shards["uid"].to_pylist() == [u for u in decisions["uid"].to_pylist() if u in kept]
    reasons = Counter(row["reason"] for row in rows.values() if not row["keep"])
    assert summary["counts"] == {
        "ingested": len(rows),
        "kept": len(kept),
        "dropped": {code: reasons[code] for code in REASONS if reasons[code]},
    }
    assert sum(reasons.values()) + len(kept) == len(rows)
    for row in rows.values():
        _check_decision(row, rows)
    weights = np.array([rows[uid]["weight"] for uid in kept])
    assert not kept or abs(float(weights.mean()) - 1) < 1e-4
    hashes = shards["sha256"].drop_null().to_pylist()
    assert len(set(hashes)) == len(hashes)
    for row in shards.select(["uid", "caption", "captions", "weight"]).to_pylist():
        assert row["captions"][0] == row["caption"] == rows[row["uid"]]["caption"]
        assert row["weight"] == rows[row["uid"]]["weight"]
    assert not [name for name in list_tree(out) if "/.tmp-" in f"/{name}"]


def _check_decision(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    assert re.fullmatch("[0-9a-f]{32}", row["uid"])
    if row["keep"]:
        assert row["reason"] is None
        assert row["failed_rules"] == []
        assert row["representative_uid"] is None
        return
    assert row["reason"] == row["failed_rules"][0]
    assert row["reason"] in REASONS
    assert row["weight"] == 0
    is_duplicate = row["reason"] in (
        "duplicate_bytes",
        "duplicate_perceptual",
        "duplicate_semantic",
    )
    assert (row["representative_uid"] is not None) == is_duplicate
    if is_duplicate:
        representative = rows[row["representative_uid"]]
        assert representative["keep"]
        assert representative["cluster_id"] == row["cluster_id"]


def assert_equal_decisions(one: Path, other: Path) -> None:
    """Check that two outputs decide alike, to the last digit."""
    for read in (read_decisions, read_shards):
        assert read(one).sort_by("uid").equals(read(other).sort_by("uid"))


def table_differences(one: Path, other: Path) -> list[str]:
    """Return the names of Parquet files in both outputs that hold different tables."""
    names = sorted(name for name in list_tree(one) if name.endswith(".parquet"))
    return [n for n in names if not pq.read_table(one / n).equals(pq.read_table(other / n))]


def carry_out(
    source: Path | str, out: Path, name: str = "dedup", **fields: Any
) -> list[BoundStage]:
    """Run a shipped pipeline in this process; fields are `stage__field`."""
    settings = [(*key.split("__"), value) for key, value in fields.items()]
    inputs = ("ingest", "inputs", (str(source),))
    stages = bind(load_pipeline(name, [inputs, *settings]), str(out))
    for bound in stages:
        for step in bound.stage.steps():
            for task in step.tasks(bound.room):
                step.run(bound.room, task)
    return stages


def decisions_of(stages: list[BoundStage]) -> list[dict[str, Any]]:
    (bound,) = (bound for bound in stages if bound.stage.name == "select")
    shards = bound.room.shards()
    tables = [storage.read_table(bound.room.shard_path("select", shard)) for shard in shards]
    return pa.concat_tables(tables).to_pylist()
