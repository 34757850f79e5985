"""Ten ways in which copies of a picture are made, at stated strengths, drawn by key."""

import io
from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

__all__ = ["COPIES", "make_copy"]

JPEG_QUALITY = 30
HALF = 0.5
#: Share of the width, and of the height, that a crop leaves; where, is drawn.
CROP_KEPT = 0.9
#: Standard deviation of the blur, in shares of the longer side.
BLUR = 0.01
#: Brightness, contrast and saturation are each multiplied by up to so much more or less.
JITTER = 0.2
#: Height of the line of text, in shares of the height.
TEXT_HEIGHT = 0.1
#: Width of the border, in shares of the shorter side, and its colours.
BORDER, BORDER_COLOURS = 0.08, ("white", "black", "grey", "navy")
DEGREES = 5.0


def _saved(image: Image.Image, layout: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, layout, **options)
    return buffer.getvalue()


def _halved(image: Image.Image, _: Random) -> Image.Image:
    width, height = (max(1, round(side * HALF)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _cropped(image: Image.Image, rng: Random) -> Image.Image:
    width, height = (round(side * CROP_KEPT) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _blurred(image: Image.Image, _: Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size)))


def _jittered(image: Image.Image, rng: Random) -> Image.Image:
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    return image


def _captioned(image: Image.Image, rng: Random) -> Image.Image:
    image, height = image.copy(), TEXT_HEIGHT * image.height
    text = rng.choice(["Sample text", "EXAMPLE.ORG", "No. 42 of 100", "best wishes"])
    place = (image.width / 2, image.height * rng.uniform(0.2, 0.8))
    ImageDraw.Draw(image).text(
        place,
        text,
        fill=rng.choice(["black", "white", "red"]),
        anchor="mm",
        font=ImageFont.load_default(max(6.0, height)),
        stroke_width=max(1, round(height / 16)),
        stroke_fill=rng.choice(["grey", "yellow"]),
    )
    return image


def _bordered(image: Image.Image, rng: Random) -> Image.Image:
    width = max(1, round(BORDER * min(image.size)))
    return ImageOps.expand(image, width, rng.choice(BORDER_COLOURS))


def _rotated(image: Image.Image, rng: Random) -> Image.Image:
    angle = rng.choice([-DEGREES, DEGREES])
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")


#: Every way by its name; all but `jpeg` are stored without loss.
_CHANGES: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "jpeg": lambda image, _: image,
    "half": _halved,
    "crop": _cropped,
    "mirror": lambda image, _: ImageOps.mirror(image),
    "blur": _blurred,
    "jitter": _jittered,
    "text": _captioned,
    "border": _bordered,
    "rotation": _rotated,
    "grey": lambda image, _: ImageOps.grayscale(image),
}
COPIES = tuple(_CHANGES)


def make_copy(image: Image.Image, kind: str, key: str) -> bytes:
    """Return the file of one kind of copy of an RGB picture; the same for the same key."""
    copy = _CHANGES[kind](image, Random(f"copy:{kind}:{key}"))
    return _saved(copy, "JPEG", quality=JPEG_QUALITY) if kind == "jpeg" else _saved(copy, "PNG")
