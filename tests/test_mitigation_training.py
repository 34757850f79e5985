"""Each piece of mitigation in open_clip's own loop and in a plain one, on weighted samples."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import WeightedRandomSampler

from curate.audit import embed, measure
from curate.mitigation import (
    CaptionSampler,
    EmbeddingNoise,
    NoisyLoss,
    TargetedBatches,
    TextMask,
)
from curate.models.encoders import torch_threads
from tests.audit.checkpoints import Pair, build, pairs, prepare, write_config
from tests.audit.test_monitor import Loader, open_clip_arguments
from tests.exports import make_run

PIECES = ("noise", "mask", "captions", "targets")
BATCH, DRAWN, EPOCHS = 16, 64, 2
SHARE = 0.25


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


class Drawn:
    """A reader of one's own: shards of a run, drawn by weight with torch's sampler."""

    def __init__(self, run: Path, transform: Any, sampler: CaptionSampler | None) -> None:
        tables = [pq.read_table(path) for path in sorted((run / "shards").glob("*.parquet"))]
        self._rows = [row for table in tables for row in table.to_pylist()]
        self._transform, self._sampler, self._epoch = transform, sampler, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draws = torch.Generator().manual_seed(self._epoch)
        weights = [row["weight"] for row in self._rows]
        for place in WeightedRandomSampler(weights, DRAWN, generator=draws):
            row = self._rows[place]
            image = self._transform(Image.open(io.BytesIO(row["image"])).convert("RGB"))
            sample = {**row, "image": image}
            yield sample if self._sampler is None else self._sampler(sample)


class Training:
    """A tiny model and what it trains on, from one seed."""

    def __init__(self, run: Path, config: Path, pieces: tuple[str, ...]) -> None:
        self.pieces = pieces
        self.model, transform, self.tokenizer = build(config)
        self.model.output_dict = True
        self.noise, self.mask = EmbeddingNoise(0.1), TextMask(0.3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        sampler = CaptionSampler(seed=1) if "captions" in pieces else None
        self.samples = Drawn(run, transform, sampler)
        self.batches = TargetedBatches(self.samples, BATCH, self._augment, share=SHARE, every=1)
        self.augmented: list[str] = []
        self.captions: set[str] = set()
        self.held_out = prepare(pairs(32, 7), transform, self.tokenizer)

    def _augment(self, sample: dict[str, Any]) -> dict[str, Any]:
        self.augmented.append(sample["uid"])
        return sample | {"image": sample["image"].flip(-1)}

    def epoch(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images and tokens."""
        self.batches.set_epoch(number)
        if "targets" in self.pieces and self.batches.due(number):
            known = {sample["uid"]: sample for sample in self.samples}
            given = {
                "image": torch.stack([sample["image"] for sample in known.values()]),
                "text": self.tokenizer([sample["caption"] for sample in known.values()]),
            }
            values = score(self.model, given, self.held_out)
            self.batches.update(dict(zip(known, values, strict=True)))
        batches = list(self.batches)
        self.captions |= {sample["caption"] for batch in batches for sample in batch}
        return [
            (
                torch.stack([sample["image"] for sample in batch]),
                self.tokenizer([sample["caption"] for sample in batch]),
            )
            for batch in batches
        ]


def score(model: Any, given: dict[str, Any], held_out: dict[str, Any]) -> list[float]:
    """How memorized each sample is, by the model alone."""
    model.eval()
    with torch.no_grad():
        calls = {"image": model.encode_image, "text": model.encode_text}
        found = measure(embed(calls, given, held_out))
    model.train()
    return found.scores["memorization"].tolist()


def train_plainly(training: Training) -> None:
    from open_clip.loss import ClipLoss

    loss, model, pieces = ClipLoss(), training.model, training.pieces
    model.train()
    for number in range(EPOCHS):
        for images, texts in training.epoch(number):
            words = training.mask(texts) if "mask" in pieces else texts
            out = model(images, words)
            parts = {"image": out["image_features"], "text": out["text_features"]}
            parts = training.noise(parts) if "noise" in pieces else parts
            training.optimizer.zero_grad()
            loss(parts["image"], parts["text"], out["logit_scale"]).backward()
            training.optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))


