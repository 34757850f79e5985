"""One shard of URLs to one shard of img2dataset's layout, by img2dataset's own downloader.

Three seams, none of which changes what is installed: the downloader is given a writer and a resizer
of ours, as its constructor allows, and its loop runs with our `fetch` in the place of its own
function. That loop is the original's code over a copy of its module's names, without `urllib` and
without the original fetch, so that nothing of it could still open a URL by itself.
"""

import io
import json
import math
import os
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.download.fetch import FetchError, Limits, fetch
from curate.errors import RunError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks a server for news
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports a module that Python will drop
    from img2dataset import downloader, resizer, writer

__all__ = ["FILES", "Request", "Resizer", "download", "make_resizer", "retry"]

#: What a shard consists of, in the order in which it is committed.
FILES = (".tar", ".parquet", "_stats.json")

_SHARD_DIGITS = 5
#: Samples per shard by which img2dataset numbers keys; larger shards have a digit more.
_KEY_SAMPLES = 10_000
_FETCH = "download_image_with_retry"
_UNSAFE = ("urllib", "download_image")
_EXTENSION = "jpg"
_AGENT = "Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:72.0) Gecko/20100101 Firefox/72.0"

Resizer = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Request:
    """What of img2dataset's options a shard is downloaded with.

    Parameters
    ----------
    limits : Limits
    resizer : callable
        img2dataset's: image stream to bytes, sizes and error.
    threads : int
    retries : int
        Further tries at once, of what failed.
    verify_hash : str or None
        `md5`, `sha256` or `sha512`: the column of that name must be the hash of the bytes.
    user_agent_token : str or None
    disallowed_directives : tuple of str
        Of X-Robots-Tag headers.
    """

    limits: Limits
    resizer: Resizer
    threads: int
    retries: int
    verify_hash: str | None
    user_agent_token: str | None
    disallowed_directives: tuple[str, ...]


def make_resizer(mode: str, side_px: int) -> Resizer:
    """Return img2dataset's resizer to a side of `side_px`, for images that are larger."""
    resize: Resizer = resizer.Resizer(side_px, mode, resize_only_if_bigger=True, skip_reencode=True)
    return resize


def download(
    rows: pa.Table, shard: int, samples: int, request: Request, folder: str
) -> dict[str, int]:
    """Download a shard into a local folder.

    Parameters
    ----------
    rows : pyarrow.Table
        Column `url`; if there are any `caption` and the hash to verify; others are kept as they
        are and must be of types that JSON has.
    shard : int
        Its number.
    samples : int
        Samples of a full shard.
    request : Request
    folder : str
        Gets the shard's `FILES`.

    Returns
    -------
    dict
        Error message -> number of URLs; `success` -> number of images.

    Raises
    ------
    RunError
        If img2dataset lost a row, or is of a version that cannot be guarded.
    """
    _run(rows, shard, samples, request, folder)
    return _check(rows, shard, folder)


def retry(
    rows: pa.Table, shard: int, samples: int, request: Request, folder: str, whole: str
) -> dict[str, int]:
    """Download what failed of a shard once more.

    Parameters
    ----------
    rows, shard, samples, request
        As of `download`.
    folder : str
        Gets the whole shard, what it held before included.
    whole : str
        The shard as it is: path without the suffixes of its `FILES`.

    Returns
    -------
    dict
        As of `download`.

    Raises
    ------
    RunError
    """
    table = pq.read_table(f"{whole}.parquet", columns=["key", "status"])
    failed = table.filter(pc.not_equal(table["status"], "success"))["key"].to_pylist()
    digits = _key_digits(samples)
    positions = sorted(int(key) % 10**digits for key in failed)
    _run(rows.take(pa.array(positions, pa.int64())), shard, samples, request, folder, positions,
         f"{whole}.tar")  # fmt: skip
    return _check(rows, shard, folder)


def _key_digits(samples: int) -> int:
    return math.ceil(math.log10(max(samples, _KEY_SAMPLES)))


def _name(shard: int) -> str:
    return str(shard).zfill(_SHARD_DIGITS)


def _check(rows: pa.Table, shard: int, folder: str) -> dict[str, int]:
    """Check that no row was lost, and bring the statistics in line with the whole shard."""
    path = f"{folder}/{_name(shard)}"
    table = pq.read_table(f"{path}.parquet", columns=["status", "error_message"])
    if table.num_rows != rows.num_rows:
        raise RunError(
            f"download, shard {_name(shard)}: must give a row for each of {rows.num_rows} URLs; "
            f"got {table.num_rows}. Run the same command again to resume."
        )
    statuses, errors = (column.to_pylist() for column in table.columns)
    found = Counter(error or status for status, error in zip(statuses, errors, strict=True))
    stats = json.loads(Path(f"{path}_stats.json").read_text(encoding="utf-8"))
    counts = Counter(statuses)
    stats |= {"count": len(statuses), "successes": counts["success"], "status_dict": dict(found)}
    stats |= {name: counts[name] for name in ("failed_to_download", "failed_to_resize")}
    Path(f"{path}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")
    return dict(found)


