import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curate.formats.pixels import (
    decode,
    make_thumbnail,
    measure_contrast,
    read_square,
    read_thumbnail,
)

MANY = 10_000_000
EXIF_ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, working_px: int = 500) -> np.ndarray[Any, Any]:
    """Decode what must decode; return (H, W, 3) uint8."""
    found = decode(data, MANY, working_px)
    assert found.reason is None
    assert found.image is not None
    assert found.image.mode == "RGB"
    assert found.width is not None
    assert found.height is not None
    return np.asarray(found.image)


def gradient(width: int, height: int) -> Image.Image:
    columns = np.linspace(0, 255, width)[None, :, None]
    rows = np.linspace(255, 0, height)[:, None, None]
    both = np.broadcast_to((columns + rows) / 2, (height, width, 1))
    parts = [np.broadcast_to(columns, both.shape), np.broadcast_to(rows, both.shape), both]
    return Image.fromarray(np.concatenate(parts, axis=2).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """Make a PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "AVIF"])
def test_formats(kind: str) -> None:
    image = gradient(60, 40)
    found = decode(encoded(image, kind), MANY, 60)
    assert (found.width, found.height, found.reason) == (60, 40, None)
    assert found.image is not None
    worst = np.abs(np.asarray(found.image, int) - np.asarray(image, int)).mean()
    assert worst < (1e-9 if kind in ("PNG", "BMP", "TIFF") else 8)


@pytest.mark.parametrize("side", [10_001, 13_038, 20_000, 2**31 - 1])
def test_too_many_pixels_are_not_decoded(side: int) -> None:
    found = decode(png_header(side, side), 100_000_000, 128)
    assert found.reason == "too_many_pixels"
    assert found.image is None
    assert (found.width, found.height) == (side, side)


def test_the_cap_itself_is_allowed() -> None:
    data = encoded(gradient(40, 30), "PNG")
    assert decode(data, 1200, 10).reason is None
    found = decode(data, 1199, 10)
    assert (found.reason, found.width, found.height) == ("too_many_pixels", 40, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.8])
def test_truncated_images(kind: str, share: float) -> None:
    data = encoded(gradient(200, 150), kind)
    found = decode(data[: int(len(data) * share)], MANY, 128)
    assert found.reason == "decode_error"
    assert found.image is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"not an image",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\xff\xd8\xff" + b"x" * 90,
        png_header(0, 5),
        b"GIF89a" + b"\xff" * 20,
    ],
)
def test_what_is_no_picture(data: bytes) -> None:
    found = decode(data, MANY, 128)
    assert (found.image, found.reason) == (None, "decode_error")


def test_formats_that_run_programs_are_not_tried() -> None:
    for kind in ("EPS", "PPM", "TGA", "PCX"):
        assert decode(encoded(gradient(9, 9), kind), MANY, 9).reason == "decode_error"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_lie_over_white(mode: str) -> None:
    image = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 20))
    image.paste((0, 0, 0, 128), (10, 0, 20, 20))
    found = pixels(encoded(image.convert(mode), "PNG"))
    assert found[:, :10].max() == 0
    assert abs(int(found[5, 15, 0]) - 127) <= 1
    assert found[:, 20:].min() == 255


def test_palette_with_transparency() -> None:
    image = Image.new("P", (20, 10), 0)
    image.putpalette([200, 10, 10, 10, 10, 200])
    image.paste(1, (10, 0, 20, 10))
    for kind in ("PNG", "GIF"):
        found = pixels(encoded(image, kind, transparency=0))
        assert found[:, :10].min() == 255
        assert found[5, 15].tolist() == [10, 10, 200]
    by_entry = pixels(encoded(image, "PNG", transparency=bytes([128, 255])))
    assert np.abs(by_entry[5, 5].astype(int) - [227, 132, 132]).max() <= 1


def test_colour_keyed_transparency() -> None:
    image = Image.new("RGB", (20, 10), (1, 2, 3))
    image.paste((9, 9, 9), (10, 0, 20, 10))
    found = pixels(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert found[5, 15].tolist() == [9, 9, 9]
    assert found[5, 5].tolist() == [255, 255, 255]
    large = encoded(image.resize((800, 400)), "PNG", transparency=(1, 2, 3))
    assert pixels(large, 50)[20, 20].tolist() == [255, 255, 255]


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (40, 40), (0, 255, 255, 0))  # red ink
    found = decode(encoded(image, "JPEG", quality=95), MANY, 40)
    assert found.image is not None
    red, green, blue = np.asarray(found.image)[20, 20].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16)
    image = Image.fromarray(np.repeat(values[None], 4, axis=0))
    found = pixels(encoded(image, kind))[2].astype(int)
    assert np.abs(found - np.arange(256)[:, None]).max() <= 1
    assert len(np.unique(found[:, 0])) == 256


def test_grey_and_bilevel() -> None:
    assert pixels(encoded(Image.new("L", (8, 8), 77), "PNG"))[3, 3].tolist() == [77] * 3
    assert pixels(encoded(Image.new("1", (8, 8), 1), "PNG"))[3, 3].tolist() == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste((255, 0, 0), (0, 0, 30, 20))  # red in the upper left
    turns = Image.Transpose
    stored_as = {
        1: None, 2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE, 6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if stored_as is None else upright.transpose(stored_as)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    found = decode(encoded(stored, kind, exif=exif), MANY, 60)
    assert (found.width, found.height) == (60, 40)
    assert found.image is not None
    assert found.image.size == (60, 40)
    shown = np.asarray(found.image).astype(int)
    assert shown[8, 10, 1] < 60
    for row, column in ((8, 50), (32, 10), (32, 50)):
        assert shown[row, column, 1] > 200


def test_too_many_pixels_with_orientation_are_measured_as_displayed_or_stored() -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    found = decode(encoded(gradient(60, 40), "JPEG", exif=exif), 100, 60)
    assert found.reason == "too_many_pixels"
    assert {found.width, found.height} == {60, 40}


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage!",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0",  # orientation as text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x02\0\0\0\x06\0\x06\0",  # two of them
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0",  # the 99th
    ],
)
def test_broken_exif_does_not_lose_the_picture(exif: bytes) -> None:
    image = gradient(60, 40)
    found = decode(encoded(image, "JPEG", quality=95, exif=exif), MANY, 60)
    assert found.reason is None
    assert {found.width, found.height} == {60, 40}


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = pixels(data)[10, 15].tolist()
        assert red > 230
        assert max(green, blue) < 30


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1000, 700), (700, 1000), (401, 399), (128, 128), (90, 50)])
def test_large_images_are_scaled_down_but_not_below_the_working_size(
    kind: str, size: tuple[int, int]
) -> None:
    image = gradient(*size)
    found = decode(encoded(image, kind), MANY, 128)
    assert (found.width, found.height) == size
    assert found.image is not None
    assert min(found.image.size) >= min(128, *size)
    assert min(found.image.size) < 4 * 128 or min(found.image.size) == min(size)
    original, kept = size[0] / size[1], found.image.size[0] / found.image.size[1]
    assert abs(kept / original - 1) < 0.02
    small = np.asarray(found.image.resize((8, 8), Image.Resampling.BOX), int)
    wanted = np.asarray(image.resize((8, 8), Image.Resampling.BOX), int)
    assert np.abs(small - wanted).max() < 6


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((400, 200), (128, 64)),
        ((200, 400), (64, 128)),
        ((128, 128), (128, 128)),
        ((50, 20), (50, 20)),
        ((2000, 3), (128, 1)),
        ((1, 1), (1, 1)),
    ],
)
def test_thumbnails(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = gradient(*size)
    data = make_thumbnail(image, 128)
    assert data[8:12] == b"WEBP"
    small = read_thumbnail(data)
    assert small.size == expected
    assert small.mode == "RGB"
    assert image.size == size  # the picture itself is left alone
    wanted = np.asarray(image.resize(expected, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(small, int) - wanted).mean() < 12


def test_thumbnails_are_the_same_each_time() -> None:
    image = gradient(300, 200)
    assert make_thumbnail(image, 128) == make_thumbnail(image, 128)


def test_thumbnails_are_read_as_webp_only() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        read_thumbnail(encoded(gradient(9, 9), "PNG"))


@pytest.mark.parametrize("size", [(128, 64), (3, 128), (64, 64), (1, 1)])
def test_thumbnails_are_squeezed_to_a_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 100, 0))
    pixels = read_square(make_thumbnail(image, 128), 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.mean((1, 2)) - [200, 100, 0]).max() < 8


def test_a_square_is_upright() -> None:
    image = Image.new("RGB", (120, 60), "white")
    image.paste((0, 0, 0), (0, 0, 120, 30))
    pixels = read_square(make_thumbnail(image, 128), 64)
    assert pixels[:, :28].max() < 40
    assert pixels[:, 36:].min() > 215


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (900, 700)])
def test_a_picture_of_one_colour_has_no_contrast(size: tuple[int, int]) -> None:
    assert measure_contrast(Image.new("RGB", size, (250, 130, 3))) == 0


def test_contrast_is_that_of_the_strongest_channel() -> None:
    image = Image.new("RGB", (60, 40), (0, 90, 9))
    image.paste((255, 90, 29), (0, 0, 30, 40))
    assert measure_contrast(image) == 127.5


def test_a_fine_pattern_is_not_taken_for_one_colour() -> None:
    dots = np.indices((901, 700)).sum(0) % 2 * 255
    image = Image.fromarray(dots.astype(np.uint8)).convert("RGB")
    assert measure_contrast(image) == pytest.approx(127.5, abs=3)
