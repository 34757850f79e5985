"""Rules on what a source's metadata and tables from outside say, on a pool without images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.config import load_pipeline
from curate.engine.runner import bind
from curate.errors import ConfigError, InputError
from curate.formats import lookup
from curate.formats.sources import TABLES
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp
from tests.support import carry_out, decisions_of

COUNT = 40
FRACTION = {"column": "metadata.clip_l14_similarity_score", "fraction": 0.25}


def write_pool(folder: Path) -> Path:
    """Write a pool whose twins are its rows 0 and 1, with CLIP scores that rise by row."""
    for start in (0, 25):
        uids = datacomp_uids(25 if start == 0 else COUNT - 25, start)
        vectors = draw_vectors(COUNT)
        vectors[1] = vectors[0]
        own = vectors[start : start + len(uids)]
        write_datacomp(folder, f"{start:04d}", uids, l14_img=own, l14_txt=own)
        path = folder / f"{start:04d}.parquet"
        table = pq.read_table(path)
        scores = pa.array([(start + i) / COUNT for i in range(len(uids))], pa.float32())
        for name in ("clip_l14_similarity_score", "clip_b32_similarity_score"):
            table = table.set_column(table.column_names.index(name), name, scores)
        pq.write_table(table, path)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("pool") / "in")


def run(pool: Path, out: Path, **select: Any) -> list[dict[str, Any]]:
    fields = {f"select__{name}": value for name, value in select.items()}
    return decisions_of(carry_out(pool, out, "dedup", **fields))


def kept(rows: list[dict[str, Any]]) -> list[int]:
    return [row for row, decided in enumerate(rows) if decided["keep"]]


def facts(pool: Path, out: Path, **select: Any) -> dict[str, Any]:
    fields = {f"select__{name}": value for name, value in select.items()}
    bound = next(b for b in carry_out(pool, out, "dedup", **fields) if b.stage.name == "select")
    return bound.stage.facts(bound.room)


def write_scores(path: Path, rows: list[int], **columns: list[Any]) -> Path:
    table = pa.table({"uid": [f"{row:032x}" for row in rows], **columns})
    pq.write_table(table, path, row_group_size=7)
    return path


def test_metadata(pool: Path, tmp_path: Path) -> None:
    bounds = [{"column": "metadata.clip_b32_similarity_score", "min": 0.2, "max": 0.5}]
    rows = run(pool, tmp_path, thresholds=bounds)
    assert kept(rows) == list(range(8, 21))
    assert {row["reason"] for row in rows} == {None, "outside_threshold"}
    rows = run(pool, tmp_path, keep_fraction=FRACTION)
    assert kept(rows) == list(range(30, 40))
    # Of the twins the one of the higher score stays, or of the lower.
    for highest, stays in ((True, 1), (False, 0)):
        rule = {"column": "metadata.clip_b32_similarity_score", "highest": highest}
        rows = run(pool, tmp_path, prefer=[rule, "resolution"])
        assert kept(rows) == [stays, *range(2, COUNT)]


def test_clip_score_without_images(pool: Path, tmp_path: Path) -> None:
    """The baseline, by the pool's own score instead of the vectors'."""
    stages = carry_out(pool, tmp_path, "clip-score", select__keep_fraction=FRACTION)
    assert kept(decisions_of(stages)) == list(range(30, 40))


def test_a_table_by_uid_with_gaps(pool: Path, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "nsfw.parquet", list(range(5, 200)), punsafe=[0.1] * 195)
    table = [{"path": str(path)}]
    rule = {"column": "nsfw.punsafe", "max": 0.5}
    assert kept(run(pool, tmp_path / "a", score_tables=table, thresholds=[rule])) == list(
        range(5, COUNT)
    )
    spared = [{**rule, "missing": "keep"}]
    assert kept(run(pool, tmp_path / "b", score_tables=table, thresholds=spared)) == list(
        range(1, COUNT)
    )
    best = {"column": "nsfw.punsafe", "fraction": 1.0}
    assert kept(run(pool, tmp_path / "c", score_tables=table, keep_fraction=best)) == list(
        range(5, COUNT)
    )
    found = facts(pool, tmp_path / "c", score_tables=table, keep_fraction=best)
    assert found["joined"] == {"nsfw.punsafe": COUNT - 5}


@pytest.mark.parametrize("suffix", TABLES)
def test_tables_of_all_kinds_by_url(pool: Path, tmp_path: Path, suffix: str) -> None:
    """Each URL is in both files of the pool; a folder of tables is one table."""
    (tmp_path / "t").mkdir()
    for part in (0, 1):
        urls = [f"http://x/{i}" for i in range(part, 30, 2)]
        table = pa.table({"URL": urls, "aesthetic": [float(u[9:]) for u in urls]})
        path = tmp_path / f"t/{part}.{suffix}"
        if suffix == "parquet":
            pq.write_table(table, path)
        elif suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        else:
            sign = "\t" if suffix == "tsv" else ","
            lines = [sign.join(map(str, row.values())) for row in table.to_pylist()]
            path.write_text("\n".join([f"URL{sign}aesthetic", *lines]))
    tables = [{"path": str(tmp_path / "t"), "on": "url", "name": "laion"}]
    rule = [{"column": "laion.aesthetic", "min": 10}]
    rows = run(pool, tmp_path / "out", score_tables=tables, thresholds=rule)
    assert kept(rows) == [*range(10, 25), *range(35, 40)]


def test_any_field_of_the_metadata_joins(pool: Path, tmp_path: Path) -> None:
    path = tmp_path / "by_hash.csv"
    path.write_text(f"digest,score\n{3:064x},1\n{4:064x},2\n")
    tables = [{"path": str(path), "on": "sha256", "column": "digest"}]
    rule = [{"column": "by_hash.score", "min": 2}]
    rows = run(pool, tmp_path / "out", score_tables=tables, thresholds=rule)
    assert kept(rows) == [4, 29]


def test_rows_that_contradict_each_other(pool: Path, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [7, 7, 9], score=[1.0, 1.0, 2.0])
    rule = [{"column": "s.score", "min": 1}]
    tables = [{"path": str(path)}]
    assert kept(run(pool, tmp_path / "out", score_tables=tables, thresholds=rule)) == [7, 9]
    write_scores(path, [7, 9, 7], score=[1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=f"s: must say one thing of a sample .*{7:032x}") as error:
        run(pool, tmp_path / "out", score_tables=tables, thresholds=rule)
    assert "\n" not in str(error.value)


def test_a_table_is_known_by_its_content(pool: Path, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [7], score=[1.0])
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere/s.parquet"
    copy.write_bytes(path.read_bytes())

    def fingerprint(path: Path, column: str = "s.score") -> str:
        settings = [
            ("ingest", "inputs", (str(pool),)),
            ("select", "score_tables", [{"path": str(path)}]),
            ("select", "thresholds", [{"column": column, "min": 1}]),
        ]
        bound = bind(load_pipeline("dedup", settings), str(tmp_path / "out"))
        return next(one.fingerprints["select"] for one in bound if one.stage.name == "select")

    before = fingerprint(path)
    assert fingerprint(copy) == before
    write_scores(copy, [7], score=[1.5])
    assert fingerprint(copy) != before


def test_a_table_of_many_runs_is_joined_alike(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.permutation(3000).tolist()
    path = write_scores(tmp_path / "s.parquet", rows, score=[float(row) for row in rows])
    select = {
        "score_tables": [{"path": str(path)}],
        "thresholds": [{"column": "s.score", "min": 20, "max": 29}],
    }
    assert kept(run(pool, tmp_path / "one", **select)) == list(range(20, 30))
    monkeypatch.setattr(lookup.sort_runs, "__defaults__", (100,))
    monkeypatch.setattr(lookup, "_BATCH_ROWS", 64)
    assert kept(run(pool, tmp_path / "many", **select)) == list(range(20, 30))
    keys = list((tmp_path / "many").glob("stages/select-*/tables/*.keys.npy"))
    assert len(keys) > 20


# What does not hold.


def refused(pool: Path, tmp_path: Path, kind: type[Exception], match: str, **select: Any) -> None:
    with pytest.raises(kind, match=match) as error:
        run(pool, tmp_path / "out", **select)
    assert "\n" not in str(error.value)


def test_names_that_are_not_there(pool: Path, tmp_path: Path) -> None:
    rule = [{"column": "metadata.clip_score", "min": 1}]
    message = (
        r"metadata\.clip_score must be a number in the samples' metadata; none has it\. Numbers "
        r"there: clip_b32_similarity_score, clip_l14_similarity_score, original_height"
    )
    refused(pool, tmp_path, InputError, message, thresholds=rule)
    path = write_scores(tmp_path / "s.parquet", [7], score=[1.0], text=["a"])
    tables = [{"path": str(path)}]
    for column, said in (
        ("s.scores", "must have the column scores; got uid, score, text"),
        ("s.text", "text must hold numbers; got string"),
    ):
        rule = [{"column": column, "min": 1}]
        refused(pool, tmp_path, InputError, said, score_tables=tables, thresholds=rule)
    rule = [{"column": "t.score", "min": 1}]
    message = (
        r"select\.thresholds must be on columns of what there is \(metadata, s, before the dot"
    )
    refused(pool, tmp_path, ConfigError, message, score_tables=tables, thresholds=rule)
    message = r"select\.thresholds.*a numeric column .* 'caption' is not"
    rule = [{"column": "caption", "min": 1}]
    refused(pool, tmp_path, ConfigError, message, thresholds=rule)


def test_a_table_of_other_samples(pool: Path, tmp_path: Path) -> None:
    rule = [{"column": "s.score", "min": 1}]
    path = write_scores(tmp_path / "s.parquet", [99], score=[1.0])
    tables = [{"path": str(path)}]
    message = (
        r"s\.score must be a number of some sample; none of the samples is in the table by uid"
    )
    refused(pool, tmp_path, InputError, message, score_tables=tables, thresholds=rule)
    message = r"by colour \(they have none\)"
    tables = [{"path": str(path), "on": "colour", "column": "uid"}]
    refused(pool, tmp_path, InputError, message, score_tables=tables, thresholds=rule)


def test_files_that_are_no_tables(pool: Path, tmp_path: Path) -> None:
    rule = [{"column": "s.score", "min": 1}]
    for name, data, said in (
        ("s.txt", b"uid,score\n", "must be a table"),
        ("s.parquet", b"PAR1", "must be a whole table of numbers by key"),
        ("s.csv", b"", "cannot be read"),
        ("s.csv", b"uid,score\na,much\n", "cannot be read"),
        ("s.jsonl", b'{"uid": "a", "score": "much"}\n', "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        tables = [{"path": str(tmp_path / name)}]
        refused(pool, tmp_path, InputError, said, score_tables=tables, thresholds=rule)
    tables = [{"path": str(tmp_path / "none.csv"), "name": "s"}]
    refused(pool, tmp_path, InputError, "no such path", score_tables=tables, thresholds=rule)
