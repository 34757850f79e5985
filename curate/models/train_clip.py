"""Trains a small CLIP end to end: deterministic for a seed, one thread and one device."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional

from curate.models.clip_proxy import (
    ClipShape,
    GroupedClipLoss,
    build_clip,
    encode,
    normalise_pixels,
)
from curate.models.encoders import torch_threads
from curate.models.steps import EagerSteps, GraphedSteps, Steps, finish, finish_together
from curate.models.train import RETRIES, fit_contrastive, has_learned, seed_attempt

__all__ = [
    "ClipRecipe",
    "ClipTraining",
    "Disturb",
    "augment_pixels",
    "train_clip",
    "train_clips",
]

Array = np.ndarray[Any, Any]

#: Least side of a random crop, as a share of the picture's.
_LEAST_CROP = 0.75
#: Brightness and contrast are changed by up to this share.
_JITTER = 0.2
#: Share of a caption's tokens that a step does not see.
_DROPPED_TOKENS = 0.1
#: 1 / temperature, the range that CLIP allows (Radford et al. 2021, section 2.5).
_MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class ClipRecipe:
    """How a proxy is trained.

    Parameters
    ----------
    epochs : int
    batch : int
        Pairs per step, at most a quarter of the data.
    learning_rate : float
        Highest, reached after a tenth of the steps; falls as a cosine to 0.
    weight_decay : float
    dtype : str
        "float32" or "bfloat16".
    retries : int
        Times that a diverged training is begun again, with another seed.
    """

    epochs: int = 30
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dtype: str = "bfloat16"
    retries: int = RETRIES


@dataclass(frozen=True)
class Disturb:
    """What is done to a step besides.

    Parameters
    ----------
    vectors : callable, optional
        Changes the unit vectors before their loss, by side: "image" and "text".
    tokens : callable, optional
        Changes (B, CONTEXT) int64 before the text tower sees them.
    """

    vectors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    tokens: Callable[[Tensor], Tensor] | None = None


_UNDISTURBED = Disturb()


@dataclass(frozen=True)
class ClipTraining:
    """A trained proxy and how it went.

    Parameters
    ----------
    model : CLIP
        In evaluation mode.
    losses : list of float
        Mean contrastive loss per epoch, relative to that at chance; lower is better.
    retries : int
        Trainings that diverged and were begun again.
    diverged : bool
        Whether the last one diverged too; if to infinity, `model` has first weights.
    """

    model: CLIP
    losses: list[float] = field(default_factory=list)
    retries: int = 0
    diverged: bool = False


_Training = Generator[None, None, ClipTraining]
_Losses = Generator[None, None, list[float]]


def train_clip(
    shape: ClipShape,
    pixels: Array,
    tokens: Array,
    groups: Array,
    recipe: ClipRecipe,
    seed: int,
    device: str,
    rows: Array | None = None,
    disturb: Disturb | None = None,
) -> ClipTraining:
    """Train a proxy; a training that diverges is begun again with another seed.

    Parameters
    ----------
    shape : ClipShape
    pixels : (N, 3, S, S) or (I, N, 3, S, S) uint8
        One picture of each sample, or I: each a modality of its own, all through one tower.
    tokens : (N, CONTEXT) or (T, N, CONTEXT) int64
        One caption of each sample, or T, as above.
    groups : (N, G) int64
        Rows that share an entry of any column are not each other's negatives.
    recipe : ClipRecipe
    seed : int
    device : str
    rows : (T,) or (T, 2) int64, optional
        What an epoch goes through, in this order, instead of all samples in one drawn anew: whose
        picture, and in a second column whose caption. Then the groups of both count.
    disturb : Disturb, optional

    Returns
    -------
    ClipTraining
        Trained on the mean of the contrastive losses of all pairs of modalities.
    """
    whose = None
    if rows is not None and rows.ndim == 2:
        groups = groups[rows].reshape(len(rows), -1)
        whose, rows = torch.from_numpy(rows), np.arange(len(rows))
    samples = _lay_out(pixels, tokens, device)

    def fit(model: CLIP) -> _Losses:
        return _fit(model, samples, groups, recipe, whose, rows, disturb or _UNDISTURBED)

    with torch_threads(1):
        return finish(_train(shape, recipe, seed, device, fit))


def train_clips(
    shape: ClipShape,
    pixels: Array,
    tokens: Array,
    groups: Array,
    recipe: ClipRecipe,
    chosen: Sequence[tuple[Array, int]],
    device: str,
) -> list[ClipTraining]:
    """Train several proxies at once, each on some of the samples as `train_clip` does it alone.

    Parameters
    ----------
    shape, pixels, tokens, groups, recipe, device
        See `train_clip`.
    chosen : sequence of ((N,) bool, int)
        What each trains on, and its seed.

    Returns
    -------
    list of ClipTraining

    Notes
    -----
    A GPU takes half of the time that they take one after the other, and holds the samples once.
    """
    samples = _lay_out(pixels, tokens, device)

    def begin(inside: Array, seed: int) -> _Training:
        rows = torch.from_numpy(np.flatnonzero(inside))
        whose, part = torch.stack([rows, rows], 1), groups[inside]
        return _train(
            shape, recipe, seed, device, lambda model: _fit(model, samples, part, recipe, whose)
        )

    with torch_threads(1):
        return finish_together([begin(*one) for one in chosen], device)


def _train(
    shape: ClipShape,
    recipe: ClipRecipe,
    seed: int,
    device: str,
    fit: Callable[[CLIP], _Losses],
) -> _Training:
    for attempt in range(recipe.retries + 1):
        seed_attempt(seed, attempt)
        model = build_clip(shape).to(device)
        losses = yield from fit(model)
        diverged = not has_learned(losses)
        if not diverged:
            break
    if not all(map(math.isfinite, losses)):
        model = build_clip(shape).to(device)
    finite = [loss for loss in losses if math.isfinite(loss)]
    return ClipTraining(model.eval().requires_grad_(False), finite, attempt, diverged)


def _lay_out(pixels: Array, tokens: Array, device: str) -> tuple[Tensor, Tensor]:
    """Put samples where they are trained on, as modalities of pictures and of captions."""
    pixels = pixels if pixels.ndim == 5 else pixels[None]
    tokens = tokens if tokens.ndim == 3 else tokens[None]
    return torch.from_numpy(pixels).to(device), torch.from_numpy(tokens).to(device)


def _fit(
    model: CLIP,
    samples: tuple[Tensor, Tensor],
    groups: Array,
    recipe: ClipRecipe,
    whose: Tensor | None = None,
    rows: Array | None = None,
    disturb: Disturb = _UNDISTURBED,
) -> _Losses:
    """Train in place; see `fit_contrastive`.

    `whose` (M, 2) int64: the samples whose picture and caption each of the `groups` (M, G) is of;
    all samples in their order if None.
    """
    images, texts = samples
    device = images.device
    on_gpu = device.type == "cuda"
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True,
        capturable=on_gpu,
    )  # fmt: skip

    def ask(chosen: Tensor, alike: Tensor) -> list[Tensor]:
        # Drawn on the CPU whatever the device, so that it draws the same.
        own, spoken = (chosen, chosen) if whose is None else whose[chosen].unbind(1)
        views = _draw_views(len(images) * len(chosen))
        hidden = _draw_hidden(len(texts) * len(chosen), texts.shape[2])
        return [own, spoken, *views, hidden, alike]

    def loss_of(inputs: Sequence[Tensor]) -> Tensor:
        own, spoken, *views, hidden, alike = (given.to(device) for given in inputs)
        seen = _change_views(images[:, own].flatten(0, 1), *views)
        words = _hide_words(texts[:, spoken].flatten(0, 1), hidden)
        words = words if disturb.tokens is None else disturb.tokens(words)
        sides = encode(model, normalise_pixels(seen), words, recipe.dtype)
        if disturb.vectors is not None:
            changed = disturb.vectors({"image": sides[0], "text": sides[1]})
            sides = changed["image"], changed["text"]
        _limit_scale(model)
        measure, scale = GroupedClipLoss(alike), model.logit_scale.exp()
        modalities = [part for side in sides for part in side.view(-1, len(own), side.shape[1])]
        losses = [measure(one, other, scale) for one, other in combinations(modalities, 2)]
        return torch.stack(losses).mean()

    model.train()
    # What disturbs a step may draw, which a graph would not do anew.
    graphed = on_gpu and disturb == _UNDISTURBED
    steps: Steps = (
        GraphedSteps(model, optimiser, loss_of) if graphed else EagerSteps(optimiser, loss_of)
    )
    losses = yield from fit_contrastive(steps, groups, recipe.epochs, recipe.batch, ask, rows=rows)
    _limit_scale(model)
    return losses


def _limit_scale(model: CLIP) -> None:
    with torch.no_grad():
        model.logit_scale.clamp_(0, _MAX_LOG_SCALE)


def augment_pixels(pixels: Tensor) -> Tensor:
    """Random crops, brightness and contrast: (B, 3, S, S) uint8 -> float32 in [0, 255].

    Pictures are not mirrored: captions name left and right, and hold letters.
    """
    return _change_views(pixels, *(part.to(pixels.device) for part in _draw_views(len(pixels))))


def _draw_views(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (B, 2, 3) within the picture, contrast and brightness (B, 1, 1, 1)."""
    side = _LEAST_CROP + (1 - _LEAST_CROP) * torch.rand(count)
    shift = (2 * torch.rand(count, 2) - 1) * (1 - side)[:, None]
    frame = torch.zeros(count, 2, 3)
    frame[:, 0, 0] = frame[:, 1, 1] = side
    frame[:, :, 2] = shift
    gain = 1 + _JITTER * (2 * torch.rand(count, 1, 1, 1) - 1)
    lift = 255 * _JITTER / 2 * (2 * torch.rand(count, 1, 1, 1) - 1)
    return frame, gain, lift


def _change_views(pixels: Tensor, frame: Tensor, gain: Tensor, lift: Tensor) -> Tensor:
    grid = functional.affine_grid(frame, list(pixels.shape), align_corners=False)
    seen = functional.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    return (gain * (seen - 127.5) + 127.5 + lift).clamp(0, 255)


def _draw_hidden(count: int, length: int) -> Tensor:
    """Tokens that a step does not see, should they be words: (B, L) bool."""
    return torch.rand(count, length) < _DROPPED_TOKENS


def _hide_words(tokens: Tensor, hidden: Tensor) -> Tensor:
    """Replace some words by the unknown one; start and end stay, by which the tower pools."""
    marks = tokens.max(1, keepdim=True).values - 1  # start mark; the end mark is one above
    words = (tokens > 1) & (tokens < marks)
    return tokens.masked_fill(words & hidden, 1)
