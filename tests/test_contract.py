"""What holds for every stage: one suite, run over all of them on a small real input."""

import hashlib
import io
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageDraw
from pydantic import ValidationError

from curate import storage
from curate.config import Pipeline, load_pipeline
from curate.engine.runner import BoundStage, bind
from curate.errors import ConfigError
from curate.schema import COLUMNS, public_columns, select_schema
from curate.stages import STAGES
from curate.stages.base import Stage, Step, Table

#: What a stage needs to do anything at all on a few dozen samples.
FIELDS: dict[str, dict[str, Any]] = {
    "dedup": {"min_cosine": 0.7, "min_pixel_match": 0.97},
    "score": {"proxy": "clip", "clip_proxies": 4, "clip_epochs": 1, "clip_views": 1},
    "select": {"min_caption_chars": 3, "min_side_px": 8, "max_aspect": 4},
    "write": {"shard_samples": 7, "webdataset": True},
    "report": {"pictures": 3},
}
WHOLE = 40
BROKEN = 5
#: Before `ingest` there are no samples: for `download` see tests/stages/test_download.py.
CHAIN = {name: kind for name, kind in STAGES.items() if name != "download"}
each_stage = pytest.mark.parametrize("name", CHAIN)


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (48 + seed % 5, 40), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, w, h = rng.integers(2, 24, 4).tolist()
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def samples() -> Iterator[tuple[str, bytes, str | None]]:
    """Yield key, image and caption; one shard of five has no usable sample at all."""
    for i in range(BROKEN):
        yield f"broken{i}", (b"" if i == 0 else b"not an image"), f"a caption without picture {i}"
    colours = ("red", "green", "blue", "yellow")
    for i in range(WHOLE):
        yield f"whole{i:02d}", encode(picture(i)), f"a {colours[i % 4]} drawing number {i}"
    yield "twin", encode(picture(0)), "an exact twin"
    near = picture(1).crop((1, 1, 48, 39)).resize((49, 40))
    yield "near", encode(near, "JPEG"), "a near twin"
    yield "long", encode(Image.new("RGB", (90, 20), "red")), "a banner"
    yield "silent", encode(picture(90)), None
    yield "short", encode(picture(91)), "x"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "data" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for key, image, caption in samples():
            members = [("png", image)]
            if caption is not None:
                members.append(("txt", caption.encode()))
            for suffix, content in members:
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return path


def lowest(kind: type[Stage], name: str) -> int:
    """Return the smallest value that a whole-number field takes."""
    limits = kind.model_fields[name].metadata
    return next((limit.ge for limit in limits if hasattr(limit, "ge")), 1)


def make_pipeline(source: Path, shard_samples: int, without: str | None = None) -> Pipeline:
    recipe: dict[str, dict[str, Any]] = {}
    for name, kind in CHAIN.items():
        recipe[name] = dict(FIELDS.get(name, {}))
        if "min_samples" in kind.model_fields:
            recipe[name]["min_samples"] = lowest(kind, "min_samples")
    recipe["ingest"] = {"shard_samples": shard_samples, "inputs": [str(source)]}
    recipe.pop(without or "", None)
    path = source.parent.parent / "pipeline.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return load_pipeline(str(path))


@dataclass(frozen=True)
class Run:
    """A pipeline that was carried out in this process, without a cluster."""

    stages: dict[str, BoundStage]
    tables: dict[str, pa.Table]

    def files(self, stage: str) -> dict[str, str]:
        """Return files below the stage's first folder that it publishes, by content."""
        room = self.stages[stage].room
        found = {}
        for folder in self.stages[stage].stage.publishes:
            for name in storage.walk_files(room.path(folder)):
                data = Path(room.path(folder, name)).read_bytes()
                found[f"{folder}/{name}"] = hashlib.sha256(data).hexdigest()
        return found

    def published(self, name: str) -> pa.Table:
        """Return the tables that `write` publishes in a folder, one after the other."""
        folder = self.stages["write"].room.path(name)
        names = [one for one in storage.list_names(folder) if one.endswith(".parquet")]
        tables = [storage.read_table(storage.join(folder, one)) for one in names]
        return pa.concat_tables(tables).replace_schema_metadata()


