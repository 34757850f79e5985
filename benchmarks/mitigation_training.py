"""Trains models of `benchmarks.mitigation`: a plain loop over pieces of `curate.mitigation`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor

from benchmarks.mitigation_data import PX, Data
from benchmarks.signature import embed
from curate.audit import Embeddings, measure
from curate.mitigation import CaptionSampler, EmbeddingNoise, TargetedBatches, TextMask
from curate.models.clip_proxy import (
    ClipShape,
    GroupedClipLoss,
    build_clip,
    encode,
    normalise_pixels,
)
from curate.models.precision import pick_dtype
from curate.models.train_clip import augment_pixels

Array = np.ndarray[Any, Any]

BATCH = 64
_SIZE = {"image_px": PX, "image_width": 16, "text_width": 64, "text_layers": 1}
_RATE, _DECAY = 2e-3, 0.05
#: Words of a target that are hidden, besides two random crops.
_TARGET_MASK = 0.3


@dataclass(frozen=True)
class Arm:
    """What is done while a model trains.

    Parameters
    ----------
    noise : float
        Sigma.
    noisy : str
        Which modalities it is added to: "all", "pictures", "first" (picture) or "name".
    captions : int
        That a sample's name is drawn of.
    mask : float
        Share of words hidden.
    every : int
        Epochs after which the top 5 % are chosen again for augmentation; 0: never.
    curated : bool
    """

    noise: float = 0.0
    noisy: str = "all"
    captions: int = 1
    mask: float = 0.0
    every: int = 0
    curated: bool = False

    def sigmas(self, modalities: list[str]) -> dict[str, float]:
        """Sigma by modality; the name is the last one."""
        chosen = {
            "all": modalities, "name": modalities[-1:], "pictures": modalities[:-1],
            "first": modalities[:1],
        }[self.noisy]  # fmt: skip
        return dict.fromkeys(chosen, self.noise)


class Rows:
    """Training samples, each epoch in an order of its own.

    Parameters
    ----------
    data : Data
    rows : (M,) int
    donors : (N,) int
        Whose captions a row has.
    captions : int
        That the name is drawn of.
    seed : int
    """

    def __init__(self, data: Data, rows: Array, donors: Array, captions: int, seed: int) -> None:
        self._data, self._rows, self._donors = data, rows, donors
        self._sampler, self._seed, self._epoch = CaptionSampler(captions, seed), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._rows)
        for row in order.tolist():
            yield self._sampler({
                "uid": str(row),
                "row": row,
                "pictures": torch.from_numpy(self._data.pixels[:, row]),
                "captions": self._data.captions[self._donors[row]],
            })  # fmt: skip


def augment_target(mask: TextMask, sample: dict[str, Any]) -> dict[str, Any]:
    """Crop a sample's pictures once more than those of others, and hide some words."""
    again = augment_pixels(sample["pictures"]).round().to(torch.uint8)
    hidden = mask(torch.from_numpy(sample["caption"])[None])[0].numpy()
    return {**sample, "pictures": again, "caption": hidden}


def train(
    data: Data, rows: Array, donors: Array, arm: Arm, steps: int, seed: int, unrelated: Array
) -> CLIP:
    """Train one model for so many steps; `unrelated` (H,) int are rows that it never sees."""
    torch.manual_seed(seed)
    model, dtype = build_clip(ClipShape(data.words, **_SIZE)), pick_dtype("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps, pct_start=0.1)
    marks = (data.words + 2, data.words + 3)  # of the folded vocabulary
    noise = EmbeddingNoise(arm.sigmas(data.modalities)).train()
    mask = TextMask(arm.mask, keep=marks).train()
    hide = TextMask(_TARGET_MASK, keep=marks).train()
    batches = TargetedBatches(
        Rows(data, rows, donors, arm.captions, seed), BATCH,
        lambda sample: augment_target(hide, sample), every=max(1, arm.every),
    )  # fmt: skip
    codes = torch.from_numpy(np.unique(data.corpus.clusters, return_inverse=True)[1])
    done = epoch = 0
    model.train()
    while done < steps:
        batches.set_epoch(epoch)
        if arm.every and batches.due(epoch):
            batches.update(score_rows(model, data, rows, donors, unrelated))
        for batch in batches:
            seen = torch.stack([sample["pictures"] for sample in batch], 1).flatten(0, 1)
            words = mask(torch.from_numpy(np.stack([sample["caption"] for sample in batch])))
            pixels = normalise_pixels(augment_pixels(seen))
            image, text = encode(model, pixels, words, dtype)
            parts = [*image.view(-1, len(batch), image.shape[1]), text]
            noisy = noise(dict(zip(data.modalities, parts, strict=True)))
            # As everywhere, pairs with one picture or one name are not rivals.
            kinds = [codes[[sample["row"] for sample in batch]]]
            kinds += [codes[donors[[sample["row"] for sample in batch]]]]
            alike = torch.stack([kind[:, None] == kind for kind in kinds]).any(0)
            loss = mean_loss(noisy, alike, model.logit_scale.exp())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            done += 1
            if done == steps:
                break
        epoch += 1
    return model.eval().requires_grad_(False)


def mean_loss(parts: dict[str, Tensor], alike: Tensor, scale: Tensor) -> Tensor:
    """Mean of the contrastive losses of all pairs of modalities."""
    measured = GroupedClipLoss(alike)
    return torch.stack([measured(*pair, scale) for pair in combinations(parts.values(), 2)]).mean()


def score_rows(
    model: CLIP, data: Data, rows: Array, donors: Array, unrelated: Array
) -> dict[str, float]:
    """Memorization of training samples by the model alone: uid to value."""
    model.eval()
    trained = embed_rows(model, data, rows, donors)
    held_out = embed_rows(model, data, unrelated, donors)
    model.train()
    values = measure(Embeddings(trained, held_out)).scores["memorization"]
    return dict(zip(map(str, rows.tolist()), values.tolist(), strict=True))


def embed_rows(model: CLIP, data: Data, rows: Array, donors: Array) -> dict[str, Array]:
    """Embed rows with the names that they were given: (M, D) float32 by modality."""
    samples = data.samples()
    part = replace(samples, pixels=samples.pixels[:, rows], tokens=samples.tokens[:, donors[rows]])
    found = embed(model, part, 1, pick_dtype("cpu"))
    return {
        name: one.reshape(len(rows), -1) for name, one in zip(data.modalities, found, strict=True)
    }
