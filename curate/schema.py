"""Every column and every reason code, once.

`curate columns` and the README's table are printed from here; stages take their Arrow types
from here, so that a column cannot mean two things.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

__all__ = [
    "COLUMNS",
    "REASONS",
    "Column",
    "describe_columns",
    "markdown_tables",
    "public_columns",
    "select_schema",
]


@dataclass(frozen=True)
class Column:
    """One column: its type and what a reader must know to use it.

    Parameters
    ----------
    name : str
    type : pyarrow.DataType or None
        None where the width depends on the encoder (vectors, stored as fixed-size binary).
    unit : str
        Unit or range; "" where there is none.
    direction : str
        Which way is better or what high means; "" where there is no direction.
    meaning : str
    stage : str
        The stage that writes it.
    where : str
        "both" for decisions and shards, "decisions", "shards", or "stage" for columns that stay
        in the stage folders.
    """

    name: str
    type: pa.DataType | None
    unit: str
    direction: str
    meaning: str
    stage: str
    where: str = "stage"


_STDERR = "standard error over proxies"

_ALL = (
    Column("uid", pa.string(), "32 hex digits", "", "identity of the sample, fixed at ingest", "ingest", "both"),
    Column("key", pa.string(), "", "", "the source's own name for the sample", "ingest", "both"),
    Column("source_file", pa.string(), "", "", "file the sample came from, relative to the input", "ingest", "decisions"),
    Column("member", pa.string(), "", "", "image file beside a table, relative to it; null in tars", "ingest"),
    Column("offset", pa.int64(), "bytes", "", "where the image starts in its tar", "ingest"),
    Column("size_bytes", pa.int64(), "bytes", "", "length of the image file; null if unknown", "ingest"),
    Column("row_group", pa.int32(), "", "", "Parquet row group of the image", "ingest"),
    Column("row", pa.int32(), "", "", "row within its Parquet row group; where the source has vectors and no images, row of these", "ingest"),
    Column("caption", pa.string(), "", "", "the caption as it came, as valid UTF-8 without NUL", "ingest", "both"),
    Column("metadata", pa.string(), "JSON", "", "the source's other fields", "ingest"),
    Column("ingest_reason", pa.string(), "reason code", "", "what was wrong before any pixel was read", "ingest"),
    Column("removal_list", pa.string(), "", "", "the list of remove.lists that names the sample; null if none", "remove"),
    Column("removal_reason", pa.string(), "reason code", "", "reason by what the list names samples by: uid, URL or hash", "remove"),
    Column("width", pa.int32(), "px", "", "width of the original image", "embed", "both"),
    Column("height", pa.int32(), "px", "", "height of the original image", "embed", "both"),
    Column("image_contrast", pa.float32(), "[0, 127.5]", "higher: shows more", "standard deviation of the grey levels of the channel where it is largest; 0: one colour, nothing to see", "embed", "both"),
    Column("sha256", pa.string(), "64 hex digits", "", "hash of the image's bytes as stored in the source", "embed", "shards"),
    Column("decode_reason", pa.string(), "reason code", "", "why no pixels could be had", "embed"),
    Column("byte_list", pa.string(), "", "", "the list of remove.lists that holds the hash of the image's bytes; null if none", "embed"),
    Column("image_emb", None, "unit norm", "", "image vector, float16", "embed"),
    Column("text_emb", None, "unit norm", "", "caption vector, float16", "embed"),
    Column("clip_score", pa.float32(), "[-1, 1]", "higher: better match", "cosine of image_emb and text_emb; null if the two towers share no space", "embed", "both"),
    Column("thumbnail", pa.binary(), "WebP", "", "image with longest side at most 128 px; null where the source has none", "embed"),
    Column("nsfw_probability", pa.float32(), "[0, 1]", "higher: more likely unsafe", "probability that the picture is pornographic, by open_nsfw; null unless embed.plugins has nsfw", "embed", "both"),
    Column("text_area", pa.float32(), "[0, 1]", "higher: more text", "share of the picture that legible text covers; null unless embed.plugins has text", "embed", "both"),
    Column("text_overlap", pa.float32(), "[0, 1]", "higher: read off the picture", "share of the caption's letters and digits that stand in picture_text too; null unless embed.plugins has text", "embed", "both"),
    Column("picture_text", pa.string(), "", "", "text read in the picture, line by line; null unless embed.plugins has text", "embed", "decisions"),
    Column("caption_language", pa.string(), "ISO 639", "", "language of the caption, by fastText's lid.176; null where it has too few letters, and unless embed.plugins has language", "embed", "both"),
    Column("caption_language_probability", pa.float32(), "[0, 1]", "higher: surer", "probability of caption_language", "embed", "both"),
    Column("cluster_id", pa.string(), "32 hex digits", "", "smallest uid among the samples joined by duplicate edges", "dedup", "decisions"),
    Column("cluster_size", pa.int32(), "samples", "", "number of samples of this cluster_id", "dedup", "decisions"),
    Column("caption_agreement", pa.float32(), "[-1, 1]", "lower: contradicts", "mean cosine of text_emb to the captions of the cluster's other samples; null if there are none", "dedup", "decisions"),
    Column("earlier_uid", pa.string(), "32 hex digits", "", "the sample kept by an earlier run (dedup.against) that this one duplicates; null if none", "dedup", "decisions"),
    Column("earlier_cosine", pa.float32(), "[-1, 1]", "", "cosine of image_emb to it", "dedup", "decisions"),
    Column("contaminated_by", pa.string(), "", "", "evaluation image that the sample shows: its path, or source:key, of a .npy source:row; null if none", "decontaminate", "decisions"),
    Column("contamination_cosine", pa.float32(), "[-1, 1]", "", "cosine of image_emb to it", "decontaminate", "decisions"),
    Column("alignment_in", pa.float32(), "[-1, 1]", "higher: better match", "mean cosine of the pair under proxies trained with it", "score", "both"),
    Column("alignment_in_stderr", pa.float32(), "[0, 1]", "", _STDERR, "score", "decisions"),
    Column("alignment_out", pa.float32(), "[-1, 1]", "higher: better match", "mean cosine of the pair under proxies trained without it", "score", "both"),
    Column("alignment_out_stderr", pa.float32(), "[0, 1]", "", _STDERR, "score", "decisions"),
    Column("holdout_gap", pa.float32(), "[-2, 2]", "higher: learned only by rote", "alignment_in - alignment_out under proxies over frozen vectors", "score", "both"),
    Column("holdout_gap_stderr", pa.float32(), "[0, 2]", "", _STDERR, "score", "decisions"),
    Column("memorization_score", pa.float32(), "[-4.5, 4.5]", "higher: more memorized", "cross-modal coherence under in- minus out-proxies trained end to end (MultiMem, raw); null without them", "score", "both"),
    Column("memorization_score_stderr", pa.float32(), ">= 0", "", _STDERR, "score", "decisions"),
    Column("mismatch_probability", pa.float32(), "[0, 1]", "lower: better match", "probability that the caption does not belong to the image", "score", "both"),
    Column("mismatch_probability_stderr", pa.float32(), "[0, 1]", "", "standard error over cross-fitted detectors", "score", "decisions"),
    Column("rarity", pa.float32(), "[0, 1]", "higher: rarer", "rank of the mean distance to the 10th nearest neighbour outside the cluster, over both modalities", "score", "both"),
    Column("caption_information", pa.float32(), "[0, 1]", "higher: says more", "how far the caption narrows down pictures, right or wrong; 1: as the typical one or more, 0: fits all", "score", "both"),
    Column("memorization_kind", pa.string(), "none | beneficial | harmful", "", "none: generalised; beneficial: memorized, caption probably right; harmful: memorized, caption probably wrong; an outlier to both modalities counts by its caption too, for nothing tells it from the rare and right; null without memorization_score and its error", "score", "both"),
    Column("keep", pa.bool_(), "", "", "whether the sample is in shards/", "select", "decisions"),
    Column("reason", pa.string(), "reason code", "", "first rule that the sample failed; null if kept", "select", "decisions"),
    Column("failed_rules", pa.list_(pa.string()), "reason codes", "", "every rule that the sample failed", "select", "decisions"),
    Column("removed_by", pa.string(), "", "", "the list of remove.lists that the sample is on; null if none", "select", "decisions"),
    Column("weight", pa.float32(), ">= 0", "higher: train on it more", "sampling weight; 0 if dropped, mean 1 over the kept", "select", "both"),
    Column("representative_uid", pa.string(), "32 hex digits", "", "the kept sample that a dropped duplicate reaches", "select", "decisions"),
    Column("representative_cosine", pa.float32(), "[-1, 1]", "", "cosine of image_emb to the representative; 1 for equal bytes", "select", "decisions"),
    Column("duplicate_level", pa.string(), "bytes | perceptual | semantic", "", "how the sample duplicates its representative: equal bytes, pixels that match, a near vector alone", "select", "decisions"),
    Column("captions", pa.list_(pa.string()), "", "", "own caption first, then those of dropped duplicates that are not mismatched", "select", "shards"),
    Column("image", pa.binary(), "", "", "the image's original bytes; null where the source has vectors alone", "write", "shards"),
)  # fmt: skip

COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}

#: Reason code -> meaning, in the order in which rules are tried: a sample's `reason` is the first
#: that it failed.
REASONS: dict[str, str] = {
    "removed_by_uid": "a list of remove.lists holds its uid",
    "removed_by_url": "a list of remove.lists holds its URL",
    "removed_by_hash": "a list of remove.lists holds the hash of the downloaded file, or of the image's bytes",
    "image_missing": "the key or row has no image",
    "image_empty": "the image has zero bytes",
    "caption_missing": "the key or row has no caption, or it is empty or blank",
    "caption_invalid": "the caption is not valid UTF-8 or holds NUL characters",
    "duplicate_key": "the key already occurred in this source file",
    "duplicate_uid": "another sample already has the uid that the source gives",
    "url_refused": "the URL, or an address that it leads to, may not be reached (download.allow_addresses)",
    "robots_disallowed": "the server's X-Robots-Tag header says not to use the image",
    "failed_to_download": "the source's own table says that the download failed",
    "hash_mismatch": "the downloaded bytes have another hash than the list says",
    "failed_to_resize": "the source's own table says that the resize failed",
    "decode_error": "the image cannot be decoded",
    "too_many_pixels": "the image has more pixels than embed.max_pixels",
    "caption_too_short": "the caption has fewer characters than select.min_caption_chars",
    "caption_too_long": "the caption has more characters than select.max_caption_chars",
    "image_too_small": "the shorter side is under select.min_side_px",
    "aspect_too_extreme": "longer over shorter side is above select.max_aspect",
    "nsfw": "nsfw_probability is above select.max_nsfw_probability",
    "caption_in_picture": "the caption is read off the picture (select.max_text_overlap)",
    "caption_language": "the caption is in none of select.languages",
    "contaminated": "shows an image of decontaminate.inputs",
    "mismatched": "the caption does not belong to the image (select.max_mismatch_rate)",
    "caption_uninformative": "the caption would fit many pictures (select.min_caption_information)",
    "outside_threshold": "a column is outside select.thresholds",
    "outside_fraction": "ranks below select.keep_fraction",
    "duplicate_earlier": "an earlier run named by dedup.against kept a copy",
    "duplicate_bytes": "equal bytes to a kept sample",
    "duplicate_perceptual": "the pixels match those of a kept sample",
    "duplicate_semantic": "cosine to a kept sample reaches dedup.min_cosine, and pixels were not compared; where there are none it reaches dedup.min_cosine_alone",
    "caption_repeated": "more kept samples have this caption than select.max_caption_repeats",
}


def public_columns(where: str) -> tuple[str, ...]:
    """Names of the columns of `decisions` or `shards`, in order.

    Parameters
    ----------
    where : {"decisions", "shards"}
    """
    return tuple(c.name for c in _ALL if c.where in (where, "both"))


def select_schema(names: Iterable[str]) -> pa.Schema:
    """Arrow schema of the named columns.

    Raises
    ------
    KeyError
        If a name is not in `COLUMNS` or is a vector, whose width only its encoder knows.
    """
    fields = []
    for name in names:
        column = COLUMNS[name]
        if column.type is None:
            raise KeyError(f"{name} is a vector: its type depends on the encoder")
        fields.append(pa.field(name, column.type))
    return pa.schema(fields)


def describe_columns() -> dict[str, Any]:
    """Return columns and reason codes as plain values, for `curate columns --json`."""
    columns = [
        {
            "name": c.name,
            "type": "vector" if c.type is None else str(c.type),
            "unit": c.unit,
            "direction": c.direction,
            "meaning": c.meaning,
            "stage": c.stage,
            "where": c.where,
        }
        for c in _ALL
    ]
    return {"columns": columns, "reasons": REASONS}


def markdown_tables() -> str:
    """Return the README's tables of public columns and of reason codes."""
    lines = ["| column | type | range | in | meaning |", "|---|---|---|---|---|"]
    for column in _ALL:
        if column.where == "stage":
            continue
        where = "decisions, shards" if column.where == "both" else column.where
        unit = column.unit.replace("|", "\\|")
        meaning = f"{column.meaning}; {column.direction}" if column.direction else column.meaning
        lines.append(f"| `{column.name}` | {column.type} | {unit} | {where} | {meaning} |")
    lines += ["", "| reason | meaning |", "|---|---|"]
    lines += [f"| `{code}` | {meaning} |" for code, meaning in REASONS.items()]
    return "\n".join(lines)
