"""Time and memory of a report on many samples, and of opening it in a browser.

`python -m benchmarks.report FOLDER [--samples 100000]` lays out tables as the stages before the
report leave them (drawn decisions with every reason, real thumbnails of the bundled sample,
random unit vectors), and, given again, builds the report and prints one JSON line. Wants playwright
and chromium for the browser's part, and prints null without. `--check` takes FOLDER as the OUT of
a run instead, and compares every number that its page shows with the decisions.
"""

import argparse
import html
import io
import json
import re
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from curate.memorization.folds import hash_unit
from curate.stages.base import Room
from curate.stages.report import Report, RunFacts, write_report
from curate.storage import vector_column
from tests.stages.test_report import FACTS, decisions, lay_out
from tests.support import read_decisions, read_report, sample_pairs

SHARD_SAMPLES = 6250
WIDTH = 512


def prepare(folder: Path, samples: int) -> Room:
    """Lay out `samples` samples with thumbnails and vectors."""
    from PIL import Image

    thumbnails = []
    for data, _ in list(sample_pairs().values())[:400]:
        try:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
        except OSError:  # the sample has broken pictures
            continue
        picture.thumbnail((128, 128))
        held = io.BytesIO()
        picture.save(held, "WEBP", quality=80)
        thumbnails.append(held.getvalue())
    table = decisions(samples)
    shards = -(-samples // SHARD_SAMPLES)
    room = lay_out(folder, table, None, shards)
    rng = np.random.default_rng(0)
    room.origins["image_emb"] = "embed.vectors"
    room.folders["embed.vectors"] = str(folder / "embed.vectors")
    for shard in room.shards():
        uids = room.read(shard, [])["uid"]
        picks = (hash_unit(uids.to_pylist(), 1, "thumbnails") * len(thumbnails)).astype(int)
        pictures = pa.array([thumbnails[place] for place in picks], pa.binary())
        room.commit_shard("embed.thumbnails", shard, pa.table({"uid": uids, "thumbnail": pictures}))
        vectors = rng.normal(size=(len(uids), WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        column = vector_column(vectors, np.ones(len(uids), bool))
        room.commit_shard("embed.vectors", shard, pa.table({"uid": uids, "image_emb": column}))
    return room


def check(out: Path) -> dict[str, int]:
    """Compare what a run's page says with its decisions, counted anew; return what was compared.

    Raises
    ------
    AssertionError
        If a number or a shown sample differs.
    """
    rows = {row["uid"]: row for row in read_decisions(out).to_pylist()}
    page = html.unescape((out / "report/index.html").read_text("utf-8"))
    shown = read_report(out)
    reasons = Counter(row["reason"] for row in rows.values())
    kept = reasons.pop(None, 0)
    assert f"{kept:,} of {len(rows):,} samples" in page
    for code, number in reasons.items():
        found = re.search(rf'data-gallery="{code}">.*?<td class="number">−([\d,]+)<', page)
        assert found is not None
        assert found.group(1) == f"{number:,}", code
    names = {None: "kept", **{code: code for code in reasons}}
    totals = {gallery["name"]: gallery["groups"][0]["total"] for gallery in shown["galleries"]}
    for code, name in names.items():
        assert totals.get(name, reasons.get(code, kept)) == (
            kept if code is None else reasons[code]
        )
    scores = 0
    for sample in shown["samples"]:
        row = rows[sample["uid"]]
        assert sample["keep"] == row["keep"]
        assert sample.get("reason") == row["reason"]
        for name, value in sample["scores"].items():
            assert abs(value - row[name]) < 1e-4
            scores += 1
    curves = json.loads((out / "report/curves.json").read_text("utf-8"))
    for name, chart in curves["histograms"].items():
        have = [row["keep"] for row in rows.values() if row[name] is not None]
        assert (sum(chart["kept"]), sum(chart["dropped"])) == (sum(have), len(have) - sum(have))
    for point in curves["threshold"]:
        if point["rate"] == shown["curve"]["current"]:
            assert point["kept"] == kept
    return {
        "reasons": len(reasons),
        "samples": len(shown["samples"]),
        "scores": scores,
        "histograms": len(curves["histograms"]),
    }


def open_in_browser(page: Path) -> float | None:
    """Return seconds from the start of loading to the first picture drawn."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto("about:blank")
        begun = time.monotonic()
        tab.goto(page.as_uri(), wait_until="commit")
        tab.locator("#wall img").first.scroll_into_view_if_needed()
        tab.locator("#wall img").first.evaluate("image => image.decode()")
        seconds = time.monotonic() - begun
        browser.close()
    return seconds


def main() -> None:
    """Prepare, build, open, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        print(json.dumps(check(given.folder)))
        return
    prepared = given.folder / "prepared.json"
    if not prepared.exists():
        room = prepare(given.folder, given.samples)
        prepared.write_text(json.dumps([room.folders, room.origins]), "utf-8")
        print("prepared; give the command again to measure in a fresh process")
        return
    folders, origins = json.loads(prepared.read_text("utf-8"))
    room = Room(Report(), folders, origins, frozenset({"report"}))
    target = given.folder / "report"
    shutil.rmtree(target, ignore_errors=True)
    begun, busy = time.monotonic(), time.process_time()
    manifest = {"parameters": {"max_mismatch_rate": 0.05}, "steps": {}, "versions": {}}
    samples = write_report(room, RunFacts(FACTS, {"select": manifest}), str(target))
    seconds, busy = time.monotonic() - begun, time.process_time() - busy
    size_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = open_in_browser(target / "index.html")
    found = {
        "samples": samples,
        "wall_seconds": round(seconds, 1),
        "busy_seconds": round(busy, 1),
        "peak_mb": round(peak_kib * 1024 / 1e6),
        "report_mb": round(size_bytes / 1e6, 1),
        "first_picture_seconds": first and round(first, 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
