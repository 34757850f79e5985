import numpy as np
import pytest
from PIL import Image, ImageDraw

from curate.dedup.registration import find
from tests.dedup.test_copies import draw

LEFT, RIGHT = np.array([0]), np.array([1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("degrees", [-5, -2, 0, 3, 5])
def test_turns_are_measured(seed: int, degrees: int) -> None:
    image = draw(seed)
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
    found = find(LEFT, RIGHT, [image, turned].__getitem__)
    assert found.degrees[0] == pytest.approx(degrees, abs=1.2)
    assert found.expected[0] >= found.matches[0]


@pytest.mark.parametrize("seed", range(3))
def test_crops_between_pixels_are_expected_to_match(seed: int) -> None:
    image = draw(seed)
    crop = image.crop((3, 6, 117, 121))
    found = find(LEFT, RIGHT, [image, crop].__getitem__)
    np.testing.assert_allclose(found.windows[0] * 128, (3, 6, 117, 121), atol=4)
    assert found.expected[0] > max(0.97, found.matches[0])


def test_nothing_is_expected_of_what_is_hopeless() -> None:
    read = [draw(0), draw(100)].__getitem__
    found = find(LEFT, RIGHT, read, least=1)
    assert found.expected[0] == found.matches[0] < 1
    assert found.degrees[0] == 0


def test_windows_do_not_depend_on_what_else_is_asked() -> None:
    # Rings look the same from many windows: the last digit would decide which is chosen.
    rings = [Image.new("RGB", (64, 64), "white") for _ in range(40)]
    for number, ring in enumerate(rings):
        half, grey = 20 + number % 10 * 0.8, 60 + number * 4
        box = (32 - half, 32 - half, 32 + half, 32 + half)
        ImageDraw.Draw(ring).ellipse(box, outline=(grey, grey, grey))
    left, right = np.triu_indices(len(rings), 1)
    whole = find(left, right, rings.__getitem__)
    alone = [find(left[[n]], right[[n]], rings.__getitem__) for n in range(len(left))]
    np.testing.assert_array_equal(whole.windows, np.concatenate([one.windows for one in alone]))
    assert len(np.unique(whole.windows, axis=0)) > 5
