"""The proxy trained end to end, whole: a small CLIP over thumbnails and tokens.

open_clip's own model class and loss, at a size that trains hundreds of pairs a second on one core:
a residual tower of one block per stage and a text transformer of a layer or two, over a vocabulary
cut down to the set's own words. Nothing in it has seen a picture or a caption before.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from curate.models.weights import load_weights

__all__ = [
    "CONTEXT",
    "MARKS",
    "MAX_VIEWS",
    "ClipShape",
    "GroupedClipLoss",
    "build_clip",
    "choose_words",
    "embed_images",
    "embed_texts",
    "embed_views",
    "encode",
    "fold_tokens",
    "load_clip",
    "normalise_pixels",
    "tokenize",
]

Array = np.ndarray[Any, Any]

#: Tokens read of a caption, with start and end: longer ones are cut.
CONTEXT = 24
#: Ids of CLIP's vocabulary that every caption holds; the end mark is the highest id of all, by
#: which the text tower finds the token to pool.
_START, _END = 49406, 49407
#: What is no word: padding, start, end.
MARKS = (0, _START, _END)
#: Words that stay apart: one that occurs once teaches nothing but its sample.
_WORDS = 8192
_LEAST_OCCURRENCES = 2
#: In the folded vocabulary: padding, any word outside it, then the words, start and end.
_PADDING, _UNKNOWN, _FIRST_WORD = 0, 1, 2

#: Rows per inference batch, always padded to this: a row's result must not depend on its shard.
#: A GPU takes as long for few as for many.
_BATCHES = {"cpu": 128, "cuda": 1024}

#: CLIP's own (Radford et al. 2021), of pixels in [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_SPREAD = (0.26862954, 0.26130258, 0.27577711)

#: Left, top and side of the squares that stand for augmented views, as shares of the picture: the
#: whole, and crops like those of training. Fixed, so that a view depends on nothing but the sample.
_VIEWS = ((0.0, 0.0, 1.0), (0.0, 0.0, 0.875), (0.125, 0.125, 0.875), (0.0, 0.125, 0.875))
MAX_VIEWS = len(_VIEWS)


@dataclass(frozen=True)
class ClipShape:
    """Size of a proxy.

    Parameters
    ----------
    words : int
        Of the folded vocabulary.
    image_px : int
        Side of the pictures, a multiple of 32.
    image_width : int
        Channels of the residual tower's first stage.
    text_width, text_layers : int
        A multiple of 64, and how many.
    width : int
        Of the joint space.
    """

    words: int
    image_px: int = 64
    image_width: int = 16
    text_width: int = 128
    text_layers: int = 2
    width: int = 128


def build_clip(shape: ClipShape) -> CLIP:
    """Make a proxy with first weights from torch's seed."""
    vision = CLIPVisionCfg(
        layers=(1, 1, 1, 1), width=shape.image_width, image_size=shape.image_px, head_width=32
    )
    text = CLIPTextCfg(
        context_length=CONTEXT,
        vocab_size=shape.words + _FIRST_WORD + 2,
        width=shape.text_width,
        heads=shape.text_width // 64,
        layers=shape.text_layers,
    )
    # What oneDNN convolves fastest on a CPU, by a quarter.
    return CLIP(shape.width, vision, text).to(memory_format=torch.channels_last)


