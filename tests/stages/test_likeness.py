import pytest

from curate.stages.dedup import Dedup


@pytest.mark.parametrize(
    ("min_cosine", "alone", "expected"), [(0.78, 0.95, 0.95), (0.97, 0.95, 0.97), (1.0, 0.5, 1.0)]
)
def test_without_pixels_a_candidate_needs_a_cosine_that_is_enough(
    min_cosine: float, alone: float, expected: float
) -> None:
    fields = {"min_cosine": min_cosine, "min_cosine_alone": alone, "seed": 3}
    for asked in ({"min_pixel_match": 0.96}, {"max_patch_difference": 15}):
        stage = Dedup(**fields, **asked).without_pixels()
        assert not stage.asks_pixels
        assert stage.min_cosine == expected
        assert stage.seed == 3
        assert stage.without_pixels() == stage
    # Where pixels are not asked anyway, `min_cosine` is all there is.
    stage = Dedup(**fields)
    assert stage.without_pixels() == stage
