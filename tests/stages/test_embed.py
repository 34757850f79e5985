import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageDraw

from curate import storage
from curate.config import Pipeline
from curate.engine.runner import BoundStage, bind
from curate.formats.pixels import decode, read_thumbnail
from curate.models.encoders import Precision, load_encoder
from curate.stages.base import Room, Stage
from curate.stages.embed import Embed
from curate.stages.ingest import Ingest
from tests.support import write_samples

Array = np.ndarray[Any, Any]

#: The smallest architecture that open_clip describes.
SMALL = "ViT-S-32-alt"
TABLES = ("embed.vectors", "embed.pixels", "embed.thumbnails")


def picture(seed: int, size: tuple[int, int] = (60, 50)) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, w, h = rng.integers(2, 28, 4).tolist()
        pen.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def samples() -> Iterator[tuple[str, bytes | None, str | None]]:
    yield "whole", picture(0), "a drawing"
    yield "zero", b"", "no bytes"
    yield "broken", b"\xff\xd8\xff nothing", "broken bytes"
    yield "cut", picture(1)[:200], "cut short"
    yield "large", picture(2, (300, 200)), "too many pixels"
    yield "silent", picture(3), None
    yield "blank", picture(4), "   "
    yield "blind", None, "no picture"
    for i in range(5):
        yield f"more{i}", picture(10 + i), "words " * 3 * i + "of several lengths"
    yield "wordy", picture(20), "word " * 400


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("source") / "00000.tar", samples())


def make(source: Path, **fields: Any) -> Pipeline:
    stages: tuple[Stage, ...] = (
        Ingest(inputs=(str(source),), shard_samples=6),
        Embed(max_pixels=50_000, **fields),
    )
    return Pipeline("test", "", stages)


def run(pipeline: Pipeline, out: Path, batch: int = 4) -> Room:
    ingest, embed = bind(pipeline, str(out))
    for bound in (ingest, embed):
        for step in bound.missing_steps():
            for task in step.tasks(bound.room):
                step.run(bound.room, task)
            if step.name == "probe":
                fix_precision(bound.room, batch)
    return embed.room


def fix_precision(room: Room, batch: int) -> None:
    """Take plain float32, whatever is fast here, so that an oracle can be computed."""
    choice = storage.read_json(room.path("precision.json"))
    for tower in ("image", "text"):
        choice[tower].update(dtype="float32", channels_last=False)
    choice.update(device="cpu", batch={"image": batch, "text": batch})
    storage.commit_json(room.path("precision.json"), choice)


def rows_of(room: Room, table: str) -> pa.Table:
    shards = [storage.read_table(room.shard_path(table, shard)) for shard in room.shards()]
    return pa.concat_tables(shards).replace_schema_metadata()


