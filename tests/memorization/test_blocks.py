import numpy as np
import pytest

from curate.memorization.blocks import BLOCK_ROWS, by_blocks, exact_products

_RNG = np.random.default_rng(0)


def _pair(width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D) and columns (D, M) of unit norm, float32."""
    both = _RNG.normal(size=(2 * BLOCK_ROWS + 88, width)), _RNG.normal(size=(count, width))
    one, other = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in both)
    return one.astype(np.float32), other.astype(np.float32).T


@pytest.mark.parametrize("size", [1, 7, BLOCK_ROWS, BLOCK_ROWS + 44])
def test_a_row_is_the_same_to_the_last_digit_in_any_company(size: int) -> None:
    rows, columns = _pair(1280, 61)
    multiply = exact_products(columns)
    whole = by_blocks(multiply, rows)
    starts = range(0, len(rows) if size > 1 else 20, size)
    parts = np.concatenate([by_blocks(multiply, rows[s : s + size]) for s in starts])
    np.testing.assert_array_equal(parts, whole[: len(parts)])


@pytest.mark.parametrize("width", [1, 7, 128, 1280, 4096])
def test_no_order_of_any_axis_matters(width: int) -> None:
    rows, columns = _pair(width, 61)
    found = exact_products(columns)(rows)
    order, across, along = (_RNG.permutation(count) for count in (len(rows), 61, width))
    mixed = exact_products(columns[along][:, across])(rows[order][:, along])
    np.testing.assert_array_equal(mixed, found[order][:, across])
    assert found.dtype == np.float32


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize("width", [1, 7, 128, 1280, 4096])
def test_products_are_as_near_as_those_of_float32(width: int, scale: float) -> None:
    rows, columns = _pair(width, 61)
    truth = rows.astype(np.float64) @ columns * scale
    found = exact_products(np.float32(scale) * columns)(rows)
    assert np.abs(found - truth).max() < 3e-7 * scale


def test_rows_and_columns_of_zeros_give_zeros() -> None:
    rows, columns = _pair(7, 3)
    rows[2], columns[:, 1] = 0, 0
    found = exact_products(columns)(rows)
    assert (found[2] == 0).all()
    assert (found[:, 1] == 0).all()
    assert np.isfinite(found).all()


def test_parts_go_together() -> None:
    numbers = np.arange(BLOCK_ROWS + 3)
    seen = []

    def add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        seen.append(len(left))
        return np.stack([left, left + right], axis=1)

    found = by_blocks(add, numbers, 2 * numbers)
    np.testing.assert_array_equal(found, np.stack([numbers, 3 * numbers], axis=1))
    assert seen == [BLOCK_ROWS, 3]


def test_no_rows_keep_their_shape() -> None:
    rows, columns = _pair(7, 61)
    assert by_blocks(exact_products(columns), rows[:0]).shape == (0, 61)
