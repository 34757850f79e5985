"""What an ablation found, in sentences."""

from typing import Any

__all__ = ["describe_ablation", "tell_pool", "tell_recommendation"]


def describe_ablation(report: dict[str, Any], page: str) -> str:
    """Return what is printed after an ablation.

    Parameters
    ----------
    report : dict
        What `ablate.ablating.ablate` returns.
    page : str
        Location of the page.
    """
    width = max(len(row["name"]) for row in report["lines"])
    lines = [
        f"{tell_pool(report)}; students: {report['model']}, {report['plan']['steps']} steps of "
        f"{report['plan']['batch']}",
        "",
        f"{'':<{width}}  dropped  seeds   R@10  gain over the loosest",
    ]
    for row in report["lines"]:
        one = row["figures"]["all"]
        more = "".join(
            f"  {part} {row['figures'][part]['gain']:+.4f}"
            for part in ("rare", "rest", "zero_shot")
            if part in row["figures"]
        )
        lines.append(
            f"{row['name']:<{width}}  {row['share_dropped']:7.1%}  {row['seeds']:>5}  "
            f"{one['mean']:.4f}  {one['gain']:+.4f} ± {one['stderr']:.4f}{more}"
            + ("  stopped: clearly behind" if row["stopped"] else "")
        )
    lines += ["", *tell_recommendation(report)]
    lines += [f"Warning: {line}" for line in report["warnings"]]
    return "\n".join([*lines, f"Page: {page}"])


def tell_pool(report: dict[str, Any]) -> str:
    """Say how many samples there are, and how many judge."""
    judged = f"{report['pool']:,} samples, of which {report['held_out']:,} held-out pairs judge"
    return judged + (" each seed, others for each" if report["apart"] else "")


def tell_recommendation(report: dict[str, Any]) -> list[str]:
    """Return the recommended options, and how sure they are, a sentence each."""
    found = report["recommended"]
    options = found["options"] or "(as the run is)"
    lines = [f"Recommended: {options}"]
    if found["training"]:
        lines.append(f"While training: {found['training']}, by curate.load and curate.mitigation.")
    compared = found["comparisons"]
    others = f"the {compared} others" if compared > 1 else "the other"
    if not found["is_better"]:
        rival = found["rival"]
        told = "No setting is better than the loosest beyond noise: it is recommended."
        lines.append(told)
        lines.append(
            f"The best of {others}, {rival['name']}, has a held-out R@10 higher by "
            f"{rival['mean']:+.4f} ({_interval(rival, compared)}). A gain would have to be about "
            f"{rival['needed']:.4f} to be told from noise here; with more held-out pairs or more "
            "--seeds, less."
        )
        return lines
    gain, share = found["gain"], found["share_dropped"]
    told = (
        f"It drops {share:.1%} of what the loosest setting keeps and raises held-out R@10 by "
        f"{gain['mean']:+.4f} ({_interval(gain, compared)})"
    )
    best = found["best"]
    if best == found["name"]:
        told += "; no looser setting comes within one standard error of it."
    else:
        told += (
            f"; it is the loosest within one standard error of the best, {best}, which is better "
            "beyond noise."
        )
    lines.append(told)
    for kind, one in found["versus"].items():
        verb = "is better than" if one["low"] > 0 else (
            "is worse than" if one["high"] < 0 else "cannot be told from"
        )  # fmt: skip
        what = {"random": "a random set", "cosine": "a cosine filter"}[kind]
        lines.append(
            f"It {verb} {what} of the same size: {one['mean']:+.4f} ({_interval(one, compared)})."
        )
    return lines


def _interval(one: dict[str, float], compared: int) -> str:
    told = f"95 %: {one['low']:+.4f} to {one['high']:+.4f}"
    return f"{told}, as the best of {compared}" if compared > 1 else told
