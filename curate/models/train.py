"""Trains a proxy over frozen vectors: deterministic for a seed and one thread.

Training starts from the closed-form solution of the linear problem. On a few hundred pairs that
start is most of the result, and on thousands it saves most of the epochs.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from curate.models.encoders import torch_threads
from curate.models.proxy import Heads, HeadsShape, chance_loss, contrastive_loss
from curate.models.steps import EagerSteps, Steps, finish

__all__ = [
    "RETRIES",
    "Front",
    "Recipe",
    "Training",
    "fit_contrastive",
    "fit_front",
    "has_learned",
    "has_rivals",
    "seed_attempt",
    "train_heads",
]

Array = np.ndarray[Any, Any]
Front = tuple[Array, Array]

#: Times that a diverged training is begun again with another seed.
RETRIES = 2

#: A last epoch above this share of the loss at chance has learned nothing.
_CHANCE_SHARE = 0.99

#: Added to every variance of the start, in units of their mean. Of .1 to 10, 1 to 3 gave the best
#: left-out agreement at 450 pairs, and 3 the better one after training on 4 000.
_RIDGE = 3.0

#: Added to every variance in `fit_front`, in units of their mean: scales the directions but does
#: not level them, because blowing up weak ones made heads on 450 pairs overfit.
_FRONT_RIDGE = 30.0

#: Vectors more than so many times as wide as they are many are decomposed by their products with
#: each other: a covariance of 4 096 numbers takes 6 s, the products of 500 vectors a tenth of one.
_WIDE = 4

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Recipe:
    """How a proxy is trained.

    Parameters
    ----------
    epochs : int
        0 leaves the closed-form start.
    batch : int
        Pairs per step, at most a quarter of the data.
    learning_rate : float
        Highest, reached after a tenth of the steps; falls as a cosine to 0.
    weight_decay : float
    noise : float
        Standard deviation of noise on the inputs, relative to their own per direction.
    retries : int
        Times that a diverged training is begun again, with another seed.
    """

    epochs: int = 6
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    noise: float = 0.3
    retries: int = RETRIES


@dataclass(frozen=True)
class Training:
    """A trained proxy and how it went.

    Parameters
    ----------
    heads : Heads
    losses : list of float
        Mean contrastive loss per epoch, relative to that at chance; lower is better.
    retries : int
        Trainings that diverged and were begun again.
    diverged : bool
        Whether the last one diverged too; `heads` is the closed-form start then.
    """

    heads: Heads
    losses: list[float] = field(default_factory=list)
    retries: int = 0
    diverged: bool = False


def fit_front(vectors: Array, width: int) -> Front:
    """Fit centring and rotation of one modality onto its directions of largest variance.

    Parameters
    ----------
    vectors : (M, D) float16 or float32
    width : int
        Directions to keep.

    Returns
    -------
    mean : (D,) float32
    front : (D, min(width, M, D)) float32
    """
    mean = vectors.mean(0, dtype=np.float64)
    centred = vectors.astype(np.float64) - mean
    wide = _WIDE * len(vectors) < vectors.shape[1]
    count = min(width, *vectors.shape)
    with threadpool_limits(1):  # more would add up in another order
        products = centred @ centred.T if wide else centred.T @ centred
        variances, directions = np.linalg.eigh(products / max(len(vectors), 1))
        variances = np.maximum(variances[::-1][:count], 0)
        directions = directions[:, ::-1][:, :count]
        if wide:  # these are directions over the rows so far
            directions = centred.T @ directions / np.sqrt(len(vectors) * variances + 1e-12)
    floor = _FRONT_RIDGE * variances.mean() + 1e-12
    return mean.astype(np.float32), (directions / np.sqrt(variances + floor)).astype(np.float32)


def train_heads(
    shape: HeadsShape,
    fronts: tuple[Front, Front],
    pairs: tuple[Array, Array],
    groups: Array,
    recipe: Recipe,
    seed: int,
    observe: Callable[[Heads], None] | None = None,
) -> Training:
    """Train a proxy; a training that diverges is begun again with another seed.

    Parameters
    ----------
    shape : HeadsShape
    fronts : pair of (mean, front)
        See `fit_front`; image, text.
    pairs : ((N, image_width) floating, (N, text_width) floating)
    groups : (N, G) int64
        Rows that share an entry of any column are not each other's negatives.
    recipe : Recipe
    seed : int
    observe : callable, optional
        Is shown the heads after every epoch, of a training begun again too.

    Returns
    -------
    Training
    """
    with torch_threads(1):
        for attempt in range(recipe.retries + 1):
            seed_attempt(seed, attempt)
            heads, white = _start(shape, fronts, pairs)
            losses = _fit(heads, white, groups, recipe, observe)
            diverged = recipe.epochs > 0 and not has_learned(losses)
            if not diverged:
                break
        if diverged:
            heads, _ = _start(shape, fronts, pairs)
    finite = [loss for loss in losses if math.isfinite(loss)]
    return Training(heads.eval().requires_grad_(False), finite, attempt, diverged)


def has_rivals(groups: Array) -> bool:
    """Tell whether any pair is another's negative; without, a training moves nothing, at no loss.

    Parameters
    ----------
    groups : (N, G) int64
        Rows that share an entry of any column are not each other's negatives.
    """
    return len(groups) > 1 and not (groups == groups[0]).all(0).any()


def seed_attempt(seed: int, attempt: int) -> None:
    """Seed torch for a training that is begun for the nth time; any seed will do."""
    torch.manual_seed((seed + attempt * 1_000_003) % 2**64)


def has_learned(losses: list[float]) -> bool:
    """Tell whether a training ended finite and below chance."""
    return bool(losses) and math.isfinite(losses[-1]) and losses[-1] < _CHANCE_SHARE


def _start(
    shape: HeadsShape, fronts: tuple[Front, Front], pairs: tuple[Array, Array]
) -> tuple[Heads, list[Tensor]]:
    """Heads whose linear paths hold the closed-form solution, and their inputs after the front."""
    heads = Heads(shape)
    heads.set_fronts(*fronts)
    both = (heads.image, heads.text)
    white = [
        torch.cat(
            [
                head.whiten(torch.from_numpy(vectors[first : first + _BLOCK_ROWS].astype("f4")))
                for first in range(0, len(vectors), _BLOCK_ROWS)
            ]
            or [torch.zeros(0, head.front.shape[1])]
        )
        for head, vectors in zip(both, pairs, strict=True)
    ]
    if len(white[0]) > 1:
        for head, weight in zip(both, _solve_linear(*white), strict=True):
            count = min(shape.width, len(weight))
            with torch.no_grad():
                head.linear.weight.zero_()[:count] = weight[:count]
                head.narrow.weight.zero_()
                head.narrow.bias.zero_()
    return heads, white


def _solve_linear(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical directions of two views, the strongest first, each scaled by its correlation.

    References
    ----------
    Hotelling 1936; ridge as in Vinod 1976.
    """
    sides = [(part - part.mean(0)).double() for part in (image, text)]
    roots = []
    for part in sides:
        variances, directions = torch.linalg.eigh(part.T @ part / len(part))
        floor = _RIDGE * variances.mean() + 1e-12
        roots.append(directions / (variances.clamp(min=0) + floor).sqrt())
    cross = sides[0].T @ sides[1] / len(sides[0])
    left, strength, right = torch.linalg.svd(roots[0].T @ cross @ roots[1], full_matrices=False)
    return (
        ((roots[0] @ left) * strength).T.float(),
        ((roots[1] @ right.T) * strength).T.float(),
    )