def run_step(bound: BoundStage, step: Step) -> None:
    # Tasks run in any order: the last first is as good as any.
    for task in reversed(step.tasks(bound.room)):
        step.run(bound.room, task)


def probe(bound: BoundStage, step: Step) -> None:
    """Find out about the encoder once for all runs, and fix what depends on measured times.

    Two runs may choose differently, which is allowed; what was committed is obeyed.
    """
    room = bound.room
    if not _PROBED:
        run_step(bound, step)
        choice = storage.read_json(room.path("precision.json"))
        for tower in ("image", "text"):
            choice[tower].update(dtype="float32", channels_last=tower == "image")
        choice.update(device="cpu", batch={"image": 8, "text": 4})
        storage.commit_json(room.path("precision.json"), choice)
        for name in storage.walk_files(room.path()):
            _PROBED[name] = Path(room.path(name)).read_bytes()
    for name, data in _PROBED.items():
        storage.commit_bytes(room.path(name), data)


_PROBED: dict[str, bytes] = {}


def carry_out(source: Path, out: Path, shard_samples: int, like: Run | None = None) -> Run:
    """Run a pipeline; with `like`, give every stage what the stages before it made there.

    A sample's vector may differ in its last digit with its place in a batch, and training makes
    more of that than any tolerance for the stages behind it should allow.
    """
    done: dict[str, BoundStage] = {}
    made: dict[str, pa.Table] = {}
    for bound in bind(make_pipeline(source, shard_samples), str(out)):
        bound = replace(bound, room=replace(bound.room, threads=1))
        done[bound.stage.name] = bound
        for step in bound.missing_steps():
            (probe if step.name == "probe" else run_step)(bound, step)
        for table in bound.stage.tables():
            if table.columns:
                made[table.name] = read_shards(bound, table.name)
                if like is not None:
                    take_over(bound, table.name, like.tables[table.name])
    return Run(done, made)


def read_shards(bound: BoundStage, table: str) -> pa.Table:
    """Return a table's shards one after the other."""
    room = bound.room
    shards = [storage.read_table(room.shard_path(table, shard)) for shard in room.shards()]
    return pa.concat_tables(shards).replace_schema_metadata()


def take_over(bound: BoundStage, table: str, content: pa.Table) -> None:
    row_of = {uid: row for row, uid in enumerate(content["uid"].to_pylist())}
    for shard in bound.room.shards():
        index = storage.read_table(bound.room.shard_path("ingest", shard), ["uid"])
        rows = [row_of[uid] for uid in index["uid"].to_pylist()]
        bound.room.commit_shard(table, shard, content.take(pa.array(rows)))


@pytest.fixture(scope="module")
def eight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return carry_out(source, tmp_path_factory.mktemp("eight"), BROKEN)


