import numpy as np
import pytest

from curate.memorization.blocks import BLOCK_ROWS, by_blocks

_RNG = np.random.default_rng(0)
_ROWS = _RNG.normal(size=(2 * BLOCK_ROWS + 88, 1280)).astype(np.float32)
_BASE = _RNG.normal(size=(1280, 61)).astype(np.float32)


def _product(rows: np.ndarray) -> np.ndarray:
    return rows @ _BASE


@pytest.mark.parametrize("size", [1, 7, BLOCK_ROWS, BLOCK_ROWS + 44])
def test_a_row_is_the_same_to_the_last_digit_in_any_company(size: int) -> None:
    whole = by_blocks(_product, _ROWS)
    np.testing.assert_allclose(whole, _ROWS @ _BASE, rtol=1e-3, atol=1e-3)
    starts = range(0, len(_ROWS) if size > 1 else 20, size)
    parts = np.concatenate([by_blocks(_product, _ROWS[s : s + size]) for s in starts])
    np.testing.assert_array_equal(parts, whole[: len(parts)])


def test_parts_go_together_and_padding_is_left_out() -> None:
    numbers = np.arange(BLOCK_ROWS + 3)
    seen = []

    def add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        seen.append(len(left))
        return np.stack([left, left + right], axis=1)

    found = by_blocks(add, numbers, 2 * numbers)
    np.testing.assert_array_equal(found, np.stack([numbers, 3 * numbers], axis=1))
    assert seen == [BLOCK_ROWS, BLOCK_ROWS]


def test_no_rows_keep_their_shape() -> None:
    assert by_blocks(_product, _ROWS[:0]).shape == (0, 61)
