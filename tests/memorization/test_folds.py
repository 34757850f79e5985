import numpy as np
import pytest

from curate.memorization.folds import block_masks, draw_blocks, draw_masks, hash_unit

IDS = [f"{number:032x}" for number in range(2000)]


def test_hash_is_uniform_and_depends_on_seed_and_purpose() -> None:
    first = hash_unit(IDS, 0, "a")
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.03
    assert np.array_equal(first[::-1], hash_unit(IDS[::-1], 0, "a"))
    for other in (hash_unit(IDS, 1, "a"), hash_unit(IDS, 0, "b")):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


@pytest.mark.parametrize("proxies", [2, 4, 8, 12, 64])
def test_every_sample_is_in_exactly_half_of_the_proxies(proxies: int) -> None:
    masks = draw_masks(IDS, proxies, seed=3)
    assert masks.shape == (len(IDS), proxies)
    assert (masks.sum(1) == proxies // 2).all()
    assert (masks[:, ::2] != masks[:, 1::2]).all()
    assert (abs(masks.mean(0) - 0.5) < 0.06).all()


def test_first_pairs_are_independent_splits() -> None:
    masks = draw_masks(IDS, 8, seed=0)[:, ::2].astype(float)
    correlation = np.corrcoef(masks.T) - np.eye(4)
    assert abs(correlation).max() < 0.08


def test_a_cluster_is_in_or_out_as_a_whole_wherever_it_stands() -> None:
    repeated = IDS[:50] * 3
    masks = draw_masks(repeated, 8, seed=0)
    assert np.array_equal(masks[:50], masks[50:100])
    order = np.random.default_rng(0).permutation(150)
    shuffled = draw_masks([repeated[row] for row in order], 8, seed=0)
    assert np.array_equal(shuffled, masks[order])


def test_samples_of_one_block_share_their_masks() -> None:
    blocks, masks = draw_blocks(IDS, 64, 1), draw_masks(IDS, 64, 1)
    assert np.array_equal(block_masks(64, 1)[blocks], masks)
    assert blocks.max() < 16


def test_seeds_give_other_halves() -> None:
    agreement = (draw_masks(IDS, 2, 0) == draw_masks(IDS, 2, 1)).mean()
    assert 0.4 < agreement < 0.6


@pytest.mark.parametrize("proxies", [0, 1, 3])
def test_odd_numbers_of_proxies_are_refused(proxies: int) -> None:
    with pytest.raises(ValueError, match="even"):
        draw_masks(IDS, proxies, 0)
