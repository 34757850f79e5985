"""One run over the bundled sample, and everything that must hold after it."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curate import __version__
from tests.support import (
    SAMPLE,
    TIMEOUT_SECONDS,
    assert_sound,
    curate,
    launch,
    list_tree,
    only_error,
    read_decisions,
    read_folder,
    read_report,
    read_shards,
    read_summary,
    sample_pairs,
    sample_truth,
    stage_folders,
    succeed,
)

HEAVY = ("torch", "faiss", "dask", "distributed", "transformers", "open_clip")
#: Calls the command in a fresh process and says which heavy packages that imported.
PROBE = f"""
import sys
from curate.cli import main
code = main(sys.argv[1:], standalone_mode=False)
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
sys.exit(code or 0)
"""

SHARD = r"\d{5}\.parquet"
ALLOWED = {
    "": r"\.lock|run\.json|run\.log",
    "decisions": SHARD,
    "shards": SHARD,
    "ingest": rf"(sources|skipped|layout)\.json|repeats\.npy|scan/{SHARD}",
    "remove": "",
    "embed.vectors": r"precision\.json",
    "embed.pixels": "",
    "embed.thumbnails": "",
    "decontaminate": r"(sources|evaluation)\.json",
    "dedup": r"(nodes|pixels|centroids|queries|query_rows|parts|labels|sizes|cluster_uids)\.npy"
    r"|earlier_(uids|cosines)\.npy"
    r"|caption_agreement\.npy|(queries|reach|groups|captions)\.json"
    r"|(keys|cells|detours|visits)/\d{5}\.npy|visits/\d{5}\.offsets\.npy|spots/\d{6}\.npy"
    rf"|(edges|earlier)/\d{{6}}\.parquet|recall/(pilot|rest)-{SHARD}",
    "select": r"decisions\.parquet|summary\.json",
    "write": rf"layout\.json|decisions/{SHARD}",
    "report": r"(report/)?(index\.html|report\.(js|css)|data\.js|curves\.json)"
    r"|(report/)?thumbnails/\d{4}\.webp",
}
IN_EVERY_STAGE = rf"manifest\.json|origin\.json|done/[a-z]+/[0-9a-z-]+\.json|shards/{SHARD}"


def arguments(out: Path, *more: str) -> list[str]:
    return ["dedup", "--input", str(SAMPLE / "shards"), "--output", str(out), *more]


def probe(*given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, *given],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )


@dataclass(frozen=True)
class Run:
    """A finished output and what the command printed."""

    out: Path
    stdout: str

    def rows(self) -> dict[str, dict[str, Any]]:
        """Decisions by key, which in the sample is unique."""
        return {row["key"]: row for row in read_decisions(self.out).to_pylist()}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("full") / "out"
    return Run(out, succeed("run", *arguments(out), by=launch).stdout)


@pytest.fixture(scope="module")
def changed(full: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, run again with other parameters of the stages from select on."""
    out = tmp_path_factory.mktemp("changed") / "out"
    shutil.copytree(full.out, out)
    settings = ("--set", "select.min_side_px=100", "--set", "write.webdataset=true")
    return Run(out, succeed("run", *arguments(out, *settings), by=launch).stdout)


def test_output_is_sound(full: Run) -> None:
    assert_sound(full.out)
    rows = full.rows()
    assert rows.keys() == sample_truth().keys()
    assert {row["source_file"] for row in rows.values()} == {f"0000{i}.tar" for i in range(4)}


def test_output_holds_nothing_unexpected(full: Run) -> None:
    for name in list_tree(full.out):
        top, _, rest = name.partition("/")
        allowed = ALLOWED[top] if rest and top != "stages" else ALLOWED[""]
        if top == "stages":
            folder, _, rest = rest.partition("/")
            table, _, fingerprint = folder.rpartition("-")
            assert re.fullmatch("[0-9a-f]{12}", fingerprint), name
            allowed = f"{IN_EVERY_STAGE}|{ALLOWED[table]}"
        assert re.fullmatch(allowed, rest or name), name


