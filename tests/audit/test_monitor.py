"""The monitor in a plain loop, in open_clip's, and in Hugging Face's Trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import curate
from curate.audit import Embeddings, Monitor
from curate.errors import ConfigError
from curate.models.encoders import torch_threads
from tests.audit.checkpoints import build, pairs, prepare, train, write_config

COUNT = 40


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(torch.nn.Module):
    """Two towers, each call of which costs so many seconds of a clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.layer, self.clock, self.seconds = torch.nn.Linear(8, 8), clock, seconds

    def encode_image(self, rows: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.clock.now += self.seconds
        return self.layer(rows)

    encode_text = encode_image


def panel(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(COUNT, 8, generator=generator) for name in ("image", "text")}


def test_the_share_of_time_is_kept_at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("curate.audit.monitor.time.perf_counter", clock)
    model = Slow(clock, 0.25)  # a batch of both modalities: half of a step
    monitor = Monitor(model, panel(0), panel(1), batch=16)
    for _ in range(5000):
        clock.now += 1
        if len(monitor.history) == 8:  # the machine gets busy, and then quiet again
            model.seconds = 2.0
        if len(monitor.history) == 9:
            model.seconds = 0.25
        monitor.step()
        assert monitor.spent_share <= 0.01 or len(monitor.history) == 9
    assert len(monitor.history) >= 9
    steps = [record["step"] for record in monitor.history]
    # 3 + 3 batches of half a second: every 300 steps and the caution.
    assert 250 <= steps[1] - steps[0] <= 400
    assert monitor.spent_share <= 0.01


def test_training_is_left_as_it_is(tmp_path: Path) -> None:
    model, transform, tokenizer = build(write_config(tmp_path))
    given = prepare(pairs(COUNT, 1), transform, tokenizer)
    monitor = Monitor(model, given, prepare(pairs(COUNT, 2), transform, tokenizer))
    model.train()
    model.visual.eval()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = monitor.measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.visual.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert record["low"] < record["memorization"] < record["high"]


def test_memorization_rises_and_has_a_limit(tmp_path: Path) -> None:
    model, transform, tokenizer = build(write_config(tmp_path))
    given = prepare(pairs(COUNT, 1), transform, tokenizer)
    held_out = prepare(pairs(COUNT, 2), transform, tokenizer)
    records: list[dict[str, float]] = []
    start = Monitor(model, given, held_out).embed()
    assert isinstance(start, Embeddings)
    monitor = Monitor(
        model, given, held_out, reference=start, max_memorization=0.05, report=records.append
    )
    monitor.measure()
    assert not monitor.exceeded
    with torch_threads(1):
        train(model, given, 40)
    monitor.measure()
    assert monitor.exceeded
    assert records == monitor.history
    assert records[0]["memorization"] == pytest.approx(0, abs=1e-6)
    assert records[1]["low"] > 0.05


def open_clip_arguments() -> SimpleNamespace:
    return SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False,
        grad_clip_norm=None, horovod=False, rank=0, world_size=1, log_every_n_steps=1000,
        batch_size=20, wandb=False, local_rank=0,
    )  # fmt: skip


class Loader(list[Any]):
    """Batches as open_clip's trainer wants them."""

    num_samples = COUNT

    @property
    def num_batches(self) -> int:
        return len(self)


def test_in_the_loop_of_open_clip(tmp_path: Path) -> None:
    trainer = pytest.importorskip("open_clip_train.train")
    from open_clip.loss import ClipLoss

    model, transform, tokenizer = build(write_config(tmp_path))
    model.output_dict = True
    given = prepare(pairs(COUNT, 1), transform, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, given, prepare(pairs(COUNT, 2), transform, tokenizer), share=1)
    handle = monitor.attach(optimizer)
    monitor.measure()
    loader = Loader((given["image"][i::2], given["text"][i::2]) for i in range(2))
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    for epoch in range(3):
        trainer.train_one_epoch(
            model, data, ClipLoss(), epoch, optimizer, None, lambda step: None, None,
            open_clip_arguments(),
        )  # fmt: skip
    assert monitor._steps == 6
    assert monitor.history[-1]["step"] > 0
    handle.remove()
    optimizer.step()
    assert monitor._steps == 6