def _fit(
    heads: Heads,
    white: list[Tensor],
    groups: Array,
    recipe: Recipe,
    observe: Callable[[Heads], None] | None = None,
) -> list[float]:
    """Train in place; see `fit_contrastive`."""
    if len(groups) < 2:
        return []  # no rivals, and no spread either
    spreads = [part.std(0) * recipe.noise for part in white]
    optimiser = torch.optim.AdamW(
        heads.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )

    def loss_of(inputs: Sequence[Tensor]) -> Tensor:
        rows, alike = inputs
        image, text = (
            head.project(part[rows] + spread * torch.randn(len(rows), len(spread)))
            for head, part, spread in zip((heads.image, heads.text), white, spreads, strict=True)
        )
        return contrastive_loss(image, text, heads.scale(), alike)

    def shown() -> None:
        if observe is not None:
            observe(heads.eval())
            heads.train()

    heads.train()
    steps = EagerSteps(optimiser, loss_of)
    return finish(fit_contrastive(steps, groups, recipe.epochs, recipe.batch, after_epoch=shown))


def fit_contrastive(
    steps: Steps,
    groups: Array,
    epochs: int,
    batch: int,
    ask: Callable[[Tensor, Tensor], Sequence[Tensor]] = lambda *batch: batch,
    after_epoch: Callable[[], None] | None = None,
    rows: Array | None = None,
) -> Generator[None, None, list[float]]:
    """Take the steps of a contrastive training, with a yield after each.

    Parameters
    ----------
    steps : Steps
    groups : (N, G) int64
        Rows that share an entry of any column are not each other's negatives.
    epochs : int
    batch : int
        Pairs per step, at most a quarter of the data.
    ask : callable, optional
        What a step is given of a batch, of its rows (B,) int64 and of the pairs among them that are
        alike, (B, B) bool; else these.
    after_epoch : callable, optional
    rows : (T,) int64, optional
        What an epoch goes through, in this order, instead of all rows in one drawn anew.

    Returns
    -------
    list of float
        Mean loss per epoch, relative to that at chance, ending at one that is not finite. 0
        without any rivals: see `has_rivals`.
    """
    count = len(groups) if rows is None else len(rows)
    batch = min(batch, max(2, count // 4))
    per_epoch = count // batch
    if per_epoch == 0:
        return []
    total = per_epoch * epochs
    kinds = torch.from_numpy(groups)
    losses: list[float] = []
    while len(losses) < epochs and (not losses or math.isfinite(losses[-1])):
        order = torch.randperm(count) if rows is None else torch.from_numpy(rows)
        chance = 0.0
        for number in range(per_epoch):
            chosen = order[number * batch : (number + 1) * batch]
            alike = (kinds[chosen, None] == kinds[None, chosen]).any(-1)
            steps.take(ask(chosen, alike), _rate(len(losses) * per_epoch + number, total))
            chance += chance_loss(alike)
            yield
        losses.append(steps.total() / max(chance, 1e-6))  # without any rivals both are 0
        if after_epoch is not None:
            after_epoch()
    return losses


def _rate(step: int, total: int) -> float:
    """Learning rate as a share of its highest: up over a tenth of the steps, then a cosine to 0."""
    warm = max(1, total // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
