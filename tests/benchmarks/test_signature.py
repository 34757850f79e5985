"""Tests of the protocol's benchmarks, on samples of two and of three modalities."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.emoji import Emoji
from benchmarks.signature import IMAGE_PX, Samples, embed, join_groups, judge, make_samples
from benchmarks.signature_three import equal_pictures, group_emoji, read_pixels
from curate.memorization.protocol import SETS
from curate.models.clip_proxy import ClipShape, build_clip, encode, normalise_pixels
from curate.models.encoders import torch_threads
from curate.models.train_clip import ClipRecipe

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "white": "weiß", "black": "schwarz"}
SHAPES = {"square": "Quadrat", "bar": "Balken", "post": "Pfosten", "frame": "Rahmen"}
BOXES = {"square": (16, 16, 48, 48), "bar": (4, 28, 60, 36), "post": (28, 4, 36, 60)}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


def picture(shape: str, colour: str, ground: str) -> np.ndarray:
    image = Image.new("RGB", (IMAGE_PX, IMAGE_PX), ground)
    image.paste(colour, BOXES.get(shape, (8, 8, 56, 56)))
    if shape == "frame":
        image.paste(ground, (16, 16, 48, 48))
    return np.asarray(image).transpose(2, 0, 1)


def samples(pictures: int, languages: int) -> Samples:
    """Shapes on grounds, drawn on grey or a colour and named in one or two languages."""
    kinds = [(s, c, g) for s in SHAPES for c in COLOURS for g in COLOURS if c != g]
    first = [picture(*kind) for kind in kinds]
    second = [picture(shape, colour, "grey") for shape, colour, _ in kinds]
    english = [f"{colour} {shape} on {ground}" for shape, colour, ground in kinds]
    german = [f"{SHAPES[s]} in {COLOURS[c]} auf {COLOURS[g]}" for s, c, g in kinds]
    return make_samples(
        ("first", "second")[:pictures] + ("en", "de")[:languages],
        np.stack([first, second][:pictures]),
        [english, german][:languages],
        english,
    )


def test_groups_join_over_columns_and_edges() -> None:
    columns = [list("aabcdef"), list("uvvwxyz")]
    names = join_groups(columns)
    assert len(set(names)) == 5
    assert len(set(names[:3])) == 1
    joined = join_groups(columns, (np.array([2, 5]), np.array([3, 6])))
    assert [joined.index(name) for name in joined] == [0, 0, 0, 0, 4, 5, 5]
    assert len(set(join_groups([["a"]]))) == 1


def test_pictures_are_equal_within_a_few_grey_levels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 250, (6, 3, 64, 64)).astype(np.uint8)
    pixels[3] = pixels[1] + rng.integers(0, 3, pixels[1].shape).astype(np.uint8)
    pixels[4] = pixels[2] + 6
    pixels[5] = pixels[0]
    first, other = equal_pictures(pixels)
    assert sorted(zip(first.tolist(), other.tolist(), strict=True)) == [(0, 5), (1, 3)]


def test_emoji_are_grouped_by_code_name_and_picture() -> None:
    rng = np.random.default_rng(1)
    emoji = [
        Emoji("1F468-200D-1F33E", (), ("man farmer", "Bauer")),
        Emoji("1F469-200D-1F33E", (), ("woman farmer", "Bäuerin")),
        Emoji("265F", (), ("chess pawn", "BAUER")),
        Emoji("1F1EB-1F1F7", (), ("flag: France", "Flagge: Frankreich")),
        Emoji("1F1E8-1F1F5", (), ("flag: Clipperton Island", "Flagge: Clipperton-Insel")),
        Emoji("1FAB3", (), ("cockroach", "Kakerlake")),
    ]
    pixels = rng.integers(0, 255, (2, len(emoji), 3, 8, 8)).astype(np.uint8)
    pixels[1, 4] = pixels[1, 3]
    names = group_emoji(emoji, pixels)
    assert [names.index(name) for name in names] == [0, 0, 0, 3, 3, 5]


def test_emoji_are_laid_over_white() -> None:
    image = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 36, 72))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = read_pixels(buffer.getvalue())
    assert pixels.shape == (3, IMAGE_PX, IMAGE_PX)
    assert pixels[:, 5, 5].tolist() == [255, 0, 0]
    assert pixels[:, 5, -5].tolist() == [255, 255, 255]


def test_languages_share_a_vocabulary() -> None:
    both = samples(1, 2)
    assert both.tokens.shape[:2] == (2, len(both.groups))
    assert both.tokens.max() == both.words + 3
    assert len(np.unique(both.tokens[1])) > 10  # hardly a German word is unknown
    assert (both.tokens[1] == 1).mean() < 0.01
    assert both.codes.shape == (len(both.groups), 1)


@pytest.mark.parametrize(("pictures", "languages"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_modality_is_embedded_by_its_tower(pictures: int, languages: int) -> None:
    some = samples(pictures, languages)
    torch.manual_seed(0)
    model = build_clip(ClipShape(some.words)).eval()
    found = embed(model, some, 2, "float32")
    assert [part.ndim for part in found] == [3] * pictures + [2] * languages
    with torch.inference_mode():
        for number in range(max(pictures, languages)):
            seen = torch.from_numpy(some.pixels[min(number, pictures - 1)]).float()
            said = torch.from_numpy(some.tokens[min(number, languages - 1)])
            image, text = encode(model, normalise_pixels(seen), said, "float32")
            whole, crop = found[min(number, pictures - 1)]
            np.testing.assert_allclose(whole, image, atol=1e-5)
            assert np.abs(whole - crop).max() > 1e-3
            words = found[pictures + min(number, languages - 1)]
            np.testing.assert_allclose(words, text, atol=1e-5)


def test_a_report_tells_all_forms_and_pairs() -> None:
    some = samples(2, 1)
    report = judge(some, ClipRecipe(epochs=2, batch=16, dtype="float32"), 1, 0)
    assert report["modalities"] == ["first", "second", "en"]
    assert list(report["pairs"]) == ["first x second", "first x en", "second x en"]
    assert report["samples"] == report["groups"] == 80
    assert sum(one["samples"] for one in report["sets"].values()) <= 80
    for name in SETS:
        raw = report["forms"]["raw"][name]
        assert raw == report["sets"][name]["mean"]
        assert report["forms"]["pair_mean"][name] == pytest.approx(raw / 3, rel=2e-3)
        assert report["forms"]["per_modality"][name] == pytest.approx(raw / 2, rel=2e-3)
    assert report["noise_floor"]["all"]["standard_deviation"] > 0


def test_two_modalities_have_one_pair_and_one_form() -> None:
    report = judge(samples(1, 1), ClipRecipe(epochs=1, batch=16, dtype="float32"), 1, 0)
    (pair,) = report["pairs"].values()
    assert pair == report["forms"]["raw"] == report["forms"]["pair_mean"]
    assert pair == report["forms"]["per_modality"]