def test_in_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    small = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = CLIPConfig(
        text_config=small | {"vocab_size": 99, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config)

    def sample() -> dict[str, Any]:
        words = torch.cat([torch.randint(3, 99, (7,)), torch.tensor([2])])
        return {"pixel_values": torch.randn(3, 16, 16), "input_ids": words, "return_loss": True}

    def gather(samples: list[dict[str, Any]]) -> dict[str, Any]:
        stacked = {n: torch.stack([s[n] for s in samples]) for n in ("pixel_values", "input_ids")}
        return stacked | {"return_loss": True}

    both = [[sample() for _ in range(COUNT)] for _ in range(2)]
    parts = [
        {"image": torch.stack([s["pixel_values"] for s in part]),
         "text": torch.stack([s["input_ids"] for s in part])}
        for part in both
    ]  # fmt: skip
    monitor = Monitor(model, parts[0], parts[1], share=1)
    monitor.measure()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=20, report_to=[], use_cpu=True,
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True, logging_steps=100,
    )  # fmt: skip
    trainer = Trainer(model, arguments, gather, both[0], callbacks=[monitor.callback()])
    trainer.train()
    told = [line for line in trainer.state.log_history if "audit/memorization" in line]
    assert len(told) == len(monitor.history) - 1 > 0
    monitor.exceeded = True
    monitor._share = 1e-9
    trainer.train()
    assert trainer.state.global_step == 1


def step_as_rank(rank: int, meeting: str) -> None:
    """Step one of two ranks; the first stops both."""
    meet = f"file://{meeting}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    model = Slow(Clock(), 0)
    model.eval()
    monitor = Monitor(model, panel(0), panel(1), share=1, max_memorization=-1)
    callback = monitor.callback()
    state = SimpleNamespace(global_step=7, is_world_process_zero=rank == 0, log_history=[])
    control = SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(None, state, control)
    steps = 0
    while not control.should_training_stop:
        steps += 1
        callback.on_step_end(None, state, control)
    assert bool(state.log_history) == (rank == 0)
    assert monitor.exceeded == (rank == 0)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    torch.distributed.all_gather(counts, torch.tensor([steps]))
    assert counts[0] == counts[1] > 1
    if rank == 0:
        assert monitor.history[0]["step"] == 7 + steps
    torch.distributed.destroy_process_group()


def test_all_ranks_stop_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(step_as_rank, (str(tmp_path / "meeting"),), nprocs=2)


def test_a_slow_beginning_does_not_put_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("curate.audit.monitor.time.perf_counter", clock)
    model = Slow(clock, 0.25)

    def compile_first(rows: torch.Tensor) -> torch.Tensor:
        clock.now += 60 if monitor._spent == 0 else 0
        return model.encode_image(rows)

    encoders = {"image": model.encode_image, "text": compile_first}
    monitor = Monitor(model, panel(0), panel(1), encoders=encoders, batch=16, share=0.1)
    for _ in range(2_000):
        clock.now += 1
        monitor.step()
    # 61 s are spent on two batches: it waits until they and six more are a tenth, no longer.
    assert 560 <= monitor.history[0]["step"] <= 620
    assert monitor.spent_share <= 0.1


def test_what_cannot_be_measured_does_not_end_a_training(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("curate.audit.monitor.time.perf_counter", clock)
    model = Slow(clock, 0.25)
    monitor = Monitor(model, panel(0), panel(1), share=1)
    torch.nn.init.constant_(model.layer.bias, float("nan"))
    for _ in range(250):
        clock.now += 1
        assert monitor.step() is None
    assert "not measured; image: rows must be finite" in caplog.text
    assert monitor.spent_share > 0
    torch.nn.init.zeros_(model.layer.bias)
    clock.now += 1
    assert monitor.step() == monitor.history[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": torch.ones(4, 8)}, "candidates must map image, text .* got Tensor"),
        ({"held_out": {"image": torch.ones(4, 8)}}, "held_out must map .* text is missing"),
        ({"candidates": {"image": torch.ones(4, 8), "text": None}}, "NoneType"),
        ({"candidates": {n: torch.ones(1, 8) for n in ("image", "text")}}, "got 1 of image, 1"),
        (
            {"held_out": {"image": torch.ones(4, 8), "text": torch.ones(3, 8)}},
            "got 4 of image, 3 of text",
        ),
        ({"reference": {}}, "reference must be Embeddings; got dict"),
        ({"batch": 2.5}, "must be whole, at least 1; got 1, 2.5"),
        ({"max_memorization": float("nan")}, "max_memorization must be finite; got nan"),
    ],
)
def test_refuses_at_once(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"candidates": panel(0), "held_out": panel(1)} | change
    with pytest.raises(ConfigError, match=message):
        Monitor(Slow(Clock(), 0), **given)


def test_a_reference_of_another_panel() -> None:
    model = Slow(Clock(), 0)
    fewer = {name: rows[:30] for name, rows in panel(0).items()}
    reference = Monitor(model, fewer, panel(1)).embed()
    with pytest.raises(ConfigError, match="40 candidates and 40 held-out pairs; got 30 and 40"):
        Monitor(model, panel(0), panel(1), reference=reference)


def test_parameters() -> None:
    assert curate.audit.Monitor is Monitor
    model = Slow(Clock(), 0)
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\]; got 0"):
        Monitor(model, panel(0), panel(1), share=0)
    with pytest.raises(ConfigError, match="Give encoders"):
        Monitor(torch.nn.Linear(2, 2), panel(0), panel(1))