def test_shards_hold_the_original_bytes(full: Run) -> None:
    pairs = sample_pairs()
    kept = read_shards(full.out).select(["key", "image", "sha256", "caption"]).to_pylist()
    assert len(kept) > 700
    for row in kept:
        image, caption = pairs[row["key"]]
        assert hashlib.sha256(image).hexdigest() == row["sha256"]
        assert row["image"] == image
        assert row["caption"] == caption.decode()


def test_run_json(full: Run) -> None:
    summary = read_summary(full.out)
    assert summary["name"] == "dedup"
    assert summary["wall_seconds"] > 0
    assert summary["versions"]["curate"] == __version__
    assert {f"{n}-{t['fingerprint']}" for n, t in summary["stages"].items()} == stage_folders(
        full.out
    )
    assert summary["facts"]["dedup"]["recall"]["recall"] > 0.99
    assert summary["facts"]["embed"]["precision"]["image"]["dtype"] in ("float32", "bfloat16")
    assert summary["stages"]["embed.pixels"]["steps"]["shards"]["samples"] == 1004
    assert str(full.out) not in json.dumps(summary)


def test_summary_on_stdout(full: Run) -> None:
    counts = read_summary(full.out)["counts"]
    assert re.search(rf"^in +{counts['ingested']} +100.0%$", full.stdout, re.M)
    assert re.search(rf"^kept +{counts['kept']} ", full.stdout, re.M)
    for code, number in counts["dropped"].items():
        assert re.search(rf"^  {code} +{number} ", full.stdout, re.M)
    assert f"{full.out}/decisions" in full.stdout


def twins(kind: str) -> list[tuple[str, str]]:
    return [(k, row["of_key"]) for k, row in sample_truth().items() if row["kind"] == kind]


def share_found(full: Run, kind: str) -> float:
    """Share of twins that are in one cluster with their original, of which one was dropped."""
    rows, pairs = full.rows(), twins(kind)
    found: list[bool] = [
        rows[twin]["cluster_id"] == rows[original]["cluster_id"]
        and not (rows[twin]["keep"] and rows[original]["keep"])
        for twin, original in pairs
    ]
    assert len(found) > 30
    return sum(found) / len(found)


def test_finds_every_exact_twin(full: Run) -> None:
    assert share_found(full, "exact_twin") == 1
    rows = full.rows()
    for twin, original in twins("exact_twin"):
        assert "duplicate_bytes" in (rows[twin]["reason"], rows[original]["reason"])


def test_finds_near_twins(full: Run) -> None:
    assert share_found(full, "near_twin") >= 0.95


def test_drops_few_others_as_duplicates(full: Run) -> None:
    pairs = [*twins("exact_twin"), *twins("near_twin")]
    planted = {key for both in pairs for key in both}
    reasons = ("duplicate_bytes", "duplicate_perceptual")
    dropped = [key for key, row in full.rows().items() if row["reason"] in reasons]
    assert sum(key in planted for key in dropped) / len(dropped) >= 0.98


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("undecodable", "decode_error"),
        ("truncated", "decode_error"),
        ("empty_caption", "caption_missing"),
    ],
)
def test_accounts_for_every_broken_sample(full: Run, kind: str, reason: str) -> None:
    rows = full.rows()
    found = [rows[key]["reason"] for key, row in sample_truth().items() if row["kind"] == kind]
    assert found == [reason] * 37


def test_second_run_does_nothing(full: Run) -> None:
    def times() -> dict[str, int]:
        return {
            name: (full.out / name).stat().st_mtime_ns
            for name in list_tree(full.out) - {".lock", "run.log"}
        }

    before = times()
    done = probe("run", *arguments(full.out))
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"
    assert times() == before


def test_plan_computes_nothing(full: Run, tmp_path: Path) -> None:
    before = list_tree(full.out)
    settings = ("--set", "select.min_side_px=100", "--set", "write.webdataset=true")
    done = probe("plan", *arguments(full.out, *settings))
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "imported:"
    assert list_tree(full.out) == before
    states = {line.split()[1]: line.split(maxsplit=2)[::2] for line in lines if line[0] != " "}
    states.pop("tables:")
    for table in ("ingest", "embed.vectors", "embed.pixels", "embed.thumbnails", "dedup"):
        assert states[table] == ["done", "complete"]
    assert states["select"] == ["new", "select.min_side_px None -> 100"]
    assert states["write"] == ["new", "write.webdataset False -> True; input select changed"]
    fresh = probe("plan", *arguments(tmp_path / "new"), "--json")
    tables = json.loads(fresh.stdout.rpartition("imported:")[0])["tables"]
    assert {row["state"] for row in tables} == {"new"}
    assert not (tmp_path / "new").exists()


