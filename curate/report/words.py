"""What a run found, in words: for the terminal and for the page."""

import math
from typing import Any

from curate.report.text import clean_text, tell_share

__all__ = [
    "SPAN",
    "describe_facts",
    "describe_repeated",
    "describe_series",
    "describe_unlike",
    "stage_times",
]

_ODDITIES = {
    "truncated_files": "input files are cut off; what comes before the cut was read",
    "incomplete_shards": "img2dataset shards have no _stats.json: the download was not finished",
    "stats_disagree": "img2dataset shards hold something else than their _stats.json says",
    "unreadable_tables": "tables beside tars could not be read and were left out",
}

#: Above this estimated share real pairs are hardly told from planted ones.
_NEARLY_ALL = 0.9
#: Standard errors that a 95 % interval spans on either side.
SPAN = 1.96
#: Characters of a caption within a sentence.
_SHOWN_CHARS = 80


def stage_times(stages: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return name, wall seconds and samples of each stage, none more often than it was ingested.

    Parameters
    ----------
    stages : dict
        By table: a dict with `steps`, as `run.json` holds it.
    """
    by_stage: dict[str, tuple[float, float]] = {}
    ingested = _most_samples(stages["ingest"]) if "ingest" in stages else math.inf
    for table, facts in stages.items():
        stage = table.partition(".")[0]
        seconds = sum(step["wall_seconds"] for step in facts["steps"].values())
        samples = min(_most_samples(facts), ingested)  # a training counts every pass
        # Side tables of one stage are filled by the same pass: it is counted once.
        known = by_stage.get(stage, (0.0, 0.0))
        by_stage[stage] = (max(known[0], seconds), max(known[1], samples))
    return [(stage, seconds, samples) for stage, (seconds, samples) in by_stage.items()]


def _most_samples(facts: dict[str, Any]) -> float:
    return max((step.get("samples", 0) for step in facts["steps"].values()), default=0)


def _describe_input(facts: dict[str, Any]) -> list[str]:
    """Tell what was left out before ingest and what a download gave."""
    lines = []
    skipped = facts.get("ingest", {}).get("skipped_shards", [])
    if skipped:
        shown = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
        lines.append(f"Warning: {len(skipped)} incomplete shards were skipped: {shown}")
    got = facts.get("download")
    if got:
        why = [f"{text} ({count})" for text, count in list(got["failed_at_first"].items())[:3]]
        mostly = f"; failed at first: {', '.join(why)}" if why else ""
        lines.append(f"Downloaded {got['images']} of {got['urls']} URLs{mostly}")
    return lines


def describe_repeated(caption: str, share: float) -> str:
    """Return a warning of a caption that a share of the samples has."""
    return f"{share:.1%} of captions are one and the same: “{_cut(caption)}”"


def describe_unlike(number: int, share: float, example: str, most: int) -> str:
    """Return a warning of captions that say too little, as unlike pictures share them.

    Parameters
    ----------
    number : int
        Captions.
    share : float
        Of the samples that have one of them.
    example : str
    most : int
        `select.max_caption_repeats` that would cap them.
    """
    many = f"{number:,} captions are" if number > 1 else "1 caption is"
    return (
        f"{many} shared by pictures that do not look alike ({share:.1%} of samples), as "
        f"“{_cut(example)}”; --set select.max_caption_repeats={most} keeps at most {most} of each"
    )


def describe_series(number: int, share: float, title: str, example: str) -> str:
    """Return a warning of titles that unlike pictures share while what stands behind them differs.

    Parameters
    ----------
    number : int
        Titles.
    share : float
        Of the samples that have one of them.
    title, example : str
        One, and a caption that has it.
    """
    many = f"{number:,} titles are" if number > 1 else "1 title is"
    return (
        f"{many} shared by pictures that do not look alike, before words that differ "
        f"({share:.1%} of samples), as “{_cut(title)}” in “{_cut(example)}”; where it is wrong, "
        "name the samples in remove.lists"
    )


def _cut(caption: str) -> str:
    return caption if len(caption) <= _SHOWN_CHARS else f"{caption[:_SHOWN_CHARS]} …"


def describe_facts(facts: dict[str, Any], scanned: dict[str, float]) -> list[str]:
    """Return a sentence for each figure; those to act on begin with "Warning: ".

    Parameters
    ----------
    facts : dict
        By stage, as `run.json` holds them.
    scanned : dict
        Counts of the step `ingest.scan`.
    """
    lines = []
    for name, meaning in _ODDITIES.items():
        if scanned.get(name):
            lines.append(f"Warning: {scanned[name]:.0f} {meaning}")
    lines += _describe_input(facts)
    recall = facts.get("dedup", {}).get("recall", {})
    if recall.get("recall") is not None:
        within = ""
        if recall.get("interval"):
            low, high = recall["interval"]
            within = f"{low:.2%} to {high:.2%} by "
        lines.append(
            f"Duplicate pairs found, of those that brute force finds: {recall['recall']:.2%} "
            f"({within}{recall['rows']} samples)"
        )
        if not recall.get("reached", True):
            lines.append(
                "Warning: of duplicate pairs fewer were found than dedup.target_recall asks; raise "
                "dedup.max_probes"
            )
    detector = facts.get("score", {}).get("mismatch", {})
    if detector.get("share") is not None:
        lines.append(
            f"Estimated share of mismatched captions: {tell_share(detector['share'])} "
            f"(± {tell_share(SPAN * detector['share_stderr'])})"
        )
    if (detector.get("share") or 0) > _NEARLY_ALL:
        lines.append(
            "Warning: captions look as if drawn at random: either nearly all are wrong, or the "
            "encoder cannot tell these pictures or captions apart"
        )
    selected = facts.get("select", {})
    mismatch = selected.get("mismatch")
    if mismatch and mismatch["expected_rate"] is not None:
        lines.append(f"Expected among the kept: {tell_share(mismatch['expected_rate'])}")
    if mismatch and mismatch.get("phantoms_caught"):
        lines.append(_describe_calibration(mismatch))
    if mismatch and mismatch["max_probability"] < 0 and selected["failed"]["mismatched"]:
        lines.append(
            "Warning: no sample is sure enough for select.max_mismatch_rate: all that have a score "
            "were dropped"
        )
    if mismatch and mismatch["unscored"]:
        told = f"Warning: {mismatch['unscored']} samples have no score and were not judged"
        judge = facts.get("score", {})
        if not judge.get("scored", True):
            told += f": {judge['usable']} usable samples are fewer than score.min_samples"
        lines.append(told)
    lines += [
        f"Warning: {clean_text(line)}" for line in facts.get("report", {}).get("warnings", [])
    ]
    return lines


def _describe_calibration(mismatch: dict[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    caught = mismatch["phantoms_caught"]
    return (
        f"At this threshold {share(caught['random'])} of captions planted at random are caught and "
        f"{share(caught['near_image'])} of look-alikes' captions; it drops "
        f"{share(mismatch['rare_dropped'])} of rare and {share(mismatch['common_dropped'])} of "
        "common samples"
    )
