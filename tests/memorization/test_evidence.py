import numpy as np

from curate.memorization.evidence import (
    EVIDENCE,
    Bank,
    Pairs,
    ProxyView,
    gather_evidence,
    highest,
)

RNG = np.random.default_rng(0)


def _unit(*shape: int) -> np.ndarray:
    rows = RNG.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def _setting(count: int = 30, size: int = 400):
    bank = Bank(_unit(size, 8), _unit(size, 6))
    clusters = np.arange(size)
    rows = np.stack([np.arange(count), np.arange(count) + 50], axis=1)
    pairs = Pairs(
        bank.image[rows[:, 0]], bank.text[rows[:, 1]], clusters[rows], clusters[rows[:, 1]], rows
    )
    image, text = _unit(size, 5), _unit(size, 5)
    out = RNG.random(count) < 0.5
    references = slice(100, 220)
    view = ProxyView(
        image[rows[:, 0]],
        text[rows[:, 1]],
        out,
        5.0,
        image[references],
        text[references],
        clusters[references],
        clusters[references],
    )
    return pairs, bank, view


def _oracle(pairs: Pairs, bank: Bank, views: list[ProxyView], row: int) -> dict[str, float]:
    """The same, one number at a time."""
    result = {}
    seen = [v for v in views if v.left_out[row]]
    cosines, forth, back, bits = [], [], [], []
    for view in seen:
        i, t = view.image[row], view.text[row]
        own = float(i @ t)
        free = [
            r
            for r in range(len(view.clusters))
            if view.clusters[r] not in pairs.clusters[row]
            and view.captions[r] != pairs.captions[row]
        ]
        cosines.append(own)
        for losses, query, references in (
            (forth, i, view.text_references),
            (back, t, view.image_references),
        ):
            logits = view.scale * np.array([own, *(float(query @ references[r]) for r in free)])
            losses.append(np.log(np.mean(np.exp(logits))) - logits[0])
        chances = np.exp(logits[1:]) / np.exp(logits[1:]).sum()  # the caption's, of other images
        bits.append(np.log2(len(free)) + (chances * np.log2(chances)).sum())
    if seen:
        result["caption_bits"] = np.mean(bits)
        result["out_cosine"] = np.mean(cosines)
        result["out_loss_image"], result["out_loss_text"] = np.mean(forth), np.mean(back)
        result["out_cosine_spread"] = np.std(cosines)
    by_image, by_text = bank.image @ pairs.image[row], bank.text @ pairs.text[row]
    by_image[pairs.rows[row]] = by_text[pairs.rows[row]] = -1
    for name, near, far in (
        ("image_neighbours", by_image, by_text),
        ("caption_neighbours", by_text, by_image),
    ):
        order = np.argsort(-near)[:10]
        result[f"best_of_{name}"] = far[order].max()
        result[f"best_five_of_{name}"] = far[order[:5]].mean()
        result[f"nearest_of_{name}"] = near.max()
    like_image, like_text = np.exp((by_image - 1) / 0.1), np.exp((by_text - 1) / 0.1)
    result["information"] = np.log(
        (like_image * like_text).mean() / (like_image.mean() * like_text.mean())
    )
    return result


def test_features_are_what_they_say() -> None:
    pairs, bank, view = _setting()
    found = gather_evidence(pairs, bank, [view])
    assert found.shape == (30, len(EVIDENCE))
    for row in range(30):
        expected = _oracle(pairs, bank, [view], row)
        for name, value in expected.items():
            np.testing.assert_allclose(found[row, EVIDENCE.index(name)], value, atol=2e-4)


def test_a_pair_is_not_compared_with_the_samples_it_is_made_of() -> None:
    pairs, bank, _ = _setting()
    spoilt = Bank(bank.image.copy(), bank.text.copy())
    # Whatever stands in the bank at the rows of a pair's own samples, the evidence is the same.
    for row in range(3):
        one = Pairs(*(part[row : row + 1] for part in vars(pairs).values()))
        spoilt.image[pairs.rows[row]] = one.image
        spoilt.text[pairs.rows[row]] = one.text
        none = gather_evidence(one, bank, [])
        assert np.array_equal(none, gather_evidence(one, spoilt, []))
        spoilt.image[:], spoilt.text[:] = bank.image, bank.text


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    pairs, bank, _ = _setting()
    whole = gather_evidence(pairs, bank, [])
    part = Pairs(*(field[7:9] for field in vars(pairs).values()))
    assert np.array_equal(whole[7:9], gather_evidence(part, bank, []))


def test_highest_finds_the_largest() -> None:
    for width in (3, 64, 1000, 1031):
        values = RNG.normal(size=(17, width))
        expected = np.argsort(-values, axis=1)[:, :10]
        assert np.array_equal(highest(values, 10), expected)
        assert highest(values[:0], 10).shape == (0, min(width, 10))


def test_of_equal_values_the_first_are_the_highest() -> None:
    """Copies in a bank; which of them are looked at must not depend on the processor."""
    values = RNG.integers(0, 4, size=(50, 1000)).astype(np.float32)
    assert np.array_equal(highest(values, 10), np.argsort(-values, axis=1, kind="stable")[:, :10])
