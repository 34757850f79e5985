"""Download: the images of URL lists, by img2dataset, as shards that ingest reads.

What a server answers is no function of the list. So the fingerprint is that of the list and of what
is wanted of an image; how it is fetched (time limits, threads, allowed addresses, retries) may
change from run to run without a finished shard being fetched again; and ingest's fingerprint is
that of the files that were committed.
"""

import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from curate import storage
from curate.errors import CurateError, InputError
from curate.formats import pixels, url_lists
from curate.formats.sources import Source, find_root, identify
from curate.stages.base import OneOrMore, Room, Stage, Step, Table, execution_only, one_task
from curate.stages.download_inputs import (
    decide_shards,
    hash_shard,
    read_layout,
    read_list,
    read_shard,
    shard_names,
)
from curate.stages.ingest import DOWNLOADED, commit_sources, source_tasks

__all__ = ["SHARED_WITH_INGEST", "Download"]

#: Fields that are ingest's: they say what a sample of the list is.
SHARED_WITH_INGEST = ("inputs", "root", "dataset", "uid_column", "limit", "seed")
#: Folder of what tells each shard, within the stage's own.
_DIGESTS = "digests"
#: How many kinds of failure `run.json` tells.
_SHOWN_MESSAGES = 20


class Download(Stage):
    """Download what URL lists name; failed URLs stay rows, with what went wrong."""

    name: ClassVar[str] = "download"
    makes_input: ClassVar[bool] = True

    inputs: tuple[str, ...] = execution_only((), "The lists; set from ingest.inputs.")
    root: str | None = execution_only(None, "Folder of the lists' names; set from ingest.root.")
    dataset: str = Field(default="", description="Set from ingest.dataset.")
    uid_column: str | None = Field(default=None, description="Set from ingest.uid_column.")
    limit: int | None = Field(default=None, description="Set from ingest.limit.", ge=1)
    seed: int = Field(default=0, description="Set from ingest.seed.")
    url_column: str | None = Field(
        default=None, description="Column of URLs; default: url, URL, image_url or img_url."
    )
    caption_column: str | None = Field(
        default=None, description="Column of captions; default: caption, text, TEXT, title or alt."
    )
    verify_hash: Literal["md5", "sha256", "sha512"] | None = Field(
        default=None, description="Column of the list that must be this hash of the bytes."
    )
    shard_samples: int | None = Field(
        default=None,
        description="URLs per shard, which a kill costs at most; default: a 16th of all, within "
        "256 to 10 000, in steps of twice as many.",
        ge=1,
    )
    max_bytes: int = Field(default=16_000_000, description="bytes of an image file at most", ge=1)
    min_side_px: int = Field(default=0, description="shorter side at least", ge=0)
    max_pixels: int = Field(default=100_000_000, description="pixels at most, by the header", ge=1)
    max_aspect: float | None = Field(
        default=None, description="longer over shorter side at most", ge=1
    )
    resize: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = Field(
        default="no", description="img2dataset's resize_mode for larger images; no: keep the bytes."
    )
    image_side_px: int = Field(default=256, description="side that `resize` brings images to", ge=1)
    disallowed_directives: OneOrMore = Field(
        default=("noai", "noimageai", "noindex", "noimageindex"),
        description="X-Robots-Tag directives by which an image is left alone",
    )
    user_agent_token: str | None = execution_only(
        None,
        "Name by which servers and their X-Robots-Tag know this download.",
        pattern=r"^[A-Za-z0-9._+-]+$",
    )
    allow_addresses: OneOrMore = execution_only(
        (), "Addresses and ranges (CIDR) that may be reached although they are not public."
    )
    max_redirects: int = execution_only(5, "redirects to follow at most", ge=0, le=20)
    stall_seconds: float = execution_only(10.0, "seconds without a byte before giving up", gt=0)
    max_seconds: float = execution_only(60.0, "seconds that one try of a file may take", gt=0)
    threads: int = execution_only(64, "files fetched at once by a worker", ge=1, le=1024)
    retries: int = execution_only(0, "further tries of a URL at once", ge=0, le=10)
    retry_failed: int = execution_only(
        0, "Rounds in which all that failed is tried again; raise it to have another.", ge=0, le=99
    )

    @field_validator("allow_addresses")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from curate.download.addresses import parse_network

        for text in value:
            try:
                parse_network(text)
            except ValueError as error:
                raise ValueError(f"addresses or CIDR ranges; got {text!r}") from error
        return value

    def tables(self) -> tuple[Table, ...]:
        return (Table("download", ()),)

    def steps(self) -> tuple[Step, ...]:
        """List the lists, read each, decide the shards, download them, try again what failed."""
        return (
            Step("list", _list, one_task),
            Step("read", read_list, source_tasks),
            Step("layout", decide_shards, one_task),
            Step("fetch", _fetch, shard_names),
            *(
                Step(_round(number), _retry, _failed_shards)
                for number in range(1, self.retry_failed + 1)
            ),
        )

    def hashed_fields(self) -> dict[str, Any]:
        unused = ("seed",) if self.limit is None else ()
        if self.resize == "no":
            unused = (*unused, "image_side_px")
        return {k: v for k, v in super().hashed_fields().items() if k not in unused}

    def folder(self) -> str:
        """Return the folder to which names of lists are relative."""
        return self.root.rstrip("/") if self.root else find_root(self.inputs)

    def list_sources(self) -> list[Source]:
        """Return the lists in order of name.

        Raises
        ------
        InputError
            If an input is missing or no list.
        """
        found = url_lists.find_lists(self.inputs, self.folder(), self.url_column)
        if not found:
            raise InputError(
                f"{self.inputs[0]}: must be a list of URLs, as it was; it is none. Put it back."
            )
        return found

    def finds_lists(self, layout: str = "auto") -> bool:
        """Tell whether the inputs are lists of URLs; what cannot be read is for ingest to say."""
        if not self.inputs or layout != "auto":
            return False
        try:
            return bool(url_lists.find_lists(self.inputs, self.folder(), self.url_column))
        except CurateError:
            return False

    def sources(self) -> list[dict[str, Any]]:
        return [identify(source) for source in self.list_sources()]

    def asks_more(self, folder: str) -> bool:
        """Tell whether a round of `retry_failed` is still to be made."""
        if not self.retry_failed:
            return False
        steps = storage.read_json(storage.join(folder, "manifest.json"))["steps"]
        return _round(self.retry_failed) not in steps

    def facts(self, room: Room) -> dict[str, Any]:
        """Return how many URLs gave an image, and what the others failed of."""
        steps = storage.read_json(room.path("manifest.json"))["steps"]
        fetched = steps["fetch"]
        recovered = sum(steps[name].get("images", 0) for name in steps if name.startswith("retry"))
        messages = Counter(
            {
                name.removeprefix("failed."): int(count)
                for name, count in fetched.items()
                if name.startswith("failed.")
            }
        )
        return {
            "urls": int(fetched["samples"]),
            "images": int(fetched.get("images", 0) + recovered),
            "recovered": int(recovered),
            "failed_at_first": dict(messages.most_common(_SHOWN_MESSAGES)),
        }


