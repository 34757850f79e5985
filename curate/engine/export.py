"""Write what a finished run kept in another layout, in an order drawn by uid; recompute nothing.

The order puts samples of all shards into each file. So every shard is first cut into segments by
where its samples go (`scatter`), and every file then put together from its segments (`gather`):
each image is read and written twice in order, however many files there are. A file that was
written is not written again.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate import storage
from curate.config import nearest
from curate.engine.finished import read_finished
from curate.engine.manifest import provenance
from curate.engine.runner import Progress, lock_output
from curate.errors import (
    AlignmentError,
    ConfigError,
    CurateError,
    InputError,
    NothingKeptError,
    OutputError,
    SourceChangedError,
    StorageError,
)
from curate.formats import datacomp, groups, huggingface, keep_list, mds, webdataset
from curate.memorization.folds import draw_repeats, hash_unit
from curate.report.text import tell_count
from curate.schema import public_columns, select_schema

__all__ = ["LAYOUTS", "Mapper", "Request", "describe_export", "export"]

LAYOUTS = ("webdataset", "groups", "mds", "hf", "datacomp", "keep-list")
_GROUPED = ("groups", "mds")
_OF_IMAGES = ("webdataset", "groups", "mds", "hf")

#: The file that marks a folder as an export, and where it keeps what it no longer needs at the end.
_MARK, _STATE = "export.json", ".export"
_VERSION = 2

_FILE_SAMPLES = 10_000
#: What a file should hold at most where nothing else is asked for: a worker holds as much.
_FILE_BYTES = 256 << 20
#: Weights are not told apart by few files, nor do loaders share few among their workers.
_FILES_PER_GROUP, _LEAST_SAMPLES = 8, 100
#: Images that are held while a shard is cut into segments.
_CHUNK_BYTES = 128 << 20
_ROWS_AT_ONCE = 256
#: What open_clip reads.
_COMMON_KINDS = ("jpg", "png", "webp")


@dataclass(frozen=True)
class Request:
    """What to export.

    Parameters
    ----------
    out : str
        A finished run.
    target : str
        Folder to write to.
    layout : str
        One of `LAYOUTS`.
    seed : int
        Of the order, and of the rounding of weights to repeats.
    shard_samples : int, optional
        Samples per file at most; default: 10 000, or fewer where images are large or groups
        would be of few files.
    groups : int
        At most, where the layout has groups.
    """

    out: str
    target: str
    layout: str
    seed: int = 0
    shard_samples: int | None = None
    groups: int = 4

    def state(self, *names: str) -> str:
        """Location of what is needed until the export ends."""
        return storage.join(self.target, _STATE, *names)

    def shard(self, name: str) -> str:
        """Location of a shard of the run."""
        return storage.join(self.out, "shards", name)

    def identity(self, run: dict[str, Any]) -> dict[str, Any]:
        """Everything that can change what is written."""
        asked = asdict(self)
        del asked["out"], asked["target"]
        return {**asked, "write": run["stages"]["write"]["fingerprint"], "version": _VERSION}


class Mapper(Protocol):
    """Whatever maps a function over tasks, as `Workers` does."""

    def map(
        self, function: Callable[..., Any], tasks: Sequence[str], *arguments: Any
    ) -> Iterator[tuple[str, Any]]:
        """Yield (task, `function(*arguments, task)`) as tasks end."""


def export(request: Request, workers: Mapper, progress: Progress) -> dict[str, Any]:
    """Carry out an export; what an earlier one of the same request has done is not repeated.

    Returns
    -------
    dict
        What `export.json` holds, and `computed`.

    Raises
    ------
    CurateError
    """
    if request.layout not in LAYOUTS:
        near = nearest(request.layout, LAYOUTS) or " Name one of them."
        known = ", ".join(LAYOUTS)
        raise ConfigError(f"--to: must be one of {known}; got {request.layout!r}.{near}")
    run = read_finished(request.out)
    if "write" not in run["stages"]:
        raise OutputError(
            f"{request.out}: must be a run with the stage write; its pipeline has none. Add it and "
            "run again."
        )
    if run["counts"]["kept"] == 0:
        raise NothingKeptError(
            f"{request.out}: must hold kept samples; every one was dropped. Loosen the rules of "
            "`select` and run again."
        )
    with lock_output(request.target, _MARK, "export"):
        return _export(request, run, workers, progress)


def _export(
    request: Request, run: dict[str, Any], workers: Mapper, progress: Progress
) -> dict[str, Any]:
    mark = storage.join(request.target, _MARK)
    identity = request.identity(run)
    found: dict[str, Any] = storage.read_json(mark) if storage.exists(mark) else {}
    if found and found.get("request") != identity:
        raise OutputError(
            f"{request.target}: must be empty or hold the same export; found one with other "
            "parameters or of another run. Remove it, or choose another --output."
        )
    if found.get("status") == "finished":
        return dict(found, computed=False)
    storage.clear_temporaries(request.target)
    storage.commit_json(mark, {"status": "unfinished", "request": identity})
    if request.layout in _OF_IMAGES:
        facts = _write_files(request, run, workers, progress)
    else:
        facts = _write_lists(request, run)
    if read_finished(request.out)["stages"] != run["stages"]:
        raise SourceChangedError(
            f"{request.out}: must not change while it is exported; it was run anew. Remove "
            f"{request.target} and export again."
        )
    done = {"status": "finished", "request": identity, **facts, "versions": provenance()}
    storage.remove(request.state())
    storage.commit_json(mark, done)
    return dict(done, computed=True)


def _write_lists(request: Request, run: dict[str, Any]) -> dict[str, Any]:
    """Write what needs no image, from the decisions."""
    folder = storage.join(request.out, "decisions")
    tables = [
        keep_list.select_kept(
            storage.read_table(storage.join(folder, name), [*keep_list.SCHEMA.names, "keep"])
        )
        for name in storage.list_names(folder)
        if name.endswith(".parquet")
    ]
    _check_count(request, sum(map(len, tables)), run)
    kept = pa.concat_tables(tables)
    if request.layout == "keep-list":
        storage.commit_table(storage.join(request.target, keep_list.NAME), kept)
        return {"samples": len(kept), "files": 1}
    uids = kept["uid"].to_pylist()
    repeats = draw_repeats(uids, kept["weight"].to_numpy(), request.seed, "subset")
    packed = datacomp.pack_subset(uids)
    weighted = datacomp.pack_subset([uid for uid, n in zip(uids, repeats, strict=True) if n])
    times = repeats[repeats > 0][np.argsort(np.array(uids)[repeats > 0])]
    storage.commit_array(storage.join(request.target, "kept.npy"), packed)
    storage.commit_array(storage.join(request.target, "weighted.npy"), np.repeat(weighted, times))
    return {"samples": len(kept), "files": 2, "weighted_samples": int(repeats.sum())}


def _check_count(request: Request, found: int, run: dict[str, Any]) -> None:
    if found != run["counts"]["kept"]:
        raise AlignmentError(
            f"{request.out}: must hold the {run['counts']['kept']} kept samples of its run.json; "
            f"got {found}. Run it again, or copy it whole."
        )


def _write_files(
    request: Request, run: dict[str, Any], workers: Mapper, progress: Progress
) -> dict[str, Any]:
    if not storage.exists(request.state("layout.json")):
        _plan(request, run)
    layout = storage.read_json(request.state("layout.json"))
    inputs = [part["name"] for part in layout["inputs"]]
    files = [str(number) for number in range(len(layout["files"]))]
    for step, tasks in (("scatter", inputs), ("gather", files)):
        done = {n.removesuffix(".json") for n in storage.list_names(request.state(step))}
        left = [task for task in tasks if task not in done]
        progress.begin("export", step, len(tasks), len(tasks) - len(left))
        for _task, counts in workers.map(_execute, left, request, step) if left else ():
            progress.advance(counts)
        progress.end()
    return _finish(request, run, layout)


def _plan(request: Request, run: dict[str, Any]) -> None:
    """Decide where every sample goes; the layout is written last."""
    folder = storage.join(request.out, "shards")
    names = [name for name in storage.list_names(folder) if name.endswith(".parquet")]
    tables = [storage.read_table(request.shard(name), ["uid", "weight"]) for name in names]
    total = sum(map(len, tables))
    _check_count(request, total, run)
    if _lacks_images(request.shard(names[0])):
        raise InputError(
            f"{request.out}: must hold images to be written as {request.layout}; its source has "
            "vectors alone. Export --to keep-list or datacomp."
        )
    uids = [uid for table in tables for uid in table["uid"].to_pylist()]
    weights = np.concatenate([table["weight"].to_numpy() for table in tables])
    drawn = hash_unit(uids, request.seed, "order")
    order = np.lexsort((np.array(uids, "S32"), drawn))
    sizes = storage.walk_files(folder)
    per_file = request.shard_samples or _choose_samples(request, total, sum(sizes.values()))
    wanted = request.groups if request.layout in _GROUPED else 1
    cut = groups.cut(weights, order, -(-total // per_file), wanted)
    ends = np.cumsum([len(table) for table in tables]).tolist()
    storage.commit_array(request.state("shard.npy"), cut.shard)
    storage.commit_array(request.state("place.npy"), cut.place)
    layout = {
        "inputs": [
            {"name": name, "start": end - len(table), "end": end}
            for name, table, end in zip(names, tables, ends, strict=True)
        ],
        "files": [
            {"name": name, "samples": int(samples)}
            for name, samples in zip(
                _name_files(request.layout, cut.groups), np.bincount(cut.shard), strict=True
            )
        ],
        "groups": [asdict(group) for group in cut.groups],
        "weight_error": cut.error,
        "captions": max(map(_most_captions, map(request.shard, names))),
    }
    storage.commit_json(request.state("layout.json"), layout)


def _most_captions(url: str) -> int:
    """Return how many captions a sample of a shard has at most."""
    captions = storage.read_table(url, ["captions"])["captions"]
    return int(pc.max(pc.list_value_length(captions)).as_py() or 1)


def _choose_samples(request: Request, total: int, size_bytes: int) -> int:
    chosen = min(_FILE_SAMPLES, _FILE_BYTES * total // max(size_bytes, 1))
    if request.layout in _GROUPED:
        chosen = min(chosen, max(_LEAST_SAMPLES, total // (_FILES_PER_GROUP * request.groups)))
    return max(chosen, 1)


def _lacks_images(url: str) -> bool:
    """Tell whether the first row, and therefore any, has no image."""
    first = next(_batches(url))
    return len(first) > 0 and not first["image"][0].is_valid


def _name_files(layout: str, found: tuple[groups.Group, ...]) -> list[str]:
    """Name the files of all groups, without what distinguishes the parts of one."""
    numbers = [(g, i) for g, group in enumerate(found) for i in range(group.shards)]
    if layout == "hf":
        return [f"data/train-{i:05d}-of-{len(numbers):05d}.parquet" for _, i in numbers]
    if layout == "webdataset":
        return [f"{i:05d}.tar" for _, i in numbers]
    if layout == "mds":
        return [f"group{g}/{i:05d}" for g, i in numbers]
    return [f"group{g}-{i:05d}.tar" for g, i in numbers]


def _execute(request: Request, step: str, task: str) -> dict[str, float]:
    """Run one task on a worker; its mark, written last, says that it is done."""
    try:
        result = (_scatter if step == "scatter" else _gather)(request, task)
    except CurateError:
        raise
    except OSError as error:
        raise StorageError(
            f"export.{step}, task {task}: {error}. Run the same command again to resume."
        ) from error
    storage.commit_json(request.state(step, f"{task}.json"), result)
    return {"samples": float(result["samples"])}


def _batches(url: str) -> Iterator[pa.Table]:
    """Yield a shard's rows, a few hundred at a time."""
    names = list(public_columns("shards"))
    with storage.open_binary(url) as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=names):
            yield pa.Table.from_batches([batch])