def test_changed_parameter_recomputes_what_depends_on_it(full: Run, changed: Run) -> None:
    assert_sound(changed.out)
    before, after = (read_summary(run.out)["stages"] for run in (full, changed))
    same = [name for name in before if before[name] == after[name]]
    embedded = ["embed.vectors", "embed.pixels", "embed.thumbnails"]
    assert same == ["ingest", "remove", *embedded, "decontaminate", "dedup"]
    new = stage_folders(changed.out) - stage_folders(full.out)
    assert {name.rpartition("-")[0] for name in new} == set(before) - set(same)
    assert "min_side_px: 100" in read_summary(changed.out)["pipeline"]
    for key, row in changed.rows().items():
        is_small = row["width"] is not None and min(row["width"], row["height"]) < 100
        assert ("image_too_small" in row["failed_rules"]) == is_small, key
    assert "image_too_small" in read_summary(changed.out)["counts"]["dropped"]


def test_webdataset_holds_the_kept(changed: Run) -> None:
    pytest.importorskip("webdataset")
    from webdataset.tariterators import group_by_keys, tar_file_expander

    rows = {row["uid"]: row for row in read_shards(changed.out).to_pylist()}
    uids = []
    for path in sorted((changed.out / "webdataset").glob("*.tar")):
        with path.open("rb") as file:
            stream = [{"url": path.name, "stream": file}]
            for sample in group_by_keys(tar_file_expander(stream)):
                row = rows[sample["__key__"]]
                uids.append(row["uid"])
                assert sample["txt"].decode() == row["caption"]
                assert sample["jpg"] == row["image"]
                assert json.loads(sample["json"])["uid"] == row["uid"]
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 3 * len(rows)
    assert uids == list(rows)
    sizes = json.loads((changed.out / "webdataset/sizes.json").read_text())
    assert sizes == {"00000.tar": len(rows)}


def test_export_holds_the_kept(full: Run, tmp_path: Path) -> None:
    done = succeed("export", full.out, "--to", "hf", "--output", tmp_path / "hf")
    assert done.stdout.splitlines()[0] == f"{len(read_shards(full.out))} samples in 1 file"
    table = read_folder(tmp_path / "hf/data")
    rows = {row["uid"]: row for row in table.to_pylist()}
    assert len(rows) == len(table)
    for row in read_shards(full.out).to_pylist():
        image = row.pop("image")
        found = rows.pop(row["uid"])
        assert found.pop("image")["bytes"] == image
        assert found == row
    assert not rows


def test_report_numbers_equal_the_decisions(full: Run) -> None:
    page = (full.out / "report/index.html").read_text("utf-8")
    counts = read_summary(full.out)["counts"]
    numbers = re.findall(r'<td class="number">−?([\d,]+)</td>', page)
    expected = [counts["ingested"], *counts["dropped"].values(), counts["kept"]]
    assert [int(number.replace(",", "")) for number in numbers[: len(expected)]] == expected
    rows = {row["uid"]: row for row in full.rows().values()}
    shown = read_report(full.out)["samples"]
    assert 600 < len(shown) < 1004
    assert 800 < len(read_report(full.out)["map"]) < 1004
    for sample in shown:
        row = rows[sample["uid"]]
        assert (sample["keep"], sample.get("reason")) == (row["keep"], row["reason"])
        assert sample.get("caption") == row["caption"] or len(row["caption"]) > 240
        assert ("picture" in sample) == (row["reason"] != "decode_error")
        if "picture" in sample:
            assert (full.out / "report" / sample["picture"]).stat().st_size > 0


