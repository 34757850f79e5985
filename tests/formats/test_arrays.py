from pathlib import Path

import numpy as np
import pytest

from curate.errors import InputError, SourceChangedError
from curate.formats.arrays import list_arrays, normalise, open_array
from tests.formats.vectors import draw_vectors


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_either_kind_of_file(tmp_path: Path, kind: str, order: str) -> None:
    vectors = np.asarray(draw_vectors(9).astype(kind), order=order)
    np.save(tmp_path / "a.npy", vectors)
    np.savez(tmp_path / "plain.npz", a=vectors, b=vectors[:2])
    np.savez_compressed(tmp_path / "packed.npz", a=vectors)
    assert list_arrays(str(tmp_path / "plain.npz"), "plain.npz") == ["a", "b"]
    for name, member in (("a.npy", None), ("plain.npz", "a"), ("packed.npz", "a")):
        stored = open_array(str(tmp_path / name), name, member)
        assert (stored.rows, stored.width) == (9, 24)
        np.testing.assert_array_equal(stored.take(np.array([7, 2, 2])), vectors[[7, 2, 2]])
        assert stored.take(np.zeros(0, int)).shape == (0, 24)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([["a", None]], object), "must hold floating numbers; got pickled objects"),
        (np.zeros((3, 4), np.int8), "must hold floating numbers; got int8"),
        (np.zeros(3, "u8,u8"), "must hold floating numbers"),
        (np.zeros(5, np.float16), r"must be of shape .* got \(5,\)"),
        (np.zeros((2, 3, 4), np.float16), r"must be of shape .* got \(2, 3, 4\)"),
        (np.zeros((3, 0), np.float16), r"must be of shape .* got \(3, 0\)"),
    ],
)
def test_what_is_no_array_of_vectors(tmp_path: Path, array: np.ndarray, message: str) -> None:
    if array.dtype.hasobject:
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
    else:
        np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", a=array)
    with pytest.raises(InputError, match=rf"^a\.npy: {message}"):
        open_array(str(tmp_path / "a.npy"), "a.npy")
    with pytest.raises(InputError, match=rf"^a\.npz: a: {message}"):
        open_array(str(tmp_path / "a.npz"), "a.npz", "a")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an array",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\x06\x00{'a':\n",
        b"\x93NUMPY\x03\x00\x00\x00\x00\x00",
    ],
)
def test_what_is_no_array_at_all(tmp_path: Path, data: bytes) -> None:
    for name, member in (("a.npy", None), ("a.npz", "a")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="must be a whole") as caught:
            open_array(str(tmp_path / name), name, member)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"must be a whole \.npz"):
        list_arrays(str(tmp_path / "a.npz"), "a.npz")


def test_a_file_cut_short_or_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, draw_vectors(9))
    stored = open_array(str(path), "a.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="it is cut short"):
        open_array(str(path), "a.npy")
    for change in (lambda: None, lambda: np.save(path, draw_vectors(2)), path.unlink):
        change()
        with pytest.raises(SourceChangedError, match="must hold the rows that were indexed"):
            stored.take(np.array([8]))
    with pytest.raises(SourceChangedError, match="must stay as it is"):
        open_array(str(path), "a.npy")


def test_unit_norm_or_nothing() -> None:
    rows = np.random.default_rng(0).standard_normal((5000, 16))
    rows[0] = 0
    rows[1, 3] = np.nan
    rows[2, 5] = -np.inf
    rows[3] *= 1e300  # its square overflows
    rows[4] *= 1e-300
    rows[4999] = np.nan
    unit, valid = normalise(rows)
    assert unit.dtype == np.float16
    assert np.flatnonzero(~valid).tolist() == [0, 1, 2, 4999]
    assert not unit[~valid].any()
    rows[3] *= 1e-300
    rows[4] *= 1e300
    expected = rows[valid] / np.linalg.norm(rows[valid], axis=1, keepdims=True)
    np.testing.assert_allclose(unit[valid], expected, atol=5e-4)
    nothing, none = normalise(np.zeros((0, 3), np.float32))
    assert nothing.shape == (0, 3)
    assert none.shape == (0,)