def _chunks(url: str) -> Iterator[pa.Table]:
    """Yield a shard's rows, as many at a time as may be held."""
    held: list[pa.Table] = []
    for batch in _batches(url):
        held.append(batch)
        if sum(table.nbytes for table in held) >= _CHUNK_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _scatter(request: Request, name: str) -> dict[str, Any]:
    """Write a shard's rows once more, those that go to one file next to each other."""
    layout = storage.read_json(request.state("layout.json"))
    part = next(part for part in layout["inputs"] if part["name"] == name)
    begin, end = part["start"], part["end"]
    files = storage.read_array_rows(request.state("shard.npy"), begin, end)
    places = storage.read_array_rows(request.state("place.npy"), begin, end)
    segments: list[tuple[int, int, int]] = []
    at = 0
    with storage.commit(request.state("segments", f"{name}.arrow")) as path, open(path, "wb") as to:
        for chunk in _chunks(request.shard(name)):
            own, place = files[at : at + len(chunk)], places[at : at + len(chunk)]
            at += len(chunk)
            order = np.lexsort((place, own))
            table = chunk.append_column("place", pa.array(place)).take(pa.array(order))
            targets, starts = np.unique(own[order], return_index=True)
            for file, low, high in zip(targets, starts, [*starts[1:], len(table)], strict=True):
                first = to.tell()
                with pa.ipc.new_stream(to, table.schema) as stream:
                    stream.write_table(table.slice(low, high - low))
                segments.append((int(file), first, to.tell()))
    if at != end - begin:
        raise AlignmentError(
            f"{request.shard(name)}: must hold {end - begin} rows, as when the export began; got "
            f"{at}. Remove {request.target} and export again."
        )
    storage.commit_array(
        request.state("segments", f"{name}.npy"), np.array(segments, "<i8").reshape(-1, 3)
    )
    return {"samples": at}


