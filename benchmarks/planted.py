"""Judge a finished run against planted truth: `python -m benchmarks.planted OUT TRUTH`.

Prints one JSON line: how many planted faults were found, and how many clean pairs were dropped.
"""

import json
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq

from curate.memorization.rarity import RARE

__all__ = ["judge"]

_TWINS = ("exact_twin", "near_twin")
_DUPLICATES = ("duplicate_bytes", "duplicate_perceptual", "duplicate_semantic")


def judge(out: str, truth: str) -> dict[str, Any]:
    """Compare decisions with planted truth.

    Parameters
    ----------
    out : str
        OUT of a finished run.
    truth : str
        `truth.parquet` as `benchmarks.corpora` writes it.

    Returns
    -------
    dict
        `exact_found`, `near_found`: share of planted twins in one cluster with their original.
        `duplicates_right`: share of the samples dropped as duplicates whose representative is of
        the same planted group. `swaps_dropped`: share of swapped captions that are not kept.
        `clean_dropped`: share of clean pairs dropped for anything but being a duplicate.
        `undecodable_accounted`: share of undecodable and truncated images with `decode_error`;
        `memorized`: where there is a `memorization_kind`, shares of the kinds and mean score among
        swaps, rare and common clean pairs.
    """
    rows = {row["key"]: row for row in pq.read_table(Path(out) / "decisions").to_pylist()}
    planted = {row["key"]: row for row in pq.read_table(truth).to_pylist()}
    keys = {row["uid"]: key for key, row in rows.items()}

    def group(key: str) -> str:
        return str(planted[key]["of_key"] if planted[key]["kind"] in _TWINS else key)

    def share(chosen: list[bool]) -> float | None:
        return round(sum(chosen) / len(chosen), 4) if chosen else None

    def of_kind(*kinds: str) -> list[str]:
        return [key for key in planted if planted[key]["kind"] in kinds]

    found = {
        kind: share([rows[k]["cluster_id"] == rows[group(k)]["cluster_id"] for k in of_kind(kind)])
        for kind in _TWINS
    }
    dropped = [key for key in planted if rows[key]["reason"] in _DUPLICATES]
    wrong = [k for k in dropped if group(k) != group(keys[rows[k]["representative_uid"]])]
    clean = [k for k in of_kind("clean") if rows[k]["reason"] not in _DUPLICATES]
    return {
        "samples": len(planted),
        "accounted": set(rows) == set(planted),
        "exact_found": found["exact_twin"],
        "near_found": found["near_twin"],
        "duplicates_dropped": len(dropped),
        "duplicates_right": share([key not in wrong for key in dropped]),
        "duplicates_wrong": [
            [planted[k]["source"], planted[keys[rows[k]["representative_uid"]]]["source"]]
            for k in wrong[:10]
        ],
        "swaps_dropped": share([not rows[k]["keep"] for k in of_kind("swap")]),
        "clean_dropped": share([not rows[k]["keep"] for k in clean]),
        "undecodable_accounted": share(
            [rows[k]["reason"] == "decode_error" for k in of_kind("undecodable", "truncated")]
        ),
        "memorized": _memorized(rows, of_kind("swap"), of_kind("clean")),
    }


def _memorized(
    rows: dict[str, Any], swaps: list[str], clean: list[str]
) -> dict[str, dict[str, float]] | None:
    """Shares of each `memorization_kind`, and mean score, by what a pair is."""
    judged = {key for key in rows if rows[key]["memorization_kind"] is not None}
    parts = {
        "swaps": [key for key in swaps if key in judged],
        "rare": [key for key in clean if key in judged and rows[key]["rarity"] >= RARE],
        "common": [key for key in clean if key in judged and rows[key]["rarity"] < RARE],
    }
    if not all(parts.values()):
        return None
    return {
        part: {
            "pairs": len(keys),
            "score": round(sum(rows[k]["memorization_score"] for k in keys) / len(keys), 4),
            **{
                kind: round(sum(rows[k]["memorization_kind"] == kind for k in keys) / len(keys), 4)
                for kind in ("none", "beneficial", "harmful")
            },
        }
        for part, keys in parts.items()
    }


@click.command()
@click.argument("out")
@click.argument("truth")
def main(out: str, truth: str) -> None:
    """Print one JSON line about the run in OUT, whose planted truth is TRUTH."""
    click.echo(json.dumps(judge(out, truth)))


if __name__ == "__main__":
    main()
