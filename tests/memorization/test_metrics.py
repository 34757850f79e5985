from itertools import combinations, permutations

import numpy as np
import pytest

from curate.memorization import baselines, checks, metrics
from curate.memorization.metrics import (
    clipmem,
    cmc,
    contrastive_loss,
    loss_gap,
    multimem,
    rescale,
    sslmem,
)

RNG = np.random.default_rng(0)

#: Modalities, views, samples, width, held-out samples, number format.
SHAPES = [
    (2, 1, 2, 1, 1, np.float64),
    (2, 1, 2, 4096, 3, np.float32),
    (2, 4, 17, 8, 5, np.float64),
    (3, 1, 40, 3, 7, np.float32),
    (3, 3, 9, 64, 1, np.float16),
    (4, 2, 11, 5, 30, np.float64),
    (7, 1, 3, 2, 2, np.float32),
]


def _unit(*shape: int, dtype=np.float64) -> np.ndarray:
    rows = RNG.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(dtype)


def _modalities(number: int, views: int, samples: int, width: int, dtype=np.float64):
    shape = (views, samples, width) if views > 1 else (samples, width)
    return [_unit(*shape, dtype=dtype) for _ in range(number)]


def _views(array: np.ndarray) -> np.ndarray:
    return np.asarray(array if array.ndim == 3 else array[None], np.float64)


def _cmc_oracle(modalities, held_out) -> np.ndarray:
    """Half of all entries of Phi Phi' less half of all of Phi Phi_h', one number at a time."""
    arrays = [_views(array) for array in modalities]
    result = []
    for sample in range(arrays[0].shape[1]):
        terms = []
        for view in range(max(len(array) for array in arrays)):
            phi = [array[view % len(array), sample] for array in arrays]
            own = sum(float(a @ b) for a in phi for b in phi)
            cross = [
                sum(float(a @ b) for a in phi for b in (np.float64(h[other]) for h in held_out))
                for other in range(len(held_out[0]))
            ]
            terms.append(own / 2 - np.mean(cross) / 2)
        result.append(np.mean(terms))
    return np.array(result)


@pytest.mark.parametrize(("number", "views", "samples", "width", "held", "dtype"), SHAPES)
def test_cmc_is_the_double_sum(number, views, samples, width, held, dtype) -> None:
    modalities = _modalities(number, views, samples, width, dtype)
    held_out = _modalities(number, 1, held, width, dtype)
    found = cmc(modalities, held_out)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, _cmc_oracle(modalities, held_out), atol=1e-9)
    assert (found >= -(number**2) / 8 - 1e-2).all()
    assert (found <= number**2 + 1e-2).all()


def test_blocks_do_not_change_cmc(monkeypatch: pytest.MonkeyPatch) -> None:
    modalities, held_out = _modalities(3, 2, 50, 6), _modalities(3, 1, 4, 6)
    whole = cmc(modalities, held_out)
    monkeypatch.setattr(checks, "_BLOCK_BYTES", 900)
    np.testing.assert_allclose(cmc(modalities, held_out), whole, atol=1e-12)


@pytest.mark.parametrize(("number", "views", "samples", "width", "held", "dtype"), SHAPES)
def test_multimem_is_the_difference_in_three_scales(
    number, views, samples, width, held, dtype
) -> None:
    inside, outside = (_modalities(number, views, samples, width, dtype) for _ in "fg")
    held_in, held_out = (_modalities(number, 1, held, width, dtype) for _ in "fg")
    models = (inside, outside, held_in, held_out)
    raw = multimem(*models)
    np.testing.assert_allclose(raw, cmc(inside, held_in) - cmc(outside, held_out), atol=1e-12)
    np.testing.assert_allclose(
        multimem(*models, form="pair_mean") * len(list(combinations(range(number), 2))), raw
    )
    np.testing.assert_allclose(multimem(*models, form="per_modality") * (number - 1), raw)
    assert (multimem(inside, inside, held_in, held_in) == 0).all()


def test_order_of_modalities_does_not_matter() -> None:
    models = [_modalities(3, 2, 12, 9) for _ in range(2)]
    models += [_modalities(3, 1, 4, 9) for _ in range(2)]
    expected = multimem(*models)
    for order in permutations(range(3)):
        moved = [[model[place] for place in order] for model in models]
        np.testing.assert_allclose(multimem(*moved), expected, atol=1e-12)