def _gather(request: Request, task: str) -> dict[str, Any]:
    """Put one file together from its segments, in order, and check its images' hashes."""
    layout = storage.read_json(request.state("layout.json"))
    wanted = layout["files"][int(task)]
    rows: list[dict[str, Any] | None] = [None] * wanted["samples"]
    for part in layout["inputs"]:
        segments = storage.read_array(request.state("segments", f"{part['name']}.npy"))
        url = request.state("segments", f"{part['name']}.arrow")
        for _, begin, end in segments[segments[:, 0] == int(task)].tolist():
            with pa.ipc.open_stream(storage.read_range(url, begin, end)) as stream:
                for row in stream.read_all().to_pylist():
                    rows[row.pop("place")] = row
    found = [row for row in rows if row is not None]
    if len(found) != wanted["samples"]:
        raise AlignmentError(
            f"{request.target}: {wanted['name']} must have {wanted['samples']} samples; got "
            f"{len(found)}. Remove the folder and export again."
        )
    for row in found:
        _check_image(request, row)
    url = storage.join(request.target, wanted["name"])
    parts = _WRITE[request.layout](url, found, layout["captions"])
    kinds = [webdataset.to_sample(row).suffix for row in found]
    return {
        "samples": len(found),
        "parts": parts,
        "uncommon": sum(kind not in _COMMON_KINDS for kind in kinds),
        "silent": sum(not row["caption"] for row in found),
    }


