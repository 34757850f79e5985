from collections.abc import Callable

import numpy as np
import pytest

from curate.memorization.folds import block_masks, draw_blocks, draw_halves, draw_masks, hash_unit

IDS = [f"{number:032x}" for number in range(2000)]


def test_hash_is_uniform_and_depends_on_seed_and_purpose() -> None:
    first = hash_unit(IDS, 0, "a")
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.03
    assert np.array_equal(first[::-1], hash_unit(IDS[::-1], 0, "a"))
    for other in (hash_unit(IDS, 1, "a"), hash_unit(IDS, 0, "b")):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


Draw = Callable[[list[str], int, int], np.ndarray]
either = pytest.mark.parametrize("draw", [draw_masks, draw_halves])


@either
@pytest.mark.parametrize("proxies", [2, 4, 8, 12, 64])
def test_every_sample_is_in_exactly_half_of_the_proxies(proxies: int, draw: Draw) -> None:
    masks = draw(IDS, proxies, 3)
    assert masks.shape == (len(IDS), proxies)
    assert (masks.sum(1) == proxies // 2).all()
    assert (masks[:, ::2] != masks[:, 1::2]).all()
    assert (abs(masks.mean(0) - 0.5) < 0.06).all()


def test_first_pairs_are_independent_splits() -> None:
    masks = draw_masks(IDS, 8, seed=0)[:, ::2].astype(float)
    correlation = np.corrcoef(masks.T) - np.eye(4)
    assert abs(correlation).max() < 0.08


def test_all_halves_are_independent_and_hold_many_kinds_of_samples() -> None:
    masks = draw_halves(IDS, 64, seed=0)
    correlation = np.corrcoef(masks[:, ::2].T.astype(float)) - np.eye(32)
    assert abs(correlation).max() < 0.1
    assert len(np.unique(masks, axis=0)) == len(IDS)


@either
def test_a_cluster_is_in_or_out_as_a_whole_wherever_it_stands(draw: Draw) -> None:
    repeated = IDS[:50] * 3
    masks = draw(repeated, 8, 0)
    assert np.array_equal(masks[:50], masks[50:100])
    order = np.random.default_rng(0).permutation(150)
    shuffled = draw([repeated[row] for row in order], 8, 0)
    assert np.array_equal(shuffled, masks[order])


def test_samples_of_one_block_share_their_masks() -> None:
    blocks, masks = draw_blocks(IDS, 64, 1), draw_masks(IDS, 64, 1)
    assert np.array_equal(block_masks(64, 1)[blocks], masks)
    assert blocks.max() < 16


@either
def test_seeds_give_other_halves(draw: Draw) -> None:
    agreement = (draw(IDS, 2, 0) == draw(IDS, 2, 1)).mean()
    assert 0.4 < agreement < 0.6


@either
@pytest.mark.parametrize("proxies", [0, 1, 3])
def test_odd_numbers_of_proxies_are_refused(proxies: int, draw: Draw) -> None:
    with pytest.raises(ValueError, match="even"):
        draw(IDS, proxies, 0)