def test_one_view_is_the_same_as_equal_views() -> None:
    image, text, sound = _unit(10, 6), _unit(3, 10, 6), _unit(10, 6)
    held_out = _modalities(3, 1, 5, 6)
    repeated = np.broadcast_to(image, (3, 10, 6))
    mixed = cmc([image, text, sound], held_out)
    np.testing.assert_allclose(mixed, cmc([repeated, text, sound], held_out), atol=1e-12)
    by_view = [cmc([image, text[view], sound], held_out) for view in range(3)]
    np.testing.assert_allclose(mixed, np.mean(by_view, axis=0), atol=1e-12)


def _opposites(number: int, width: int) -> list[np.ndarray]:
    """Held-out samples whose mean is zero, so that only the positive part is left."""
    half = _unit(3, width)
    return [np.concatenate([half, -half])] * number


@pytest.mark.parametrize("views", [1, 4])
def test_with_two_modalities_the_positive_part_is_that_of_clipmem(views: int) -> None:
    inside, outside = (tuple(_modalities(2, views, 20, 7)) for _ in "fg")
    nothing = tuple(_opposites(2, 7))
    expected = clipmem(inside, outside, nothing, nothing)
    for form in ("raw", "pair_mean", "per_modality"):
        found = multimem(inside, outside, nothing, nothing, form=form)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    means = [(_views(a) * _views(b)).sum(-1).mean(0) for a, b in (inside, outside)]
    np.testing.assert_allclose(expected, means[0] - means[1], atol=1e-12)


@pytest.mark.parametrize("number", [3, 5])
def test_positive_parts_of_pairs_add_up(number: int) -> None:
    inside, outside = (_modalities(number, 1, 20, 7) for _ in "fg")
    nothing = _opposites(number, 7)
    pairs = [
        multimem([inside[a], inside[b]], [outside[a], outside[b]], nothing[:2], nothing[:2])
        for a, b in combinations(range(number), 2)
    ]
    models = (inside, outside, nothing, nothing)
    np.testing.assert_allclose(multimem(*models), np.sum(pairs, 0), atol=1e-12)
    np.testing.assert_allclose(multimem(*models, form="pair_mean"), np.mean(pairs, 0), atol=1e-12)
    # The paper's three modalities: AIT = (IT + AT + AI) / 2.
    expected = np.sum(pairs, 0) / (number - 1)
    np.testing.assert_allclose(multimem(*models, form="per_modality"), expected, atol=1e-12)


def test_clipmem_subtracts_what_unrelated_samples_get() -> None:
    inside, outside = ((_unit(3, 8, 5), _unit(8, 5)) for _ in "fg")
    held_in, held_out = ((_unit(6, 5), _unit(6, 5)) for _ in "fg")
    expected = np.zeros(8)
    for sign, (image, text), (images, texts) in (
        (1, inside, held_in),
        (-1, outside, held_out),
    ):
        for row in range(8):
            own = np.mean([view[row] @ text[row] for view in image])
            own -= np.mean([view[row] @ t for view in image for t in texts])
            own -= np.mean([i @ text[row] for i in images])
            expected[row] += sign * own
    np.testing.assert_allclose(clipmem(inside, outside, held_in, held_out), expected, atol=1e-12)
    assert (clipmem(inside, inside, held_in, held_in) == 0).all()


def test_rescale_divides_by_the_range() -> None:
    assert rescale(np.array([-1.0, 0.0, 3.0])).tolist() == [-0.25, 0, 0.75]
    assert rescale(np.array([2.0, 4.0])).tolist() == [0.5, 1]
    assert rescale(np.array([-2.0])).tolist() == [-1]
    assert rescale(np.zeros(2)).tolist() == [0, 0]


def test_rescale_of_numbers_at_the_ends_of_float64() -> None:
    most, least = np.finfo(np.float64).max, np.finfo(np.float64).smallest_subnormal
    assert rescale(np.array([1e308, -1e308])).tolist() == [0.5, -0.5]
    assert rescale(np.array([most, 0, -most])).tolist() == [0.5, 0, -0.5]
    assert rescale(np.array([most, most / 2])).tolist() == [1, 0.5]
    assert rescale(np.array([least, -least])).tolist() == [0.5, -0.5]