def _check_image(request: Request, row: dict[str, Any]) -> None:
    data = row["image"]
    if data is None or hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise SourceChangedError(
            f"{request.out}/shards, uid {row['uid']}: must hold the bytes that were written; they "
            "changed since. Remove OUT and run again."
        )


_Parts = list[dict[str, Any]]


def _write_tar(url: str, rows: list[dict[str, Any]], captions: int) -> _Parts:
    with storage.commit(url) as path:
        webdataset.write(path, (webdataset.to_sample(row, captions) for row in rows))
    return []


def _write_mds(url: str, rows: list[dict[str, Any]], captions: int) -> _Parts:
    parts = []
    for number, run in enumerate(mds.split(map(mds.encode_sample, rows))):
        name = f"{url}.{number:03d}.mds"
        with storage.commit(name) as path:
            size_bytes = mds.write(path, run)
        parts.append(mds.describe(name.rpartition("/")[2], len(run), size_bytes))
    return parts


def _write_parquet(url: str, rows: list[dict[str, Any]], captions: int) -> _Parts:
    schema = select_schema(public_columns("shards"))
    with storage.commit_batches(url, huggingface.SCHEMA, huggingface.METADATA) as append:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = pa.Table.from_pylist(rows[start : start + _ROWS_AT_ONCE], schema)
            append(huggingface.to_table(block))
    return []


