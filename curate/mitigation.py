"""Pieces against memorization while a CLIP-like model trains; each drops into any PyTorch loop.

All combine with each other and with `curate.load(OUT, weighted=True)`. In open_clip's loop the
noise goes around the loss, the mask onto the model, and the batches in place of the loader.
"""

import heapq
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from curate.errors import ConfigError
from curate.memorization.folds import hash_unit

__all__ = ["CaptionSampler", "EmbeddingNoise", "NoisyLoss", "TargetedBatches", "TextMask"]


#: What open_clip and transformers call a caption's tokens.
_TOKENS = ("text", "input_ids")


class EmbeddingNoise(nn.Module):
    """Add Gaussian noise to embeddings of unit norm while training.

    Parameters
    ----------
    sigma : float or mapping of str to float
        Standard deviation of every number of a unit vector; by modality ("image", "text"), where
        those not named stay as they are. 0.1 on all modalities and 0.15 on text alone are
        published; noise on one modality alone leaves pairs without it as memorized, or more.
    renormalise : bool
        Bring the sum to unit norm again, so that products stay cosines.

    Raises
    ------
    ConfigError
        If a sigma is negative or not finite.

    References
    ----------
    Wang et al., MultiMem (arXiv:2606.22220) and CLIPMem (arXiv:2502.07830), mitigation.
    """

    def __init__(self, sigma: float | Mapping[str, float], renormalise: bool = True) -> None:
        super().__init__()
        self.sigma = dict(sigma) if isinstance(sigma, Mapping) else float(sigma)
        self.renormalise = renormalise
        values = self.sigma.values() if isinstance(self.sigma, dict) else [self.sigma]
        if not all(0 <= value < math.inf for value in values):
            raise ConfigError(f"EmbeddingNoise: sigma must be finite, at least 0; got {sigma}.")

    def forward(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (B, D) unit vectors by modality with noise; unchanged in evaluation mode."""
        return {name: self._add(name, value) for name, value in embeddings.items()}

    def _add(self, name: str, value: Tensor) -> Tensor:
        sigma = self.sigma.get(name, 0.0) if isinstance(self.sigma, dict) else self.sigma
        if not self.training or sigma == 0:
            return value
        noisy = value + sigma * torch.randn_like(value)
        return nn.functional.normalize(noisy, dim=-1) if self.renormalise else noisy


class NoisyLoss(nn.Module):
    """A contrastive loss that sees noisy embeddings: for open_clip's `train_one_epoch`.

    Parameters
    ----------
    loss : callable
        Takes `image_features`, `text_features` and whatever else the model returns.
    noise : EmbeddingNoise

    Raises
    ------
    ConfigError
        If the noise names another modality than "image" and "text".
    """

    def __init__(self, loss: Callable[..., Any], noise: EmbeddingNoise) -> None:
        super().__init__()
        named = noise.sigma if isinstance(noise.sigma, dict) else {}
        unknown = [name for name in named if name not in ("image", "text")]
        if unknown:
            raise ConfigError(
                f"NoisyLoss: modalities must be image and text; got {', '.join(unknown)}. Name "
                "one of them."
            )
        self.loss, self.noise = loss, noise

    def forward(
        self, image_features: Tensor, text_features: Tensor, *args: Any, **options: Any
    ) -> Any:
        """Return what the loss returns."""
        found = self.noise({"image": image_features, "text": text_features})
        return self.loss(found["image"], found["text"], *args, **options)


class TextMask(nn.Module):
    """Hide a random share of a caption's words from the text tower while training.

    Parameters
    ----------
    share : float
        Probability that a token is hidden, in [0, 1).
    mask_id : int, optional
        Put in its place; default: the token is taken out and the rest moves up.
    keep : tuple of int
        Tokens that stay: of CLIP's vocabulary the start and end marks.
    pad_id : int

    Raises
    ------
    ConfigError
        If the share is out of range.
    """

    def __init__(
        self,
        share: float = 0.15,
        mask_id: int | None = None,
        keep: tuple[int, ...] = (49406, 49407),
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ConfigError(f"TextMask: share must be in [0, 1); got {share}.")
        self.share, self.mask_id, self.keep, self.pad_id = share, mask_id, keep, pad_id

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, L) integer tokens with some hidden; unchanged in evaluation mode.

        Of each caption at least one word stays.
        """
        if not self.training or self.share == 0:
            return tokens
        marks = torch.tensor([self.pad_id, *self.keep], device=tokens.device)
        words = ~torch.isin(tokens, marks)
        drawn = torch.rand(tokens.shape, device=tokens.device)
        # The word least likely to be hidden stays: an empty caption says nothing of any picture.
        least = torch.where(words, drawn, -1.0).argmax(1, keepdim=True)
        hidden = words & (drawn < self.share)
        hidden.scatter_(1, least, False)
        if self.mask_id is not None:
            return tokens.masked_fill(hidden, self.mask_id)
        order = hidden.long().argsort(dim=1, stable=True)
        moved = tokens.gather(1, order)
        return moved.masked_fill(hidden.gather(1, order), self.pad_id)

    def attach(self, model: nn.Module, place: int = 1) -> Any:
        """Mask the tokens that a model in training mode is called with; `remove()` undoes it.

        Parameters
        ----------
        model : nn.Module
            Called as `model(images, texts)`; positions count, and `text=` or `input_ids=` is found
            by name. A call without either has nothing to hide.
        place : int
            Position of the tokens.

        Raises
        ------
        ConfigError
            If the model takes no argument in that place; of a call, if what is there are no tokens.
        """
        taken = [_takes(model, **{name: None}) for name in _TOKENS]
        if not any(taken) and not _takes(model, *[None] * (place + 1)):
            raise ConfigError(
                f"TextMask: {type(model).__name__} takes nothing in position {place}, so that no "
                "token would be hidden. Give the place of its tokens, counted from 0."
            )

        def mask(tokens: Any) -> Any:
            if tokens is None:
                return None
            if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
                raise ConfigError(
                    f"TextMask: position {place} must be (B, L) integer tokens; got "
                    f"{_describe(tokens)}. Give their place to `attach`, or call with `text=`."
                )
            return self(tokens)

        def hook(module: nn.Module, args: Any, options: Any) -> Any:
            if not module.training:
                return args, options
            named = [name for name in _TOKENS if name in options]
            if named:
                options = {**options, named[0]: mask(options[named[0]])}
            elif len(args) > place:
                args = (*args[:place], mask(args[place]), *args[place + 1 :])
            return args, options

        return model.register_forward_pre_hook(hook, with_kwargs=True)


def _takes(model: nn.Module, *args: Any, **options: Any) -> bool:
    """Say whether a model can be called with such arguments and others."""
    try:
        inspect.signature(model.forward).bind_partial(*args, **options)
    except TypeError:
        return False
    return True


class CaptionSampler:
    """Draw a sample's caption anew in each epoch, of its own and those of its dropped duplicates.

    `curate.load` does so itself; this is for other readers of what `curate export` wrote.

    Parameters
    ----------
    most : int, optional
        Captions of a sample that are drawn from, its own first; default: all.
    seed : int
    """

    def __init__(self, most: int | None = None, seed: int = 0) -> None:
        if most is not None and most < 1:
            raise ConfigError(f"CaptionSampler: most must be at least 1; got {most}.")
        self.most, self.seed = most, seed
        # In shared memory: workers that live through all epochs are told of the next one.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch that is drawn for."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn for, in a DataLoader's workers too."""
        self._epoch[0] = epoch

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sample with `caption` drawn, by seed, epoch and `uid`, of its `captions`."""
        captions = sample.get("captions")
        known = [sample["caption"]] if captions is None or not len(captions) else captions
        known = known[: self.most]
        unit = hash_unit([sample["uid"]], self.seed, f"caption {self.epoch}")[0]
        return {**sample, "caption": known[int(unit * len(known))]}


class TargetedBatches(IterableDataset[list[dict[str, Any]]]):
    """Put the samples that are memorized most into batches of their own, and augment only those.

    Every `every` epochs the training set is scored; until the next time the top `share` are the
    targets. Until the first `update` batches are as they come.

    Parameters
    ----------
    samples : iterable of dict
        With `uid`: `curate.load(...)`, a list, or any other that can be walked once an epoch; an
        IterableDataset parts itself among a DataLoader's workers. `set_epoch` is passed on to it.
    batch_size : int
    augment : callable
        Applied to each target; the others stay as they are.
    share : float
        In (0, 1]; 0.05 is published.
    every : int
        10 is published.
    drop_last : bool
        Leave out a last batch that is not full.

    Raises
    ------
    ConfigError
        If a parameter is out of range, or the samples can be walked only once.

    Notes
    -----
    Use it with `DataLoader(batches, batch_size=None, ...)`, and with workers that end with the
    epoch (`persistent_workers=False`): others keep the targets that they began with.

    References
    ----------
    Wang et al., MultiMem (arXiv:2606.22220): the top 5 % every 10 epochs.

    Examples
    --------
    >>> for epoch in range(30):  # doctest: +SKIP
    ...     batches.set_epoch(epoch)
    ...     if batches.due(epoch):
    ...         batches.update(score(model))  # uid to how memorized it is
    ...     for batch in loader: ...
    """

    def __init__(
        self,
        samples: Iterable[dict[str, Any]],
        batch_size: int,
        augment: Callable[[dict[str, Any]], dict[str, Any]],
        share: float = 0.05,
        every: int = 10,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1 or every < 1 or not 0 < share <= 1:
            raise ConfigError(
                "TargetedBatches: batch_size and every must be at least 1, and share in (0, 1]; "
                f"got {batch_size}, {every}, {share}."
            )
        if isinstance(samples, Iterator):
            raise ConfigError(
                "TargetedBatches: samples must be there in every epoch; got a "
                f"{type(samples).__name__}, which ends with the first. Give a list or a dataset."
            )
        self._samples, self._size, self._augment = samples, batch_size, augment
        self._share, self._every, self._drop_last = share, every, drop_last
        self.targets: frozenset[str] = frozenset()

    def due(self, epoch: int) -> bool:
        """Tell whether the training set is to be scored before this epoch."""
        return epoch > 0 and epoch % self._every == 0

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the samples."""
        if hasattr(self._samples, "set_epoch"):
            self._samples.set_epoch(epoch)

    def update(self, scores: Mapping[str, float | None]) -> None:
        """Choose the targets: the uids of the highest scores; of equal ones the first by name.

        Parameters
        ----------
        scores : mapping of str to float or None
            Higher: more memorized; None or NaN: unknown. See `curate.audit.measure`.
        """
        known = {uid: s for uid, s in scores.items() if s is not None and not math.isnan(s)}
        count = max(1, round(self._share * len(known))) if known else 0
        best = heapq.nsmallest(count, known, key=lambda uid: (-known[uid], uid))
        self.targets = frozenset(best)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield lists of samples; a list holds targets alone, or none but in the last ones."""
        waiting: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for sample in self._own_samples():
            is_target = sample["uid"] in self.targets
            batch = waiting[is_target]
            batch.append(self._augment(sample) if is_target else sample)
            if len(batch) == self._size:
                yield batch
                waiting[is_target] = []
        # What is left of both shares batches, or the targets of a small set would never be seen.
        rest = waiting[True] + waiting[False]
        for start in range(0, len(rest), self._size):
            batch = rest[start : start + self._size]
            if len(batch) == self._size or not self._drop_last:
                yield batch

    def _own_samples(self) -> Iterator[dict[str, Any]]:
        """Yield the share of the DataLoader's worker that this is in."""
        samples: Any = self._samples
        worker = get_worker_info()
        if worker is None or isinstance(samples, IterableDataset):  # which parts itself
            yield from samples
        elif hasattr(samples, "__getitem__") and hasattr(samples, "__len__"):
            for place in range(worker.id, len(samples), worker.num_workers):
                yield samples[place]
        else:
            yield from itertools.islice(samples, worker.id, None, worker.num_workers)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__
