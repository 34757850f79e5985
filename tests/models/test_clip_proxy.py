from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from pydantic import ValidationError

from curate.errors import StorageError
from curate.models.clip_proxy import (
    CONTEXT,
    MARKS,
    MAX_VIEWS,
    ClipShape,
    GroupedClipLoss,
    build_clip,
    embed_views,
    encode,
    fold_tokens,
    load_clip,
    normalise_pixels,
    tokenize,
)
from curate.models.encoders import torch_threads
from curate.models.weights import dump_weights
from curate.stages.score import Score

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32
SHAPE = ClipShape(5, image_px=SIDE, image_width=8, text_width=64, text_layers=1, width=16)
PADDING, START, END = MARKS
DTYPES = ["float32", "bfloat16"]
BATCH = 128  # rows that inference always sees


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@cache
def _model() -> CLIP:
    """Random weights; its norms have seen enough pictures to tell one from another."""
    torch.manual_seed(0)
    model = build_clip(SHAPE)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model.encode_image(normalise_pixels(torch.from_numpy(_pixels(16)).float()))
    return model.eval().requires_grad_(False)


def _pixels(count: int) -> np.ndarray:
    """Coarse coloured noise: (N, 3, S, S)."""
    coarse = np.random.default_rng(1).integers(0, 256, (count, 3, 8, 8), np.uint8)
    return coarse.repeat(SIDE // 8, 2).repeat(SIDE // 8, 3)


def _tokens(count: int) -> np.ndarray:
    """Captions of 1 to 8 of the words 1 to 6, between marks."""
    rng = np.random.default_rng(2)
    rows = np.zeros((count, CONTEXT), np.int64)
    for row in rows:
        length = rng.integers(1, 9)
        row[0], row[length + 1] = SHAPE.words + 2, SHAPE.words + 3
        row[1 : length + 1] = rng.integers(1, SHAPE.words + 2, length)
    return rows


def _unit(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    rows = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return torch.nn.functional.normalize(rows, dim=1)


def test_known_words_stay_apart_and_all_others_become_one() -> None:
    tokens = np.array([[START, 20, 7, 10, 30, 31, END, 0, 0], [START, END] + [0] * 7])
    folded = fold_tokens(tokens, np.array([10, 20, 30]))
    assert folded.tolist() == [[5, 3, 1, 2, 4, 1, 6, 0, 0], [5, 6, 0, 0, 0, 0, 0, 0, 0]]
    assert folded.dtype == np.int64


@pytest.mark.parametrize("known", [0, 1, 40])
def test_folding_is_that_of_a_dictionary(known: int) -> None:
    rng = np.random.default_rng(known)
    words = np.sort(rng.choice(np.arange(1, 100), known, replace=False)).astype(np.int64)
    tokens = rng.integers(0, 101, (50, CONTEXT)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = START, END
    places = {0: 0, START: 2 + known, END: 3 + known}
    places |= {int(word): 2 + place for place, word in enumerate(words)}
    expected = [[places.get(token, 1) for token in row] for row in tokens.tolist()]
    assert fold_tokens(tokens, words).tolist() == expected
    assert fold_tokens(tokens[:0], words).shape == (0, CONTEXT)


@pytest.mark.parametrize("words", [[], [320, 736, 1928]])
def test_the_end_mark_is_the_highest_id_and_in_every_caption(words: list[int]) -> None:
    captions = ["a red square", "", "!?! 100%", "red " * 200, "ein Häuschen 🏠 <end_of_text>"]
    tokens = tokenize(captions)
    assert tokens.shape == (len(captions), CONTEXT)
    assert tokens.dtype == np.int32
    folded = fold_tokens(tokens, np.array(words, np.int64))
    ends = folded == len(words) + 3
    assert ends.sum(1).tolist() == [1, 1, 1, 1, 2]  # the last caption spells one out
    assert (folded.argmax(1) == ends.argmax(1)).all()
    assert (folded[:, 0] == len(words) + 2).all()
    assert 0 <= folded.min() <= folded.max() < len(words) + 4
    assert tokenize([]).shape == (0, CONTEXT)


def test_loss_is_that_of_open_clip_where_nothing_is_alike() -> None:
    rng = np.random.default_rng(0)
    image, text, scale = _unit(rng, 9, 6), _unit(rng, 9, 6), torch.tensor(7.0)
    expected = ClipLoss()(image, text, scale).item()
    for alike in (torch.zeros(9, 9, dtype=torch.bool), torch.eye(9, dtype=torch.bool)):
        assert GroupedClipLoss(alike)(image, text, scale).item() == expected


def test_loss_spares_those_alike() -> None:
    rng = np.random.default_rng(1)
    image, text, scale = _unit(rng, 8, 5), _unit(rng, 8, 5), 4.0
    group = rng.integers(4, size=8)
    alike = group[:, None] == group
    assert 0 < (alike.sum() - 8) < 56
    total = 0.0
    for row in range(8):
        rivals = [other for other in range(8) if other == row or not alike[row, other]]
        for a, b in ((image, text), (text, image)):
            logits = [scale * float(a[row] @ b[other]) for other in rivals]
            total += (np.log(np.exp(logits).sum()) - logits[rivals.index(row)]) / 16
    image.requires_grad_()
    found = GroupedClipLoss(torch.from_numpy(alike))(image, text, torch.tensor(scale))
    found.backward()
    assert found.item() == pytest.approx(total, abs=1e-5)
    assert torch.isfinite(image.grad).all()


def test_loss_is_nought_where_all_are_alike() -> None:
    rng = np.random.default_rng(2)
    alike = torch.ones(4, 4, dtype=torch.bool)
    loss = GroupedClipLoss(alike)(_unit(rng, 4, 3), _unit(rng, 4, 3), torch.tensor(9.0))
    assert loss.item() == 0


def test_weights_survive() -> None:
    pixels, tokens = _pixels(3), _tokens(3)
    data = dump_weights(_model())
    again = load_clip(data, SHAPE, "cpu")
    assert not again.training
    assert dump_weights(again) == data
    models = (_model(), again)
    before, after = (embed_views(model, pixels, tokens, 2, "float32") for model in models)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)


def test_other_bytes_are_refused() -> None:
    data = dump_weights(_model())
    for damaged in (b"", b"nothing of the kind", data[:-1], data[:1000], b"\x00" + data[1:]):
        with pytest.raises(StorageError, match="proxy's file must hold its weights") as caught:
            load_clip(damaged, SHAPE, "cpu")
        assert "\n" not in str(caught.value)
    for words, width in ((6, 16), (5, 17)):
        other = ClipShape(words, SIDE, SHAPE.image_width, SHAPE.text_width, 1, width)
        with pytest.raises(StorageError, match="Remove the score folder") as caught:
            load_clip(data, other, "cpu")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: str) -> None:
    pixels, tokens = _pixels(150), _tokens(150)
    whole = embed_views(_model(), pixels, tokens, 2, dtype)
    for rows in ([149], [130, 7, 131], np.arange(20, 150)):
        part = embed_views(_model(), pixels[rows], tokens[rows], 2, dtype)
        for one, other in zip(whole, part, strict=True):
            assert np.array_equal(one[rows], other)
    assert len(np.unique(whole[0], axis=0)) == 150


def test_shapes_and_norms() -> None:
    for count in (0, 1, 5):
        found = embed_views(_model(), _pixels(count), _tokens(count), MAX_VIEWS, "float32")
        assert [part.shape for part in found] == [(count, 16), (count, 16), (count,)]
        assert {part.dtype for part in found} == {np.dtype(np.float32)}
        assert np.linalg.norm(found[0], axis=1).max(initial=0) <= 1 + 1e-5
        np.testing.assert_allclose(np.linalg.norm(found[1], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_view_is_what_the_model_says_of_the_whole_picture(dtype: str) -> None:
    pixels, tokens = _pixels(BATCH), _tokens(BATCH)
    found = embed_views(_model(), pixels, tokens, 1, dtype)
    with torch.inference_mode():
        seen = normalise_pixels(torch.from_numpy(pixels).float())
        image, text = encode(_model(), seen, torch.from_numpy(tokens), dtype)
    assert np.array_equal(found[0], image.numpy())
    assert np.array_equal(found[1], text.numpy())
    np.testing.assert_allclose(found[2], (image * text).sum(1).numpy(), atol=1e-6)


def test_several_views_are_averaged() -> None:
    pixels, tokens = _pixels(BATCH), _tokens(BATCH)
    image, text, alignment = embed_views(_model(), pixels, tokens, MAX_VIEWS, "float32")
    whole = torch.from_numpy(pixels).float()
    few = SIDE * 7 // 8
    corners = [(0, 0), (SIDE - few, SIDE - few), (SIDE - few, 0)]
    crops = [whole[:, :, y : y + few, x : x + few] for y, x in corners]
    views = [whole, *(torch.nn.functional.interpolate(c, SIDE, mode="bilinear") for c in crops)]
    with torch.inference_mode():
        both = [
            encode(_model(), normalise_pixels(view), torch.from_numpy(tokens), "float32")
            for view in views
        ]
    np.testing.assert_allclose(image, np.mean([one.numpy() for one, _ in both], 0), atol=1e-5)
    cosines = [(one * words).sum(1).numpy() for one, words in both]
    np.testing.assert_allclose(alignment, np.mean(cosines, 0), atol=1e-5)
    assert np.ptp(cosines, axis=0).max() > 0.01
    np.testing.assert_array_equal(text, both[0][1].numpy())


def test_the_stage_allows_as_many_views_as_there_are() -> None:
    assert Score(clip_views=MAX_VIEWS).clip_views == MAX_VIEWS
    with pytest.raises(ValidationError):
        Score(clip_views=MAX_VIEWS + 1)


def test_pixels_are_normalised_per_channel() -> None:
    pixels = torch.full((2, 3, 4, 4), 255.0)
    pixels[1] = 0
    found = normalise_pixels(pixels)
    np.testing.assert_allclose(found[0, :, 0, 0], [1.930336, 2.074883, 2.145897], atol=1e-5)
    np.testing.assert_allclose(found[1, :, 3, 3], [-1.792263, -1.752097, -1.480215], atol=1e-5)
