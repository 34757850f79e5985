"""What a finished run kept, as samples to train on: shared among ranks and DataLoader workers."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from curate import storage
from curate.engine.finished import read_finished
from curate.errors import ConfigError, InputError
from curate.formats.pixels import decode
from curate.memorization.folds import draw_repeats, hash_unit

__all__ = ["Samples"]

Array = np.ndarray[Any, Any]

#: More than any picture has: decoding must not scale one down.
_FULL_SIZE_PX = 1 << 24


@dataclass(frozen=True)
class _Block:
    """One row group: what is read at once."""

    url: str
    row_group: int
    rows: int


class Samples(IterableDataset[dict[str, Any]]):
    """Iterate over the samples that a run kept.

    Each is a dict: `uid`; `image`; `caption`, drawn anew in each epoch from the sample's own and
    those of its dropped duplicates; `weight`, with mean 1 over all. All ranks get the same number
    of samples: where they do not share evenly, up to `world_size - 1` are left out, others in
    each epoch. Draws depend on seed, epoch and uid; the order also on how many ranks and workers
    share it.

    Parameters
    ----------
    out : str
        OUT of a finished run.
    image : {"pil", "bytes"}
        RGB over white and upright, as the run saw it; or the original bytes.
    transform : callable, optional
        Applied to each image.
    weighted : bool
        Give each sample as often per epoch as it weighs: the weight rounded up or down at random.
        Then do not use `weight` in the loss as well.
    seed : int
    shuffle : bool
        False: in the order of OUT, each worker its part.
    buffer_samples : int
        Encoded samples from which the next is drawn; also the most that each worker holds besides
        the thousand that it reads at once.
    rank, world_size : int, optional
        Default: those of `torch.distributed`, else of the environment, else one rank.

    Raises
    ------
    OutputError
        If `out` holds no finished run.
    ConfigError
        If a parameter does not hold.

    Examples
    --------
    >>> samples = curate.load("cleaned", transform=preprocess)  # doctest: +SKIP
    >>> loader = torch.utils.data.DataLoader(samples, 256, num_workers=8)  # doctest: +SKIP
    >>> for epoch in range(32):  # doctest: +SKIP
    ...     samples.set_epoch(epoch)
    ...     for batch in loader: ...
    """

    def __init__(
        self,
        out: str,
        *,
        image: Literal["pil", "bytes"] = "pil",
        transform: Callable[[Any], Any] | None = None,
        weighted: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        buffer_samples: int = 2048,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if image not in ("pil", "bytes"):
            raise ConfigError(f"load: image must be pil or bytes; got {image!r}. Choose one.")
        if buffer_samples < 1:
            raise ConfigError(
                f"load: buffer_samples must be at least 1; got {buffer_samples}; raise it."
            )
        self.rank, self.world_size = _find_rank(rank, world_size)
        self._image, self._transform = image, transform
        self._weighted, self._seed, self._shuffle = weighted, seed, shuffle
        self._buffer_samples = buffer_samples
        read_finished(out)
        folder = storage.join(out, "shards")
        names = [name for name in storage.list_names(folder) if name.endswith(".parquet")]
        self._blocks = [block for name in names for block in _blocks(storage.join(folder, name))]
        # Workers that outlive an epoch must see the next one.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that order, captions and repeats are drawn for."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """Samples of this rank in the current epoch."""
        return int(sum(self._counts(self._repeats()))) // self.world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's samples of the current epoch, or a worker's part of them."""
        epoch, repeats = self.epoch, self._repeats()
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        counts = self._counts(repeats)
        share = int(sum(counts)) // self.world_size
        begin = self.rank * share + share * worker // workers
        end = self.rank * share + share * (worker + 1) // workers
        order = np.arange(len(self._blocks))
        if self._shuffle:
            order = self._draws(epoch).permutation(order)
        encoded = self._read(epoch, order, counts, repeats, begin, end)
        if self._shuffle:
            draws = self._draws(epoch, self.rank, worker, workers)
            encoded = _mix(encoded, draws, self._buffer_samples)
        return map(self._finish, encoded)

    def _draws(self, *keys: int) -> np.random.Generator:
        return np.random.default_rng([self._seed & 0xFFFFFFFF, *keys])

    def _repeats(self) -> list[Array] | None:
        """How often each row of each block comes; None: once."""
        if not self._weighted:
            return None
        purpose, found = f"repeats {self.epoch}", []
        for block in self._blocks:
            table = _read(block, ["uid", "weight"])
            uids, weights = table["uid"].to_pylist(), table["weight"].to_numpy()
            found.append(draw_repeats(uids, weights, self._seed, purpose))
        return found

    def _counts(self, repeats: list[Array] | None) -> list[int]:
        if repeats is None:
            return [block.rows for block in self._blocks]
        return [int(one.sum()) for one in repeats]

    def _read(
        self,
        epoch: int,
        order: Array,
        counts: list[int],
        repeats: list[Array] | None,
        begin: int,
        end: int,
    ) -> Iterator[dict[str, Any]]:
        """Yield what lies from `begin` to `end` in the blocks, taken in that order."""
        at = 0
        for number in order.tolist():
            low, high = max(begin - at, 0), min(end - at, counts[number])
            at += counts[number]
            if low >= high:
                continue
            rows = np.arange(self._blocks[number].rows)
            copies = np.zeros_like(rows)
            if repeats is not None:
                times = repeats[number]
                copies = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
                rows = np.repeat(rows, times)
            if self._shuffle:
                mixed = self._draws(epoch, number).permutation(len(rows))
                rows, copies = rows[mixed], copies[mixed]
            yield from self._rows(epoch, number, rows[low:high], copies[low:high])

    def _rows(
        self, epoch: int, number: int, rows: Array, copies: Array
    ) -> Iterator[dict[str, Any]]:
        table = _read(self._blocks[number], ["uid", "image", "caption", "captions", "weight"])
        uids, weights = table["uid"].to_pylist(), table["weight"].to_pylist()
        keys = [f"{uids[row]}/{copy}" for row, copy in zip(rows, copies, strict=True)]
        drawn = hash_unit(keys, self._seed, f"caption {epoch}")
        for row, unit in zip(rows.tolist(), drawn.tolist(), strict=True):
            known = table["captions"][row].as_py() or [table["caption"][row].as_py() or ""]
            image = table["image"][row].as_py()
            if image is None:
                raise InputError(
                    f"{self._blocks[number].url}: must hold images; uid {uids[row]} has none, "
                    "because its source has vectors alone. Use the keep list on the images."
                )
            caption = known[int(unit * len(known))]
            yield {"uid": uids[row], "image": image, "caption": caption, "weight": weights[row]}

    def _finish(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self._image == "pil":
            sample["image"] = decode(sample["image"], sys.maxsize, _FULL_SIZE_PX).image
        if self._transform is not None:
            sample["image"] = self._transform(sample["image"])
        return sample


def _find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ConfigError("load: rank and world_size must be given together; got one. Give both.")
    if rank is None or world_size is None:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        if ready:
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = (int(os.environ.get(n, d)) for n, d in _RANK_VARIABLES)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"load: rank must be in [0, world_size); got {rank} of {world_size}. Mend one of them."
        )
    return rank, world_size


#: What torchrun sets, and what holds without it.
_RANK_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1))


def _blocks(url: str) -> list[_Block]:
    with storage.open_binary(url) as file, pq.ParquetFile(file) as parquet:
        groups = range(parquet.num_row_groups)
        return [_Block(url, i, parquet.metadata.row_group(i).num_rows) for i in groups]


def _read(block: _Block, columns: list[str]) -> Any:
    with storage.open_binary(block.url) as file, pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(block.row_group, columns)


def _mix(
    samples: Iterator[dict[str, Any]], draws: np.random.Generator, size: int
) -> Iterator[dict[str, Any]]:
    """Yield samples in the order in which they are drawn from a buffer of the next `size`."""
    held: list[dict[str, Any]] = []
    for sample in samples:
        if len(held) < size:
            held.append(sample)
            continue
        place = int(draws.integers(size))
        held[place], sample = sample, held[place]
        yield sample
    for place in draws.permutation(len(held)).tolist():
        yield held[place]
