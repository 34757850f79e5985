"""What an ablation found, in sentences."""

from typing import Any

from curate.report.words import SPAN

__all__ = ["describe_ablation", "tell_recommendation"]


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
        f"{report['pool']} samples, of which {report['held_out']} held-out pairs judge; students: "
        f"{report['model']}, {report['plan']['steps']} steps of {report['plan']['batch']}",
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


def tell_recommendation(report: dict[str, Any]) -> list[str]:
    """Return the recommended options, and how sure they are, a sentence each."""
    found = report["recommended"]
    options = found["options"] or "(as the run is)"
    lines = [f"Recommended: {options}"]
    if found["training"]:
        lines.append(f"While training: {found['training']}, by curate.load and curate.mitigation.")
    if not found["is_better"]:
        told = "No setting is better than the loosest beyond noise: it is recommended."
        return [*lines, told]
    gain, share = found["gain"], found["share_dropped"]
    low, high = (gain["mean"] + sign * SPAN * gain["stderr"] for sign in (-1, 1))
    told = (
        f"It drops {share:.1%} of what the loosest setting keeps and raises held-out R@10 by "
        f"{gain['mean']:+.4f} (95 %: {low:+.4f} to {high:+.4f})"
    )
    best = found["best"]
    if best == found["name"]:
        told += "; no looser setting comes within one standard error of it."
    else:
        told += f"; it is the loosest within one standard error of the best, {best}."
    lines.append(told)
    for kind, one in found["versus"].items():
        verb = "is better than" if one["mean"] > SPAN * one["stderr"] else (
            "is worse than" if one["mean"] < -SPAN * one["stderr"] else "cannot be told from"
        )  # fmt: skip
        what = {"random": "a random set", "cosine": "a cosine filter"}[kind]
        lines.append(
            f"It {verb} {what} of the same size: {one['mean']:+.4f} ± {one['stderr']:.4f}."
        )
    return lines
