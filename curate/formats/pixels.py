"""Bytes to pixels, once, with untrusted input in mind."""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = [
    "Decoded",
    "decode",
    "make_thumbnail",
    "measure_contrast",
    "read_size",
    "read_square",
    "read_thumbnail",
]

#: What Pillow may try: raster formats with decoders that are fuzzed upstream. Formats that run
#: programs or fetch files (EPS, MSP and the like) are left out.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
#: EXIF orientations that turn a picture by a quarter.
_LYING = (5, 6, 7, 8)
_THUMBNAIL_QUALITY = 80
#: libwebp's fastest method: 0.4 ms a picture instead of 3, for files a tenth larger.
_THUMBNAIL_METHOD = 0
#: Pixels a side that contrast is measured on: all of a picture's would cost as much as decoding it.
_CONTRAST_PX = 128


@dataclass(frozen=True)
class Decoded:
    """An image or the reason why there is none.

    Parameters
    ----------
    image : PIL.Image.Image or None
        RGB over white, upright, scaled down towards `working_px` where it was much larger.
    width, height : int or None
        Size of the original, as displayed.
    reason : str or None
        `decode_error` or `too_many_pixels`.
    """

    image: Image.Image | None
    width: int | None
    height: int | None
    reason: str | None


def decode(data: bytes, max_pixels: int, working_px: int) -> Decoded:
    """Decode an image once for all consumers.

    Parameters
    ----------
    data : bytes
    max_pixels : int
        Larger images are not decoded; their header is read, so width and height are known.
    working_px : int
        The result's shorter side stays at or above this, or at the original's.

    Notes
    -----
    Transparent images are laid over white, as a browser shows them; animations give their first
    frame; EXIF orientation is applied.
    """
    width = height = None
    # Opening reads the header alone. The cap below is ours and the user's; Pillow's own, at another
    # number, would hide the size of what it refuses.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            # Decoders warn of oddities (EXIF, palettes) that do not keep a file from decoding.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    return Decoded(None, width, height, "too_many_pixels")
                # JPEG alone can decode at a fraction of its size, and does so much faster.
                image.draft("RGB", (2 * working_px, 2 * working_px))
                upright = ImageOps.exif_transpose(image)
                if image.getexif().get(0x0112) in _LYING:
                    width, height = height, width
                return Decoded(_flatten(_shrink(upright, working_px)), width, height, None)
    except Exception:  # decoders meet hostile bytes: whatever they raise, the sample is undecodable
        return Decoded(None, width, height, "decode_error")


def read_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height that an image's header gives; None if it is of no format we read."""
    Image.MAX_IMAGE_PIXELS = None  # as in `decode`
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return image.size
    except Exception:  # as in `decode`
        return None


def _shrink(image: Image.Image, working_px: int) -> Image.Image:
    factor = min(image.size) // (2 * working_px)
    if factor < 2 or image.mode.startswith("I"):
        return image
    if image.mode in ("1", "P", "PA") or "transparency" in image.info:
        # Neither indices nor a colour that stands for transparency can be averaged.
        image = image.convert("RGBA")
    return image.reduce(factor)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I;16") or image.mode == "I":
        # Sixteen bits a channel: Pillow would clip instead of scaling.
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    return image.convert("RGB")


def measure_contrast(image: Image.Image) -> float:
    """Standard deviation of the grey levels of the RGB channel where it is largest: [0, 127.5].

    0 for a picture of one colour, which shows nothing. Pixels are left out of large pictures, not
    averaged, so that a fine pattern does not pass for one colour.
    """
    size = [min(side, _CONTRAST_PX) for side in image.size]
    some = image.resize((size[0], size[1]), Image.Resampling.NEAREST)
    return float(np.asarray(some).std(axis=(0, 1), dtype=np.float64).max())


def make_thumbnail(image: Image.Image, longest_px: int) -> bytes:
    """Return a WebP of at most `longest_px` on its longer side."""
    small = image.copy()
    small.thumbnail((longest_px, longest_px), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_THUMBNAIL_QUALITY, method=_THUMBNAIL_METHOD)
    return buffer.getvalue()


def read_thumbnail(data: bytes) -> Image.Image:
    """Decode what `make_thumbnail` wrote."""
    with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
        return image.convert("RGB")


def read_square(data: bytes, side_px: int) -> np.ndarray[Any, Any]:
    """Decode a thumbnail and squeeze it to a square: (3, side_px, side_px) uint8."""
    square = read_thumbnail(data).resize((side_px, side_px), Image.Resampling.BILINEAR)
    return np.asarray(square, np.uint8).transpose(2, 0, 1)
