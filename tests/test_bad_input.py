"""Every kind of bad input ends in a reason code or in one clear line; nothing is lost silently."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.errors import InputError
from curate.formats import FORMATS, list_sources
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp
from tests.support import (
    TIMEOUT_SECONDS,
    Members,
    assert_sound,
    call,
    carry_out,
    clean_pairs,
    command,
    curate,
    decisions_of,
    launch,
    list_tree,
    only_error,
    pair,
    read_decisions,
    read_report,
    read_shards,
    read_summary,
    succeed,
    write_tar,
)

SHARD_SAMPLES = 8
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 0h9"/></svg>'
HTML = b"<!doctype html><script>alert(1)</script><img src=x onerror=alert(2)>"
LONG = "an apple and a pear, " * 47_620

#: Key -> reason, or None where the sample is to be kept; for samples of `bad.tar`.
SINGLE = {
    "zero_byte_image": "image_empty",
    "170_megapixels": "too_many_pixels",
    "svg_named_jpg": "decode_error",
    "html_named_jpg": "decode_error",
    "million_characters": "caption_too_long",
    "nul_in_caption": "caption_invalid",
    "latin_1_caption": "caption_invalid",
    "blank_caption": "caption_missing",
    "no_caption": "caption_missing",
    "no_image": "image_missing",
    "no_image_no_caption": "image_missing",
}


def megapixels(width: int, height: int) -> bytes:
    """A PNG of so many pixels in one bit each, which is small as a file."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def bad_members(image: bytes) -> Members:
    text = b"a caption"
    return [
        *pair("zero_byte_image", b"", text),
        ("170_megapixels.png", megapixels(17_000, 10_000)),
        ("170_megapixels.txt", text),
        *pair("svg_named_jpg", SVG, text),
        *pair("html_named_jpg", HTML, text),
        *pair("million_characters", image, LONG.encode()),
        *pair("nul_in_caption", image, b"one\0two"),
        *pair("latin_1_caption", image, "Käfer".encode("latin-1")),
        *pair("blank_caption", image, b" \n\t "),
        ("no_caption.jpg", image),
        ("no_image.txt", text),
        ("no_image_no_caption.json", b'{"width": 3}'),
    ]


def cut(path: Path, keep_bytes: int) -> None:
    with path.open("rb+") as file:
        file.truncate(keep_bytes)