def _run(
    rows: pa.Table,
    shard: int,
    samples: int,
    request: Request,
    folder: str,
    positions: Sequence[int] | None = None,
    earlier: str | None = None,
) -> None:
    """Let img2dataset download rows, which have the places `positions` in their shard."""
    digits = _key_digits(samples)
    places = range(rows.num_rows) if positions is None else positions

    def open_writer(*arguments: Any) -> _Writer:
        keys = [downloader.compute_key(p, shard, digits, _SHARD_DIGITS) for p in places]
        return _Writer(*arguments, keys=keys, digits=digits, earlier=earlier)

    loader = downloader.Downloader(
        sample_writer_class=open_writer,
        resizer=request.resizer,
        thread_count=request.threads,
        save_caption="caption" in rows.column_names,
        extract_exif=False,
        output_folder=folder,
        column_list=rows.column_names,
        timeout=request.limits.stall_seconds,
        number_sample_per_shard=10**digits,
        oom_shard_count=_SHARD_DIGITS,
        compute_hash=request.verify_hash or "sha256",
        verify_hash_type=request.verify_hash,
        encode_format=_EXTENSION,
        retries=request.retries,
        user_agent_token=request.user_agent_token,
        disallowed_header_directives=list(request.disallowed_directives) or None,
    )
    listed = f"{folder}/rows.arrow"
    with pa.ipc.new_file(listed, rows.schema) as file:
        file.write_table(rows)
    _guard(downloader.Downloader.download_shard, request.limits)(loader, (shard, listed))


def _guard(loop: Any, limits: Limits) -> Callable[..., None]:
    """Return img2dataset's loop with a fetch within limits in the place of its own.

    Raises
    ------
    RunError
        If it no longer fetches by the name that is replaced.
    """
    if _FETCH not in _names_in(loop.__code__):
        raise RunError(
            "download: img2dataset must fetch by download_image_with_retry; this version does not. "
            "Install 1.47."
        )
    safe = {name: value for name, value in vars(downloader).items() if name not in _UNSAFE}

    def guarded(
        row: tuple[int, str | None],
        timeout: float,
        retries: int,
        user_agent_token: str | None,
        disallowed_header_directives: set[str] | None,
    ) -> tuple[int, io.BytesIO | None, str | None]:
        return _fetch_row(row, limits, retries, user_agent_token, disallowed_header_directives)

    return FunctionType(loop.__code__, {**safe, _FETCH: guarded}, loop.__name__)


def _names_in(code: CodeType) -> set[str]:
    """Return the names that a function's code uses, those of its inner functions included."""
    inner = (_names_in(one) for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*inner)


def _fetch_row(
    row: tuple[int, str | None],
    limits: Limits,
    retries: int,
    token: str | None,
    directives: set[str] | None,
) -> tuple[int, io.BytesIO | None, str | None]:
    """Fetch as img2dataset's own function does: number of the row, bytes, error."""
    number, url = row
    agent = _AGENT
    if token:
        agent += f" (compatible; {token}; +https://github.com/rom1504/img2dataset)"

    def opts_out(headers: Message) -> bool:
        return bool(directives and downloader.is_disallowed(headers, token, directives))

    why = ""
    for _ in range(retries + 1):
        try:
            return number, io.BytesIO(fetch(url, limits, agent, opts_out)), None
        except FetchError as error:
            why = str(error)
        except Exception as error:  # a server must not be able to end more than its own row
            why = f"unexpected {type(error).__name__}"
        if why.startswith("refused"):
            break
    return number, None, why


class _Writer(writer.WebDatasetSampleWriter):  # type: ignore[misc]
    """img2dataset's writer of tars, in order of key instead of arrival and without times.

    So the same answers of the same servers give the same files, whatever came first. Images wait in
    a file, not in memory.
    """

    def __init__(self, *arguments: Any, keys: list[str], digits: int, earlier: str | None) -> None:
        super().__init__(*arguments)
        self.tarwriter.mtime = 0
        self._keys = keys
        self._digits = digits
        self._failure: OSError | None = None
        self._arrived = tempfile.TemporaryFile(dir=arguments[1])  # noqa: SIM115 (closed by `close`)
        self._rows: dict[str, tuple[BinaryIO, int, int | None, str | None, dict[str, Any]]] = {}
        self._earlier = open(earlier, "rb") if earlier else None  # noqa: SIM115
        if self._earlier is not None:
            self._take_over(self._earlier)

    def _take_over(self, file: BinaryIO) -> None:
        """Take the samples that the shard holds."""
        images: dict[str, tarfile.TarInfo] = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix == _EXTENSION:
                    images[key] = member
                elif suffix == "json":
                    meta = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    image = images[key]
                    place = (file, image.offset_data, image.size)
                    self._rows[key] = (*place, meta.get("caption"), meta)

    def write(
        self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]
    ) -> None:
        """Put a sample aside; what failed again leaves what there is."""
        own = self._keys[int(key) % 10**self._digits]
        if image is None and own in self._rows:
            return
        meta["key"] = own
        offset = self._arrived.tell()
        if image is not None:
            try:
                self._arrived.write(image)
            except OSError as error:  # what is raised here costs img2dataset's loop a row, unseen
                self._failure = error
        size = None if image is None else len(image)
        self._rows[own] = (self._arrived, offset, size, caption, meta)

    def close(self) -> None:
        """Write all samples."""
        if self._failure is not None:
            raise self._failure
        for key in sorted(self._rows):
            file, offset, size, caption, meta = self._rows[key]
            image = None
            if size is not None:
                file.seek(offset)
                image = file.read(size)
            super().write(image, key, caption, meta)
        super().close()
        self._arrived.close()
        if self._earlier is not None:
            self._earlier.close()
