"""Pieces against memorization, each alone and all in a training of a tiny open_clip model."""

from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import curate
from curate.audit import Embeddings, embed, measure
from curate.errors import ConfigError
from curate.mitigation import (
    CaptionSampler,
    EmbeddingNoise,
    NoisyLoss,
    TargetedBatches,
    TextMask,
)
from tests.audit.checkpoints import build, pairs, prepare, write_config
from tests.audit.test_monitor import Loader, open_clip_arguments
from tests.exports import KEPT, make_run


def unit(rows: int, width: int = 64) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width), dim=-1)


def test_noise_is_gaussian_per_modality_and_for_training_alone() -> None:
    torch.manual_seed(0)
    given = {"image": unit(4000), "text": unit(4000)}
    noise = EmbeddingNoise({"text": 0.15}, renormalise=False)
    found = noise(given)
    assert found["image"] is given["image"]
    difference = found["text"] - given["text"]
    assert difference.mean().abs() < 1e-3
    assert difference.std().item() == pytest.approx(0.15, rel=0.01)
    again = EmbeddingNoise(0.1)(given)
    for name, rows in again.items():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4000))
        # Of unit vectors with noise of norm .1 * 8 the cosine is 1 / sqrt(1 + .64).
        assert (rows * given[name]).sum(1).mean().item() == pytest.approx(0.78, abs=0.01)
    assert noise.eval()(given)["text"] is given["text"]
    with pytest.raises(ConfigError, match="at least 0"):
        EmbeddingNoise({"text": -0.1})


def test_a_noisy_loss_takes_what_the_model_returns() -> None:
    from open_clip.loss import ClipLoss

    out = {"image_features": unit(8), "text_features": unit(8), "logit_scale": torch.tensor(10.0)}
    plain = ClipLoss()(**out, output_dict=True)["contrastive_loss"]
    noisy = NoisyLoss(ClipLoss(), EmbeddingNoise(0.1))
    assert noisy(**out, output_dict=True)["contrastive_loss"] != plain
    assert noisy.eval()(**out, output_dict=True)["contrastive_loss"] == plain
    with pytest.raises(ConfigError, match="must be image and text; got txt"):
        NoisyLoss(ClipLoss(), EmbeddingNoise({"txt": 0.1}))


def test_a_mask_takes_words_out_and_leaves_marks() -> None:
    torch.manual_seed(1)
    row = [49406, *range(1000, 1040), 49407, *[0] * 8]
    tokens = torch.tensor([row] * 200)
    found = TextMask(0.25)(tokens)
    assert found.shape == tokens.shape
    for one in found.tolist():
        words = [word for word in one if 1000 <= word < 1040]
        assert one[0] == 49406
        assert one[len(words) + 1] == 49407
        assert set(one[len(words) + 2 :]) == {0}
        assert words == sorted(words)
    share = 1 - ((found >= 1000) & (found < 1040)).float().sum().item() / (200 * 40)
    assert share == pytest.approx(0.25, abs=0.02)
    put = TextMask(0.25, mask_id=7)(tokens)
    assert torch.equal(put[:, [0, 41]], tokens[:, [0, 41]])
    assert ((put == 7) | (put == tokens)).all()
    assert torch.equal(TextMask(0.25).eval()(tokens), tokens)
    short = torch.tensor([[49406, 1000, 49407, 0]] * 50)
    assert torch.equal(TextMask(0.9)(short), short)
    with pytest.raises(ConfigError, match="share"):
        TextMask(1.0)


