"""Image operations that the corpora are made with, all deterministic for given bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from PIL import Image

# openclipart holds two PNGs of 623 megapixels. They come from a signed distribution package,
# so Pillow's decompression-bomb guard is raised for them, and only while one of them is open.
MAX_PIXELS = 700_000_000

SMALL_SIDE = 128
CROP_SHARE = 0.04
NEAR_TRANSFORMS = ("jpeg30", "half", "crop4")


@dataclass(frozen=True)
class Encoding:
    """How original images are stored.

    Attributes
    ----------
    longest_side
        Images are resized down to this longest side; 0 keeps the original bytes.
    quality
        JPEG quality of re-encoded images.
    """

    longest_side: int = 0
    quality: int = 85


@dataclass(frozen=True)
class Encoded:
    """An image file's bytes, its extension without the dot, and its true size."""

    data: bytes
    extension: str
    width: int | None
    height: int | None


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image with the pixel limit of these corpora instead of Pillow's.

    Parameters
    ----------
    data
        The image file.

    Yields
    ------
    Image.Image
        The image, its pixels not decoded yet.
    """
    saved = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = saved


def is_decodable(data: bytes) -> bool:
    """Tell whether Pillow decodes the whole image.

    Parameters
    ----------
    data
        The image file, perhaps a broken one.

    Returns
    -------
    bool
        Whether all pixels could be read.
    """
    try:
        with opened(data) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def over_white(image: Image.Image) -> Image.Image:
    """Composite an image over white.

    Parameters
    ----------
    image
        An image of any mode.

    Returns
    -------
    Image.Image
        A new image in mode RGB.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, "white")
    canvas.alpha_composite(rgba)
    return canvas.convert("RGB")


def _to_jpeg(image: Image.Image, quality: int) -> Encoded:
    buffer = io.BytesIO()
    over_white(image).save(buffer, "JPEG", quality=quality, optimize=True)
    return Encoded(buffer.getvalue(), "jpg", image.width, image.height)


def _to_png(image: Image.Image) -> Encoded:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Encoded(buffer.getvalue(), "png", image.width, image.height)


def _with_full_colour(image: Image.Image) -> Image.Image:
    # Palette images can only be resized by nearest neighbour.
    keeps_alpha = "A" in image.getbands() or "transparency" in image.info
    return image.convert("RGBA" if keeps_alpha else "RGB")


def shrunk(image: Image.Image, longest_side: int) -> Image.Image:
    """Resize an image down, never up.

    Parameters
    ----------
    image
        The image.
    longest_side
        The longest side that the result may have.

    Returns
    -------
    Image.Image
        The image over white, its longest side at most `longest_side`.
    """
    factor = max(image.size) // (4 * longest_side)
    if factor > 1:
        # A cheap box filter first: Lanczos over hundreds of megapixels takes minutes.
        image = _with_full_colour(image).reduce(factor)
    image = over_white(image)
    if max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return image


def encode_original(data: bytes, extension: str, encoding: Encoding) -> tuple[Encoded, int, int]:
    """Store an original image as its corpus wants it.

    Parameters
    ----------
    data
        The original image file.
    extension
        The original's extension without the dot.
    encoding
        How images are stored.

    Returns
    -------
    tuple of Encoded, int, int
        The stored image, and the original's width and height.
    """
    with opened(data) as image:
        width, height = image.size
        if encoding.longest_side == 0:
            return Encoded(data, extension, width, height), width, height
        small = shrunk(image, encoding.longest_side)
    return _to_jpeg(small, encoding.quality), width, height


def near_twin(original: Encoded, transform: str, quality: int) -> tuple[Encoded, str]:
    """Make a near copy of an image.

    Parameters
    ----------
    original
        The image to copy.
    transform
        One of `NEAR_TRANSFORMS`; "half" becomes "resize70" for images of at most 128 px, where
        half the size would leave too little to recognise.
    quality
        JPEG quality of resized and cropped copies of JPEG images.

    Returns
    -------
    tuple of Encoded, str
        The copy, and the transformation it was made with.
    """
    with opened(original.data) as opened_image:
        if transform == "jpeg30":
            return _to_jpeg(opened_image, 30), transform
        image = _with_full_colour(opened_image)
    width, height = image.size
    if transform == "half":
        transform, share = ("half", 0.5) if max(image.size) > SMALL_SIDE else ("resize70", 0.7)
        size = (max(1, round(width * share)), max(1, round(height * share)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    elif transform == "crop4":
        left, top = (max(1, round(side * CROP_SHARE)) if side > 2 else 0 for side in image.size)
        image = image.crop((left, top, width - left, height - top))
    else:
        raise ValueError(f"unknown transformation: {transform}")
    as_jpeg = original.extension == "jpg"
    return (_to_jpeg(image, quality) if as_jpeg else _to_png(image)), transform


def undecodable(extension: str, rng: Random) -> Encoded:
    """Make a file that no image decoder reads.

    Parameters
    ----------
    extension
        The extension that it pretends to have, without the dot.
    rng
        Source of the bytes.

    Returns
    -------
    Encoded
        Random bytes, without a size.
    """
    while True:
        data = rng.randbytes(rng.randrange(500, 4000))
        # Some formats have no magic number, so that random bytes are, rarely, a valid header.
        if not is_decodable(data):
            return Encoded(data, extension, None, None)


def truncated(original: Encoded, rng: Random) -> Encoded:
    """Cut an image file short.

    Parameters
    ----------
    original
        The image to cut.
    rng
        Source of the length.

    Returns
    -------
    Encoded
        The first 30 to 60 % of the file, with the size that its header still tells.
    """
    length = max(1, int(len(original.data) * rng.uniform(0.3, 0.6)))
    return Encoded(original.data[:length], original.extension, original.width, original.height)