def _round(number: int) -> str:
    return f"retry{number}"


def _stage(room: Room) -> Download:
    assert isinstance(room.stage, Download)
    return room.stage


def _list(room: Room, task: str) -> dict[str, float]:
    return {"sources": commit_sources(room, _stage(room).list_sources())}


def _request(stage: Download) -> Any:
    from curate.download import shards
    from curate.download.fetch import Limits

    limits = Limits(
        stage.max_bytes,
        stage.max_seconds,
        stage.stall_seconds,
        stage.max_redirects,
        stage.allow_addresses,
    )
    resize = (
        None if stage.resize == "no" else shards.make_resizer(stage.resize, stage.image_side_px)
    )
    return shards.Request(
        limits,
        partial(_fit_image, stage, resize),
        stage.threads,
        stage.retries,
        stage.verify_hash,
        stage.user_agent_token,
        stage.disallowed_directives,
    )


def _fit_image(
    stage: Download,
    resize: Callable[..., tuple[Any, ...]] | None,
    stream: io.BytesIO,
    boxes: object = None,
) -> tuple[Any, ...]:
    """Judge a file by its header, in img2dataset's words, and resize it if that is asked for.

    Returns
    -------
    tuple
        Bytes, width, height, original width and height, error.
    """
    data = stream.getvalue()
    size = pixels.read_size(data)
    nothing = (None,) * 5
    if size is None:
        return (*nothing, "Image decoding error")
    if min(size) < max(stage.min_side_px, 1):
        return (*nothing, "image too small")
    if size[0] * size[1] > stage.max_pixels:
        return (*nothing, "image area too large")
    if stage.max_aspect is not None and max(size) / min(size) > stage.max_aspect:
        return (*nothing, "aspect ratio too large")
    if resize is None:
        return (data, *size, *size, None)
    return resize(stream)


