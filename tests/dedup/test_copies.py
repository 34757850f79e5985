import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from curate.dedup.copies import are_copies, pixel_matches, worst_differences
from curate.dedup.registration import GRID_PX
from curate.formats.pixels import make_thumbnail, read_thumbnail

#: What the shipped pipelines ask of a copy.
MIN_MATCH = 0.96
MAX_DIFFERENCE = 15.0

LEFT, RIGHT = np.array([0]), np.array([1])


def draw(seed: int, side: int = 128) -> Image.Image:
    """Draw a clip-art-like picture: large coloured shapes on white."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(7):
        x, y = rng.integers(0, side * 3 // 4, 2).tolist()
        w, h = rng.integers(side // 8, side // 2, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x, y, x + w, y + h), fill=colour)
    return image


def flag(stripe: str = "gold") -> Image.Image:
    image = Image.new("RGB", (120, 80), "navy")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 27, 119, 53), fill=stripe)
    pen.rectangle((0, 54, 119, 79), fill="crimson")
    return image


def dots(moved: int = 0, radius: int = 6) -> Image.Image:
    """Draw six by six dots, one of them moved."""
    image = Image.new("RGB", (126, 126), "white")
    pen = ImageDraw.Draw(image)
    for row in range(6):
        for column in range(6):
            x, y = 10 + 21 * column + moved * (row == column == 3), 10 + 21 * row
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="black")
    return image


def sign(text: str = "30") -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 4, 123, 123), fill="red")
    pen.ellipse((20, 20, 107, 107), fill="white")
    pen.text((64, 64), text, fill="black", anchor="mm", font=ImageFont.load_default(24))
    return image


def clock(hour: int = 2) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 4, 123, 123), outline="blue", width=12)
    angle = np.pi * hour / 6
    pen.line((64, 64, 64 + 24 * np.sin(angle), 64 - 24 * np.cos(angle)), fill="blue", width=5)
    pen.line((64, 64, 64, 26), fill="blue", width=3)
    return image


#: Pictures, and another of the series of each.
SERIES = {
    "stripe": (flag(), flag("darkorange")),
    "moved dot": (dots(), dots(moved=3)),
    "larger dots": (dots(), dots(radius=7)),
    "number": (sign(), sign("50")),
    "hand": (clock(), clock(10)),
}


def measure(found: Callable[..., Any], one: Image.Image, other: Image.Image) -> float:
    values = found(LEFT, RIGHT, [one, other].__getitem__)
    assert values.shape == (1,)
    assert values.dtype == np.float32
    return float(values[0])


def match(one: Image.Image, other: Image.Image) -> float:
    return measure(pixel_matches, one, other)


def difference(one: Image.Image, other: Image.Image) -> float:
    return measure(worst_differences, one, other)


def confirmed(one: Image.Image, other: Image.Image) -> bool:
    read = [one, other].__getitem__
    found = are_copies(LEFT, RIGHT, read, MIN_MATCH, MAX_DIFFERENCE)
    # Which of the two comes first is an accident of the shards.
    assert np.array_equal(found, are_copies(RIGHT, LEFT, read, MIN_MATCH, MAX_DIFFERENCE))
    return bool(found[0])


def cropped(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    left, top = round(width * share), round(height * share)
    return image.crop((left, top, width - left, height - top)).resize((width, height))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


@pytest.mark.parametrize("seed", range(5))
def test_equal_pictures_match_fully(seed: int) -> None:
    image = draw(seed)
    assert match(image, image.copy()) == pytest.approx(1, abs=1e-5)
    # Brightness and contrast do not count.
    dimmed = image.point(lambda value: value // 2 + 40)
    assert match(image, dimmed) > 0.999


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["crop", "quality", "resize", "blur", "all"])
def test_copies_are_found(seed: int, kind: str) -> None:
    image = copy = draw(seed)
    if kind in ("crop", "all"):
        copy = cropped(copy, 0.04)
    if kind in ("resize", "all"):
        copy = copy.resize((90, 90))
    if kind in ("quality", "all"):
        copy = recompressed(copy, 30)
    if kind == "blur":
        copy = copy.filter(ImageFilter.GaussianBlur(1))
    assert match(image, copy) >= MIN_MATCH
    assert match(copy, image) == match(image, copy)
    assert confirmed(image, copy)


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("kind", ["quality", "resize", "crop"])
def test_copies_of_series_are_found(name: str, kind: str) -> None:
    for image in SERIES[name]:
        width, height = image.size
        copy = {
            "quality": recompressed(image, 30),
            "resize": recompressed(image.resize((width * 7 // 10, height * 7 // 10)), 80),
            "crop": recompressed(
                image.crop((5, height // 25, width - 5, height - height // 25)), 80
            ),
        }[kind]
        one, other = (read_thumbnail(make_thumbnail(each, 128)) for each in (image, copy))
        assert confirmed(one, other)


#: Altered by more than compression. What is darker darkens its white too.
ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "crop": lambda image: image.crop((0, 7, 116, 122)),
    "border": lambda image: ImageOps.expand(image, 10, "navy"),
    "turned left": lambda image: image.rotate(4, Image.Resampling.BICUBIC, fillcolor="white"),
    "turned right": lambda image: image.rotate(-5, Image.Resampling.BICUBIC, fillcolor="white"),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "flatter": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ALTERED)
def test_altered_copies_are_found(seed: int, kind: str) -> None:
    image = draw(seed)
    copy = ALTERED[kind](image)
    assert confirmed(image, recompressed(copy, 80))
    assert not confirmed(draw(seed + 100), copy)


@pytest.mark.parametrize("kind", ALTERED)
@pytest.mark.parametrize("name", ["hand", "number", "moved dot"])
def test_altered_others_of_a_series_are_not(name: str, kind: str) -> None:
    image, other = SERIES[name]
    assert not confirmed(image, ALTERED[kind](other))


def test_another_colour_on_the_same_white_is_not_another_light() -> None:
    def hand(colour: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).ellipse((10, 20, 80, 90), fill=colour)
        ImageDraw.Draw(image).line((30, 40, 60, 60), fill=tuple(c // 2 for c in colour), width=4)
        return image

    light, medium = hand((224, 187, 149)), hand((191, 143, 104))
    assert match(light, medium) > MIN_MATCH
    assert not confirmed(light, medium)
    assert confirmed(light, ImageEnhance.Brightness(light).enhance(0.85))


@pytest.mark.parametrize("other", [(163, 106, 66), (146, 146, 146)])
def test_colour_decides_about_plain_pictures(other: tuple[int, int, int]) -> None:
    def swatch(colour: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rounded_rectangle((1, 1, 62, 62), 3, fill=colour)
        return image

    tan = swatch((183, 139, 103))
    assert not confirmed(tan, swatch(other))
    assert confirmed(tan, recompressed(tan, 80))
    assert confirmed(tan, swatch((185, 141, 105)))


@pytest.mark.parametrize("radius", [9, 10, 11])
def test_dots_of_another_size_are_not_another_light(radius: int) -> None:
    assert not confirmed(dots(radius=radius), dots(radius=radius + 1))


def test_thin_lines_may_differ_less() -> None:
    def ring(radius: int, colour: str) -> Image.Image:
        image = Image.new("RGB", (128, 128), "white")
        box = (64 - radius, 64 - radius, 64 + radius, 64 + radius)
        ImageDraw.Draw(image).ellipse(box, outline=colour, width=2)
        ImageDraw.Draw(image).rectangle((2, 2, 125, 125), outline=colour)
        return image

    pale, dark = ring(50, "#d8d8d8"), ring(50, "black")
    assert not confirmed(pale, ring(53, "#d8d8d8"))
    assert difference(pale, ring(53, "#d8d8d8")) < MAX_DIFFERENCE
    assert confirmed(pale, pale.resize((100, 100)))
    assert confirmed(dark, dark.resize((100, 100)))


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("quality", [30, 95])
def test_others_of_a_series_are_not(name: str, quality: int) -> None:
    image, other = SERIES[name]
    other = recompressed(other, quality)
    # As wholes they match: this is what the second question is for.
    assert match(image, other) >= MIN_MATCH
    assert not confirmed(image, other)
    assert difference(image, other) > 1.2 * MAX_DIFFERENCE


def test_difference_is_the_mean_over_the_worst_patch() -> None:
    image = draw(0, 40).convert("L").convert("RGB")
    assert difference(image, image) == 0
    brighter = image.point(lambda value: min(value // 2 + 60, 255))
    brightest = brighter.point(lambda value: value + 10)
    assert difference(brighter, brightest) == pytest.approx(10, abs=1)  # luma is rounded
    # 3 x 3 of the 40 x 40 pixels, on a picture whose edges hold the window.
    spot = brighter.copy()
    ImageDraw.Draw(spot).rectangle((20, 20, 22, 22), fill=(230, 230, 230))
    changed = np.asarray(spot, int)[20:23, 20:23, 0] - np.asarray(brighter, int)[20:23, 20:23, 0]
    assert difference(brighter, spot) == pytest.approx(abs(changed.mean()), abs=1)


def test_colour_counts_half() -> None:
    one, other = flag(), flag()
    ImageDraw.Draw(other).rectangle((0, 0, 119, 26), fill=(0, 0, 176))  # navy is (0, 0, 128)
    blue = 48 * np.array([0.114, 0.5 / 2, -0.0813 / 2])  # luma, blue difference, red difference
    assert difference(one, other) == pytest.approx(np.linalg.norm(blue), rel=0.1)


def test_questions_not_asked() -> None:
    images = [*SERIES["hand"], ImageOps.invert(clock())]
    left, right = np.array([0, 0]), np.array([1, 2])

    def ask(min_match: float | None, max_difference: float | None) -> list[bool]:
        found = are_copies(left, right, images.__getitem__, min_match, max_difference)
        assert found.dtype == bool
        return [bool(one) for one in found]

    assert ask(None, None) == [True, True]
    assert ask(MIN_MATCH, None) == [True, False]
    assert ask(MIN_MATCH, MAX_DIFFERENCE) == [False, False]
    assert ask(None, MAX_DIFFERENCE) == [False, False]
    assert ask(None, 255) == [True, True]


@pytest.mark.parametrize("seed", range(5))
def test_other_pictures_are_not(seed: int) -> None:
    image = draw(seed)
    red, green, blue = image.split()
    for other in (
        ImageOps.mirror(image),
        ImageOps.flip(image),
        Image.merge("RGB", (blue, red, green)),
        ImageOps.invert(image),
        draw(seed + 100),
        cropped(image, 0.2),
    ):
        assert match(image, other) < MIN_MATCH


@pytest.mark.parametrize("colour", ["white", "black", (200, 10, 60)])
def test_pictures_of_one_colour_match_nothing(colour: Any) -> None:
    plain = Image.new("RGB", (64, 64), colour)
    assert match(plain, draw(0)) <= 0
    assert match(plain, plain.copy()) <= 0
    darker = plain.point(lambda value: value * 3 // 4)
    assert match(plain, darker) <= 0


def test_many_pairs_equal_each_alone() -> None:
    images = [draw(seed) for seed in range(4)]
    images += [cropped(image, 0.04) for image in images]
    images += [Image.new("RGB", (1, 1), "red"), draw(9, GRID_PX - 5), draw(9).resize((128, 2))]
    images += [image for pair in SERIES.values() for image in pair]
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, len(images), (2, 60))
    for found, measured in ((pixel_matches, match), (worst_differences, difference)):
        together = found(left, right, images.__getitem__)
        alone = [measured(images[a], images[b]) for a, b in zip(left, right, strict=True)]
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert np.array_equal(together, found(left, right, images.__getitem__))
    assert np.abs(pixel_matches(left, right, images.__getitem__)).max() <= 1
    copies = are_copies(left, right, images.__getitem__, MIN_MATCH, MAX_DIFFERENCE)
    alone = [confirmed(images[a], images[b]) for a, b in zip(left, right, strict=True)]
    assert copies.tolist() == alone
    assert 0 < copies.sum() < len(copies)
    none = np.zeros(0, np.int64)
    assert pixel_matches(none, none, images.__getitem__).shape == (0,)
    assert are_copies(none, none, images.__getitem__, MIN_MATCH, MAX_DIFFERENCE).shape == (0,)


def test_every_picture_is_read_a_bounded_number_of_times() -> None:
    images = [draw(seed) for seed in range(6)]
    reads: dict[int, int] = {}

    def read(row: int) -> Image.Image:
        reads[row] = reads.get(row, 0) + 1
        return images[row]

    pairs = [(a, b) for a in range(6) for b in range(6) if a < b]
    left, right = (np.array(ends) for ends in zip(*pairs, strict=True))
    pixel_matches(left, right, read)
    # In either direction once as the searched picture, once as the one searched for.
    assert max(reads.values()) <= 4
