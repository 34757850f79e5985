"""Parquet that Hugging Face's `datasets` loads with images decoded, and the card beside it."""

import json
from typing import Any

import pyarrow as pa

from curate.formats.index import image_suffix
from curate.schema import COLUMNS, public_columns, select_schema

__all__ = ["METADATA", "SCHEMA", "card", "to_table"]

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
#: The columns of `shards`, the image first and as `datasets` stores one.
SCHEMA = pa.schema(
    [
        pa.field("image", _IMAGE),
        *select_schema(name for name in public_columns("shards") if name != "image"),
    ]
)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        # Releases before 4 know no other name for a list; later ones read this one too.
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}


#: What `datasets` reads from a file's footer.
METADATA = {
    "huggingface": json.dumps(
        {"info": {"features": {field.name: _feature(field.type) for field in SCHEMA}}}
    )
}


def to_table(table: pa.Table) -> pa.Table:
    """Bring rows of `shards` to `SCHEMA`; the path is a name that nothing lies under."""
    images = [
        None if data is None else {"bytes": data, "path": f"{uid}.{image_suffix(data)}"}
        for uid, data in zip(table["uid"].to_pylist(), table["image"].to_pylist(), strict=True)
    ]
    columns = [table[name] for name in SCHEMA.names[1:]]
    return pa.table([pa.array(images, _IMAGE), *columns], schema=SCHEMA)


def card(run: dict[str, Any], seed: int) -> str:
    """Return the dataset card: what `datasets` must know, and the run's numbers.

    Parameters
    ----------
    run : dict
        What `run.json` holds.
    seed : int
        Of the order.
    """
    counts = run["counts"]
    total = max(counts["ingested"], 1)
    rows = [("ingested", counts["ingested"]), ("kept", counts["kept"])]
    rows += [(f"dropped: {code}", number) for code, number in counts["dropped"].items()]
    numbers = [f"| {name} | {number} | {number / total:.1%} |" for name, number in rows]
    columns = [
        f"| `{name}` | {COLUMNS[name].unit.replace('|', chr(92) + '|')} | {COLUMNS[name].meaning} |"
        for name in SCHEMA.names
    ]
    lines = [
        "---", "configs:", "- config_name: default", "  data_files:", "  - split: train",
        "    path: data/train-*.parquet", "---", "",
        "# Image–text pairs, cleaned with `curate`", "",
        f"{counts['kept']} of {counts['ingested']} pairs, with their images' original bytes, in an "
        f"order drawn by seed {seed}.", "",
        "| samples | number | share |", "|---|---|---|", *numbers, "",
        *_judgement(run["facts"]),
        "| column | range | meaning |", "|---|---|---|", *columns, "",
        "```python", "from datasets import load_dataset", "",
        'samples = load_dataset("FOLDER", split="train")', "```", "",
        "## How it was made", "",
        f"Pipeline `{run['name']}`, versions "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items()) + ":", "",
        "```yaml", run["pipeline"].rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _judgement(facts: dict[str, Any]) -> list[str]:
    """What the run measured of its own errors, as far as it has judged."""
    lines = []
    recall = facts.get("dedup", {}).get("recall", {}).get("recall")
    if recall is not None:
        lines.append(f"- duplicate pairs found, of those that brute force finds: {recall:.2%}")
    share = facts.get("score", {}).get("mismatch", {}).get("share")
    if share is not None:
        lines.append(f"- estimated share of mismatched captions before: {share:.1%}")
    left = (facts.get("select", {}).get("mismatch") or {}).get("expected_rate")
    if left is not None:
        lines.append(f"- expected share of mismatched captions among these: {left:.1%}")
    return [*lines, ""] if lines else []
