"""What models of `benchmarks.mitigation` see: emoji, or pairs of a finished run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.emoji import EMOJI_VENDORS, emoji_captions, read_emoji
from benchmarks.memorization import rare_rows
from benchmarks.parts import find_titles, split_parts
from benchmarks.signature import IMAGE_PX, Samples, join_groups, read_pair_vectors, read_pairs
from benchmarks.signature_three import group_emoji, read_pixels
from benchmarks.trial import Corpus, embed_captions, embed_pictures
from curate.formats.pixels import read_square
from curate.models.clip_proxy import choose_words, fold_tokens, tokenize

Array = np.ndarray[Any, Any]

SETTINGS = {"two": EMOJI_VENDORS[:1], "three": EMOJI_VENDORS, "run": ("picture",)}
NAME = "name"
#: Side of the pictures.
PX = 32
#: Of an emoji.
CAPTIONS = 5


@dataclass(frozen=True)
class Data:
    """Emoji as models see them, before swaps.

    Parameters
    ----------
    modalities : list of str, length I + 1
    pixels : (I, N, 3, S, S) uint8
    captions : list of N lists of (L,) int64
        The name first.
    words : int
        Of the vocabulary.
    corpus : Corpus
        First picture and name of the same rows, for scores.
    rare : (N,) bool
    """

    modalities: list[str]
    pixels: Array
    captions: list[list[Array]]
    words: int
    corpus: Corpus
    rare: Array

    def samples(self) -> Samples:
        """Return pictures and names, for `embed`."""
        names = np.stack([known[0] for known in self.captions])
        groups = self.corpus.clusters.tolist()
        return Samples(self.modalities, self.pixels, names[None], self.words, groups)


def read_data(cache: Path) -> Data:
    """Read all emoji of both vendors."""
    emoji = read_emoji(cache, EMOJI_VENDORS, ("en",))
    known = emoji_captions(cache)
    captions = [known[one.code][:CAPTIONS] for one in emoji]
    pictures = zip(*(one.images for one in emoji), strict=True)
    pixels = np.stack([np.stack([read_pixels(data) for data in part]) for part in pictures])
    shown = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pixels[0]]
    vectors = embed_pictures(shown), embed_captions([part[0] for part in captions])
    uids = [one.code for one in emoji]
    return make_data(pixels, captions, group_emoji(emoji, pixels), uids, vectors)


def read_run(out: Path, limit: int) -> Data:
    """Read so many pairs of a finished run, the first by hash."""
    table = read_pairs(out, limit)
    uids, captions, clusters = (table[n].to_pylist() for n in ("uid", "caption", "cluster_id"))
    pixels = np.stack([read_square(data, IMAGE_PX) for data in table["thumbnail"].to_pylist()])
    said = [
        tell_apart(caption, title)
        for caption, title in zip(captions, find_titles(captions, clusters), strict=True)
    ]
    groups, vectors = join_groups([clusters, captions]), read_pair_vectors(out, uids)
    return make_data(pixels[None], said, groups, uids, vectors, SETTINGS["run"])


def tell_apart(caption: str, title: str) -> list[str]:
    """Return a caption, its title, and its other parts, as far as these differ."""
    rest = " ".join(part for part in split_parts(caption) if part != title)
    return list(dict.fromkeys(filter(None, (caption, title, rest))))


def make_data(
    pixels: Array,
    captions: list[list[str]],
    groups: list[str],
    uids: list[str],
    vectors: tuple[Array, Array],
    pictures: Sequence[str] = EMOJI_VENDORS,
) -> Data:
    """Tokenize captions and shrink pictures, (I, N, 3, S, S) uint8.

    Parameters
    ----------
    captions : list of N lists of str
        The name first.
    vectors : ((N, D) float32, (N, E) float32)
        Of the first pictures and the names.
    pictures : sequence of str, length I
        Names of these modalities.
    """
    names, spelt, alike = map(np.array, ([part[0] for part in captions], uids, groups))
    plain = np.full(len(uids), "clean")
    corpus = Corpus(spelt, names, alike, plain, alike, plain, plain, *vectors, Path("none"))
    tokens = tokenize([caption for part in captions for caption in part])
    words = choose_words(Counter(tokens.ravel().tolist()))
    ends = np.cumsum([len(part) for part in captions])[:-1]
    folded = [list(part) for part in np.split(fold_tokens(tokens, words), ends)]
    sizes = (*pixels.shape[:2], 3, PX, pixels.shape[3] // PX, PX, pixels.shape[4] // PX)
    small = pixels.reshape(sizes).mean((4, 6)).round().astype(np.uint8)
    return Data([*pictures, NAME], small, folded, len(words), corpus, rare_rows(corpus))


def cut_modalities(data: Data, setting: str) -> Data:
    """Leave the pictures of a setting's vendors."""
    count = len(SETTINGS[setting])
    return replace(data, modalities=[*SETTINGS[setting], NAME], pixels=data.pixels[:count])