def test_report_written_anew_is_the_same(full: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(full.out, out)
    before = {name: (out / name).read_bytes() for name in list_tree(out) - {".lock"}}
    shutil.rmtree(out / "report")
    assert succeed("report", out).stdout == f"{out}/report/index.html\n"
    assert {name: (out / name).read_bytes() for name in list_tree(out) - {".lock"}} == before
    assert "Nothing to do" in succeed("run", *arguments(out)).stdout


def test_show_tells_what_became_of_a_sample(full: Run) -> None:
    rows = full.rows()
    twin = next(row for row in rows.values() if row["reason"] == "duplicate_perceptual")
    broken = next(row for row in rows.values() if row["reason"] == "decode_error")
    found = json.loads(succeed("show", full.out, twin["uid"], broken["uid"][:9], "--json").stdout)
    for sample, row in zip(found, (twin, broken), strict=True):
        assert {name: sample[name] for name in row} == row
        assert sample["source"]["file"] == row["source_file"]
        assert [rule["code"] for rule in sample["rules"]] == row["failed_rules"]
        assert len(sample["what_would_keep_it"]) == len(row["failed_rules"])
    members = [row["uid"] for row in rows.values() if row["cluster_id"] == twin["cluster_id"]]
    assert found[0]["cluster"][0]["uid"] == twin["representative_uid"]
    assert sorted(member["uid"] for member in found[0]["cluster"]) == sorted(members)
    text = succeed("show", full.out, twin["uid"]).stdout
    assert "dropped: duplicate_perceptual" in text
    assert f"{twin['representative_uid']}  kept" in text
    assert "--set dedup.min_cosine=" in text


@pytest.mark.parametrize(
    ("uid", "told"), [("abc", "got 3 characters"), ("\x1b[2J" + "z" * 32, "got one of no samples")]
)
def test_show_of_no_sample_is_one_line(full: Run, uid: str, told: str) -> None:
    done = curate("show", full.out, uid)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in only_error(done.stderr)
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["show", "OUT", "a" * 32], ["stats", "OUT"], ["report", "OUT"]]
)
def test_what_asks_for_a_finished_run_says_so(tmp_path: Path, arguments: list[str]) -> None:
    done = curate(*(str(tmp_path) if one == "OUT" else one for one in arguments))
    assert done.returncode == 2
    assert "must hold a finished run" in only_error(done.stderr)
    assert list_tree(tmp_path) == set()


def test_stats_are_those_of_the_run(full: Run) -> None:
    assert succeed("stats", full.out).stdout == full.stdout
    assert json.loads(succeed("stats", full.out, "--json").stdout) == read_summary(full.out)


def test_help_fits_a_screen() -> None:
    lines = succeed("--help", by=launch).stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_clean_removes_only_what_is_unused(full: Run, changed: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(changed.out, out)
    unused = stage_folders(full.out) - {
        f"{name}-{table['fingerprint']}" for name, table in read_summary(out)["stages"].items()
    }
    assert {name.rpartition("-")[0] for name in unused} == {"select", "write", "report"}
    before = list_tree(out)
    done = succeed("clean", out)
    assert done.stdout.splitlines() == [
        *(f"removed {name}" for name in sorted(unused)),
        "3 folders removed",
    ]
    gone = before - list_tree(out)
    assert {name.split("/")[1] for name in gone} == unused
    assert_sound(out)
    settings = ("--set", "select.min_side_px=100", "--set", "write.webdataset=true")
    assert "Nothing to do" in succeed("run", *arguments(out, *settings)).stdout


def test_limit_keeps_that_many_and_is_published(full: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(full.out, out)
    assert len(list((out / "decisions").iterdir())) == 4
    succeed("run", *arguments(out, "--limit", "100"))
    assert_sound(out)
    limited = Run(out, "").rows()
    assert len(limited) == 100
    everything = full.rows()
    for key, row in limited.items():
        assert row["uid"] == everything[key]["uid"]
    assert [path.name for path in (out / "decisions").iterdir()] == ["00000.parquet"]
    # The earlier result is still there: going back computes nothing and publishes it again.
    succeed("run", *arguments(out))
    assert Run(out, "").rows() == everything
    assert read_summary(out)["counts"] == read_summary(full.out)["counts"]