def test_sslmem_is_the_gap_of_distances_between_views() -> None:
    inside, outside = _unit(4, 6, 3), _unit(3, 6, 9)
    expected = []
    for row in range(6):
        mean = [
            np.mean([np.linalg.norm(a[row] - b[row]) for a, b in combinations(model, 2)])
            for model in (inside, outside)
        ]
        expected.append(mean[1] - mean[0])
    np.testing.assert_allclose(sslmem(inside, outside), expected, atol=1e-12)
    assert (sslmem(inside, inside) == 0).all()
    tight = np.broadcast_to(inside[:1], inside.shape)
    assert (sslmem(tight, inside) > 0).all()


def test_loss_gap_is_out_less_in() -> None:
    assert loss_gap(np.array([1.0, 2.0]), np.array([4.0, 2.0])).tolist() == [3, 0]


def _loss_oracle(image, text, bank, temperature, rows) -> np.ndarray:
    result = []
    for row in range(len(image)):
        total = 0.0
        for query, references in ((image[row], bank[1]), (text[row], bank[0])):
            own = image[row] @ text[row] / temperature
            others = [
                query @ references[other] / temperature
                for other in range(len(references))
                if other != rows[row]
            ]
            total += np.log(np.exp([own, *others]).sum()) - own
        result.append(total / 2)
    return np.array(result)


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_contrastive_loss_is_that_of_the_definition(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text, bank = _unit(9, 6), _unit(9, 6), (_unit(14, 6), _unit(14, 6))
    monkeypatch.setattr(checks, "_BLOCK_BYTES", 200)
    for rows in (np.full(9, -1), np.arange(9) - 2 * (np.arange(9) == 1)):
        found = contrastive_loss(image, text, bank, temperature, rows)
        np.testing.assert_allclose(
            found, _loss_oracle(image, text, bank, temperature, rows), rtol=1e-4, atol=1e-5
        )
    none = contrastive_loss(image, text, bank, temperature)
    outside = contrastive_loss(image, text, bank, temperature, np.full(9, -1))
    assert np.array_equal(none, outside)


def test_contrastive_loss_does_not_overflow_at_small_temperatures() -> None:
    image = _unit(5, 4, dtype=np.float32)
    loss = contrastive_loss(image, -image, (image, image), 1e-4)
    assert np.isfinite(loss).all()
    assert (loss > 1e4).all()


def _with(value: float, row: int = 1) -> np.ndarray:
    array = _unit(4, 3)
    array[row] = value
    return array


GOOD, HELD = _unit(4, 3), _unit(2, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_with(np.nan), "in_model.1.: rows must be finite; row 1"),
        (_with(np.inf, 3), "in_model.1.: rows must be finite; row 3"),
        (_with(0.0), "of norm 1 within 0.001; row 1 has norm 0"),
        (GOOD * 1.002, "row 0 has norm 1.002"),
        (_unit(4, 5), "must fit in_model.0. in samples, width and views"),
        (_unit(5, 3), "must fit in_model.0."),
        (_unit(4, 4, 3)[0, 0], "must be .N, D. or .K, N, D.; got shape"),
        (GOOD.astype(object), "real numbers; got object"),
        (GOOD[:0], "at least one sample"),
        (GOOD[:, :0], "at least one sample"),
    ],
)
def test_wrong_embeddings_are_refused(wrong: np.ndarray, message: str) -> None:
    held_out = (HELD, HELD)
    for measure in (multimem, clipmem):
        with pytest.raises(ValueError, match=message):
            measure((GOOD, wrong), (GOOD, GOOD), held_out, held_out)


