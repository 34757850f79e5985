import hashlib
import json
import shlex
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import storage
from curate.engine import export as exports
from curate.engine.export import LAYOUTS, Request, export
from curate.engine.workers import ClusterOptions, Workers
from curate.errors import (
    AlignmentError,
    ConfigError,
    CurateError,
    InputError,
    NothingKeptError,
    OutputError,
    SourceChangedError,
)
from curate.memorization.folds import draw_repeats
from tests.exports import KEPT, Found, Here, Silent, expected, make_run
from tests.support import curate, list_tree, only_error

STATE = {".lock", "export.json"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def truth(out: Path) -> dict[str, Found]:
    return expected(out)


Exporter = Callable[..., Path]


@pytest.fixture(scope="module")
def exporter(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Export once per request."""
    made: dict[str, Path] = {}

    def make(layout: str, **options: Any) -> Path:
        key = json.dumps([layout, options])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / layout
            run(Request(str(out), str(made[key]), layout, **options))
        return made[key]

    return make


def run(request: Request) -> dict[str, Any]:
    return export(request, Here(), Silent())


def digests(folder: Path) -> dict[str, str]:
    """Return the hashes of what readers see; TRAINING.md names its own folder."""
    names = list_tree(folder) - STATE - {"TRAINING.md"}
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}


def read_tars(folder: Path) -> tuple[dict[str, Found], dict[str, list[str]], list[dict[str, Any]]]:
    """Return samples by uid, uids by tar in their order, and what the JSON members hold."""
    found: dict[str, Found] = {}
    order: dict[str, list[str]] = {}
    fields = []
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, dot, suffix = member.name.partition(".")
                assert dot
                assert "/" not in key
                file = tar.extractfile(member)
                assert file is not None
                members.setdefault(key, {})[suffix] = file.read()
        order[path.name] = list(members)
        for uid, parts in members.items():
            assert uid not in found, "keys must be unique over the set"
            row = json.loads(parts.pop("json"))
            caption = parts.pop("txt").decode()
            ((suffix, image),) = parts.items()
            assert suffix == ("png" if image.startswith(b"\x89PNG") else "jpg")
            digest = hashlib.sha256(image).hexdigest()
            assert row["uid"] == uid
            assert row["caption"] == caption
            assert digest == row["sha256"]
            found[uid] = (digest, caption, row["captions"], row["weight"])
            fields.append(row)
    return found, order, fields


def test_the_command_offers_what_there_is() -> None:
    text = curate("export", "--help").stdout
    for layout in LAYOUTS:
        assert f"\n  {layout} " in text


def test_webdataset(exporter: Exporter, truth: dict[str, Found]) -> None:
    folder = exporter("webdataset", shard_samples=25)
    found, order, fields = read_tars(folder)
    assert found == truth
    assert list_tree(folder) - STATE == {f"{i:05d}.tar" for i in range(4)} | {"sizes.json"}
    sizes = storage.read_json(str(folder / "sizes.json"))
    assert sizes == {name: len(uids) for name, uids in order.items()}
    assert set(sizes.values()) == {22, 23}
    kinds: dict[str, set[type]] = {}
    for row in fields:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
    assert all(len(found) == 1 and type(None) not in found for found in kinds.values())


def draw_caption(fields: dict[str, Any], keys: list[str], rng: np.random.Generator) -> str:
    """open_clip's rule for --json-text-key-probs: of a random order of keys the first not empty."""
    drawn = (str(fields.get(key, "")).strip() for key in rng.permutation(keys))
    return next((caption for caption in drawn if caption), "")


@pytest.mark.parametrize("layout", ["webdataset", "groups"])
def test_captions_as_open_clip_draws_among_them(
    exporter: Exporter, truth: dict[str, Found], layout: str
) -> None:
    folder = exporter(layout, shard_samples=25)
    _, _, fields = read_tars(folder)
    assert {row["caption_2"] for row in fields if len(row["captions"]) == 1} == {""}
    rng = np.random.default_rng(0)
    keys = ["caption", "caption_2"]
    if layout == "groups":
        (line,) = (
            one
            for one in (folder / "TRAINING.md").read_text().splitlines()
            if one.startswith("  --json-text-key ")
        )
        _, given, _, *shares = shlex.split(line)
        assert given.split(";") == keys
        assert shares == ["1", "1"]
    for row in fields:
        drawn = {draw_caption(row, keys, rng) for _ in range(30)}
        assert drawn == set(truth[row["uid"]][2])


def test_open_clip_itself_draws_among_them(exporter: Exporter, truth: dict[str, Found]) -> None:
    data = pytest.importorskip("open_clip_train.data")
    if not hasattr(data, "JsonCaptionExtractor"):
        pytest.skip("this open_clip has no --json-text-key-probs")
    extract = data.JsonCaptionExtractor("caption;caption_2", sample_probs=[1, 1])
    _, _, fields = read_tars(exporter("groups", shard_samples=25))
    for row in fields:
        drawn = {extract(json.dumps(row).encode()) for _ in range(30)}
        assert drawn == set(truth[row["uid"]][2])


def test_order_is_drawn_by_uid_and_seed(
    exporter: Exporter, out: Path, tmp_path: Path, truth: dict[str, Found]
) -> None:
    first = exporter("webdataset", shard_samples=25)
    _, order, _ = read_tars(first)
    uids = [uid for part in order.values() for uid in part]
    places = {uid: place for place, uid in enumerate(truth)}
    ranks = np.array([places[uid] for uid in uids])
    assert abs(np.corrcoef(ranks, np.arange(KEPT))[0, 1]) < 0.3
    # How OUT is cut into shards, and on how many workers, is no part of the answer.
    other = make_run(tmp_path / "other", shard_samples=1000)
    request = Request(str(other), str(tmp_path / "same"), "webdataset", shard_samples=25)
    with Workers(ClusterOptions(workers=2), request.target) as workers:
        export(request, workers, Silent())
    assert digests(tmp_path / "same") == digests(first)
    _, seeded, _ = read_tars(exporter("webdataset", shard_samples=25, seed=1))
    assert seeded.keys() == order.keys()
    assert seeded != order
    assert {u for part in seeded.values() for u in part} == set(uids)


def test_groups_are_of_like_weight_and_equal_shards(
    exporter: Exporter, truth: dict[str, Found]
) -> None:
    folder = exporter("groups", shard_samples=5, groups=3)
    found, order, _ = read_tars(folder)
    assert found == truth
    assert {len(uids) for uids in order.values()} == {5}
    told = storage.read_json(str(folder / "export.json"))
    assert [group["samples"] for group in told["groups"]] == [30, 30, 30]
    mean = np.mean([weight for *_, weight in truth.values()])
    for number, group in enumerate(told["groups"]):
        names = [name for name in order if name.startswith(f"group{number}-")]
        assert names == [f"group{number}-{i:05d}.tar" for i in range(group["shards"])]
        weights = [truth[uid][3] / mean for name in names for uid in order[name]]
        assert group["factor"] == pytest.approx(np.mean(weights))
        assert np.ptp(weights) < 0.25
        # Within a group the order is drawn: it does not follow the weights.
        assert abs(np.corrcoef(weights, np.arange(len(weights)))[0, 1]) < 0.5
    assert told["weight_error"] < 0.05


def test_datacomp_subsets(exporter: Exporter, truth: dict[str, Found]) -> None:
    folder = exporter("datacomp", seed=3)
    kept, weighted = (np.load(folder / f"{name}.npy") for name in ("kept", "weighted"))
    assert kept.dtype == weighted.dtype == np.dtype("u8,u8")
    assert (folder / "kept.npy").stat().st_size == 128 + 16 * KEPT
    for subset in (kept, weighted):
        assert subset.tolist() == sorted(subset.tolist())
    assert [f"{a:016x}{b:016x}" for a, b in kept.tolist()] == sorted(truth)
    uids = list(truth)
    times = draw_repeats(uids, np.array([truth[u][3] for u in uids], np.float32), 3, "subset")
    wanted = sorted(uid for uid, n in zip(uids, times, strict=True) for _ in range(n))
    assert [f"{a:016x}{b:016x}" for a, b in weighted.tolist()] == wanted
    assert set(times) == {0, 1, 2, 3}


def test_a_resharder_selects_exactly_these(exporter: Exporter, truth: dict[str, Found]) -> None:
    """DataComp's rule: search each sample's packed uid in the subset, copy it as often as found."""
    folder = exporter("datacomp", seed=3)
    everything = [*truth, *(hashlib.md5(bytes([i])).hexdigest() for i in range(50))]
    for name in ("kept", "weighted"):
        subset = np.load(folder / f"{name}.npy", mmap_mode="r")
        keys = []
        for uid in everything:
            key = np.array([(int(uid[:16], 16), int(uid[16:], 16))], subset.dtype)[0]
            low = np.searchsorted(subset, key, "left")
            high = np.searchsorted(subset, key, "right")
            keys += [f"{uid}-{j}" for j in range(high - low)]
        assert len(keys) == len(set(keys)) == len(subset)
        assert {key.partition("-")[0] for key in keys} <= truth.keys()
        if name == "kept":
            assert keys == [f"{uid}-0" for uid in truth]


def test_repeats_are_the_weight_on_average() -> None:
    weights = np.array([0.0, 0.25, 1.0, 2.7])
    keys = [f"{i}" for i in range(4000)]
    for weight in weights:
        times = draw_repeats(keys, np.full(4000, weight), 0, "test")
        assert set(times) <= {int(weight), int(weight) + 1}
        assert times.mean() == pytest.approx(weight, abs=0.03)


def test_keep_list(exporter: Exporter, out: Path, truth: dict[str, Found]) -> None:
    table = pq.read_table(exporter("keep-list") / "keep.parquet")
    assert table.column_names == ["uid", "key", "source_file", "weight"]
    decisions = {row["uid"]: row for row in pq.read_table(out / "decisions").to_pylist()}
    for row in table.to_pylist():
        decided = decisions.pop(row["uid"])
        assert decided["keep"]
        assert row == {name: decided[name] for name in table.column_names}
        assert row["weight"] == truth[row["uid"]][3]
    assert not any(row["keep"] for row in decisions.values())


def test_hf_card_tells_the_numbers(exporter: Exporter) -> None:
    text = (exporter("hf", shard_samples=40) / "README.md").read_text()
    assert "| kept | 90 | 75.0% |" in text
    assert "| dropped: mismatched | 30 | 25.0% |" in text
    assert "among these: 1.2%" in text


def test_the_same_again_does_nothing_and_another_is_refused(
    exporter: Exporter, out: Path, tmp_path: Path
) -> None:
    folder = exporter("groups", shard_samples=5, groups=3)
    before = {name: (folder / name).stat().st_mtime_ns for name in list_tree(folder)}
    request = Request(str(out), str(folder), "groups", shard_samples=5, groups=3)
    assert not run(request)["computed"]
    assert {name: (folder / name).stat().st_mtime_ns for name in list_tree(folder)} == before
    with pytest.raises(OutputError, match=r"found one with other parameters or of another run"):
        run(Request(str(out), str(folder), "groups", shard_samples=5, groups=2))


class Stopping(Silent):
    """Stops the export, as Ctrl-C does, when so many tasks have ended."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def advance(self, counts: Mapping[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_stopped_export_resumes(exporter: Exporter, out: Path, tmp_path: Path) -> None:
    request = Request(str(out), str(tmp_path / "e"), "groups", shard_samples=5, groups=3)
    with pytest.raises(KeyboardInterrupt):
        export(request, Here(), Stopping(7))
    assert storage.read_json(str(tmp_path / "e/export.json"))["status"] == "unfinished"
    progress = Silent()
    assert export(request, Here(), progress)["computed"]
    assert progress.steps["scatter"] == (3, 3)
    assert progress.steps["gather"] == (18, 4)
    assert digests(tmp_path / "e") == digests(exporter("groups", shard_samples=5, groups=3))
    assert not (tmp_path / "e/.export").exists()


def test_works_on_any_store(exporter: Exporter, out: Path) -> None:
    request = Request(str(out), "memory://bucket/e", "mds", shard_samples=5, groups=3)
    assert run(request)["computed"]
    assert not run(request)["computed"]
    files = storage.walk_files(request.target)
    local = exporter("mds", shard_samples=5, groups=3)
    assert set(files) | STATE == list_tree(local)
    for name, digest in digests(local).items():
        data = storage.read_bytes(storage.join(request.target, name))
        assert hashlib.sha256(data).hexdigest() == digest
    assert 'DATA = "memory://' in storage.read_bytes(request.target + "/TRAINING.md").decode()
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_large_images_make_smaller_files(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(str(out), "x", "webdataset")
    assert exports._choose_samples(request, 10**6, 10**6 * 20_000) == 10_000
    assert exports._choose_samples(request, 10**6, 10**6 * 500_000) == 536
    grouped = Request(str(out), "x", "groups")
    assert exports._choose_samples(grouped, 666, 10**6) == 100
    assert exports._choose_samples(grouped, 64_000, 10**9) == 2000


# Bad input.


def refused(kind: type[CurateError], match: str, *given: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        run(Request(*given))
    assert "\n" not in str(caught.value)


def test_an_unknown_layout_names_the_nearest(out: Path, tmp_path: Path) -> None:
    refused(ConfigError, "Did you mean webdataset", str(out), str(tmp_path / "x"), "webdatset")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_not_ours(out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    refused(OutputError, r"found 'mine\.txt' and no export", str(out), str(tmp_path), "mds")
    refused(OutputError, r"earlier export; found .* and no export", str(out), str(out), "keep-list")
    assert list_tree(tmp_path) == {"mine.txt"}


def test_a_run_that_is_not_finished(out: Path, tmp_path: Path) -> None:
    refused(OutputError, "must hold a finished run", str(tmp_path), str(tmp_path / "x"), "hf")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    run_json = storage.read_json(str(copy / "run.json"))
    storage.commit_json(str(copy / "run.json"), {**run_json, "status": "unfinished"})
    refused(OutputError, "must hold a finished run", str(copy), str(tmp_path / "x"), "hf")
    ingest_alone = {"ingest": run_json["stages"]["ingest"]}
    storage.commit_json(str(copy / "run.json"), {**run_json, "stages": ingest_alone})
    refused(OutputError, "must be a run with the stage write", str(copy), str(tmp_path / "x"), "hf")


def test_a_run_that_kept_nothing(tmp_path: Path) -> None:
    out = make_run(tmp_path, keep=False)
    refused(NothingKeptError, "must hold kept samples", str(out), str(tmp_path / "x"), "hf")


def test_shards_that_are_not_whole(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "shards/00001.parquet").unlink()
    refused(AlignmentError, "must hold the 90 kept .* got 60", str(copy), str(tmp_path / "x"), "hf")
    table = pq.read_table(out / "shards/00001.parquet")
    images = table["image"].to_pylist()
    images[3] = images[3][:-1] + b"x"
    place = table.column_names.index("image")
    changed = table.set_column(place, table.schema.field("image"), [images])
    pq.write_table(changed, copy / "shards/00001.parquet")
    refused(SourceChangedError, "must hold the bytes", str(copy), str(tmp_path / "y"), "groups")


def test_a_source_of_vectors_has_no_images(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for path in (copy / "shards").iterdir():
        table = pq.read_table(path)
        place = table.column_names.index("image")
        field = table.schema.field("image")
        path.unlink()  # it may be a link to the stage's
        pq.write_table(table.set_column(place, field, pa.nulls(len(table), field.type)), path)
    refused(InputError, "its source has vectors alone", str(copy), str(tmp_path / "x"), "mds")
    result = run(Request(str(copy), str(tmp_path / "y"), "datacomp"))
    assert exports.describe_export(result, "y").splitlines()[0] == f"{KEPT} samples in 2 files"
    result = run(Request(str(copy), str(tmp_path / "z"), "keep-list"))
    assert exports.describe_export(result, "z").splitlines()[0] == f"{KEPT} samples in 1 file"


def test_images_that_open_clip_does_not_read_are_told(tmp_path: Path) -> None:
    out = make_run(tmp_path, kinds=("GIF", "PNG"))
    result = run(Request(str(out), str(tmp_path / "x"), "groups"))
    told = exports.describe_export(result, "x")
    assert "Warning: 30 images are neither JPEG nor PNG nor WebP" in told
    assert "30 of the samples are of other kinds" in (tmp_path / "x/TRAINING.md").read_text()


def test_the_command(out: Path, truth: dict[str, Found], tmp_path: Path) -> None:
    given = ("export", out, "--to", "groups", "--output", tmp_path / "e", "--shard-samples", 5)
    done = curate(*given)
    assert done.returncode == 0, done.stderr
    assert "group 3" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("/e/TRAINING.md")
    again = curate(*given)
    assert again.stdout.startswith("Nothing to do: the export was complete.")
    found, _, _ = read_tars(tmp_path / "e")
    assert found == truth
    for wrong in (
        (out, "--to", "mdss", "--output", tmp_path / "x"),
        (tmp_path / "none", "--to", "mds", "--output", tmp_path / "x"),
        (out, "--to", "mds", "--output", out),
    ):
        done = curate("export", *wrong)
        assert done.returncode == 2
        assert only_error(done.stderr)