def train_by_open_clip(training: Training) -> None:
    trainer = pytest.importorskip("open_clip_train.train")
    from open_clip.loss import ClipLoss

    loss: Any = ClipLoss()
    if "noise" in training.pieces:
        loss = NoisyLoss(loss, training.noise)
    if "mask" in training.pieces:
        training.mask.attach(training.model)
    for number in range(EPOCHS):
        loader = Loader(training.epoch(number))
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        trainer.train_one_epoch(
            training.model, data, loss, number, training.optimizer, None, lambda step: None, None,
            open_clip_arguments(),
        )  # fmt: skip


def weights_of(training: Training) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in training.model.parameters()])


@pytest.mark.parametrize("pieces", [*((one,) for one in PIECES), PIECES], ids=[*PIECES, "all"])
def test_a_piece_does_the_same_in_both_loops(
    run: Path, config: Path, pieces: tuple[str, ...]
) -> None:
    trained = []
    for given, loop in (
        (pieces, train_plainly), (pieces, train_by_open_clip), ((), train_by_open_clip),
    ):  # fmt: skip
        training = Training(run, config, given)
        torch.manual_seed(3)
        with torch_threads(1):
            loop(training)
        trained.append(training)
    plain, by_open_clip, without = map(weights_of, trained)
    assert torch.isfinite(plain).all()
    torch.testing.assert_close(plain, by_open_clip)
    assert not torch.allclose(plain, without, atol=1e-3)
    own = {row["caption"] for row in trained[0].samples._rows}
    assert (trained[1].captions <= own) == ("captions" not in pieces)
    assert trained[2].captions <= own
    assert set(trained[1].augmented) <= trained[1].batches.targets
    assert bool(trained[1].augmented) == ("targets" in pieces)


class Targeted:
    """A training in which the most memorized are augmented, watched batch by batch."""

    def __init__(self, config: Path, given: list[Pair], held_out: list[Pair], every: int) -> None:
        self.model, transform, tokenizer = build(config)
        self.panel = prepare(given, transform, tokenizer)
        self.held_out = prepare(held_out, transform, tokenizer)
        self.originals = {
            str(row): {"uid": str(row), "image": image, "text": text}
            for row, (image, text) in enumerate(zip(*self.panel.values(), strict=True))
        }
        augment = TextMask(0.5)
        self.batches = TargetedBatches(
            list(self.originals.values()), 8,
            lambda s: s | {"image": s["image"].flip(-1), "text": augment(s["text"][None])[0]},
            share=SHARE, every=every,
        )  # fmt: skip
        self.scores: dict[int, dict[str, float]] = {}
        self.seen: dict[int, list[list[dict[str, Any]]]] = {}

    def train(self, epochs: int) -> None:
        from open_clip.loss import ClipLoss

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.model.train()
        for epoch in range(epochs):
            if self.batches.due(epoch):
                values = score(self.model, self.panel, self.held_out)
                self.scores[epoch] = dict(zip(self.originals, values, strict=True))
                self.batches.update(self.scores[epoch])
            self.seen[epoch] = list(self.batches)
            for batch in self.seen[epoch]:
                images, texts = (
                    torch.stack([s[name] for s in batch]) for name in ("image", "text")
                )
                image, text, scale = self.model(images, texts)[:3]
                optimizer.zero_grad()
                ClipLoss()(image, text, scale).backward()
                optimizer.step()


def test_the_top_share_is_regrouped_and_augmented_and_nothing_else(config: Path) -> None:
    given, held_out, count = pairs(64, 1), pairs(64, 2), 16
    training = Targeted(config, given, held_out, every=5)
    torch.manual_seed(0)
    with torch_threads(1):
        training.train(15)
    assert list(training.scores) == [5, 10]
    chosen = []
    for epoch, batches in training.seen.items():
        last = max((due for due in training.scores if due <= epoch), default=None)
        scores = training.scores.get(last or 0, {})
        top = set(sorted(scores, key=scores.__getitem__)[-count:]) if scores else set()
        chosen.append(top)
        assert sorted(s["uid"] for batch in batches for s in batch) == sorted(training.originals)
        for batch in batches:
            assert len({sample["uid"] in top for sample in batch}) == 1
            for sample in batch:
                before = training.originals[sample["uid"]]
                is_own = torch.equal(sample["image"], before["image"])
                assert is_own == (sample["uid"] not in top)
                if is_own:
                    assert torch.equal(sample["text"], before["text"])
    assert not chosen[4]
    assert len(chosen[5]) == len(chosen[14]) == count
    # What was augmented is not what is memorized most five epochs later.
    assert chosen[5] != chosen[10]
