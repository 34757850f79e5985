import numpy as np
import pytest

from curate.memorization.information import score_information, uniqueness


def test_uniqueness_is_one_for_a_caption_of_its_own_and_none_for_everybodys() -> None:
    np.testing.assert_allclose(uniqueness(np.array([1, 10, 1000]), 1000), [1, 2 / 3, 0], atol=1e-12)


def test_a_single_cluster_has_no_information_to_share() -> None:
    assert uniqueness(np.array([1]), 1) == 0


def test_the_lower_of_both_counts() -> None:
    bits = np.array([4.0, 1.0, 9.0, 4.0, 0.0, -1e-9])
    unique = np.array([1.0, 1.0, 1.0, 0.25, 1.0, 1.0])
    found = score_information(bits, 4.0, unique)
    np.testing.assert_allclose(found, [1, 0.25, 1, 0.25, 0, 0])


@pytest.mark.parametrize("typical", [0.0, 1e-12])
def test_captions_that_all_say_nothing_give_finite_numbers(typical: float) -> None:
    found = score_information(np.zeros(3), typical, np.ones(3))
    assert np.array_equal(found, np.zeros(3))