class GroupedClipLoss(ClipLoss):  # type: ignore[misc]  # open_clip has no annotations
    """open_clip's loss, in which pairs of one group are not each other's negatives.

    Parameters
    ----------
    alike : (B, B) bool
        Pairs of one cluster, or with equal captions.

    Notes
    -----
    At chance the mean logarithm of a row's rivals and itself, at most ln B; lower is better.
    """

    def __init__(self, alike: Tensor) -> None:
        super().__init__()
        self._excused = alike & ~torch.eye(len(alike), dtype=torch.bool, device=alike.device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return both sides' logits, (B, B) float32 each, with -inf for what is excused."""
        both = super().get_logits(image_features, text_features, logit_scale, logit_bias)
        forth, back = (side.masked_fill(self._excused, -torch.inf) for side in both)
        return forth, back


def tokenize(captions: list[str]) -> Array:
    """Return CLIP's tokens: (N, CONTEXT) int32, 0 where a caption has ended."""
    tokens: Array = _tokenizer()(captions, CONTEXT).numpy().astype(np.int32)
    return tokens


@cache  # reading the vocabulary takes half a second
def _tokenizer() -> Any:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def fold_tokens(tokens: Array, words: Array) -> Array:
    """Translate CLIP's token ids to those of a folded vocabulary.

    Parameters
    ----------
    tokens : (N, CONTEXT) integer
    words : (W,) integer, ascending
        Ids that stay apart; all others become one unknown word.

    Returns
    -------
    (N, CONTEXT) int64, [0, W + 4)
    """
    places = np.searchsorted(words, tokens).clip(max=max(len(words) - 1, 0))
    known = words[places] == tokens if len(words) else np.zeros(tokens.shape, bool)
    folded = np.where(known, places + _FIRST_WORD, _UNKNOWN)
    for mark, place in ((_START, 0), (_END, 1)):
        folded[tokens == mark] = _FIRST_WORD + len(words) + place
    folded[tokens == 0] = _PADDING
    return folded.astype(np.int64)


def normalise_pixels(pixels: Tensor) -> Tensor:
    """(B, 3, S, S) float32 in [0, 255] -> what the image tower takes, channels last."""
    mean, spread = (_channels(values, pixels.device) for values in (_MEAN, _SPREAD))
    return ((pixels / 255 - mean) / spread).contiguous(memory_format=torch.channels_last)


@cache  # while a graph is captured nothing can be moved to a GPU
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(-1, 1, 1)


def encode(model: CLIP, pixels: Tensor, tokens: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Return both sides' unit vectors, (B, width) float32, computed in `dtype` inside.

    Parameters
    ----------
    pixels : (B, 3, S, S) float32
        See `normalise_pixels`.
    tokens : (B, CONTEXT) int64
        See `fold_tokens`.
    dtype : str
        "float32" or "bfloat16".
    """
    with _lowered(pixels.device, dtype):
        image, text = model.encode_image(pixels), model.encode_text(tokens)
    return _unit(image), _unit(text)


def _lowered(device: torch.device, dtype: str) -> Any:
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def _unit(side: Tensor) -> Tensor:
    """Norms, cosines and the loss are taken in float32 whatever the towers ran in."""
    return torch.nn.functional.normalize(side.float(), dim=-1)


def embed_images(model: CLIP, pixels: Array, view: int, dtype: str) -> Array:
    """Put pictures into a proxy's joint space, seen in one view.

    Parameters
    ----------
    model : CLIP
        In evaluation mode.
    pixels : (N, 3, S, S) uint8
    view : int
        Below `MAX_VIEWS`; 0 is the whole picture.
    dtype : str
        See `encode`.

    Returns
    -------
    (N, width) float32, unit norm
    """

    def encode_part(part: Tensor) -> Tensor:
        seen = normalise_pixels(_crop(part.float(), *_VIEWS[view]))
        with _lowered(seen.device, dtype):
            return model.encode_image(seen)

    return _by_batches(model, encode_part, pixels)


def embed_texts(model: CLIP, tokens: Array, dtype: str) -> Array:
    """Put captions into a proxy's joint space.

    Parameters
    ----------
    model : CLIP
        In evaluation mode.
    tokens : (N, CONTEXT) int64
        See `fold_tokens`.
    dtype : str
        See `encode`.

    Returns
    -------
    (N, width) float32, unit norm
    """

    def encode_part(part: Tensor) -> Tensor:
        with _lowered(part.device, dtype):
            return model.encode_text(part)

    return _by_batches(model, encode_part, tokens)


def _by_batches(model: CLIP, encode_part: Callable[[Tensor], Tensor], values: Array) -> Array:
    found = np.empty((len(values), model.text_projection.shape[1]), np.float32)
    device = next(model.parameters()).device
    batch = _BATCHES[device.type]
    for start in range(0, len(values), batch):
        rows = np.minimum(np.arange(start, start + batch), len(values) - 1)
        part = torch.from_numpy(values[rows]).to(device)
        with torch.inference_mode():
            encoded = _unit(encode_part(part))
        found[start : start + batch] = encoded.cpu().numpy()[: len(values) - start]
    return found


def embed_views(
    model: CLIP, pixels: Array, tokens: Array, views: int, dtype: str
) -> tuple[Array, Array, Array]:
    """Put pairs into a proxy's joint space, the images seen in the first `views` views.

    Parameters
    ----------
    model, pixels, tokens, dtype
        See `embed_images` and `embed_texts`.
    views : int
        K, from 1 to `MAX_VIEWS`.

    Returns
    -------
    image : (N, width) float32
        Mean over views of the unit vectors.
    text : (N, width) float32, unit norm
    alignment : (N,) float32, [-1, 1]
        Mean over views of the pair's cosine.
    """
    text = embed_texts(model, tokens, dtype)
    image = np.zeros_like(text)
    for view in range(views):
        image += embed_images(model, pixels, view, dtype) / views
    return image, text, (image * text).sum(1)


def _crop(pixels: Tensor, left: float, top: float, side: float) -> Tensor:
    size = pixels.shape[-1]
    length = round(side * size)
    if length == size:
        return pixels
    x, y = round(left * size), round(top * size)
    part = pixels[:, :, y : y + length, x : x + length]
    return torch.nn.functional.interpolate(part, (size, size), mode="bilinear")


def load_clip(data: bytes, shape: ClipShape, device: str) -> CLIP:
    """Read a committed proxy, ready for inference.

    Raises
    ------
    StorageError
        If the bytes are not the weights of such a proxy.
    """
    return load_weights(build_clip(shape), data).to(device)


def choose_words(counts: Counter[int]) -> Array:
    """Choose a set's vocabulary.

    Parameters
    ----------
    counts : Counter
        How often every token id occurs in the set.

    Returns
    -------
    (W,) int64, ascending
        The most frequent ids of words, see `fold_tokens`.
    """
    # Equally frequent ones by number: the choice must not depend on the order of counting.
    ranked = sorted(
        (word for word, times in counts.items() if times >= _LEAST_OCCURRENCES),
        key=lambda word: (-counts[word], word),
    )
    return np.array(sorted(word for word in ranked[:_WORDS] if word not in MARKS), np.int64)