def write_input(folder: Path) -> Path:
    good = iter(clean_pairs(20))
    spare = next(good)
    write_tar(folder / "bad.tar", bad_members(spare[0]))
    (folder / "empty.tar").write_bytes(b"")
    members = [m for i in range(4) for m in pair(f"whole{i}", *next(good))]
    members += pair("repeated", *next(good)) + pair("between", *next(good))
    members += pair("repeated", *next(good))
    # With dots in its keys, this is by the rule of the first dot one sample, "dotted".
    members += pair("dotted.1", *next(good)) + pair("dotted.2", *next(good))
    write_tar(folder / "good.tar", members)
    kept, broken = next(good), next(good)
    path = write_tar(folder / "halved.tar", pair("first", *kept) + pair("halved", *broken))
    # Two headers, one padded image, one padded caption; then a header and half of an image.
    whole = sum(512 + -(-len(part) // 512) * 512 for part in kept)
    cut(path, whole + 512 + len(broken[0]) // 2)
    # Long enough that whole shards of the index hold nothing else.
    garbage = [m for i in range(20) for m in pair(f"useless{i:02d}", bytes([i]) * 99, b"a caption")]
    write_tar(folder / "useless.tar", garbage)
    return folder


@dataclass(frozen=True)
class Run:
    """The run over everything that is bad in itself."""

    out: Path
    stderr: str

    def reasons(self, source: str) -> list[tuple[str, str | None]]:
        rows = read_decisions(self.out).to_pylist()
        return [(row["key"], row["reason"]) for row in rows if row["source_file"] == source]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("bad")
    settings = {"ingest.shard_samples": SHARD_SAMPLES, "select.max_caption_chars": 2000}
    done = launch(
        *("run", "dedup", "--input", write_input(folder / "in"), "--output", folder / "out"),
        *(text for name, value in settings.items() for text in ("--set", f"{name}={value}")),
        *("--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    return Run(folder / "out", done.stderr)


def test_bad_samples_are_all_accounted_for(bad: Run) -> None:
    assert_sound(bad.out)
    assert "Traceback" not in bad.stderr
    assert read_summary(bad.out)["counts"]["ingested"] == len(SINGLE) + 9 + 2 + 20


@pytest.mark.parametrize("key", SINGLE)
def test_bad_sample(bad: Run, key: str) -> None:
    assert dict(bad.reasons("bad.tar"))[key] == SINGLE[key]


def test_what_only_poses_as_a_picture_never_reaches_the_page(bad: Run) -> None:
    samples = {sample["key"]: sample for sample in read_report(bad.out)["samples"]}
    for key in ("svg_named_jpg", "html_named_jpg"):
        assert samples[key]["reason"] == "decode_error"
        assert "picture" not in samples[key]
    files = [path for path in (bad.out / "report").rglob("*") if path.is_file()]
    own = {"index.html", "data.js", "report.js", "report.css", "curves.json"}
    pictures = [path for path in files if path.name not in own]
    assert pictures
    for path in pictures:
        data = path.read_bytes()
        assert path.suffix == ".webp"
        assert (data[:4], data[8:12]) == (b"RIFF", b"WEBP")


def test_caption_is_cleaned(bad: Run) -> None:
    rows = {row["key"]: row for row in read_decisions(bad.out).to_pylist()}
    assert rows["nul_in_caption"]["caption"] == "onetwo"
    assert rows["latin_1_caption"]["caption"] == "K\ufffdfer"
    assert rows["million_characters"]["caption"] == LONG
    assert len(LONG) > 1_000_000
    assert (rows["170_megapixels"]["width"], rows["170_megapixels"]["height"]) == (17_000, 10_000)


def test_duplicate_keys_and_keys_with_dots(bad: Run) -> None:
    assert bad.reasons("good.tar") == [
        *((f"whole{i}", None) for i in range(4)),
        ("repeated", None),
        ("between", None),
        ("repeated", "duplicate_key"),
        ("dotted", None),
        ("dotted", "duplicate_key"),
    ]


def test_tar_cut_in_the_middle(bad: Run) -> None:
    assert bad.reasons("halved.tar") == [("first", None), ("halved", "image_missing")]
    scan = read_summary(bad.out)["stages"]["ingest"]["steps"]["scan"]
    assert scan["truncated_files"] == 2  # this and the one of zero bytes
    assert "halved.tar" in bad.stderr


def test_a_plan_says_that_it_did_not_look_for_damage(bad: Run, tmp_path: Path) -> None:
    settings = [f"ingest.shard_samples={SHARD_SAMPLES}", "select.max_caption_chars=2000"]
    given = ["dedup", "--input", bad.out.parent / "in", "--set", settings[0], "--set", settings[1]]
    told = "The input was listed and not read through: only a run finds damaged files."
    assert call("plan", *given, "--output", tmp_path / "out").splitlines()[-1] == told
    # A finished run has told.
    done = call("plan", *given, "--output", bad.out).splitlines()
    assert done[0].split() == ["done", "ingest", "complete"]
    assert told not in done


def test_shard_with_no_usable_sample(bad: Run) -> None:
    assert bad.reasons("useless.tar") == [(f"useless{i:02d}", "decode_error") for i in range(20)]
    tables = [pq.read_table(path) for path in sorted((bad.out / "decisions").iterdir())]
    assert any(len(t) == SHARD_SAMPLES and not any(t["keep"].to_pylist()) for t in tables)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input and finished output of three good samples, each in a shard of its own."""
    folder = tmp_path_factory.mktemp("three")
    members = [m for i, one in enumerate(clean_pairs(3)) for m in pair(f"{i}", *one)]
    write_tar(folder / "in" / "0.tar", members)
    succeed(*of_three(folder), "--workers", 1)
    return folder


def of_three(folder: Path) -> tuple[object, ...]:
    given = ("--input", folder / "in", "--output", folder / "out")
    return ("run", "dedup", *given, "--set", "ingest.shard_samples=1")


def test_three_samples_for_eight_workers(three: Path) -> None:
    """From `dedup` on: on two cores, eight processes take a minute to load the models."""
    succeed(*of_three(three), "--set", "dedup.min_cosine=0.8", "--workers", 8)
    assert_sound(three / "out")
    assert read_summary(three / "out")["counts"] == {"ingested": 3, "kept": 3, "dropped": {}}


def test_nothing_kept(three: Path) -> None:
    done = curate(*of_three(three), "--set", "select.min_side_px=5000", "--workers", 1)
    assert done.returncode == 1
    assert "every one of the 3 samples was dropped" in only_error(done.stderr)
    assert_sound(three / "out")
    assert read_decisions(three / "out")["reason"].to_pylist() == ["image_too_small"] * 3
    assert len(read_shards(three / "out")) == 0


def test_a_picture_that_shows_nothing_can_be_dropped(tmp_path: Path) -> None:
    """White on nothing: everybody sees it laid over white."""
    ghost = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    ghost.paste((255, 255, 255, 255), (9, 9, 30, 30))
    buffer = io.BytesIO()
    ghost.save(buffer, "PNG")
    members = [m for i, one in enumerate(clean_pairs(2)) for m in pair(f"{i}", *one)]
    members += [*pair("ghost", buffer.getvalue(), b"a ghost"), *pair("torn", b"none", b"torn")]
    write_tar(tmp_path / "in" / "0.tar", members)
    bounds = "select.thresholds=[{column: image_contrast, min: 0.5}]"
    succeed(*of_three(tmp_path), "--set", bounds, "--workers", 1)
    rows = {row["key"]: row for row in read_decisions(tmp_path / "out").to_pylist()}
    reasons = {key: row["reason"] for key, row in rows.items()}
    assert reasons == {"0": None, "1": None, "ghost": "outside_threshold", "torn": "decode_error"}
    assert (rows["ghost"]["image_contrast"], rows["torn"]["image_contrast"]) == (0, None)
    assert min(rows[key]["image_contrast"] for key in "01") > 10


def refuse(*arguments: object, exit_code: int = 2) -> str:
    """Run in this process what must end before any worker starts; return the line it ends with."""
    done = curate(*arguments)
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    return only_error(done.stderr)


def refuse_input(tmp_path: Path, given: Path) -> str:
    line = refuse("run", "dedup", "--input", given, "--output", tmp_path / "out")
    # A slip in --input must not spoil the output folder for the next attempt.
    assert not (tmp_path / "out").exists()
    return line


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "it is empty" in refuse_input(tmp_path, tmp_path / "in")


def test_no_such_path(tmp_path: Path) -> None:
    assert "no such path" in refuse_input(tmp_path, tmp_path / "in")
    assert "matches none" in refuse_input(tmp_path, tmp_path / "in" / "*.tar")


def test_wrong_layout(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.docx").write_bytes(b"PK")
    assert "found 1 .docx" in refuse_input(tmp_path, tmp_path / "in")
    shutil.copy(tmp_path / "in" / "notes.docx", tmp_path / "in" / "0.tar.gz")
    assert "Decompress it first" in refuse_input(tmp_path, tmp_path / "in")


def test_wrong_layout_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", [])
    arguments = ("run", "dedup", "--input", tmp_path / "in", "--output", tmp_path / "out")
    line = refuse(*arguments, "--set", "ingest.format=parquet")
    assert "Leave ingest.format at auto" in line


def test_images_in_a_table_and_beside_it(tmp_path: Path) -> None:
    """Neither is left out in silence."""
    (tmp_path / "in/more").mkdir(parents=True)
    (one, text), (other, _) = clean_pairs(2)
    pq.write_table(pa.table({"image": [one], "caption": [text]}), tmp_path / "in/0.parquet")
    (tmp_path / "in/more/1.jpg").write_bytes(other)
    line = refuse_input(tmp_path, tmp_path / "in")
    assert "of one layout; found folder and parquet (0.parquet holds images" in line
    for layout, name in (("parquet", "0.parquet"), ("folder", "more/")):
        found, sources = list_sources((str(tmp_path / "in"),), str(tmp_path / "in"), layout)
        assert (found, [source.name for source in sources]) == (layout, [name])


def test_parquet_without_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"caption": ["a"], "price": [1]}), tmp_path / "in" / "0.parquet")
    done = curate("run", "dedup", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert done.returncode in (1, 2)
    assert "0.parquet" in only_error(done.stderr)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("dedup.min_cosin=0.9", "Did you mean min_cosine?"),
        ("dedupe.min_cosine=0.9", "Did you mean dedup?"),
        ("min_cosine=0.9", "must be STAGE.FIELD=VALUE"),
        ("dedup.min_cosine=high", "dedup.min_cosine must be"),
        ("dedup.min_cosine=95", "got 95"),
        ("dedup.max_probes=1.5", "dedup.max_probes must be"),
        ("embed.max_pixels=0", "embed.max_pixels must be greater than or equal to 1; got 0"),
        ("ingest.shard_samples=[1]", "ingest.shard_samples must be"),
        ("select.thresholds=[{column: caption, min: 1}]", "a numeric column"),
        ("select.keep_fraction={column: clip_score, fraction: 2}", "got 2"),
        ("embed.encoder=none", "embed.encoder"),
        ("select.prefer=[", "must be valid YAML"),
        ("select.prefer=[best]", "select.prefer.0 must be 'mismatch', "),
        ("dedup.min_cosine=", "got nothing"),
        ("remove.lists=a.txt", "remove.lists must be a list; got 'a.txt'"),
        ("remove.lists=[{path: a, by: uid, x: 1}]", "remove.lists.0 has no field 'x'"),
    ],
)
def test_setting_that_does_not_hold(tmp_path: Path, setting: str, said: str) -> None:
    folder = write_tar(tmp_path / "in" / "0.tar", []).parent
    arguments = ("dedup", "--input", folder, "--output", tmp_path / "out", "--set", setting)
    assert said in refuse("run", *arguments)
    assert said in refuse("plan", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ingest: {}\nembedd: {}\n", "Did you mean embed?"),
        ("ingest: {}\nembed: {max_pixel: 3}\n", "Did you mean max_pixels?"),
        ("ingest: {}\nembed: {max_pixels: many}\n", "embed.max_pixels must be"),
        ("ingest: {}\nembed: {max_pixels: -1}\n", "got -1"),
        ("ingest: {}\ndedup: {}\n", "which no earlier stage writes. Add embed before it."),
        ("embed: {}\ningest: {}\n", "the first stage must be ingest"),
        ("ingest: {}\ningest: {}\n", "is given twice"),
        ("ingest: [1]\n", "ingest must be a mapping"),
        ("- ingest\n", "must be a mapping of stages"),
        ("", "must be a mapping of stages; got nothing"),
        ("ingest: {\n", "must be valid YAML"),
    ],
)
def test_pipeline_that_does_not_hold(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    line = refuse("run", path, "--input", tmp_path, "--output", tmp_path / "out")
    assert said in line
    assert str(path) in line


def test_no_such_pipeline(tmp_path: Path) -> None:
    arguments = ("--input", tmp_path, "--output", tmp_path / "out")
    assert "Did you mean dedup?" in refuse("run", "dedupe", *arguments)
    assert "No such file" in refuse("run", "mine.yaml", *arguments)
    assert "got a folder. Name one of them" in refuse("run", tmp_path, *arguments)


def test_options_that_do_not_hold(tmp_path: Path) -> None:
    arguments = ("run", "dedup", "--output", tmp_path / "out")
    assert "Add --input PATH" in refuse(*arguments)
    one = write_tar(tmp_path / "in" / "0.tar", []).parent
    both = ("--input", one, "--workers", 1, "--scheduler", "tcp://127.0.0.1:1")
    assert "must not be combined" in refuse(*arguments, *both)
    for option, value in (("--limit", 0), ("--limit", "many"), ("--workers", 0)):
        assert option in refuse(*arguments, "--input", one, option, value)
    assert "No such option" in refuse(*arguments, "--inputs", one)
    assert "must not be combined" in refuse("columns", "--json", "--markdown")
    share = ("--held-out", "0.15", "--held-out-list", "a.csv")
    assert "must not be combined" in refuse("ablate", tmp_path / "out", *share)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "not UTF-8 text"),
        (b"- local", "must be a mapping with `kind`"),
        (b"workers: 2", "kind must be one of local, local-cuda, slurm, kubernetes; got None"),
        (b"kind: [", "must be valid YAML"),
    ],
)
def test_cluster_that_does_not_hold(tmp_path: Path, content: bytes, said: str) -> None:
    folder = write_tar(tmp_path / "in" / "0.tar", []).parent
    (tmp_path / "cluster.yaml").write_bytes(content)
    arguments = ("--input", folder, "--output", tmp_path / "out")
    assert said in refuse("run", "dedup", *arguments, "--cluster", tmp_path / "cluster.yaml")


def test_table_that_no_rule_asks_for_must_be_there_too(tmp_path: Path) -> None:
    folder = write_tar(tmp_path / "in" / "0.tar", pair("a", b"", b"a caption")).parent
    arguments = ("run", "dedup", "--input", folder, "--output", tmp_path / "out")
    table = f"select.score_tables=[{{path: {tmp_path}/none.csv, on: url}}]"
    assert "none.csv: must be a file, folder or pattern" in refuse(*arguments, "--set", table)


def test_output_of_something_else(tmp_path: Path) -> None:
    folder = write_tar(tmp_path / "in" / "0.tar", []).parent
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable", encoding="utf-8")
    arguments = ("--input", folder, "--output", tmp_path / "out")
    assert "found 'thesis.tex' and no run.json" in refuse("run", "dedup", *arguments)
    assert "found 'thesis.tex' and no run.json" in refuse("plan", "dedup", *arguments)
    assert list_tree(tmp_path / "out") == {"thesis.tex"}
    assert "it holds no run.json" in refuse("clean", tmp_path / "out")


def test_output_that_is_a_file(tmp_path: Path) -> None:
    folder = write_tar(tmp_path / "in" / "0.tar", []).parent
    (tmp_path / "out").write_text("irreplaceable", encoding="utf-8")
    assert str(tmp_path / "out") in refuse("run", "dedup", "-i", folder, "-o", tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "irreplaceable"
    assert str(tmp_path / "out") in refuse("plan", "dedup", "-i", folder, "-o", tmp_path / "out")
    below = tmp_path / "out" / "below"
    assert str(tmp_path / "out") in refuse("run", "dedup", "-i", folder, "-o", below)


def test_output_as_input(bad: Run, tmp_path: Path) -> None:
    assert "is an output of curate" in refuse_input(tmp_path, bad.out)


def test_output_within_the_input(tmp_path: Path) -> None:
    """The next run would read it."""
    folder = write_tar(tmp_path / "in" / "0.tar", []).parent
    for name in ("run", "plan"):
        line = refuse(name, "dedup", "--input", folder, "--output", folder / "out")
        assert "must not lie in the input" in line
    assert list_tree(folder) == {"0.tar"}


def ask_all(out: Path, target: Path) -> dict[str, str]:
    """Ask everything that can be asked of a finished run; return what is said instead."""
    asked = {
        "show": ("show", out, "abcdef"),
        "stats": ("stats", out),
        "report": ("report", out),
        "export": ("export", out, "--to", "hf", "--output", target),
        "ablate": ("ablate", out, "--plan"),
        "clean": ("clean", out),
    }
    return {name: refuse(*arguments) for name, arguments in asked.items()}


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "there is no such folder"),
        (b"{", "its run.json is damaged"),
        (b"[]", "its run.json is damaged"),
        (b"\xff\xfe{", "its run.json is damaged"),
        (b'{"status": "finished"}', "its run.json is damaged"),
        (b'{"status": "unfinished"}', "the one in it has not ended"),
    ],
)
def test_what_holds_no_finished_run(tmp_path: Path, content: bytes | None, got: str) -> None:
    out = tmp_path / "out"
    if content is not None:
        out.mkdir()
        (out / "run.json").write_bytes(content)
    for line in ask_all(out, tmp_path / "target").values():
        assert f"{out}: must hold a finished run; {got}. " in line
        assert " with `curate run`" in line or " with the same `curate run`" in line
    assert not (tmp_path / "target").exists()


def copy_three(three: Path, out: Path) -> None:
    """Copy the output of three kept samples; other tests may have decided anew."""
    succeed(*of_three(three), "--workers", 1)
    shutil.copytree(three / "out", out)


def test_run_writes_a_damaged_mark_anew(three: Path, tmp_path: Path) -> None:
    copy_three(three, tmp_path / "out")
    whole = read_summary(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text("{", encoding="utf-8")
    given = ("--input", three / "in", "--output", tmp_path / "out", "--workers", 1)
    succeed("run", "dedup", *given, "--set", "ingest.shard_samples=1")
    again = read_summary(tmp_path / "out")
    assert again["counts"] == whole["counts"]
    assert again["stages"] == whole["stages"]


def test_damaged_results(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copy_three(three, out)
    for path in (*out.glob("stages/select-*/shards/*"), *out.glob("shards/*")):
        cut(path, path.stat().st_size // 2)
    for arguments in (("show", out, "abcdef"), ("report", out)):
        line = refuse(*arguments, exit_code=1)
        assert "must be Parquet as it was written; it is damaged" in line
        assert "curate run" in line
    shutil.rmtree(out / "stages")
    assert "stages/ was removed" in refuse("show", out, "abcdef")
    shutil.rmtree(out / "decisions")
    line = refuse("export", out, "--to", "keep-list", "--output", tmp_path / "to", exit_code=1)
    assert "must hold the 3 kept samples of its run.json; got 0" in line


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    """The last resort: what the system says, in one line."""
    (tmp_path / "out" / "run.json").mkdir(parents=True)
    line = refuse("stats", tmp_path / "out", exit_code=1)
    assert "run.json: cannot be used; Is a directory. Correct that" in line


def test_clean_of_what_is_no_output(tmp_path: Path) -> None:
    assert "must hold a finished run" in refuse("clean", tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "file" in refuse("clean", tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    line = refuse("run", "dedup", "--input", three / "in", "--output", out)
    assert "Choose another --output" in line
    line = refuse("run", "dedup", "--input", three / "in", "--output", out / "below")
    assert "choose another --output" in line


def in_own_mounts(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what it likes, seen by nobody else."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], check=False).returncode != 0:
        pytest.skip("needs the right to mount (root and `unshare`)")
    return subprocess.run(
        [unshare, "-m", "sh", "-euc", script, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )


def test_read_only_output(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mount = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
    for where in (out, out / "below"):
        given = command("run", "dedup", "--input", three / "in", "--output", where)
        done = in_own_mounts(mount, out, *given)
        assert done.returncode == 2, done.stderr
        assert "hoose another" in only_error(done.stderr)
    assert list_tree(out) == set()


def test_disk_full(three: Path, tmp_path: Path) -> None:
    """The disk is full when ingest writes its index, and when the run is tried again."""
    out = tmp_path / "out"
    out.mkdir()
    script = """
        out="$1"; shift
        mount -t tmpfs -o size=48k tmpfs "$out"
        "$@" || echo "code $?"
        cat /dev/zero > "$out/run.log" 2> "$out/.lock" || true
        echo "second" >&2
        "$@" || echo "code $?"
        find "$out" -name ".tmp-*"
    """
    given = command("run", "dedup", "--input", three / "in", "--output", out, "--workers", 1)
    done = in_own_mounts(script, out, *given)
    assert done.stdout.splitlines() == ["code 1", "code 1"], "and nothing half-written stays"
    for stderr in done.stderr.split("second\n"):
        line = only_error(stderr)
        assert "No space left on device" in line
        assert "run the same command again to resume" in line


def test_file_that_cannot_grow(three: Path, tmp_path: Path) -> None:
    """Much the same by a limit on the size of files, which needs no rights."""
    out = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        command("run", "dedup", "--input", three / "in", "--output", out, "--workers", 1),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
        preexec_fn=limit,
    )
    assert done.returncode == 1, done.stderr
    line = only_error(done.stderr)
    assert "File too large" in line
    assert "un the same command again to resume" in line
    assert not [name for name in list_tree(out) if ".tmp-" in name]
    assert read_summary(out)["status"] == "unfinished"


def test_two_runs_on_one_output(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("dedup", "--input", three / "in", "--output", out)
    with subprocess.Popen(
        command("run", *arguments, "--workers", 1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as first:
        try:
            wait_for(out / "run.json", first)
            assert "another run holds it" in refuse("run", *arguments)
            assert "another run holds it" in refuse("clean", out)
            assert first.poll() is None, "the first run goes on"
        finally:
            os.killpg(first.pid, signal.SIGKILL)


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("named", [name for name in FORMATS if name != "webdataset"])
def test_tars_named_as_any_other_layout(tmp_path: Path, named: str) -> None:
    write_tar(tmp_path / "in" / "0.tar", pair("a", b"image", b"caption"))
    arguments = ("run", "dedup", "--input", tmp_path / "in", "--output", tmp_path / "out")
    line = refuse(*arguments, "--set", f"ingest.format={named}")
    assert f"(ingest.format {named}); found 1 .tar. Leave ingest.format at auto." in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("parquet", "must have a column of image bytes"),
        ("folder", "must have a column that names images"),
        ("clip_retrieval", "found 1 .parquet"),
        ("arrow", "found 1 .parquet"),
    ],
)
def test_a_pool_named_as_another_layout(tmp_path: Path, named: str, said: str) -> None:
    vectors = draw_vectors(3)
    write_datacomp(tmp_path / "in", "0", datacomp_uids(3), l14_img=vectors, l14_txt=vectors)
    (tmp_path / "in/0.npz").unlink()
    with pytest.raises(InputError, match=said) as error:
        carry_out(tmp_path / "in", tmp_path / "out", ingest__format=named)
    assert "\n" not in str(error.value)
    if named == "parquet":
        assert "found uid, url, text, original_width" in str(error.value)


def test_a_pool_with_a_row_less(tmp_path: Path) -> None:
    write_datacomp(tmp_path / "in", "0", datacomp_uids(3), l14_img=draw_vectors(2))
    with pytest.raises(InputError, match=r"0\.npz: l14_img has 2, its metadata 3") as error:
        carry_out(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_two_samples_of_one_uid(tmp_path: Path) -> None:
    """The second is a row of its own, and its metadata says what it claimed to be."""
    write_datacomp(tmp_path / "in", "0", [*datacomp_uids(3), *datacomp_uids(2)],
                   l14_img=draw_vectors(5))  # fmt: skip
    stages = carry_out(tmp_path / "in", tmp_path / "out")
    rows = decisions_of(stages)
    assert [row["reason"] for row in rows] == [None] * 3 + ["duplicate_uid"] * 2
    assert len({row["uid"] for row in rows}) == 5
    room = stages[-1].room
    fields = room.read(room.shards()[0], ["metadata"])["metadata"].to_pylist()
    assert [json.loads(text).get("uid") for text in fields] == [None] * 3 + datacomp_uids(2)
