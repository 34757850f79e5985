"""text: what is written in a picture, how much of it that covers, and whether the caption says so.

A caption that only repeats what is written in its picture teaches a model to read, not to see.
Nearly 40 % of LAION's pictures hold text that overlaps with their caption; T-MARS, which drops
those that no longer fit their caption once the text is masked, is better than dropping every
overlap, because many of them show what they name as well. Here the text is read instead of only
found (PP-OCR, by rapidocr's packaged models), so that both sides are columns:

- `text_area`: share of the picture inside the boxes of lines that could be read, at most 200.
- `text_overlap`: share of the caption's letters and digits that stand in the picture as well, in
  a stretch of at least 5 (2 of East Asian scripts) or as a whole word. Case, spaces and
  punctuation do not count: OCR loses them. 0 if the picture holds no text.

High overlap with a small area is a caption printed on a photograph, or a shop's sign: the picture
may still show what the caption says. High overlap with a large area is a page, a slide or a logo.
`select.max_text_overlap` with `select.min_overlap_area` tells them apart. T-MARS asks a model, by
the cosine of the masked picture with the caption: that needs towers of one space, and is not done
here.

References
----------
Maini et al., "T-MARS: Improving Visual Representations by Circumventing Text Feature Learning",
ICLR 2024, arXiv:2307.03132.
Du et al., "PP-OCR: A Practical Ultra Lightweight OCR System", 2020, arXiv:2009.09941.
"""

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.plugins import Plugin, Score
from curate.schema import COLUMNS

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PLUGIN", "measure_overlap"]

#: Longest side that text is looked for at: letters too small at this size are half as large at the
#: 224 to 384 px of a model that trains on the picture.
_LONGEST_PX = 736
#: Lines that are read of one picture: a page of small print takes seconds as it is.
_MAX_LINES = 200
#: A line of a single sign is more often a shape than a letter.
_MIN_SIGNS = 2
#: What is kept of a picture full of text.
_MAX_CHARS = 4000
#: Signs in a row that are no coincidence, in alphabets and in scripts of syllables or words.
_STRETCH, _DENSE_STRETCH = 5, 2
_FIRST_DENSE = "\u2e80"

_SIGNS = re.compile(r"[^\W_]+")


def measure_overlap(caption: str, text: str) -> float | None:
    """Return the share of a caption's letters and digits that a text holds too.

    Returns
    -------
    float or None
        [0, 1], see above; None if the caption has neither letters nor digits.
    """
    words = _SIGNS.findall(caption.casefold())
    found = _SIGNS.findall(text.casefold())
    signs, there, whole = "".join(words), "".join(found), set(found)
    if not signs:
        return None
    covered = np.zeros(len(signs), bool)
    start = 0
    for word in words:
        covered[start : start + len(word)] = word in whole
        start += len(word)
    for length in (_DENSE_STRETCH, _STRETCH):
        held = {there[i : i + length] for i in range(len(there) - length + 1)}
        for i in range(len(signs) - length + 1):
            stretch = signs[i : i + length]
            dense = min(stretch) >= _FIRST_DENSE
            if stretch in held and (dense or length == _STRETCH):
                covered[i : i + length] = True
    return float(covered.mean())


def _measure_area(boxes: Sequence[Any], size: tuple[int, int]) -> float:
    """Share of a picture of `size` that (4, 2) corners of boxes cover together."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for box in boxes:
        pen.polygon([(float(x), float(y)) for x, y in box], fill=1)
    return float(np.asarray(mask, np.uint8).mean())


def _open_engine() -> Any:
    import cv2
    import rapidocr

    cv2.setNumThreads(1)
    models = Path(rapidocr.__file__).parent / "models"
    return rapidocr.RapidOCR(
        params={
            "Global.log_level": "critical",
            # Lines that stand on their head are rare; telling them costs a network.
            "Global.use_cls": False,
            "Global.max_side_len": _LONGEST_PX,
            # Small pictures are not blown up: that takes four times as long and reads no more.
            "Det.limit_type": "max",
            "Det.limit_side_len": _LONGEST_PX,
            "Det.max_candidates": _MAX_LINES,
            # By name: what is only described is downloaded where it is missing.
            "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),
            "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def _load() -> Score:
    own = threading.local()  # an engine keeps what it is at: one for each thread
    own.engine = _open_engine()

    def read(image: "Image.Image", caption: str | None) -> tuple[float, float | None, str | None]:
        if not hasattr(own, "engine"):
            own.engine = _open_engine()
        image.thumbnail((_LONGEST_PX, _LONGEST_PX))
        found = own.engine(np.asarray(image)[:, :, ::-1])  # as OpenCV has it: blue first
        lines = [
            (box, line.strip())
            for box, line in zip(_or_none(found.boxes), _or_none(found.txts), strict=True)
            if len("".join(_SIGNS.findall(line))) >= _MIN_SIGNS
        ]
        text = "\n".join(line for _, line in lines)
        overlap = None if caption is None else measure_overlap(caption, text)
        area = _measure_area([box for box, _ in lines], image.size)
        return area, overlap, text[:_MAX_CHARS] or None

    def score(
        images: Sequence["Image.Image | None"], captions: Sequence[str | None]
    ) -> dict[str, Sequence[Any]]:
        pairs = zip(images, captions, strict=True)
        found = [read(image, caption) for image, caption in pairs if image is not None]
        return {
            "text_area": [area for area, _, _ in found],
            "text_overlap": [overlap for _, overlap, _ in found],
            "picture_text": [text for _, _, text in found],
        }

    return score


def _or_none(values: Any) -> Sequence[Any]:
    """An empty list where nothing was found, which rapidocr says by None."""
    return () if values is None else values


PLUGIN = Plugin(
    name="text",
    version=1,
    columns=(COLUMNS["text_area"], COLUMNS["text_overlap"], COLUMNS["picture_text"]),
    inputs=("image", "caption"),
    load=_load,
    packages=("rapidocr",),
    extra="curate[ocr]",
)