def _fetch(room: Room, task: str) -> dict[str, float]:
    """Download one shard and commit its files, the statistics last, and what tells it."""
    from curate.download import shards

    rows = read_shard(room, task)
    digest, target = hash_shard(room, rows), room.path(DOWNLOADED)
    earlier = _find_earlier(room, task, digest)
    if earlier is not None:
        for suffix in shards.FILES:
            name = storage.join(DOWNLOADED, task + suffix)
            storage.link(storage.join(earlier, name), room.path(name))
        storage.commit_json(room.path(_DIGESTS, f"{task}.json"), digest)
        stats = storage.read_json(room.path(DOWNLOADED, f"{task}_stats.json"))
        return {"samples": len(rows), "taken_over": len(rows), **_counts(stats["status_dict"])}
    with storage.scratch(target) as folder:
        samples = read_layout(room)["shard_samples"]
        found = shards.download(rows, int(task), samples, _request(_stage(room)), folder)
        for suffix in shards.FILES:
            storage.publish_file(f"{folder}/{task}{suffix}", storage.join(target, task + suffix))
    storage.commit_json(room.path(_DIGESTS, f"{task}.json"), digest)
    return {"samples": len(rows), **_counts(found)}


def _find_earlier(room: Room, task: str, digest: str) -> str | None:
    """Return the folder of another download in OUT that has the same shard: a list that grew."""
    own = room.path().rstrip("/")
    stages, _, name = own.rpartition("/")
    for other in storage.list_names(stages):
        told = storage.join(stages, other, _DIGESTS, f"{task}.json")
        if other != name and other.startswith(f"{Download.name}-") and storage.exists(told):
            folder = storage.join(stages, other)
            if storage.read_json(told) == digest:
                return folder
    return None


def _counts(found: dict[str, int]) -> dict[str, float]:
    failed = {f"failed.{why}": float(count) for why, count in found.items() if why != "success"}
    return {"images": found.get("success", 0), **failed}


def _failed_shards(room: Room) -> list[str]:
    """Name the shards that have failed rows."""
    return [task for task in shard_names(room) if _failed(room, task)]


def _failed(room: Room, task: str) -> int:
    stats = storage.read_json(room.path(DOWNLOADED, f"{task}_stats.json"))
    return int(stats["count"] - stats["successes"])


def _retry(room: Room, task: str) -> dict[str, float]:
    """Try again what failed of a shard; the files change if an image more was had.

    The tar comes first and the statistics last: in between ingest would find a sample that its
    table calls failed, and take the sample.
    """
    from curate.download import shards

    rows, failed = read_shard(room, task), _failed(room, task)
    samples, target = read_layout(room)["shard_samples"], room.path(DOWNLOADED)
    with storage.scratch(target) as folder:
        for suffix in shards.FILES[:2]:
            storage.copy_file(storage.join(target, task + suffix), f"{folder}/before{suffix}")
        request, whole = _request(_stage(room)), f"{folder}/before"
        found = shards.retry(rows, int(task), samples, request, folder, whole)
        had = len(rows) - failed
        if found.get("success", 0) > had:
            for suffix in shards.FILES:
                path = f"{folder}/{task}{suffix}"
                storage.publish_file(path, storage.join(target, task + suffix))
    return {"samples": failed, "images": found.get("success", 0) - had}
