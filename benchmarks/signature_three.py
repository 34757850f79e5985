"""The signature of `benchmarks.signature` with three modalities: emoji, each drawn and named twice.

Two settings: two vendors' renderings and a name, and one rendering and its name in two languages.
Prints one JSON line for each. Emoji of one group must not lie in two sets: variants by gender and
direction, equal names, and equal pictures (a good dozen of flags and families). Skin tones are
left out. `python -m benchmarks.signature_three`.

References: Wang et al., MultiMem (arXiv:2606.22220).
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.corpora import DEFAULT_CACHE
from benchmarks.emoji import EMOJI_VENDORS, Emoji, emoji_group, read_emoji
from benchmarks.signature import IMAGE_PX, Samples, join_groups, judge, make_samples
from benchmarks.sources import normalise
from curate.engine.workers import keep_freed_memory
from curate.formats.pixels import decode
from curate.models.precision import pick_device, pick_dtype
from curate.models.train_clip import ClipRecipe

Array = np.ndarray[Any, Any]

#: Pictures are equal below this root mean square of grey levels: 1.2 at most lie between one
#: vendor's renderings of one flag under two codes, 4.1 at least between two faces.
_EQUAL_LEVELS = 3.0


@dataclass(frozen=True)
class Setting:
    """What makes up a sample.

    Parameters
    ----------
    vendors, languages : tuple of str
        A picture from each, a name in each.
    """

    vendors: tuple[str, ...]
    languages: tuple[str, ...]


def read_pixels(data: bytes) -> Array:
    """Decode an emoji's file: (3, S, S) uint8."""
    image = decode(data, IMAGE_PX**2 * 4, IMAGE_PX).image
    assert image is not None
    return np.asarray(image.resize((IMAGE_PX, IMAGE_PX)), np.uint8).transpose(2, 0, 1)


def equal_pictures(pixels: Array) -> tuple[Array, Array]:
    """Return the pairs of rows, (E,) and (E,), whose pictures (N, ...) uint8 look the same."""
    # Products of grey levels about 0 stay small enough for float32 to tell a level.
    flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 128 - 1
    norms = (flat**2).mean(1)
    squares = norms[:, None] + norms - 2 * (flat @ flat.T) / flat.shape[1]
    first, other = np.nonzero(squares < (_EQUAL_LEVELS / 128) ** 2)
    apart = first < other
    return first[apart], other[apart]


def group_emoji(emoji: list[Emoji], pixels: Array) -> list[str]:
    """Name the groups of emoji alike in code, in a name or in a picture of (I, N, 3, S, S)."""
    names = zip(*(one.names for one in emoji), strict=True)
    columns = [[emoji_group(one.code) for one in emoji]]
    columns += [[normalise(name) for name in part] for part in names]
    edges = [equal_pictures(part) for part in pixels]
    first, other = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    return join_groups(columns, (first, other))


def read_setting(cache: Path, setting: Setting) -> Samples:
    """Read all emoji that a setting covers."""
    emoji = read_emoji(cache, setting.vendors, setting.languages)
    pictures = zip(*(one.images for one in emoji), strict=True)
    pixels = np.stack([np.stack([read_pixels(data) for data in part]) for part in pictures])
    names = [list(part) for part in zip(*(one.names for one in emoji), strict=True)]
    modalities = (*setting.vendors, *setting.languages)
    return make_samples(modalities, pixels, names, group_emoji(emoji, pixels))


@click.command()
@click.option("--cache", default=DEFAULT_CACHE, show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--setting",
    "names",
    multiple=True,
    type=click.Choice(["renderings", "languages"]),
    default=("renderings", "languages"),
    show_default=True,
    help="Repeat for several.",
)
@click.option("--language", default="de", show_default=True, help="Besides English.")
@click.option("--epochs", default=40, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    cache: Path,
    names: tuple[str, ...],
    language: str,
    seed: int,
    views: int,
    **options: int,
) -> None:
    """Measure on emoji with three modalities."""
    keep_freed_memory()
    settings = {
        "renderings": Setting(EMOJI_VENDORS, ("en",)),
        "languages": Setting(EMOJI_VENDORS[:1], ("en", language)),
    }
    for name in names:
        begun = time.monotonic()
        samples = read_setting(cache.expanduser(), settings[name])
        recipe = ClipRecipe(**options, dtype=pick_dtype(pick_device()))
        report = judge(samples, recipe, views, seed)
        seconds = round(time.monotonic() - begun, 1)
        click.echo(json.dumps({"setting": name, **options, **report, "seconds": seconds}))


if __name__ == "__main__":
    main()
