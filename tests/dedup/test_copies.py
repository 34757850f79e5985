import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from curate.dedup.copies import GRID_PX, pixel_matches

#: What the shipped pipelines ask of a copy.
MIN_MATCH = 0.97


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


def match(one: Image.Image, other: Image.Image) -> float:
    found = pixel_matches(np.array([0]), np.array([1]), [one, other].__getitem__)
    assert found.shape == (1,)
    assert found.dtype == np.float32
    return float(found[0])


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
    images += [Image.new("RGB", (1, 1), "red"), draw(9, GRID_PX - 5)]
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, len(images), (2, 40))
    together = pixel_matches(left, right, images.__getitem__)
    alone = [match(images[a], images[b]) for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together).max() <= 1 + 1e-5
    none = np.zeros(0, np.int64)
    assert pixel_matches(none, none, images.__getitem__).shape == (0,)


def test_every_picture_is_read_a_bounded_number_of_times() -> None:
    images = [draw(seed) for seed in range(6)]
    reads: dict[int, int] = {}

    def read(row: int) -> Image.Image:
        reads[row] = reads.get(row, 0) + 1
        return images[row]

    pairs = [(a, b) for a in range(6) for b in range(6) if a < b]
    left, right = (np.array(ends) for ends in zip(*pairs, strict=True))
    pixel_matches(left, right, read)
    # Once as the searched picture in either direction, once as the one searched for.
    assert max(reads.values()) <= 3