class Told(torch.nn.Module):
    """Returns what it was called with."""

    def forward(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        return args, options


def test_a_mask_finds_the_tokens_of_a_call() -> None:
    torch.manual_seed(1)
    model, pixels = Told(), torch.ones(2, 3)
    tokens = torch.tensor([[49406, *range(1000, 1040), 49407]] * 2)
    handle = TextMask(0.5).attach(model)
    for name in ("text", "input_ids"):
        args, options = model(pixels, **{name: tokens})
        assert args[0] is pixels
        assert (options[name] == 0).any()
    args, _ = model(pixels, tokens)
    assert (args[1] == 0).any()
    assert model(pixels) == ((pixels,), {})
    assert model(pixels, None) == ((pixels, None), {})
    # Tokens first, as of transformers' models by position.
    with pytest.raises(ConfigError, match=r"position 1 must be .* got \(2, 3\) torch.float32"):
        model(tokens, pixels)
    handle.remove()
    TextMask(0.5).attach(model, place=0)
    args, _ = model(tokens, pixels)
    assert (args[0] == 0).any()


def test_a_mask_refuses_a_place_that_a_model_does_not_have() -> None:
    with pytest.raises(ConfigError, match="Linear takes nothing in position 1"):
        TextMask().attach(torch.nn.Linear(2, 2))
    TextMask().attach(torch.nn.Bilinear(2, 2, 2))
    with pytest.raises(ConfigError, match="position 2"):
        TextMask().attach(torch.nn.Bilinear(2, 2, 2), place=2)


def test_captions_are_drawn_anew_in_each_epoch() -> None:
    sample = {"uid": "a", "caption": "one", "captions": ["one", "two", "three"]}
    sampler = CaptionSampler(seed=3)
    drawn = Counter()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        drawn[sampler(sample)["caption"]] += 1
        assert sampler(sample) == sampler(sample)
    assert min(drawn.values()) > 70
    assert len(drawn) == 3
    assert CaptionSampler(most=1)(sample)["caption"] == "one"
    assert CaptionSampler()({"uid": "a", "caption": "own"})["caption"] == "own"


def test_targets_get_batches_of_their_own_and_are_augmented() -> None:
    samples = [{"uid": str(number), "seen": 0} for number in range(100)]
    batches = TargetedBatches(samples, 8, lambda sample: sample | {"seen": 1}, share=0.2, every=5)
    assert [epoch for epoch in range(12) if batches.due(epoch)] == [5, 10]
    plain = list(batches)
    assert [len(batch) for batch in plain] == [8] * 12
    assert not any(sample["seen"] for batch in plain for sample in batch)
    batches.update({str(number): float(number) for number in range(100)})
    assert batches.targets == {str(number) for number in range(80, 100)}
    found = list(batches)
    kinds = [{sample["seen"] for sample in batch} for batch in found]
    assert kinds.count({1}) == 2
    assert kinds.count({0}) == 10
    for batch in found:
        assert all((int(sample["uid"]) >= 80) == sample["seen"] for sample in batch)
    whole = TargetedBatches(samples, 8, lambda sample: sample, drop_last=False)
    assert sorted(s["uid"] for batch in whole for s in batch) == sorted(s["uid"] for s in samples)
    with pytest.raises(ConfigError, match="share in"):
        TargetedBatches(samples, 8, lambda sample: sample, share=0)
    batches.update({"a": float("nan"), "b": 1.0, "c": 0.0, "d": 0.0, "e": 0.0, "f": 0.0})
    assert batches.targets == {"b"}


class MapStyle(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"uid": str(number)}


class Walked:
    """Neither a sequence nor a dataset."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (MapStyle()[number] for number in range(40))


@pytest.mark.parametrize("kind", ["list", "deque", "map", "walked"])
def test_workers_of_a_loader_share_the_samples(kind: str) -> None:
    rows = [MapStyle()[number] for number in range(40)]
    kinds = {"list": rows, "deque": deque(rows), "map": MapStyle(), "walked": Walked()}
    batches = TargetedBatches(kinds[kind], 8, lambda sample: sample, drop_last=False)
    loader = DataLoader(batches, batch_size=None, num_workers=2, collate_fn=lambda batch: batch)
    for _ in range(2):
        found = [sample["uid"] for batch in loader for sample in batch]
        assert sorted(found) == sorted(row["uid"] for row in rows)


def test_samples_and_scores_that_do_not_hold() -> None:
    with pytest.raises(ConfigError, match="in every epoch; got a generator"):
        TargetedBatches((row for row in [{"uid": "a"}]), 8, lambda sample: sample)
    batches = TargetedBatches([{"uid": "a"}], 8, lambda sample: sample, share=1)
    batches.update({"a": None, "b": float("nan"), "c": 0.1})
    assert batches.targets == {"c"}


class Captioned(MapStyle):
    """Draws a caption of each sample."""

    def __init__(self) -> None:
        self.draw = CaptionSampler()

    def __getitem__(self, number: int) -> dict[str, Any]:
        words = np.array(["one", "two", "three"])
        return self.draw({"uid": str(number), "caption": "one", "captions": words})


def test_workers_that_stay_are_told_of_the_epoch() -> None:
    samples = Captioned()
    loader = DataLoader(
        samples, 40, num_workers=1, persistent_workers=True, collate_fn=lambda rows: rows
    )
    drawn = []
    for epoch in range(4):
        samples.draw.set_epoch(epoch)
        drawn.append([row["caption"] for row in next(iter(loader))])
    assert len({*map(tuple, drawn)}) == 4


def test_all_together_with_curated_weights_in_the_loop_of_open_clip(tmp_path: Path) -> None:
    """Weighted samples of a finished run, noise, mask and targets, in open_clip's own trainer."""
    trainer = pytest.importorskip("open_clip_train.train")
    from open_clip.loss import ClipLoss

    out = make_run(tmp_path / "run")
    model, transform, tokenizer = build(write_config(tmp_path))
    model.output_dict = True
    augmented: list[str] = []

    def augment(sample: dict[str, Any]) -> dict[str, Any]:
        augmented.append(sample["uid"])
        return sample | {"image": sample["image"].flip(-1)}

    samples = curate.load(str(out), transform=transform, weighted=True)
    batches = TargetedBatches(samples, 16, augment, share=0.3, every=1)
    loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    loss = NoisyLoss(ClipLoss(), EmbeddingNoise(0.1))
    mask = TextMask(0.15)
    mask.attach(model)
    masked: list[torch.Tensor] = []
    mask.register_forward_hook(lambda module, given, tokens: masked.append(tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for epoch in range(2):
        batches.set_epoch(epoch)
        if batches.due(epoch):
            batches.update(score(model, samples, tokenizer))
        images = Loader(
            (torch.stack([s["image"] for s in batch]), tokenizer([s["caption"] for s in batch]))
            for batch in loader
        )
        data = {"train": SimpleNamespace(dataloader=images, set_epoch=lambda epoch: None)}
        trainer.train_one_epoch(
            model, data, loss, epoch, optimizer, None, lambda step: None, None,
            open_clip_arguments(),
        )  # fmt: skip
    assert set(augmented) == batches.targets
    assert len(batches.targets) == round(0.3 * len({s["uid"] for s in samples}))
    assert len(masked) >= 8
    assert all(not torch.equal(v, before[name]) for name, v in model.named_parameters())
    assert all(torch.isfinite(value).all() for value in model.parameters())


def score(model: Any, samples: Any, tokenizer: Any) -> dict[str, float]:
    """How much better each sample fits than pairs that are not trained on."""
    known = {sample["uid"]: sample for sample in samples}
    given = {
        "image": torch.stack([sample["image"] for sample in known.values()]),
        "text": tokenizer([sample["caption"] for sample in known.values()]),
    }
    model.eval()
    with torch.no_grad():
        calls = {"image": model.encode_image, "text": model.encode_text}
        found: Embeddings = embed(calls, given, {name: rows[:9] for name, rows in given.items()})
    memorized = measure(found).scores["memorization"]
    assert 0 < len(memorized) <= KEPT
    return dict(zip(known, memorized.tolist(), strict=True))


def test_a_plain_loop(tmp_path: Path) -> None:
    """Without open_clip's trainer, on a model that returns a tuple."""
    from open_clip.loss import ClipLoss

    model, transform, tokenizer = build(write_config(tmp_path))
    given = prepare(pairs(16, 0), transform, tokenizer)
    noise, mask = EmbeddingNoise({"image": 0.1, "text": 0.1}), TextMask(0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    image, text, scale = model.train()(given["image"], mask(given["text"]))
    both = noise({"image": image, "text": text})
    loss = ClipLoss()(both["image"], both["text"], scale)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
