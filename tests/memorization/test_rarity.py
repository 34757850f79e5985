import numpy as np
import pytest

from curate.memorization.rarity import isolation, rank_scale


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _oracle(image, text, clusters, bank, neighbour):
    result = []
    for row in range(len(clusters)):
        outside = [b for b in range(len(bank[2])) if bank[2][b] != clusters[row]]
        total = 0.0
        for queries, base in ((image, bank[0]), (text, bank[1])):
            cosines = sorted((float(queries[row] @ base[b]) for b in outside), reverse=True)
            total += 1 - cosines[min(neighbour, len(cosines)) - 1]
        result.append(total / 2)
    return np.array(result)


@pytest.mark.parametrize("size", [8, 900])
def test_isolation_is_the_distance_to_the_tenth_neighbour_outside_the_cluster(size: int) -> None:
    rng = np.random.default_rng(0)
    image, text = _unit(rng.normal(size=(size, 6))), _unit(rng.normal(size=(size, 4)))
    clusters = rng.integers(size // 2, size=size)
    bank = (image, text, clusters)
    few = slice(0, 40)
    found = isolation(image[few], text[few], clusters[few], bank)
    expected = _oracle(image[few], text[few], clusters[few], bank, 10)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_sample_alone_in_its_bank_is_as_rare_as_can_be() -> None:
    one = np.ones((1, 1), np.float32)
    assert isolation(one, one, np.zeros(1, int), (one, one, np.zeros(1, int))).tolist() == [2]


def test_a_row_does_not_depend_on_its_neighbours_in_the_call() -> None:
    rng = np.random.default_rng(1)
    image = _unit(rng.normal(size=(700, 32)))
    clusters = np.arange(700)
    bank = (image, image, clusters)
    whole = isolation(image, image, clusters, bank)
    part = isolation(image[100:103], image[100:103], clusters[100:103], bank)
    assert np.array_equal(whole[100:103], part)


def test_rank_scale_is_the_share_below_with_ties_halved() -> None:
    reference = np.array([1.0, 2.0, 2.0, 3.0])
    values = np.array([0.0, 1.0, 2.0, 2.5, 9.0])
    assert rank_scale(values, reference).tolist() == [0, 0.125, 0.5, 0.75, 1]