@pytest.fixture(scope="module")
def room(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Room:
    return run(make(source), tmp_path_factory.mktemp("offline"))


def by_key(room: Room, table: str) -> dict[str, dict[str, Any]]:
    keys = rows_of(room, "ingest")["key"].to_pylist()
    return dict(zip(keys, rows_of(room, table).to_pylist(), strict=True))


def test_pixel_facts(room: Room) -> None:
    facts = by_key(room, "embed.pixels")
    images = {key: image for key, image, _ in samples()}
    reasons = {key: row["decode_reason"] for key, row in facts.items() if row["decode_reason"]}
    # Of what has no bytes the index has said so: there is nothing to decode.
    assert reasons == {
        "broken": "decode_error",
        "cut": "decode_error",
        "large": "too_many_pixels",
    }
    for key, row in facts.items():
        image = images[key]
        digest = hashlib.sha256(image).hexdigest() if image else None
        assert row["sha256"] == digest, key
        assert (row["image_contrast"] is None) == (key in reasons or not row["width"]), key
    assert (facts["whole"]["width"], facts["whole"]["height"]) == (60, 50)
    assert (facts["large"]["width"], facts["large"]["height"]) == (300, 200)
    for key in ("zero", "broken", "blind"):
        assert (facts[key]["width"], facts[key]["height"]) == (None, None)


def test_thumbnails(room: Room) -> None:
    undecodable = {"zero", "broken", "cut", "large", "blind"}
    for key, row in by_key(room, "embed.thumbnails").items():
        assert (row["thumbnail"] is None) == (key in undecodable)
        if row["thumbnail"] is not None:
            assert read_thumbnail(row["thumbnail"]).size == (60, 50)


def test_vectors_are_those_of_the_encoder(room: Room) -> None:
    encoder = load_encoder("offline", "cpu")
    plain = Precision()
    table = rows_of(room, "embed.vectors")
    images, has_image = storage.read_vectors(table["image_emb"])
    texts, has_text = storage.read_vectors(table["text_emb"])
    assert table["clip_score"].null_count == len(table)  # the towers share no space
    for row, (key, data, caption) in enumerate(samples()):
        found = decode(data, 50_000, 128).image if data else None
        assert has_image[row] == (found is not None), key
        assert has_text[row] == bool(caption and caption.strip()), key
        if found is not None:
            batch = np.repeat(encoder.prepare(found)[None], 4, axis=0)
            np.testing.assert_allclose(
                images[row], encoder.encode_images(batch, plain)[0], atol=2e-3
            )
        if has_text[row]:
            assert caption is not None
            tokens = encoder.tokenize([caption])[0]
            assert len(tokens) <= encoder.text_lengths[-1]
            expected = encoder.encode_texts(tokens[None], plain)[0]
            np.testing.assert_allclose(texts[row], expected, atol=2e-3)


def test_the_committed_choice_is_told(room: Room) -> None:
    facts = room.stage.facts(room)
    assert facts["precision"]["torch_threads"] == 1
    assert facts["precision"]["batch"] == {"image": 4, "text": 4}
    assert {"dtype", "channels_last", "tried"} <= facts["precision"]["image"].keys()


def test_decoding_ahead_gives_the_same(room: Room, source: Path, tmp_path: Path) -> None:
    folders = {t: str(tmp_path / t) for t in TABLES}
    threaded = replace(room, folders={**room.folders, **folders}, threads=3)
    choice = storage.read_json(room.path("precision.json"))
    storage.commit_json(threaded.path("precision.json"), choice)
    step = threaded.stage.steps()[-1]
    for shard in reversed(step.tasks(threaded)):
        step.run(threaded, shard)
    for table in TABLES:
        assert rows_of(threaded, table).equals(rows_of(room, table))


@pytest.mark.parametrize("table", ["embed.pixels", "embed.thumbnails"])
def test_one_missing_table_is_made_alone(room: Room, tmp_path: Path, table: str) -> None:
    alone = replace(
        room,
        stage=Embed(max_pixels=50_000, encoder="open_clip:ViT-B-32/laion2b_s34b_b79k"),
        folders={**room.folders, **{t: str(tmp_path / t) for t in TABLES}},
        missing=frozenset({table}),
    )
    steps = BoundStage(alone.stage, alone, {}, {}).missing_steps()
    assert [step.name for step in steps] == ["shards"]
    for shard in steps[0].tasks(alone):
        counts = steps[0].run(alone, shard)  # weights that are not here are not asked for
        assert counts["samples"] > 0
    assert storage.list_names(str(tmp_path)) == [table]
    assert rows_of(alone, table).equals(rows_of(room, table))


def test_counts_name_reasons(room: Room, tmp_path: Path) -> None:
    alone = replace(
        room,
        folders={**room.folders, "embed.pixels": str(tmp_path)},
        missing=frozenset({"embed.pixels"}),
    )
    step = alone.stage.steps()[-1]
    assert step.run(alone, "00000") == {
        "samples": 6,
        "reason.decode_error": 2,
        "reason.too_many_pixels": 1,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(open_clip.create_model(SMALL).state_dict(), path)
    return path


def test_open_clip_gives_scores(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    import open_clip

    room = run(make(source, encoder=f"open_clip:{SMALL}/{checkpoint}"), tmp_path)
    table = rows_of(room, "embed.vectors")
    model, _, transform = open_clip.create_model_and_transforms(SMALL, pretrained=str(checkpoint))
    model.eval()
    tokenizer = open_clip.get_tokenizer(SMALL)
    scored = 0
    for (key, data, caption), score in zip(samples(), table["clip_score"].to_pylist(), strict=True):
        image = decode(data, 50_000, 224).image if data else None
        assert (score is not None) == (image is not None and bool((caption or "").strip())), key
        if score is None:
            continue
        assert image is not None
        with torch.no_grad():
            left = model.encode_image(transform(image)[None], normalize=True)
            right = model.encode_text(tokenizer([caption]), normalize=True)
        assert score == pytest.approx(float((left * right).sum()), abs=2e-3)
        scored += 1
    assert scored == 7


def test_other_weights_are_another_table_and_leave_the_rest(source: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    pipeline = make(source, encoder=f"open_clip:{SMALL}/{weights}")
    found = []
    for data in (b"one", b"other"):
        weights.write_bytes(data)
        found.append(bind(pipeline, str(tmp_path))[1].fingerprints)
    assert found[0]["embed.vectors"] != found[1]["embed.vectors"]
    offline = bind(make(source), str(tmp_path))[1].fingerprints
    for table in ("embed.pixels", "embed.thumbnails"):
        assert found[0][table] == found[1][table] == offline[table]