def test_norms_within_the_tolerance_pass() -> None:
    assert np.isfinite(cmc([GOOD * 1.0009, GOOD * 0.9991], [HELD, HELD])).all()


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ((HELD[:0], HELD[:0]), "held_out.0.: must hold at least one sample"),
        ((HELD, HELD, HELD), "held_out: must hold 2 modalities; got 3"),
        ((_unit(2, 4), _unit(2, 4)), "held_out: must have width 3; got 4"),
        ((HELD, HELD[:1]), "held_out.1.: must fit"),
        ((HELD, HELD * 2), "norm 2"),
    ],
)
def test_wrong_held_out_sets_are_refused(held_out, message: str) -> None:
    for measure in (multimem, clipmem):
        with pytest.raises(ValueError, match=message):
            measure((GOOD, GOOD), (GOOD, GOOD), held_out, (HELD, HELD))
    with pytest.raises(ValueError, match=message):
        cmc((GOOD, GOOD), held_out)


def test_models_that_do_not_fit_each_other_are_refused() -> None:
    two, three, held = (GOOD, GOOD), (GOOD, GOOD, GOOD), (HELD, HELD)
    with pytest.raises(ValueError, match="at least 2 modalities; got 1"):
        multimem([GOOD], [GOOD], [HELD], [HELD])
    with pytest.raises(ValueError, match="the 2 modalities of in_model; got 3"):
        multimem(two, three, held, held)
    with pytest.raises(ValueError, match="form: must be one of raw"):
        multimem(two, two, held, held, form="mean")
    with pytest.raises(ValueError, match="got 4 in, 5 out"):
        multimem(two, (_unit(5, 3), _unit(5, 3)), held, held)
    with pytest.raises(ValueError, match="got 4 in, 5 out"):
        clipmem(two, (_unit(5, 3), _unit(5, 3)), held, held)
    with pytest.raises(ValueError, match="two modalities; got 3; use multimem"):
        clipmem(two, three, held, held)
    with pytest.raises(ValueError, match=r"must fit in_model\[0\] in samples"):
        multimem((_unit(2, 4, 3), _unit(3, 4, 3)), two, held, held)
    # Widths of the two models may differ.
    wide = (_unit(4, 9), _unit(4, 9))
    assert multimem(two, wide, held, (_unit(2, 9), _unit(2, 9))).shape == (4,)


def test_wrong_rows_of_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores: must be \(N,\) and finite"):
        rescale(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="scores"):
        rescale(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="out_loss"):
        loss_gap(np.zeros(2), np.array([np.inf, 0]))
    with pytest.raises(ValueError, match="got 2 in, 3 out"):
        loss_gap(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"in_views: must be \(K, N, D\) with K >= 2"):
        sslmem(GOOD, GOOD)
    with pytest.raises(ValueError, match="got 4 in, 5 out"):
        sslmem(_unit(2, 4, 3), _unit(2, 5, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": GOOD[:3]}, "text: must hold as many rows as image"),
        ({"text": _unit(4, 5)}, "text: must have width 3"),
        ({"image": _unit(2, 4, 3)}, "image: must be .N, D.; got shape"),
        ({"bank": (HELD, HELD[:1])}, "bank.1.: must hold as many rows as bank.0."),
        ({"bank": (HELD[:0], HELD[:0])}, "bank.0.: must hold at least one"),
        ({"bank": (_unit(2, 5), _unit(2, 5))}, "bank: must have width 3; got 5"),
        ({"temperature": 0.0}, "temperature: must be positive"),
        ({"temperature": np.nan}, "temperature: must be positive"),
        ({"temperature": 1e-40}, "temperature: must be positive"),
        ({"rows": np.zeros(3, int)}, "rows: must be .4,. int"),
        ({"rows": np.zeros(4)}, "rows: must be .4,. int; got .* float64"),
        ({"rows": np.array([0, 1, 2, -1])}, r"rows: must be in \[-1, 2\); got -1 to 2"),
        ({"bank": (HELD[:1], HELD[:1]), "rows": np.zeros(4, int)}, "bank: must hold a sample"),
    ],
)
def test_wrong_banks_are_refused(arguments: dict, message: str) -> None:
    right = {"image": GOOD, "text": GOOD, "bank": (HELD, HELD)}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{**right, **arguments})


def test_all_is_complete() -> None:
    public = {
        name
        for name, value in vars(metrics).items()
        if not name.startswith("_")
        and (
            getattr(value, "__module__", None) in (metrics.__name__, baselines.__name__)
            or name.isupper()
        )
    }
    assert set(metrics.__all__) == public
    assert set(baselines.__all__) <= public
