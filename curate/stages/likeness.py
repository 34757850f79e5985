"""What counts as the same picture, for all stages that ask: the cosine proposes, pixels confirm."""

from typing import Any, Self

import numpy as np
from pydantic import Field

from curate.dedup.copies import are_copies
from curate.dedup.registration import ReadImage
from curate.stages.base import Stage

__all__ = ["Likeness"]

Array = np.ndarray[Any, Any]


class Likeness(Stage):
    """Base of the stages that compare pictures."""

    min_cosine: float = Field(
        0.95, description="cosine of image_emb from which two samples are candidates", gt=0, le=1
    )
    min_pixel_match: float | None = Field(
        None,
        description="correlation of the thumbnails, registered within each other, that a candidate "
        "must reach too; null: not asked",
        gt=0,
        le=1,
    )
    max_patch_difference: float | None = Field(
        None,
        description="grey levels by which a candidate's thumbnails may differ where they differ "
        "most, over a thirteenth of a side, fewer in pale ones; a turn by up to 9 degrees, missing "
        "colour and light that changes white too are undone before; null: not asked",
        ge=0,
        le=255,
    )

    min_cosine_alone: float = Field(
        0.95,
        description="cosine that is enough where one of the two has no thumbnail to compare",
        gt=0,
        le=1,
    )

    @property
    def asks_pixels(self) -> bool:
        """Whether candidates need more than their cosine."""
        return self.min_pixel_match is not None or self.max_patch_difference is not None

    def without_pixels(self) -> Self:
        """Return the stage as it judges pairs of which one has no thumbnail: by the cosine alone.

        The same stage where pixels are not asked anyway.
        """
        if not self.asks_pixels:
            return self
        least = max(self.min_cosine, self.min_cosine_alone)
        asked = {"min_pixel_match": None, "max_patch_difference": None}
        return self.model_copy(update={"min_cosine": least, **asked})

    def confirm(self, left: Array, right: Array, read_image: ReadImage) -> Array:
        """Tell which candidates the pixels confirm; all where pixels are not asked.

        Parameters
        ----------
        left, right : (E,) int64
        read_image : callable
            Returns the thumbnail of either's number.

        Returns
        -------
        (E,) bool
        """
        if not self.asks_pixels:
            return np.ones(len(left), bool)
        return are_copies(left, right, read_image, self.min_pixel_match, self.max_patch_difference)