@pytest.fixture(scope="module")
def again(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return carry_out(source, tmp_path_factory.mktemp("again"), BROKEN)


@pytest.fixture(scope="module")
def one(source: Path, eight: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return carry_out(source, tmp_path_factory.mktemp("one"), 1000, like=eight)


@each_stage
def test_adds_exactly_what_it_says_and_keeps_uids_and_order(eight: Run, name: str) -> None:
    bound = eight.stages[name]
    room = bound.room
    assert len(room.shards()) > 8
    assert bound.stage.writes() == tuple(c for t in bound.stage.tables() for c in t.columns)
    for table in bound.stage.tables():
        if not table.columns:
            continue
        assert storage.list_names(room.path("shards", table=table.name)) == [
            f"{shard}.parquet" for shard in room.shards()
        ]
        for shard in room.shards():
            found = storage.read_table(room.shard_path(table.name, shard))
            index = storage.read_table(room.shard_path("ingest", shard), ["uid"])
            assert found["uid"].equals(index["uid"])
            assert set(found.column_names) == {"uid", *table.columns}
            assert len(found.column_names) == len({"uid", *table.columns})
            for column in table.columns:
                if COLUMNS[column].type is not None:
                    assert found.schema.field(column).type == COLUMNS[column].type
            written = found.schema.metadata[b"curate.fingerprint"].decode()
            assert written == bound.fingerprints[table.name]


@each_stage
def test_leaves_no_temporaries(eight: Run, name: str) -> None:
    bound = eight.stages[name]
    for table in bound.stage.tables():
        for file in storage.walk_files(bound.room.folders[table.name]):
            assert storage.TEMPORARY_PREFIX not in file


@each_stage
def test_twice_gives_equal_tables(eight: Run, again: Run, name: str) -> None:
    bound = eight.stages[name]
    assert bound.fingerprints == again.stages[name].fingerprints
    for table in bound.stage.tables():
        if table.columns:
            assert eight.tables[table.name].equals(again.tables[table.name])
    assert eight.files(name) == again.files(name)
    facts = [dict(run.stages[name].stage.facts(run.stages[name].room)) for run in (eight, again)]
    for found in facts:
        found.pop("precision", None)  # holds measured rates
    assert facts[0] == facts[1]


@each_stage
def test_one_shard_or_many_give_the_same_by_uid(eight: Run, one: Run, name: str) -> None:
    assert len(one.stages[name].room.shards()) == 1
    for table in one.stages[name].stage.tables():
        if table.columns:
            compare(eight.tables[table.name], one.tables[table.name])
    if name == "write":
        for folder in ("decisions", "shards"):
            compare(eight.published(folder), one.published(folder))


def compare(found: pa.Table, expected: pa.Table) -> None:
    """Demand equal values by uid; floats may differ in their last digits."""
    assert found.column_names == expected.column_names
    found, expected = found.sort_by("uid"), expected.sort_by("uid")
    for name in expected.column_names:
        left, right = found[name], expected[name]
        assert left.is_valid().equals(right.is_valid()), name
        if pa.types.is_floating(left.type):
            close = np.isclose(left.to_numpy(), right.to_numpy(), rtol=1e-4, atol=1e-4)
            assert (close | np.isnan(left.to_numpy())).all(), name
        elif COLUMNS[name].type is None:
            vectors, _ = storage.read_vectors(left)
            others, _ = storage.read_vectors(right)
            np.testing.assert_allclose(vectors, others, atol=1e-3)
        else:
            assert left.equals(right), name


@each_stage
def test_running_a_step_again_changes_nothing(eight: Run, name: str) -> None:
    # A task that was killed after its commit, and before its mark, is done once more.
    bound = eight.stages[name]
    files = eight.files(name)
    step = bound.stage.steps()[-1]
    for task in step.tasks(bound.room)[1:3] or step.tasks(bound.room):
        step.run(bound.room, task)
    for table in bound.stage.tables():
        if table.columns:
            assert read_shards(bound, table.name).equals(eight.tables[table.name])
    assert eight.files(name) == files


@each_stage
def test_a_shard_in_which_no_sample_is_usable(eight: Run, name: str) -> None:
    bound = eight.stages[name]
    shard = bound.room.shards()[0]
    index = storage.read_table(bound.room.shard_path("ingest", shard))
    assert all(key.startswith("broken") for key in index["key"].to_pylist())
    for table in bound.stage.tables():
        if table.columns:
            assert len(storage.read_table(bound.room.shard_path(table.name, shard))) == BROKEN


def test_no_usable_sample_at_all(tmp_path: Path) -> None:
    path = tmp_path / "data" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            header = tarfile.TarInfo(f"{i}.jpg")
            header.size = 3
            tar.addfile(header, io.BytesIO(b"bad"))
    run = carry_out(path, tmp_path / "out", 2)
    decisions = run.published("decisions")
    assert decisions["keep"].to_pylist() == [False] * 4
    assert decisions["reason"].to_pylist() == ["caption_missing"] * 4
    assert not storage.exists(run.stages["write"].room.path("shards"))


def test_nothing_is_lost(source: Path, eight: Run) -> None:
    ingested = {key: caption for key, _, caption in samples()}
    decisions = eight.published("decisions")
    assert decisions.schema == select_schema(public_columns("decisions"))
    assert decisions["key"].to_pylist() == list(ingested)
    reasons = dict(zip(decisions["key"].to_pylist(), decisions["reason"].to_pylist(), strict=True))
    assert reasons["broken0"] == "image_empty"
    assert {reasons[f"broken{i}"] for i in range(1, BROKEN)} == {"decode_error"}
    assert reasons["silent"] == "caption_missing"
    assert reasons["short"] == "caption_too_short"
    assert reasons["long"] == "aspect_too_extreme"
    assert sorted([reasons["twin"] or "", reasons["whole00"] or ""]) == ["", "duplicate_bytes"]
    assert sorted([reasons["near"] or "", reasons["whole01"] or ""]) == ["", "duplicate_perceptual"]
    assert all(reasons[f"whole{i:02d}"] is None for i in range(2, WHOLE))
    shards = eight.published("shards")
    assert shards.schema == select_schema(public_columns("shards"))
    kept = [key for key, reason in reasons.items() if reason is None]
    assert shards["key"].to_pylist() == kept
    images = {key: image for key, image, _ in samples()}
    assert shards["image"].to_pylist() == [images[key] for key in kept]


@each_stage
def test_a_missing_column_is_a_config_error(source: Path, name: str) -> None:
    pipeline = make_pipeline(source, BROKEN)
    stage = next(stage for stage in pipeline.stages if stage.name == name)
    writers = {COLUMNS[column].stage for column in stage.reads()}
    assert writers <= STAGES.keys()
    for writer in writers - {"ingest"}:
        with pytest.raises(ConfigError, match=rf"which no earlier stage writes\. Add {writer}"):
            make_pipeline(source, BROKEN, without=writer)


class _Filler(Stage):
    """Stands for whatever stage writes the columns that another reads."""

    name: ClassVar[str] = "filler"
    columns: tuple[str, ...]

    def tables(self) -> tuple[Table, ...]:
        return (Table("filler", self.columns),)


#: Tried in turn until one is valid and not what the field has anyway.
_VALUES: tuple[Any, ...] = (
    True, False, 0.5, 2, 3, 4, 30, 150, 20_000,
    "other", "folder", "heads", "l14", "open_clip:ViT-B-32/laion2b_s34b_b79k",
    {"column": "width", "fraction": 0.5}, [{"column": "width", "min": 1}], ["resolution"],
)  # fmt: skip


def changed(stage: Stage, field: str) -> Stage | None:
    """Return the stage with another value of a field, None if it has but one valid value."""
    values = stage.model_dump()
    for value in _VALUES:
        try:
            other = type(stage)(**{**values, field: value})
        except ValidationError:
            continue
        if getattr(other, field) != getattr(stage, field):
            return other
    return None


def fingerprints(pipeline: Pipeline, stage: Stage, out: str) -> dict[str, str]:
    """Fingerprint a stage's tables behind whatever it reads."""
    before = [one for one in pipeline.stages if one.name != stage.name]
    earlier = before[: list(CHAIN).index(stage.name)]
    written = {column for one in earlier for column in one.writes()}
    filler = _Filler(columns=tuple(c for c in stage.reads() if c not in written))
    stages = (stage,) if stage.name == "ingest" else (*earlier, filler, stage)
    return bind(Pipeline("test", "", stages), out)[-1].fingerprints


FIELD_NAMES = [(name, field) for name, kind in CHAIN.items() for field in kind.model_fields]


@pytest.mark.parametrize(("name", "field"), FIELD_NAMES, ids=".".join)
def test_hashed_fields_change_the_fingerprint(
    source: Path, tmp_path: Path, name: str, field: str
) -> None:
    extra = STAGES[name].model_fields[field].json_schema_extra
    if isinstance(extra, dict) and extra.get("execution_only"):
        pytest.skip("cannot change the result")
    pipeline = make_pipeline(source, BROKEN)
    stage = next(stage for stage in pipeline.stages if stage.name == name)
    if field == "format":  # another format must find its files
        (source.parent / "a.png").write_bytes(b"x")
    other = changed(stage, field)
    if other is None:
        pytest.skip("has but one valid value")
    before = fingerprints(pipeline, stage, str(tmp_path))
    inputs = {"inputs": (str(source.parent),)} if field == "format" else {}
    after = fingerprints(pipeline, other.model_copy(update=inputs), str(tmp_path))
    (source.parent / "a.png").unlink(missing_ok=True)
    for table in stage.tables():
        depends = table.fields is None or field in table.fields
        assert (before[table.name] != after[table.name]) == depends


def test_execution_only_fields_do_not(source: Path, tmp_path: Path) -> None:
    marked = {
        (name, field)
        for name, kind in CHAIN.items()
        for field, declared in kind.model_fields.items()
        if isinstance(declared.json_schema_extra, dict)
        and declared.json_schema_extra.get("execution_only")
    }
    paths = {("ingest", "inputs"), ("ingest", "root"), ("decontaminate", "inputs")}
    waits = {("ingest", "incomplete"), ("ingest", "wait_seconds")}
    copies = {("ingest", "spool"), ("ingest", "spool_gb")}
    assert marked == paths | waits | copies | {("dedup", "against")}
    copy = tmp_path / "elsewhere" / source.name
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    here = bind(make_pipeline(source, BROKEN), str(tmp_path / "a"))
    pipeline = make_pipeline(source, BROKEN)
    moved = pipeline.stages[0].model_copy(update={"inputs": (str(copy),), "root": str(copy.parent)})
    there = bind(replace(pipeline, stages=(moved, *pipeline.stages[1:])), "memory://other/out")
    assert [b.fingerprints for b in here] == [b.fingerprints for b in there]


@each_stage
def test_the_version_changes_the_fingerprint(source: Path, tmp_path: Path, name: str) -> None:
    pipeline = make_pipeline(source, BROKEN)
    stage = next(stage for stage in pipeline.stages if stage.name == name)
    newer = type(stage.__class__.__name__, (type(stage),), {"version": stage.version + 1})
    before = fingerprints(pipeline, stage, str(tmp_path))
    after = fingerprints(pipeline, newer(**stage.model_dump()), str(tmp_path))
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_a_changed_source_changes_everything_behind_it(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data" / source.name
    copy.parent.mkdir()
    data = bytearray(source.read_bytes())
    copy.write_bytes(data)
    before = bind(make_pipeline(copy, BROKEN), str(tmp_path))
    data[2000] ^= 1
    copy.write_bytes(data)
    after = bind(make_pipeline(copy, BROKEN), str(tmp_path))
    for old, new in zip(before, after, strict=True):
        assert not set(old.fingerprints.values()) & set(new.fingerprints.values())


def test_output_can_be_trained_on(eight: Run) -> None:
    room = eight.stages["write"].room
    shards = [
        pq.read_table(room.path("shards", n)) for n in storage.list_names(room.path("shards"))
    ]
    assert sum(map(len, shards)) == WHOLE
    assert math.isclose(np.mean(np.concatenate([s["weight"] for s in shards])), 1, abs_tol=1e-5)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
