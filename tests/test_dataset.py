import hashlib
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed
from PIL import Image
from torch.utils.data import DataLoader

import curate
from curate.dataset import Samples
from curate.errors import ConfigError, InputError, OutputError
from curate.memorization.folds import draw_repeats
from tests.exports import KEPT, Found, expected, make_run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), shard_samples=7)


@pytest.fixture(scope="module")
def truth(out: Path) -> dict[str, Found]:
    return expected(out)


def load(out: Path, **options: Any) -> Samples:
    return curate.load(str(out), image="bytes", **options)


def uids(samples: Any) -> list[str]:
    return [sample["uid"] for sample in samples]


def keep_all(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch


def size_of(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.size)


def test_every_kept_sample_once(out: Path, truth: dict[str, Found]) -> None:
    samples = load(out)
    found = list(samples)
    assert len(samples) == len(found) == KEPT
    assert set(uids(found)) == truth.keys()
    for sample in found:
        digest, _, captions, weight = truth[sample["uid"]]
        assert hashlib.sha256(sample["image"]).hexdigest() == digest
        assert sample["caption"] in captions
        assert sample["weight"] == weight


def test_in_order_without_shuffling(out: Path, truth: dict[str, Found]) -> None:
    assert uids(load(out, shuffle=False)) == list(truth)


def test_order_and_captions_follow_seed_and_epoch(out: Path, truth: dict[str, Found]) -> None:
    def draw(seed: int, epoch: int) -> list[tuple[str, str]]:
        samples = load(out, seed=seed, buffer_samples=16)
        samples.set_epoch(epoch)
        assert samples.epoch == epoch
        return [(sample["uid"], sample["caption"]) for sample in samples]

    first = draw(0, 0)
    assert draw(0, 0) == first
    for other in (draw(0, 1), draw(1, 0)):
        assert sorted(uid for uid, _ in other) == sorted(truth)
        assert [uid for uid, _ in other] != [uid for uid, _ in first]
        assert dict(other) != dict(first)
    places = {uid: i for i, uid in enumerate(truth)}
    ranks = [places[uid] for uid, _ in first]
    assert abs(np.corrcoef(ranks, np.arange(KEPT))[0, 1]) < 0.4


def test_all_captions_are_drawn_alike(out: Path, truth: dict[str, Found]) -> None:
    samples = load(out)
    seen: Counter[tuple[str, str]] = Counter()
    for epoch in range(40):
        samples.set_epoch(epoch)
        seen.update((sample["uid"], sample["caption"]) for sample in samples)
    assert set(seen) == {(uid, c) for uid, found in truth.items() for c in found[2]}
    merged = [seen[uid, found[2][1]] for uid, found in truth.items() if len(found[2]) == 2]
    assert np.mean(merged) == pytest.approx(20, abs=1.5)


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_ranks_share_the_samples(out: Path, truth: dict[str, Found], world_size: int) -> None:
    parts = [load(out, rank=rank, world_size=world_size) for rank in range(world_size)]
    found = [uids(part) for part in parts]
    assert {len(part) for part in parts} == {len(one) for one in found} == {KEPT // world_size}
    flat = [uid for one in found for uid in one]
    assert len(set(flat)) == len(flat) == KEPT // world_size * world_size
    assert set(flat) <= truth.keys()


def test_the_samples_left_out_change(out: Path, truth: dict[str, Found]) -> None:
    left = set()
    for epoch in range(6):
        parts = [load(out, rank=rank, world_size=4) for rank in range(4)]
        for part in parts:
            part.set_epoch(epoch)
        left.add(frozenset(truth.keys() - {uid for part in parts for uid in uids(part)}))
    assert len(left) > 3


def test_workers_share_a_rank_and_see_the_epoch(out: Path) -> None:
    samples = load(out, rank=1, world_size=2)
    loader = DataLoader(samples, 8, num_workers=2, persistent_workers=True, collate_fn=keep_all)
    drawn = []
    for epoch in range(2):
        samples.set_epoch(epoch)
        drawn.append([sample["uid"] for batch in loader for sample in batch])
        alone = load(out, rank=1, world_size=2)
        alone.set_epoch(epoch)
        assert sorted(drawn[-1]) == sorted(uids(alone))
    assert drawn[0] != drawn[1]


def test_batches_of_tensors(out: Path) -> None:
    loader = DataLoader(curate.load(str(out), transform=size_of), batch_size=32)
    batches = list(loader)
    assert [len(batch["caption"]) for batch in batches] == [32, 32, 26]
    assert batches[0]["image"].tolist() == [[40, 36]] * 32
    assert batches[0]["weight"].dtype.is_floating_point


def test_images_are_rgb(out: Path) -> None:
    sample = next(iter(curate.load(str(out))))
    assert isinstance(sample["image"], Image.Image)
    assert (sample["image"].mode, sample["image"].size) == ("RGB", (40, 36))


def test_weighted(out: Path, truth: dict[str, Found]) -> None:
    samples = load(out, weighted=True, seed=5)
    keys, weights = list(truth), np.array([found[3] for found in truth.values()], np.float32)
    total: Counter[str] = Counter()
    for epoch in range(30):
        samples.set_epoch(epoch)
        drawn = Counter(uids(samples))
        assert drawn.total() == len(samples)
        times = draw_repeats(keys, weights, 5, f"repeats {epoch}")
        assert drawn == Counter(dict(zip(keys, times.tolist(), strict=True)))
        total += drawn
    assert np.corrcoef([total[key] for key in keys], weights)[0, 1] > 0.98
    parts = [load(out, weighted=True, rank=rank, world_size=3) for rank in range(3)]
    assert len({len(uids(part)) for part in parts}) == 1


def test_survives_the_way_to_a_spawned_worker(out: Path) -> None:
    assert uids(pickle.loads(pickle.dumps(load(out)))) == uids(load(out))


def test_rank_of_the_environment(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    samples = load(out)
    assert (samples.rank, samples.world_size) == (2, 3)


def test_torch_distributed_goes_before_it(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    meet = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        samples = load(out)
    finally:
        torch.distributed.destroy_process_group()
    assert (samples.rank, samples.world_size) == (0, 1)


def test_what_does_not_hold(out: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="must hold a finished run"):
        curate.load(str(tmp_path))
    with pytest.raises(ConfigError, match="image must be pil or bytes"):
        curate.load(str(out), image="jpeg")
    with pytest.raises(ConfigError, match="buffer_samples"):
        curate.load(str(out), buffer_samples=0)
    with pytest.raises(ConfigError, match="given together"):
        curate.load(str(out), rank=1)
    with pytest.raises(ConfigError, match="rank must be in"):
        curate.load(str(out), rank=2, world_size=2)


def test_a_source_of_vectors_has_no_images(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "copy")
    for path in (tmp_path / "copy/shards").iterdir():
        table = pq.read_table(path)
        place, field = table.column_names.index("image"), table.schema.field("image")
        path.unlink()
        pq.write_table(table.set_column(place, field, pa.nulls(len(table), field.type)), path)
    with pytest.raises(InputError, match="vectors alone"):
        next(iter(curate.load(str(tmp_path / "copy"))))