#: `_WRITE[layout](url, rows, most captions of a sample)`.
_WRITE: dict[str, Callable[[str, list[dict[str, Any]], int], _Parts]] = {
    "webdataset": _write_tar,
    "groups": _write_tar,
    "mds": _write_mds,
    "hf": _write_parquet,
}


def _finish(request: Request, run: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Write what tells readers of all files, and return the figures of the export."""
    files, error = layout["files"], layout["weight_error"]
    found = [groups.Group(**group) for group in layout["groups"]]
    results = [storage.read_json(request.state("gather", f"{i}.json")) for i in range(len(files))]
    uncommon = sum(result["uncommon"] for result in results)
    commit = partial(_commit_text, request)
    where = _absolute(request.target)
    if request.layout in ("webdataset", "groups"):
        sizes = {file["name"]: file["samples"] for file in files}
        storage.commit_json(storage.join(request.target, webdataset.SIZES), sizes)
    if request.layout == "groups":
        commit("TRAINING.md", _describe_tars(layout, found, where, uncommon))
    if request.layout == "mds":
        _commit_indexes(request, files, results)
        commit("TRAINING.md", groups.describe_mds(found, error, where))
    if request.layout == "hf":
        commit("README.md", huggingface.card(run, request.seed))
    facts: dict[str, Any] = {
        "samples": sum(file["samples"] for file in files),
        "files": sum(len(result["parts"]) or 1 for result in results),
        "not_jpeg_png_webp": uncommon,
        "without_caption": sum(result["silent"] for result in results),
    }
    if request.layout in _GROUPED:
        facts.update(groups=layout["groups"], weight_error=error)
    return facts


def _describe_tars(
    layout: dict[str, Any], found: list[groups.Group], where: str, uncommon: int
) -> str:
    fields = webdataset.caption_fields(layout["captions"])
    return groups.describe_tars(found, layout["weight_error"], where, uncommon, fields)


def _commit_indexes(request: Request, files: _Parts, results: _Parts) -> None:
    """Write the index of each group's folder, and one over all of them."""
    by_folder: dict[str, _Parts] = {}
    for file, result in zip(files, results, strict=True):
        by_folder.setdefault(file["name"].rpartition("/")[0], []).extend(result["parts"])
    whole = []
    for folder, shards in by_folder.items():
        storage.commit_json(storage.join(request.target, folder, "index.json"), mds.index(shards))
        for shard in shards:
            raw = {**shard["raw_data"], "basename": f"{folder}/{shard['raw_data']['basename']}"}
            whole.append({**shard, "raw_data": raw})
    storage.commit_json(storage.join(request.target, "index.json"), mds.index(whole))


def _commit_text(request: Request, name: str, text: str) -> None:
    storage.commit_bytes(storage.join(request.target, name), text.encode())


def _absolute(folder: str) -> str:
    """Return a local folder as an absolute path, so that commands work from anywhere."""
    fs, path = storage.filesystem(folder)
    return str(path) if storage.is_local(folder) else str(fs.unstrip_protocol(path))


def describe_export(result: dict[str, Any], target: str) -> str:
    """Return what is printed after an export."""
    lines = [f"{tell_count(result['samples'], 'sample')} in {tell_count(result['files'], 'file')}"]
    if not result["computed"]:
        lines = ["Nothing to do: the export was complete.", *lines]
    for number, group in enumerate(result.get("groups", ())):
        lines.append(
            f"group {number}  {group['samples']:>10} samples  factor {group['factor']:.4f}"
        )
    if "weighted_samples" in result:
        lines.append(f"{result['weighted_samples']} with repeats by weight")
    layout = result["request"]["layout"]
    if result.get("not_jpeg_png_webp") and layout in ("webdataset", "groups"):
        lines.append(
            f"Warning: {result['not_jpeg_png_webp']} images are neither JPEG nor PNG nor WebP; "
            "open_clip leaves them out"
        )
    if result.get("without_caption"):
        lines.append(f"Warning: {result['without_caption']} samples have no caption")
    page = {"groups": "TRAINING.md", "mds": "TRAINING.md", "hf": "README.md"}.get(layout)
    lines.append(f"Written    {target}")
    if page is not None:
        lines.append(f"Read       {storage.join(target, page)}")
    return "\n".join(lines)
