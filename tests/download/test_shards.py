"""The seam to img2dataset: what is replaced, and that nothing is lost where it swallows errors."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curate.download import shards
from curate.download.fetch import Limits
from curate.errors import RunError
from tests import web as local

LIMITS = Limits(100_000, 10, 10, 3, ("127.0.0.1",))


def request(resizer: Any) -> shards.Request:
    return shards.Request(LIMITS, resizer, 2, 0, None, None, ())


def keep(stream: Any, boxes: object = None) -> tuple[Any, ...]:
    return stream.getvalue(), 1, 1, 1, 1, None


def test_img2dataset_loop_can_open_no_url_by_itself() -> None:
    original = shards.downloader.Downloader.download_shard
    guarded: Any = shards._guard(original, LIMITS)
    names = guarded.__globals__
    assert guarded.__code__ is original.__code__
    assert not names.keys() & {"urllib", "download_image"}
    assert names["download_image_with_retry"] is not shards.downloader.download_image_with_retry
    # What is installed stays as it is.
    assert shards.downloader.Downloader.download_shard is original
    assert original.__globals__["urllib"] is shards.downloader.urllib


def test_a_loop_that_fetches_by_another_name_is_not_run() -> None:
    def loop(self: Any, row: Any) -> Any:
        return fetch_image(row)  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(RunError, match="must fetch by download_image_with_retry"):
        shards._guard(loop, LIMITS)


def test_a_row_that_img2dataset_loses_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(stream: Any, boxes: object = None) -> tuple[Any, ...]:
        raise LookupError

    with local.running() as web:
        rows = pa.table({"caption": ["a", "b"], "url": [web.serve("/a", b"x"), web.url("/gone")]})
        with pytest.raises(RunError, match="a row for each of 2 URLs; got 1"):
            shards.download(rows, 0, 2, request(fail), str(tmp_path))


def test_a_full_disk_is_no_lost_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(shards.tempfile, "TemporaryFile", lambda dir: full)
    with full, local.running() as web:
        rows = pa.table({"url": [web.serve("/a", b"x" * 99)]})
        with pytest.raises(OSError, match="No space left"):
            shards.download(rows, 0, 1, request(keep), str(tmp_path))


def test_keys_are_numbered_as_img2dataset_does(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    with local.running() as web:
        rows = pa.table({"url": [web.serve(f"/{i}", b"x%d" % i) for i in range(3)]})
        found = shards.download(rows, 7, 50_000, request(keep), str(tmp_path))
    assert found == {"success": 3}
    keys = pq.read_table(tmp_path / "00007.parquet")["key"].to_pylist()
    assert keys == [f"{7 * 100_000 + i:010d}" for i in range(3)]
